"""The edits that a network's history consists of: a closed set, since a checkpoint must load for ever.

For each kind this file says how it is applied, which shapes and names follow from it without weights, what becomes of
tensors that are stored elsewhere, and how it is written and read in plain data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.structure import Size
from lightning_prune.structure.graph import Axes, IndexArray
from lightning_prune.structure.layers import is_within
from lightning_prune.structure.stubs import Kind
from lightning_prune.surgery import plain
from lightning_prune.surgery.change import Change
from lightning_prune.surgery.depth import stays
from lightning_prune.surgery.plain import HistoryError
from lightning_prune.surgery.replacing import exchange
from lightning_prune.surgery.shrink import shrink
from lightning_prune.surgery.specs import LayerSpec
from lightning_prune.surgery.tensors import canonical, take

__all__ = [
    "UPGRADE",
    "Drop",
    "Edit",
    "Keep",
    "Known",
    "Replace",
    "apply",
    "carry",
    "read_edit",
    "same_effect",
    "write_edit",
]

UPGRADE = "It was written by a newer lightning_prune: `pip install --upgrade lightning-prune`."


@dataclass(frozen=True, eq=False)
class Keep:
    """One cut: the units that were kept.

    Attributes:
        axes: Positions kept by name of parameter or buffer and dimension, counted before this cut.
        kept: Units kept by group, counted before this cut.
        epoch: The epoch in which it was made.
        step: Optimizer steps that went before.
        cut: Its place in the schedule, from 0.
        info: Plain numbers worth remembering (the pruning ratio, a metric).
    """

    kind: ClassVar[str] = "keep"

    axes: Axes
    kept: Mapping[str, tuple[int, ...]]
    epoch: int
    step: int
    cut: int
    info: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Drop:
    """Layers that were taken out.

    Attributes:
        modules: What has taken the place of each layer, by its name (`Removal.modules`).
        groups: Groups that are gone with them.
        epoch: The epoch in which it was done.
        step: Optimizer steps that went before.
        cut: Its place in the schedule, from 0; a `Keep` of the same cut comes before it.
    """

    kind: ClassVar[str] = "drop"

    modules: Mapping[str, str]
    groups: tuple[str, ...]
    epoch: int
    step: int
    cut: int


@dataclass(frozen=True, eq=False)
class Replace:
    """Modules that were exchanged for others: a new head, a tail or a layer that became an identity.

    The network is traced again afterwards, and what was found is part of the edit: later cuts refer to it.

    Attributes:
        modules: What has taken the place of each module, by its name.
        widths: Units by group, as they were found right after it.
        original: The dense network that shares refer to from here on. Its ``widths`` also hold groups that are gone.
        new_dense: Whether that is the network as it was right after this edit.
        epoch: The epoch in which it was done.
        step: Optimizer steps that went before.
        cut: Its place in the schedule, from 0.
        info: Plain numbers worth remembering.
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
    """Do an edit to a live network, its optimizers and its averaged copies.

    Args:
        change: Writes down the way back.
        edit: What to do.
        model: The network.
        optimizers: Every optimizer that steps one of its parameters.
        copies: Modules of the same structure, edited alike.

    Raises:
        CutError: If the edit does not fit the network.
        OptimizerRefusedError: If an optimizer cannot follow.
    """
    optimizers, copies = tuple(optimizers), tuple(copies)
    if isinstance(edit, Keep):
        shrink(change, model, edit.axes, optimizers, copies)
    elif isinstance(edit, Drop):
        shrink(change, model, {}, optimizers, copies, edit.modules)
    else:
        exchange(change, (model, *copies), edit.modules, optimizers)


def carry(edit: Edit, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What becomes of tensors that are stored by the name of a parameter or buffer (a snapshot, say).

    Of a `Replace`, those of the replaced modules are left out; what the new ones start with is for the caller to add.
    """
    if isinstance(edit, Keep):
        return {name: take(tensor, edit.axes.get(name, {})) for name, tensor in stored.items()}
    if isinstance(edit, Drop):
        return {name: tensor for name, tensor in stored.items() if stays(name, edit.modules)}
    return {name: tensor for name, tensor in stored.items() if not is_within(name, edit.modules)}


@dataclass
class Known:
    """What is known of a network without its weights, as one edit after the other is read or made.

    Attributes:
        lengths: Lengths of the axes of tensors, by name.
        units: Units by group.
        cut: Names of the dense network's tensors that were cut.
        replaced: Names of the modules that were replaced so far.
    """

    lengths: dict[str, list[int]]
    units: dict[str, int]
    cut: set[str] = field(default_factory=set)
    replaced: set[str] = field(default_factory=set)

    def follow(self, edit: Edit) -> None:
        """Go from before an edit to after it."""
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
    """Whether two edits do the same to a network, whenever they were made."""
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
    """One edit as plain data; equal positions share a tensor among all that is ``known``."""

    def tensor(positions: IndexArray | tuple[int, ...]) -> Tensor:
        # Most axes of a group have the same positions, and `torch.save` writes a tensor once.
        array = np.array(positions, dtype=np.int64)
        return known.setdefault(array.tobytes(), torch.from_numpy(array))

    when = {"epoch": int(edit.epoch), "step": int(edit.step), "cut": int(edit.cut)}
    if isinstance(edit, Drop):
        modules = {canonical(name): str(kind) for name, kind in edit.modules.items()}
        return {"kind": edit.kind, "modules": modules, "groups": [str(group) for group in edit.groups], **when}
    info = {name: _plain_number(f"info[{name!r}]", value) for name, value in edit.info.items()}
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


def read_edit(found: object, known: Known) -> Edit:
    """One edit of a history; what is ``known`` goes from before it to after it.

    Raises:
        HistoryError: If anything is missing, of another type, out of range or in contradiction with what is known.
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


def _read_keep(edit: dict[str, Any], known: Known) -> Keep:
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
    return Keep(axes, kept, *_when(edit), _info(edit))


def _read_drop(edit: dict[str, Any], known: Known) -> Drop:
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
    # What is removed at the end of a run without cuts has the place before the first.
    return plain.count(edit, "epoch"), plain.count(edit, "step"), plain.count(edit, "cut", least=-1)


def _info(edit: dict[str, Any]) -> dict[str, int | float]:
    return {name: plain.number(number, f"info[{name!r}]") for name, number in plain.items(edit, "info", object)}


def _plain_number(name: str, value: object) -> int | float:
    # Scalars of numpy pass for numbers, but do not load with `weights_only=True`.
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise HistoryError(f"Expected `{name}` to be a plain number, got {type(value).__name__}.")
