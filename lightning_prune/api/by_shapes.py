"""Loading weights of a narrow network that come without a pruning history, where their shapes tell all."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.api.inspecting import traced_model_for
from lightning_prune.api.portable import require_real, tensors_of
from lightning_prune.errors import listed
from lightning_prune.structure import Structure, trace
from lightning_prune.structure.graph import Axes, Group, Member
from lightning_prune.structure.layers import is_within
from lightning_prune.structure.size_attributes import modules_with_heads
from lightning_prune.structure.traced_model import require_network, written
from lightning_prune.surgery import HistoryError, history_of
from lightning_prune.surgery.compiled import reset_compiled
from lightning_prune.surgery.restore import load_narrow
from lightning_prune.surgery.tensors import canonical, named, non_persistent

__all__ = ["load_by_shapes"]

Module = TypeVar("Module", bound=nn.Module)

#: First bytes of what `torch.save` writes.
_ZIP = b"PK\x03\x04"


def load_by_shapes(model: Module, weights: str | Path | Mapping[str, Tensor], example: Any = None) -> Module:
    """Load a plain ``state_dict`` of a narrow network into a newly built dense one, in place, by the shapes in it.

    For weights that come without the history that `save` stores: from ``torch.save(model.state_dict())``, after
    `strip`, or from another library. Each layer gets the widths of its tensors. That is the pruned network if nothing
    but widths has changed. Groups stay as many as they are, but for depthwise convolutions and instance norms. Numbers
    that modules hold, such as that of attention heads, follow only if an example is given; where shapes allow for fewer
    heads and for fewer features of each (``#head_dim``), heads are taken, with a warning. The loaded network has no
    history: amounts of further pruning refer to its present size.

    Args:
        model: The network as it was built before it was pruned.
        weights: A safetensors file, a file of ``torch.save`` (read with ``weights_only=True``), or the tensors by name.
        example: A batch of inputs, as for `prune`. The dense network is traced with it, to find what follows the
            widths; required if an attention may have lost heads.

    Returns:
        The network, in the mode it was in.

    Raises:
        HistoryError: If the names are not those of the network, a tensor is larger than the network's, or shapes do
            not tell all: layers were removed, an attention may have lost heads and no example is given, or a buffer
            that is not in the ``state_dict`` may have been cut. The network is unchanged.

    Example:
        >>> import torch
        >>> from lightning_prune import load_by_shapes, prune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = prune(net, torch.zeros(2, 4), pruning_ratio=0.5)
        >>> again = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> load_by_shapes(again, net.state_dict())
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    require_network(model)
    network = written(model)
    require_real(network, "load_by_shapes")
    if history_of(network) is not None:
        raise ValueError(
            f"load_by_shapes: expected a newly built dense {type(network).__name__}, got one that was pruned. Build it "
            "again. Weights of its own widths are loaded by `load_state_dict`."
        )
    found = _tensors(weights if isinstance(weights, Mapping) else _read(Path(weights)))
    narrow = {canonical(name): weight for name, weight in found.items()}
    here = {canonical(name): tensor for name, tensor in network.state_dict().items()}
    axes: Axes = {}
    for name in narrow.keys() & here.keys():
        pairs = zip(narrow[name].shape, here[name].shape, strict=False)
        axes[name] = {dim: np.arange(now) for dim, (now, dense) in enumerate(pairs) if now != dense}
    axes = {name: kept for name, kept in axes.items() if kept}
    problems = [*_problems(narrow, here), *_unsaved(network, axes, here)]
    if not problems and example is not None:
        axes |= _sizes(trace(traced_model_for(network, example)), axes, non_persistent(network))
    elif not problems:
        problems = list(_heads(network, axes))
    if problems:
        raise HistoryError(
            f"expected the weights of this {type(network).__name__}, of which shapes tell how narrow it is: "
            f"{listed(problems, 3)}. Nothing has changed. Use `save` where it was pruned, and `load`."
        )
    reset_compiled(network)
    load_narrow(network, axes, narrow)
    return model


def _heads(network: nn.Module, axes: Axes) -> Iterator[str]:
    """Modules that may have fewer attention heads, a number that no shape tells."""
    cut = [name.rpartition(".")[0] for name, kept in axes.items() if 0 in kept]
    for name in modules_with_heads(network):
        if any(is_within(layer, [name]) for layer in cut):
            yield f"{name} may have lost attention heads, which no shape tells: give an `example`, too"


def _sizes(structure: Structure, axes: Axes, unsaved: Collection[str]) -> Axes:
    """Sizes in attributes that follow the widths of these axes.

    Args:
        structure: Structure of the dense network.
        axes: Axes that became shorter.
        unsaved: Buffers that no `state_dict` holds.
    """
    counted: dict[str, int] = {}
    assumed: list[str] = []
    for group in (group for group in structure.groups if not group.within):
        inner = [one for one in structure.groups if group.name in one.within]
        if not any(one.sizes for one in (group, *inner)):
            continue
        ways = _ways(structure, group, inner, axes)
        dense = {one.name: one.width for one in inner}
        chosen = next((way for way in ways if way.items() >= dense.items() or way[group.name] == group.width), None)
        if chosen is None or any(counted.get(name, number) != number for name, number in chosen.items()):
            raise HistoryError(
                f"expected weights with whole heads or units of {group.name!r}, got an axis of "
                f"{_length(_whole(group, structure), structure, axes)} positions. Nothing has changed. The weights are "
                "of another network, or heads and their features were pruned: use `save` where it was pruned, and "
                "`load`."
            )
        if len(ways) > 1:
            features = ", ".join(f"{chosen[one.name]} of {one.width} of {one.name}" for one in inner)
            assumed.append(f"{chosen[group.name]} of {group.width} heads of {group.name} and {features}")
        counted |= chosen
    fewer = [one for one in structure.groups if counted.get(one.name, one.width) < one.width]
    for group in fewer:
        for name in sorted({member.tensor for member in group.members} & set(unsaved)):
            raise HistoryError(
                f"expected weights whose shapes tell what was kept, but {name} {list(structure.cost.shapes[name])} is "
                "in no `state_dict`, and which of it was kept is not known. Nothing has changed. Use `save` where it "
                "was pruned, and `load`."
            )
    if assumed:
        warnings.warn(
            f"load_by_shapes: shapes do not tell heads from their features (`#head_dim`), and whole heads are taken to "
            f"be removed where they can be: left are {listed(assumed)}. If that is wrong, use `save` where the network "
            "was pruned, and `load`.",
            stacklevel=3,
        )
    return _left(fewer, counted)


def _left(groups: Iterable[Group], counted: Mapping[str, int]) -> Axes:
    """The sizes that count the units of these groups, when so many are left."""
    left: dict[str, int] = {}
    for group in groups:
        for size in group.sizes:  # that of a norm without weights may count the units of several groups
            lost = (group.width - counted[group.name]) * size.index.shape[1]
            left[size.tensor] = left.get(size.tensor, size.length or size.index.size) - lost
    return {name: {0: np.arange(number)} for name, number in left.items()}


def _ways(structure: Structure, group: Group, inner: Sequence[Group], axes: Axes) -> list[dict[str, int]]:
    """Numbers of units of a group, and of the features of its heads, that shapes allow for; the fewest heads first."""
    own = _whole(group, structure)
    if not inner:
        units, rest = divmod(_length(own, structure, axes), own.index.shape[1])
        return [] if rest else [{group.name: units}]
    among = {(member.tensor, member.dim) for member in group.members}
    if any(size.length for one in inner for size in one.sizes):  # no shape tells the features of several groups apart
        units, rest = divmod(_length(own, structure, axes), own.index.shape[1])
        return [] if rest else [{group.name: units, **{one.name: one.width for one in inner}}]
    wholes = [(one, _whole(one, structure, among)) for one in inner]
    lengths = [(one, _length(m, structure, axes), m.index.shape[1] // group.width) for one, m in wholes]
    return [
        {group.name: heads, **{one.name: now // (heads * per) for one, now, per in lengths}}
        for heads in range(1, group.width + 1)
        if all(now % (heads * per) == 0 and now // (heads * per) <= one.width for one, now, per in lengths)
    ]


def _whole(group: Group, structure: Structure, among: Collection[tuple[str, int]] | None = None) -> Member:
    """An axis that the units of a group have alone, whose length tells their number."""
    shapes = structure.cost.shapes
    for member in group.members:
        place = member.tensor, member.dim
        if member.index.size == shapes[place[0]][place[1]] and (among is None or place in among):
            return member
    raise HistoryError(
        f"expected an axis with the units of {group.name!r} alone, from whose length their number follows, but others "
        "share each of them. Nothing has changed. Use `save` where it was pruned, and `load`."
    )


def _length(member: Member, structure: Structure, axes: Axes) -> int:
    """Present length of an axis."""
    dense = structure.cost.shapes[member.tensor][member.dim]
    return len(axes.get(member.tensor, {}).get(member.dim, range(dense)))


def _problems(narrow: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (f"{name} is missing in the weights" for name in sorted(here.keys() - narrow.keys()))
    yield from (f"{name} is not in the network" for name in sorted(narrow.keys() - here.keys()))
    for name, tensor in here.items():
        now, dense = list(narrow.get(name, tensor).shape), list(tensor.shape)
        if len(now) != len(dense) or any(a > b for a, b in zip(now, dense, strict=True)):
            yield f"{name} is {now}, here it is {dense}"
        elif 0 in now and 0 not in dense:
            yield f"{name} is {now}: layers were removed"


def _unsaved(network: nn.Module, axes: Axes, here: Mapping[str, Tensor]) -> Iterator[str]:
    """Buffers that no file holds, and that may have been cut."""
    lengths = {here[name].shape[dim] for name, kept in axes.items() for dim in kept}
    present = named(network)
    for name in sorted(non_persistent(network)):
        buffer = present.get(name)
        if buffer is not None and buffer.is_floating_point() and lengths & {*buffer.shape} - {1}:
            yield f"{name} {list(buffer.shape)} is in no `state_dict`, and which of it was kept is not known"


def _tensors(found: object) -> Mapping[str, Tensor]:
    """Weights, which must be tensors by name."""
    problem = "" if isinstance(found, Mapping) else f"a {type(found).__name__}"
    if isinstance(found, Mapping):
        others = [f"a {type(part).__name__} for {name!r}" for name, part in found.items() if not _is_dense(part)]
        problem = ", ".join(others[:3])
    if problem:
        raise HistoryError(
            f"expected a `state_dict`, tensors by name, got {problem}. Nothing has changed. Of a checkpoint, give the "
            'part that holds them, such as `torch.load(file, weights_only=True)["state_dict"]`.'
        )
    assert isinstance(found, Mapping)
    return found


def _is_dense(part: object) -> bool:
    return isinstance(part, Tensor) and part.layout is torch.strided and not part.is_meta


def _read(file: Path) -> object:
    with file.open("rb") as opened:
        is_zip = opened.read(len(_ZIP)) == _ZIP
    if not is_zip:
        return tensors_of(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise HistoryError(
            f"expected a file of tensors, got '{file}', which is torn or holds other objects, which are not read since "
            "that would execute them. Nothing has changed. Save its `state_dict()`."
        ) from error
