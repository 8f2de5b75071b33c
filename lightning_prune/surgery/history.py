"""What was done to a network, kept with it and in its checkpoints, so that any of them can be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.planning.target import Original
from lightning_prune.structure.analysis import Subject
from lightning_prune.structure.cost import LatencyTable
from lightning_prune.structure.graph import Axes, IndexArray, Structure
from lightning_prune.structure.latency import measure_latency
from lightning_prune.structure.layers import tensors
from lightning_prune.surgery import plain
from lightning_prune.surgery.plain import HistoryError
from lightning_prune.surgery.shrink import Change, cut
from lightning_prune.surgery.tensors import blank, canonical, named, non_persistent

__all__ = [
    "KEY",
    "VERSION",
    "Dense",
    "History",
    "HistoryError",
    "Keep",
    "attach",
    "begun",
    "conform",
    "history_of",
    "latency_table",
    "load_from",
    "original_of",
    "replay",
    "save_into",
]

#: Where a checkpoint keeps the history.
KEY = "lightning_prune"
#: Version of the format that is written; all versions up to it are read.
VERSION = 2

_ATTRIBUTE = "_lightning_prune_history"
_UPGRADE = "It was written by a newer lightning_prune: `pip install --upgrade lightning-prune`."

Shape = tuple[int, ...]


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
class Dense:
    """What a cut takes from a network and no checkpoint holds: kept with the live network, to widen it again.

    Attributes:
        buffers: Buffers that a ``state_dict`` leaves out, whole.
        attributes: The configuration that layers have written down, by name of the module.
    """

    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str]) -> Dense:
        """What to remember of ``model`` before its tensors ``names`` are cut for the first time."""
        present, unsaved = named(model), non_persistent(model)
        touched = {id(present[name]) for name in names}
        return cls(
            {name: present[name].detach().clone() for name in unsaved if id(present.get(name)) in touched},
            {
                # `__constants__` is where PyTorch's layers list the attributes that configure them.
                canonical(prefix): {name: vars(module)[name] for name in module.__constants__ if name in vars(module)}
                for prefix, module in model.named_modules()
                if hasattr(module, "__constants__") and any(id(t) in touched for t in tensors(module).values())
            },
        )


@dataclass(frozen=True, eq=False)
class History:
    """All that was done to a network since it was dense.

    Attributes:
        shapes: Dense shape of every tensor that was ever cut.
        params: Parameters of the dense network.
        macs: Its MACs for one sample (1 MAC = 2 FLOPs).
        widths: Its units by group.
        edits: What was done, in order.
        dense: What it takes to widen the live network; not part of a checkpoint.
        memory: Bytes of the dense network's activations for one sample; ``None`` in files of version 1.
        latency: What its latency is reckoned by, if that was measured: one table for all of the network's life.
    """

    shapes: Mapping[str, Shape]
    params: int
    macs: int
    widths: Mapping[str, int]
    edits: tuple[Keep, ...] = ()
    dense: Dense = field(default_factory=Dense)
    memory: int | None = None
    latency: LatencyTable | None = None

    @classmethod
    def begin(cls, structure: Structure) -> History:
        """The empty history of a dense network."""
        widths, cost = structure.widths, structure.cost
        return cls(
            {}, cost.params(widths), cost.macs(widths), widths, memory=cost.memory(widths), latency=cost.latency_table
        )

    def add(self, edit: Keep, model: nn.Module) -> History:
        """The history with ``edit``, which is about to be done to ``model``.

        To be called before the cut, while the model still has what will be lost, and attached after it.

        Raises:
            HistoryError: If the edit does not fit the model and this history, or is not made of plain numbers.
        """
        present = named(model)
        edit = replace(edit, axes={canonical(name): axes for name, axes in edit.axes.items()})
        for name in edit.axes:
            if name not in present:
                raise HistoryError(f"Expected the name of a parameter or buffer of the network, got {name!r}.")
        new = [name for name in edit.axes if name not in self.shapes]
        seen = Dense.of(model, new)
        # What is written must be readable: better an error now than a lost checkpoint.
        units = {**self.widths, **{group: len(kept) for past in self.edits for group, kept in past.kept.items()}}
        edit = _read_edit(_write_edit(edit, {}), {name: list(present[name].shape) for name in edit.axes}, units)
        return replace(
            self,
            shapes={**self.shapes, **{name: tuple(present[name].shape) for name in new}},
            edits=(*self.edits, edit),
            # The other way round a layer cut before would be remembered as it is now.
            dense=Dense({**seen.buffers, **self.dense.buffers}, {**seen.attributes, **self.dense.attributes}),
        )

    @property
    def axes(self) -> Axes:
        """What remains of the dense network: all edits as one."""
        whole: Axes = {}
        for edit in self.edits:
            for name, axes in edit.axes.items():
                remaining = whole.setdefault(name, {})
                for dim, kept in axes.items():
                    remaining[dim] = remaining[dim][kept] if dim in remaining else kept
        return whole

    @property
    def shapes_now(self) -> dict[str, Shape]:
        """Shapes after the last edit, of the tensors that were ever cut."""
        return {
            name: tuple(len(axes.get(dim, range(length))) for dim, length in enumerate(self.shapes[name]))
            for name, axes in self.axes.items()
        }

    def to_plain(self) -> dict[str, Any]:
        """Dictionaries, lists, strings, numbers and int64 tensors: what loads with ``weights_only=True``."""
        known: dict[bytes, Tensor] = {}
        return {
            "version": VERSION,
            "original": {
                "shapes": {name: list(shape) for name, shape in self.shapes.items()},
                "params": int(self.params),
                "macs": int(self.macs),
                "widths": {group: int(width) for group, width in self.widths.items()},
                **({} if self.memory is None else {"memory": int(self.memory)}),
                **({} if self.latency is None else {"latency": self.latency.to_plain()}),
            },
            "edits": [_write_edit(edit, known) for edit in self.edits],
        }

    @classmethod
    def from_plain(cls, found: object) -> History:
        """Read what :meth:`to_plain` gave, from whatever file it comes.

        Raises:
            HistoryError: If it is of a newer version, or anything in it is missing, of another type, out of range or
                in contradiction with the rest.
        """
        top: dict[str, Any] = plain.value(found, dict, "the history")
        version = plain.entry(top, "version", int)
        if version > VERSION:
            raise HistoryError(f"The pruning history has version {version}, {VERSION} is the last known. {_UPGRADE}")
        original = plain.entry(top, "original", dict)
        shapes = {name: plain.shape(lengths, name) for name, lengths in plain.items(original, "shapes", list)}
        widths = dict(plain.items(original, "widths", int))
        # Both follow the edits as they are read.
        lengths, units = {name: list(shape) for name, shape in shapes.items()}, dict(widths)
        edits = tuple(_read_edit(edit, lengths, units) for edit in plain.entry(top, "edits", list))
        untouched = shapes.keys() - {name for edit in edits for name in edit.axes}
        if untouched:
            raise plain.damaged(f"it has a dense shape for {min(untouched)!r}, which no edit cuts")
        params, macs = (plain.entry(original, key, int) for key in ("params", "macs"))
        memory = plain.entry(original, "memory", int) if "memory" in original else None
        latency = _table(plain.entry(original, "latency", dict)) if "latency" in original else None
        return cls(shapes, params, macs, widths, edits, memory=memory, latency=latency)


def attach(model: nn.Module, history: History | None) -> None:
    """Keep ``history`` with ``model``; ``None`` for a network that is dense again."""
    if history is not None:
        setattr(model, _ATTRIBUTE, history)
    elif history_of(model) is not None:
        delattr(model, _ATTRIBUTE)


def history_of(model: nn.Module) -> History | None:
    """What was done to ``model``, or ``None`` if nothing."""
    history: History | None = getattr(model, _ATTRIBUTE, None)
    return history


def begun(model: nn.Module, structure: Structure) -> History:
    """The history of ``model`` as a next edit takes it: its own or a new one, with the latencies that are known."""
    history = history_of(model) or History.begin(structure)
    return history if history.latency is not None else replace(history, latency=structure.cost.latency_table)


def latency_table(subject: Subject, structure: Structure) -> LatencyTable:
    """The table that the network was cut by before, or else one that is measured now."""
    history = history_of(subject.model)
    if history is not None and history.latency is not None:
        return history.latency
    return measure_latency(subject, structure, None if history is None else history.widths)


def original_of(model: nn.Module, structure: Structure) -> Original:
    """The size of the network that ``model`` was before its first cut.

    Args:
        model: The network, with its history if it was cut.
        structure: Its structure as it is now, with a table of latencies if one is needed.

    Raises:
        HistoryError: If the groups are not those that the network was cut with.
    """
    history = history_of(model)
    if history is None:
        return Original.of(structure)
    if history.widths.keys() != structure.widths.keys():
        raise HistoryError(
            f"expected the groups the network was pruned with ({', '.join(history.widths)}), found "
            f"{', '.join(structure.widths)}. Resume with the code and versions that wrote the checkpoint."
        )
    cost = structure.cost
    memory = cost.memory(history.widths) if history.memory is None else history.memory
    latency = None if cost.latency_table is None else cost.latency(history.widths)
    return Original(history.params, history.macs, history.widths, memory, latency)


def save_into(checkpoint: MutableMapping[str, Any], model: nn.Module) -> None:
    """Write the history of ``model``, if it has one, into a checkpoint that is being saved."""
    history = history_of(model)
    if history is not None:
        checkpoint[KEY] = history.to_plain()


def load_from(checkpoint: Mapping[str, Any], model: nn.Module) -> None:
    """Give ``model`` the widths of ``checkpoint``, ready for its ``state_dict`` to be loaded; see :func:`conform`.

    Raises:
        HistoryError: If the checkpoint's history is damaged, or the checkpoint is of another architecture.
    """
    history = History.from_plain(checkpoint[KEY]) if KEY in checkpoint else None
    conform(model, checkpoint["state_dict"], history)


def conform(model: nn.Module, state_dict: Mapping[str, Any], history: History | None) -> None:
    """Make a network as narrow or wide as a checkpoint, ready for ``load_state_dict``.

    Only tensors that the checkpoint's or the network's own history names change their shape. If the network was cut
    in another way before, they are zero afterwards, without a gradient: loading is to follow. Optimizers keep their
    parameters, but their state has to be loaded too.

    Args:
        model: A dense network, or a pruned one with its history attached. It gets the checkpoint's history.
        state_dict: The checkpoint's weights, named as in ``model.state_dict()``.
        history: The checkpoint's history; ``None`` if it is of a dense network.

    Raises:
        HistoryError: If the checkpoint is of another architecture; the text names the first tensors that differ.

    Whatever is raised, the network is then as it was.
    """
    mine = history_of(model)
    if mine is None and history is None:
        return
    problems = list(_differences(model, mine, history, state_dict))
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise HistoryError(
            f"This is a checkpoint of another architecture: {'; '.join(problems[:3])}{more}. Nothing has changed. "
            "Build the network with the arguments it had when the checkpoint was written."
        )
    if mine is not None and history is not None and _same_axes(mine.axes, history.axes):
        attach(model, replace(history, dense=mine.dense))
        return
    change = Change()
    try:
        if mine is not None:
            _widen(change, model, mine)
        if history is not None:
            history = replace(history, dense=Dense.of(model, history.shapes))
            cut(model, history.axes)
        attach(model, history)
    except BaseException:
        change.undo()
        raise


def replay(model: nn.Module, history: History) -> None:
    """Do to a dense network all that ``history`` tells; the weights that remain are kept.

    Raises:
        HistoryError: If the network has been pruned before, or is of another architecture.
    """
    if history_of(model) is not None:
        raise HistoryError("Expected a dense network to replay a history on, got one that has been pruned before.")
    conform(model, {}, history)


def _widen(change: Change, model: nn.Module, history: History) -> None:
    present, dense = named(model), history.dense
    with torch.inference_mode(False), torch.no_grad():
        for name, shape in history.shapes.items():
            content = blank(present[name], shape)
            if name in dense.buffers:
                content.copy_(dense.buffers[name])
            change.assign(present[name], content, None)
    for prefix, module in model.named_modules():
        if canonical(prefix) in dense.attributes:
            change.set_attributes(module, dense.attributes[canonical(prefix)])


def _differences(
    model: nn.Module, mine: History | None, history: History | None, state_dict: Mapping[str, Any]
) -> Iterator[str]:
    """In words: where a checkpoint does not fit the network that ``model`` was when it was dense."""
    present = named(model)
    # By object, as a tied tensor has several names and a history may know only one of them.
    dense = {id(tensor): tuple(tensor.shape) for tensor in present.values() if not is_lazy(tensor)}
    if mine is not None:
        dense.update((id(present[name]), shape) for name, shape in mine.shapes.items())
    expected = dict(dense)
    if history is not None:
        for name, shape in history.shapes.items():
            here = dense.get(id(present[name])) if name in present else None
            if here != shape:
                yield f"{name} was {list(shape)} before it was cut, here it is {list(here) if here else 'missing'}"
        expected.update((id(present[name]), shape) for name, shape in history.shapes_now.items() if name in present)
    for full_name, weight in state_dict.items():
        name = canonical(full_name)
        wanted = expected.get(id(present[name])) if name in present else None
        if wanted is not None and isinstance(weight, Tensor) and not is_lazy(weight) and tuple(weight.shape) != wanted:
            yield f"{name} is {list(weight.shape)}, here it should be {list(wanted)}"


def _table(found: dict[str, Any]) -> LatencyTable:
    try:
        return LatencyTable.from_plain(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise plain.damaged(f"its table of latencies is none ({type(error).__name__}: {error})") from error


def _write_edit(edit: Keep, known: dict[bytes, Tensor]) -> dict[str, Any]:
    """One edit as plain data; equal positions share a tensor among all that is ``known``."""

    def tensor(positions: IndexArray | tuple[int, ...]) -> Tensor:
        # Most axes of a group have the same positions, and `torch.save` writes a tensor once.
        array = np.array(positions, dtype=np.int64)
        return known.setdefault(array.tobytes(), torch.from_numpy(array))

    return {
        "kind": edit.kind,
        "axes": {name: {dim: tensor(kept) for dim, kept in axes.items()} for name, axes in edit.axes.items()},
        "kept": {group: tensor(units) for group, units in edit.kept.items()},
        "epoch": int(edit.epoch),
        "step": int(edit.step),
        "cut": int(edit.cut),
        "info": {name: _plain_number(name, value) for name, value in edit.info.items()},
    }


def _plain_number(name: str, value: object) -> int | float:
    # Scalars of numpy pass for numbers, but do not load with `weights_only=True`.
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise HistoryError(f"Expected `info[{name!r}]` to be a plain number, got {type(value).__name__}.")


def _same_axes(first: Axes, second: Axes) -> bool:
    return first.keys() == second.keys() and all(
        first[name].keys() == second[name].keys()
        and all(np.array_equal(first[name][dim], second[name][dim]) for dim in first[name])
        for name in first
    )


def _read_edit(found: object, lengths: dict[str, list[int]], units: dict[str, int]) -> Keep:
    """One edit of a history; ``lengths`` of tensors and ``units`` of groups go from before it to after it."""
    edit: dict[str, Any] = plain.value(found, dict, "an edit")
    kind = plain.entry(edit, "kind", str)
    if kind != Keep.kind:
        raise HistoryError(f"The pruning history holds an edit of the unknown kind {kind!r}. {_UPGRADE}")
    axes: Axes = {}
    for name, dims in plain.items(edit, "axes", dict):
        length = lengths.get(name, [])
        axes[name] = {}
        for key, positions in dims.items():
            dim = plain.value(key, int, f"a dimension of {name!r}")
            if not 0 <= dim < len(length):
                raise plain.damaged(f"an edit cuts dimension {dim} of {name!r}, which has {len(length) or 'no shape'}")
            axes[name][dim] = plain.positions(positions, length[dim], name)
            length[dim] = len(axes[name][dim])
    kept = {}
    for group, positions in plain.items(edit, "kept", Tensor):
        if group not in units:
            raise plain.damaged(f"an edit cuts a group {group!r} without a dense width")
        kept[group] = tuple(plain.positions(positions, units[group], group).tolist())
        units[group] = len(kept[group])
    epoch, step, index = (plain.entry(edit, key, int) for key in ("epoch", "step", "cut"))
    info = {name: plain.number(number, f"info[{name!r}]") for name, number in plain.items(edit, "info", object)}
    return Keep(axes, kept, epoch, step, index, info)
