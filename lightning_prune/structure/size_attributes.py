"""Sizes that modules keep in integer attributes (``num_heads``, ``head_dim``) or lists of them, and compute with.

Sizes are named like tensors, ``blocks.0.attn.num_heads``, ``conv.splits[1]``, ``rearrange.axes_lengths[h]`` (layers of
einops) or ``attn.config[num_heads]`` (configurations), and are cut like a tensor with one axis of that length. A float
attribute ``scale`` of 1/√n, where n is the width of attention heads, counts as a size of n.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from lightning_prune.structure.feature_parts import Part, part_in
from lightning_prune.structure.graph import Group, Member
from lightning_prune.structure.layers import canonical, updates_widths
from lightning_prune.structure.module_configs import integers_of, names_read, with_integer

__all__ = ["SizeAttribute", "candidates", "modules_with_heads", "size_attributes", "stored_scales", "unread"]

#: Names of sizes of attention that its `forward` need not read.
_HEADS = frozenset({"heads", "n_head", "n_heads", "nhead", "num_attention_heads", "num_heads", "num_key_value_heads"})
_FEATURES_OF_HEADS = frozenset({"all_head_size", "attn_dim", "inner_dim"})
_FEATURES = frozenset({"attention_head_size", "d_head", "dim_head", "head_dim", "head_size", "key_value_proj_dim"})
_SCALES = ("scale", "scaling")


@dataclass(frozen=True)
class SizeAttribute:
    """An integer attribute of a module, an integer in a list, dict or configuration, or a float that is 1/√n of one.

    Attributes:
        module: The module.
        attribute: Name of the attribute.
        position: Position in the list or tuple, key in the dict, or name in the configuration; None for a number.
    """

    module: nn.Module
    attribute: str
    position: int | str | None = None

    @property
    def content(self) -> Any:
        """Content of the attribute: the number, the list, the dict or the configuration."""
        return vars(self.module)[self.attribute]

    @property
    def value(self) -> int:
        """The integer."""
        found = (value for _, position, value in _integers(self.attribute, self.content) if position == self.position)
        return next(found, None) or round(self.content**-2)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the module that hold the integer, by name."""
        return {name: vars(self.module)[name] for name in self.with_value(self.value)}

    def with_value(self, value: int) -> dict[str, Any]:
        """These attributes with another integer."""
        whole = self.content
        if self.position is None:
            return {self.attribute: value**-0.5 if isinstance(whole, float) else value}
        if isinstance(whole, (list, tuple)):
            parts = [value if n == self.position else part for n, part in enumerate(whole)]
            return {self.attribute: type(whole)(parts)}
        if isinstance(self.position, str) and not isinstance(whole, dict):
            return {self.attribute: with_integer(whole, self.position, value)}
        lengths = {**whole, self.position: value}  # of einops, which computes with the pairs, and is copied by the dict
        return {self.attribute: lengths, f"_{self.attribute}": tuple(lengths.items())}


def _is_of_einops(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "einops" and "axes_lengths" in vars(module)


def _integers(own: str, content: object) -> Iterator[tuple[str, int | str | None, int]]:
    """Name, position and value of the integers in an attribute."""
    if type(content) is int:
        yield own, None, content
    elif type(content) is dict:
        yield from ((f"{own}[{key}]", key, part) for key, part in content.items() if type(part) is int)
    elif isinstance(content, (list, tuple)) and not hasattr(content, "_fields"):
        yield from ((f"{own}[{n}]", n, part) for n, part in enumerate(content) if type(part) is int)
    else:
        yield from ((f"{own}[{name}]", name, number) for name, number in integers_of(own, content).items())


def _is_scale(own: str, content: object) -> bool:
    """Whether an attribute is a scale 1/√n of attention heads of width n."""
    if type(content) is not float or not any(word in own for word in _SCALES) or not 0 < content <= 1:
        return False
    return math.isclose(content, round(content**-2) ** -0.5, rel_tol=1e-9)


def stored_scales(
    model: nn.Module, features: Group, names: Iterable[str], parts: Sequence[Part] = ()
) -> tuple[Member, ...]:
    """Attributes with the scale 1/√width of heads, which another way to compute their attention reads.

    Args:
        model: The network.
        features: The group of the features of heads.
        names: Modules whose attention computes its scale from the width.
        parts: The features of a head that the units are, where there are others.
    """
    widths = {part.total for part in parts} or {features.width}
    modules = {canonical(name): module for name, module in model.named_modules()}
    sizes = (
        _counting(name, own, round(content**-2), features, parts)
        for name in names
        for own, content in vars(modules[name]).items()
        if _is_scale(own, content) and round(content**-2) in widths
    )
    return tuple(size for size in sizes if size is not None)


def size_attributes(model: nn.Module, names: Iterable[str]) -> dict[str, SizeAttribute]:
    """The integers among these names: the canonical name of a module, a dot, and the attribute's own."""
    owned: dict[str, list[str]] = {}
    for name in names:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    if not owned:
        return {}
    modules = {canonical(name): module for name, module in model.named_modules(remove_duplicate=False)}
    found = {}
    for owner, module in ((owner, modules[owner]) for owner in owned if owner in modules):
        for name in owned[owner]:
            attribute = name.rpartition(".")[2].partition("[")[0]
            content = vars(module).get(attribute)
            if _is_scale(attribute, content):
                found[name] = SizeAttribute(module, attribute)
            for full, position, _ in _integers(attribute, content):
                if f"{owner}.{full}" == name or (not owner and full == name):
                    found[name] = SizeAttribute(module, attribute, position)
    return found


def modules_with_heads(model: nn.Module) -> list[str]:
    """Names of the modules with a number of attention heads in an attribute."""
    return [
        canonical(name)
        for name, module in model.named_modules(remove_duplicate=False)
        if any(type(vars(module).get(own)) is int for own in _HEADS) and not updates_widths(module)
    ]


def candidates(model: nn.Module, group: Group, parts: Sequence[Part] = ()) -> dict[str, tuple[Member, ...]]:
    """Attributes that may hold the width of a group or a multiple of it, by module.

    They are those of the group's layers, of the deepest module around all of them (not a layer itself), and of the
    modules in between, but not those that follow from a layer's tensors. Layers of einops are part of the module that
    they are in.

    Args:
        model: The network.
        group: The group.
        parts: The features of a head that its units are, where there are others.

    Returns:
        The positions of each unit on each attribute, by name of the module.
    """
    paths = [layer.split(".") for layer in {member.layer for member in group.members}]
    around_all = len(group.around.split(".")) if group.around else 0
    shared = min([around_all, *(len(path) - 1 for path in paths)])  # a group of one layer is in the module with it
    around = {".".join(path[:depth]) for path in paths for depth in range(shared, len(path) + 1)}
    per_unit = {divisor for member in group.members for divisor in _divisors(member.index.shape[1])}
    found = {}
    for name, module in ((canonical(name), module) for name, module in model.named_modules()):
        if name not in around and not (_is_of_einops(module) and name.rpartition(".")[0] in around):
            continue
        members = (
            _counting(name, own, value, group, parts)
            for attribute, content in _own_sizes(module).items()
            for unread in [integers_of(attribute, content).keys() - names_read(module)]
            for own, position, value in _integers(attribute, content)
            if position not in unread
        )
        fitting = tuple(member for member in members if member is not None and member.index.shape[1] in per_unit)
        if fitting:
            found[name] = fitting
    return found


def _counting(module: str, own: str, value: int, group: Group, parts: Sequence[Part]) -> Member | None:
    """An attribute that may count the units of a group, or all features of heads of which these are a part."""
    name, part = f"{module}.{own}" if module else own, part_in(parts, module, value)
    if value <= 1:
        return None
    if part is not None:
        return Member(name, 0, "along", part.positions(value), value)
    return _member(name, group.width, value // group.width) if value % group.width == 0 else None


def _own_sizes(module: nn.Module) -> dict[str, object]:
    """Attributes of a module that do not follow from its tensors."""
    if isinstance(module, nn.MultiheadAttention):
        return {"head_dim": vars(module).get("head_dim")}
    if _is_of_einops(module):
        return {"axes_lengths": vars(module)["axes_lengths"]}
    # A whole network keeps its configuration, which is saved with it.
    kept = {"config"} if hasattr(module, "save_pretrained") else set[str]()
    own = {name: one for name, one in vars(module).items() if not isinstance(one, dict) and name not in kept}
    return {} if updates_widths(module) else own


def _divisors(n: int) -> set[int]:
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return {*small, *(n // k for k in small)}


def _member(name: str, width: int, times: int) -> Member:
    return Member(name, 0, "along", np.arange(width * times, dtype=np.int64).reshape(width, times))


def unread(group: Group, found: Iterable[Member], *, features: bool = False) -> tuple[Member, ...]:
    """Those that, by their names, follow a group of whole heads, even if the network computes with none of them.

    Args:
        group: The group.
        found: Sizes that may follow it.
        features: Whether the units are features of all heads.
    """
    if max(m.index.shape[1] for m in group.members) == 1:
        return ()

    def follows(size: Member) -> bool:
        own, times = size.tensor.rpartition(".")[2], size.index.shape[1]
        single = own in _FEATURES and times == 1 if features else own in _HEADS
        return single or (own in _FEATURES_OF_HEADS and times > 1)

    return tuple(filter(follows, found))
