"""Edits, the entries of a network's history: a closed set, since checkpoints must stay loadable.

For each kind, this file defines how it is applied, the resulting shapes and names, how stored tensors are transformed,
and the plain-data format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.structure import Size
from lightning_prune.structure.graph import Axes, Factors, IndexArray
from lightning_prune.structure.layers import is_within
from lightning_prune.structure.stubs import Kind
from lightning_prune.surgery import plain
from lightning_prune.surgery.change import Change
from lightning_prune.surgery.depth import stays
from lightning_prune.surgery.plain import HistoryError
from lightning_prune.surgery.replacing import replace_modules
from lightning_prune.surgery.shrink import shrink
from lightning_prune.surgery.specs import LayerSpec
from lightning_prune.surgery.tensors import canonical, rescaled, take

__all__ = [
    "UPGRADE",
    "Drop",
    "Edit",
    "Keep",
    "NetworkState",
    "Replace",
    "apply",
    "read_edit",
    "same_effect",
    "transform_stored",
    "write_edit",
]

UPGRADE = "It was written by a newer lightning_prune: `pip install --upgrade lightning-prune`."


@dataclass(frozen=True, eq=False)
class Keep:
    """A cut that keeps some units.

    Attributes:
        axes: Kept positions by name of parameter or buffer and dimension, in the numbering before this cut.
        kept: Kept units by group, in the numbering before this cut.
        epoch: Epoch of the cut.
        step: Number of optimizer steps before the cut.
        cut: Index of the cut in the schedule, from 0.
        info: Additional numbers (the pruning ratio, a metric).
        factors: What rows of queries are multiplied by, in the numbering after this cut (`Group.queries`).
    """

    kind: ClassVar[str] = "keep"

    axes: Axes
    kept: Mapping[str, tuple[int, ...]]
    epoch: int
    step: int
    cut: int
    info: Mapping[str, float] = field(default_factory=dict)
    factors: Factors = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Drop:
    """A removal of layers.

    Attributes:
        modules: Kind of stub of each removed layer, by name (`Removal.modules`).
        groups: Removed groups.
        epoch: Epoch of the removal.
        step: Number of optimizer steps before the removal.
        cut: Index of the cut in the schedule, from 0; a `Keep` of the same cut precedes it.
    """

    kind: ClassVar[str] = "drop"

    modules: Mapping[str, str]
    groups: tuple[str, ...]
    epoch: int
    step: int
    cut: int


@dataclass(frozen=True, eq=False)
class Replace:
    """A replacement of modules: a new head, or identities for a tail or a layer.

    The network is traced again afterwards, and the structure is part of the edit, as later cuts refer to it.

    Attributes:
        modules: Spec of the new module, by name.
        widths: Units by group after the edit.
        original: The dense network that shares refer to from here on. Its ``widths`` include removed groups.
        new_dense: Whether that is the network after this edit.
        epoch: Epoch of the replacement.
        step: Number of optimizer steps before the replacement.
        cut: Index of the cut in the schedule, from 0.
        info: Additional numbers.
    """

    kind: ClassVar[str] = "replace"

    modules: Mapping[str, LayerSpec]
    widths: Mapping[str, int]
    original: Size
    new_dense: bool
    epoch: int
    step: int
    cut: int
    info: Mapping[str, float] = field(default_factory=dict)


Edit = Keep | Drop | Replace


def apply(
    change: Change, edit: Edit, model: nn.Module, optimizers: Iterable[Optimizer] = (), copies: Iterable[nn.Module] = ()
) -> None:
    """Apply an edit to a live network, its optimizers and its averaged copies.

    Args:
        change: Logs the changes.
        edit: The edit.
        model: The network.
        optimizers: All optimizers of its parameters.
        copies: Modules of the same structure, which are edited too.

    Raises:
        CutError: If the edit does not match the network.
        OptimizerRefusedError: If an optimizer is not supported.
    """
    optimizers, copies = tuple(optimizers), tuple(copies)
    if isinstance(edit, Keep):
        shrink(change, model, edit.axes, optimizers, copies, factors=edit.factors)
    elif isinstance(edit, Drop):
        shrink(change, model, {}, optimizers, copies, edit.modules)
    else:
        replace_modules(change, (model, *copies), edit.modules, optimizers)


def transform_stored(edit: Edit, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply an edit to tensors that are stored by name of parameter or buffer, such as a snapshot.

    For a `Replace`, tensors of the replaced modules are removed; the caller adds those of the new ones.
    """
    if isinstance(edit, Keep):
        taken = {name: take(tensor, edit.axes.get(name, {})) for name, tensor in stored.items()}
        return {name: rescaled(tensor, edit.factors.get(name)) for name, tensor in taken.items()}
    if isinstance(edit, Drop):
        return {name: tensor for name, tensor in stored.items() if stays(name, edit.modules)}
    return {name: tensor for name, tensor in stored.items() if not is_within(name, edit.modules)}


@dataclass
class NetworkState:
    """Shapes and widths of a network, to which edits are applied without weights.

    Attributes:
        lengths: Shapes of tensors, by name.
        units: Units by group.
        cut: Names of the dense network's tensors that were cut.
        replaced: Names of the modules that were replaced.
    """

    lengths: dict[str, list[int]]
    units: dict[str, int]
    cut: set[str] = field(default_factory=set)
    replaced: set[str] = field(default_factory=set)

    def follow(self, edit: Edit) -> None:
        """Apply an edit."""
        if isinstance(edit, Keep):
            self._follow_keep(edit)
        elif isinstance(edit, Drop):
            self._follow_drop(edit)
        else:
            self._follow_replace(edit)

    def _follow_keep(self, edit: Keep) -> None:
        for name, axes in edit.axes.items():
            for dim, kept in axes.items():
                self.lengths[name][dim] = len(kept)
            if not is_within(name, self.replaced):
                self.cut.add(name)
        self.units.update((group, len(kept)) for group, kept in edit.kept.items())

    def _follow_drop(self, edit: Drop) -> None:
        for name in [name for name in self.lengths if name.rpartition(".")[0] in edit.modules]:
            owner, _, own = name.rpartition(".")
            if edit.modules[owner] != "constant":
                del self.lengths[name]
            elif own == "weight":
                self.lengths[name] = [self.lengths[name][0], 0]
        self.units.update(dict.fromkeys(edit.groups, 0))

    def _follow_replace(self, edit: Replace) -> None:
        self.lengths = {name: now for name, now in self.lengths.items() if not is_within(name, edit.modules)}
        for prefix, spec in edit.modules.items():
            self.lengths.update((f"{prefix}.{name}", list(shape)) for name, shape in spec.shapes.items())
        self.replaced |= edit.modules.keys()
        self.units = dict(edit.widths)


def same_effect(first: Edit, second: Edit) -> bool:
    """Whether two edits have the same effect on a network."""
    if isinstance(first, Keep) and isinstance(second, Keep):
        return _same_axes(first.axes, second.axes)
    if isinstance(first, Drop | Replace) and type(first) is type(second):
        return dict(first.modules) == dict(second.modules)
    return False


def _same_axes(first: Axes, second: Axes) -> bool:
    return first.keys() == second.keys() and all(
        first[name].keys() == second[name].keys()
        and all(np.array_equal(first[name][dim], second[name][dim]) for dim in first[name])
        for name in first
    )


# -- plain data --------------------------------------------------------------------------------------------------------


def write_edit(edit: Edit, known: dict[bytes, Tensor]) -> dict[str, Any]:
    """Convert an edit to plain data; equal positions share a tensor, by ``known``."""

    def tensor(positions: IndexArray | tuple[int, ...]) -> Tensor:
        # Most axes of a group have the same positions, and `torch.save` writes a tensor once.
        array = np.array(positions, dtype=np.int64)
        return known.setdefault(array.tobytes(), torch.from_numpy(array))

    when = {"epoch": int(edit.epoch), "step": int(edit.step), "cut": int(edit.cut)}
    if isinstance(edit, Drop):
        modules = {canonical(name): str(kind) for name, kind in edit.modules.items()}
        return {"kind": edit.kind, "modules": modules, "groups": [str(group) for group in edit.groups], **when}
    info = {name: _plain_number(f"info[{name!r}]", value) for name, value in edit.info.items()}
    factors = {}
    if isinstance(edit, Keep):
        factors = {name: {"rows": tensor(rows), "factor": float(f)} for name, (rows, f) in edit.factors.items()}
    if isinstance(edit, Replace):
        return {
            "kind": edit.kind,
            "modules": {canonical(name): spec.to_plain() for name, spec in edit.modules.items()},
            "widths": {group: int(width) for group, width in edit.widths.items()},
            "original": _write_original(edit.original),
            "new_dense": bool(edit.new_dense),
            **when,
            "info": info,
        }
    return {
        "kind": edit.kind,
        "axes": {name: {dim: tensor(kept) for dim, kept in axes.items()} for name, axes in edit.axes.items()},
        "kept": {group: tensor(units) for group, units in edit.kept.items()},
        **when,
        "info": info,
        **({"factors": factors} if factors else {}),
    }


def _write_original(original: Size) -> dict[str, Any]:
    """The size of a dense network as plain data."""
    return {
        "params": int(original.params),
        "macs": int(original.macs),
        "widths": {group: int(width) for group, width in original.widths.items()},
        "memory": int(original.memory or 0),
        **({} if original.table_latency is None else {"latency": float(original.table_latency)}),
    }


def read_edit(found: object, known: NetworkState) -> Edit:
    """Read an edit and apply it to ``known``.

    Raises:
        HistoryError: If anything is missing, of another type, out of range or inconsistent.
    """
    edit: dict[str, Any] = plain.value(found, dict, "an edit")
    kind = plain.entry(edit, "kind", str)
    made: Edit
    if kind == Keep.kind:
        made = _read_keep(edit, known)
    elif kind == Drop.kind:
        made = _read_drop(edit, known)
    elif kind == Replace.kind:
        made = _read_replace(edit)
    else:
        raise HistoryError(f"The pruning history holds an edit of the unknown kind {kind!r}. {UPGRADE}")
    known.follow(made)
    return made


def _read_keep(edit: dict[str, Any], known: NetworkState) -> Keep:
    axes: Axes = {}
    for name, dims in plain.items(edit, "axes", dict):
        length = known.lengths.get(name, [])
        axes[name] = {}
        for key, positions in dims.items():
            dim = plain.value(key, int, f"a dimension of {name!r}")
            if not 0 <= dim < len(length):
                raise plain.damaged(f"an edit cuts dimension {dim} of {name!r}, which has {len(length) or 'no shape'}")
            axes[name][dim] = plain.positions(positions, length[dim], name)
    kept = {}
    for group, positions in plain.items(edit, "kept", Tensor):
        if group not in known.units:
            raise plain.damaged(f"an edit cuts a group {group!r} without a dense width")
        kept[group] = tuple(plain.positions(positions, known.units[group], group).tolist())
    return Keep(axes, kept, *_when(edit), _info(edit), _read_factors(edit, axes))


def _read_factors(edit: dict[str, Any], axes: Axes) -> Factors:
    factors: Factors = {}
    for name, found in plain.items(edit, "factors", dict) if "factors" in edit else ():
        if 0 not in axes.get(name, {}):
            raise plain.damaged(f"an edit multiplies rows of {name!r}, which it does not cut")
        rows = plain.positions(plain.entry(found, "rows", Tensor), len(axes[name][0]), name)
        factor = float(plain.number(found.get("factor"), f"the factor of {name!r}"))
        if not 0 < factor < math.inf:
            raise plain.damaged(f"an edit multiplies rows of {name!r} by {factor}")
        factors[name] = rows, factor
    return factors


def _read_drop(edit: dict[str, Any], known: NetworkState) -> Drop:
    modules = dict(plain.items(edit, "modules", str))
    if unknown := {kind for kind in modules.values() if kind not in get_args(Kind)}:
        raise HistoryError(f"The pruning history puts an unknown {min(unknown)!r} in place of a layer. {UPGRADE}")
    groups = tuple(plain.value(group, str, "a group that is gone") for group in plain.entry(edit, "groups", list))
    for group in groups:
        if not known.units.get(group):
            raise plain.damaged(f"an edit takes out a group {group!r} that is not there")
    return Drop(modules, groups, *_when(edit))


def _read_replace(edit: dict[str, Any]) -> Replace:
    modules = {name: LayerSpec.from_plain(spec) for name, spec in plain.items(edit, "modules", dict)}
    for name in modules:
        if not name or is_within(name, modules.keys() - {name}):
            raise plain.damaged(f"an edit replaces {name!r}, which is the network or part of another such module")
    widths = plain.counts(edit, "widths")
    original = _read_original(plain.entry(edit, "original", dict))
    for group, width in widths.items():
        if width > original.widths.get(group, 0):
            raise plain.damaged(f"a group {group!r} has {width} units, of a dense {original.widths.get(group)}")
    return Replace(modules, widths, original, plain.entry(edit, "new_dense", bool), *_when(edit), _info(edit))


def _read_original(found: dict[str, Any]) -> Size:
    params, macs, memory = (plain.count(found, key) for key in ("params", "macs", "memory"))
    latency = plain.number(found["latency"], "latency") if "latency" in found else None
    return Size(params, macs, plain.counts(found, "widths"), memory=memory, table_latency=latency)


def _when(edit: dict[str, Any]) -> tuple[int, int, int]:
    # Index -1: removed at the end of a run without cuts.
    return plain.count(edit, "epoch"), plain.count(edit, "step"), plain.count(edit, "cut", least=-1)


def _info(edit: dict[str, Any]) -> dict[str, int | float]:
    return {name: plain.number(number, f"info[{name!r}]") for name, number in plain.items(edit, "info", object)}


def _plain_number(name: str, value: object) -> int | float:
    # NumPy scalars cannot be loaded with `weights_only=True`.
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise HistoryError(f"Expected `{name}` to be a plain number, got {type(value).__name__}.")
