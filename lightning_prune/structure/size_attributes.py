"""Sizes that modules keep in integer attributes (``num_heads``, ``head_dim``) and compute with.

They are named like tensors, ``blocks.0.attn.num_heads``, and are cut like a tensor with one axis of that length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import nn

from lightning_prune.structure.graph import Group, Member
from lightning_prune.structure.layers import canonical, updates_widths

__all__ = ["SizeAttribute", "candidates", "modules_with_heads", "size_attributes", "unread"]

#: Names of sizes of attention that its `forward` need not read.
_HEADS = frozenset({"heads", "n_head", "n_heads", "nhead", "num_attention_heads", "num_heads", "num_key_value_heads"})
_FEATURES_OF_HEADS = frozenset({"all_head_size", "attn_dim", "inner_dim"})


@dataclass(frozen=True)
class SizeAttribute:
    """An integer attribute of a module."""

    module: nn.Module
    attribute: str

    @property
    def value(self) -> int:
        """Its value."""
        value: int = vars(self.module)[self.attribute]
        return value


def size_attributes(model: nn.Module, names: Iterable[str]) -> dict[str, SizeAttribute]:
    """The integer attributes among these names: the canonical name of a module, a dot, and the attribute's own."""
    owned: dict[str, list[str]] = {}
    for name in names:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    if not owned:
        return {}
    modules = {canonical(name): module for name, module in model.named_modules(remove_duplicate=False)}
    places = (
        (name, SizeAttribute(modules[owner], name.rpartition(".")[2]))
        for owner, inside in owned.items()
        if owner in modules
        for name in inside
    )
    return {name: place for name, place in places if type(vars(place.module).get(place.attribute)) is int}


def modules_with_heads(model: nn.Module) -> list[str]:
    """Names of the modules with a number of attention heads in an attribute."""
    return [
        canonical(name)
        for name, module in model.named_modules(remove_duplicate=False)
        if any(type(vars(module).get(own)) is int for own in _HEADS) and not updates_widths(module)
    ]


def candidates(model: nn.Module, group: Group) -> dict[str, tuple[Member, ...]]:
    """Attributes that may hold the width of a group or a multiple of it, by module.

    They are those of the group's layers, of the deepest module around all of them, and of the modules in between, but
    not those that follow from a layer's tensors.

    Args:
        model: The network.
        group: The group.

    Returns:
        The positions of each unit on each attribute, by name of the module.
    """
    paths = [layer.split(".") for layer in {member.layer for member in group.members}]
    common = 0
    while all(len(path) > common and path[common] == paths[0][common] for path in paths):
        common += 1
    around = {".".join(path[:depth]) for path in paths for depth in range(common, len(path) + 1)}
    per_unit = {divisor for member in group.members for divisor in _divisors(member.index.shape[1])}
    found = {}
    for name, module in ((canonical(name), module) for name, module in model.named_modules()):
        if name not in around or updates_widths(module):
            continue
        members = tuple(
            _member(f"{name}.{own}" if name else own, group.width, value // group.width)
            for own, value in vars(module).items()
            if type(value) is int and value > 1 and value % group.width == 0 and value // group.width in per_unit
        )
        if members:
            found[name] = members
    return found


def _divisors(n: int) -> set[int]:
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return {*small, *(n // k for k in small)}


def _member(name: str, width: int, times: int) -> Member:
    return Member(name, 0, "along", np.arange(width * times, dtype=np.int64).reshape(width, times))


def unread(group: Group, found: Iterable[Member]) -> tuple[Member, ...]:
    """Those that, by their names, follow a group of whole heads, even if the network computes with none of them."""
    if max(m.index.shape[1] for m in group.members) == 1:
        return ()

    def follows(size: Member) -> bool:
        own, times = size.tensor.rpartition(".")[2], size.index.shape[1]
        return own in _HEADS or (own in _FEATURES_OF_HEADS and times > 1)

    return tuple(filter(follows, found))
