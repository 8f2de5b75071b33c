"""What was done to a network, kept with it and in its checkpoints, so that any of them can be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, ClassVar, get_args

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
from lightning_prune.structure.standins import Kind
from lightning_prune.surgery import plain
from lightning_prune.surgery.change import Change
from lightning_prune.surgery.depth import layer, restore, template
from lightning_prune.surgery.masks import attach_masks
from lightning_prune.surgery.plain import HistoryError
from lightning_prune.surgery.shrink import cut
from lightning_prune.surgery.tensors import blank, canonical, named, non_persistent

__all__ = [
    "KEY",
    "VERSION",
    "Dense",
    "Drop",
    "History",
    "HistoryError",
    "Keep",
    "attach",
    "begun",
    "conform",
    "edits_of",
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


Edit = Keep | Drop


@dataclass(frozen=True, eq=False)
class Dense:
    """What a cut takes from a network and no checkpoint holds: kept with the live network, to widen it again.

    Attributes:
        buffers: Buffers that a ``state_dict`` leaves out, whole.
        attributes: The configuration that layers have written down, by name of the module.
        layers: Layers that were taken out, dense and without content, by name.
    """

    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layers: Mapping[str, nn.Module] = field(default_factory=dict)

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
    edits: tuple[Edit, ...] = ()
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

    def add(self, edit: Edit, model: nn.Module) -> History:
        """The history with ``edit``, which is about to be done to ``model``.

        To be called before the cut, while the model still has what will be lost, and attached after it.

        Raises:
            HistoryError: If the edit does not fit the model and this history, or is not made of plain numbers.
        """
        if isinstance(edit, Drop):
            return self._add_drop(edit, model)
        present = named(model)
        edit = replace(edit, axes={canonical(name): axes for name, axes in edit.axes.items()})
        for name in edit.axes:
            if name not in present:
                raise HistoryError(f"Expected the name of a parameter or buffer of the network, got {name!r}.")
        new = [name for name in edit.axes if name not in self.shapes]
        seen = Dense.of(model, new)
        # What is written must be readable: better an error now than a lost checkpoint.
        lengths = {name: list(present[name].shape) for name in edit.axes}
        edit = _read_keep(_write_edit(edit, {}), lengths, self._units())
        return replace(
            self,
            shapes={**self.shapes, **{name: tuple(present[name].shape) for name in new}},
            edits=(*self.edits, edit),
            # The other way round a layer cut before would be remembered as it is now.
            dense=replace(
                self.dense,
                buffers={**seen.buffers, **self.dense.buffers},
                attributes={**seen.attributes, **self.dense.attributes},
            ),
        )

    def _add_drop(self, edit: Drop, model: nn.Module) -> History:
        edit = _read_drop(_write_edit(edit, {}), self._units())
        templates = {}
        for name in edit.modules:
            found = layer(model, name)
            if found is None:
                raise HistoryError(f"Expected the name of a layer of the network, got {name!r}.")
            dense_shapes = {local: self.shapes.get(f"{name}.{local}") for local in tensors(found)}
            templates[name] = template(found, dense_shapes, self.dense.attributes.get(name, {}))
        dense = replace(self.dense, layers={**templates, **self.dense.layers})
        return replace(self, edits=(*self.edits, edit), dense=dense)

    def _units(self) -> dict[str, int]:
        """Units per group after the last edit."""
        units = dict(self.widths)
        for edit in self.edits:
            if isinstance(edit, Keep):
                units.update((group, len(kept)) for group, kept in edit.kept.items())
            else:
                units.update(dict.fromkeys(edit.groups, 0))
        return units

    @property
    def drops(self) -> dict[str, str]:
        """Every layer that was taken out, and what is in its place."""
        return {name: kind for edit in self.edits if isinstance(edit, Drop) for name, kind in edit.modules.items()}

    @property
    def vanished(self) -> frozenset[str]:
        """Groups that have lost all their units."""
        return frozenset(name for edit in self.edits if isinstance(edit, Drop) for name in edit.groups)

    @property
    def axes(self) -> Axes:
        """What remains of the dense network: all edits as one."""
        whole: Axes = {}
        for edit in self.edits:
            if not isinstance(edit, Keep):
                continue
            for name, axes in edit.axes.items():
                remaining = whole.setdefault(name, {})
                for dim, kept in axes.items():
                    remaining[dim] = remaining[dim][kept] if dim in remaining else kept
        return whole

    @property
    def shapes_now(self) -> dict[str, Shape]:
        """Shapes after the last edit, of the tensors that were ever cut and still exist."""
        shapes = {
            name: tuple(len(axes.get(dim, range(length))) for dim, length in enumerate(self.shapes[name]))
            for name, axes in self.axes.items()
        }
        drops = self.drops
        for name, shape in list(shapes.items()):
            kind, local = drops.get(name.rpartition(".")[0]), name.rpartition(".")[2]
            if kind == "constant" and local == "weight":
                shapes[name] = (shape[0], 0)
            elif kind is not None and kind != "constant":
                del shapes[name]
        return shapes

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
        untouched = shapes.keys() - {name for edit in edits if isinstance(edit, Keep) for name in edit.axes}
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


def edits_of(
    structure: Structure,
    kept: Mapping[str, tuple[int, ...]],
    epoch: int,
    step: int,
    cut: int,
    info: Mapping[str, float] | None = None,
) -> tuple[Edit, ...]:
    """The edits that a cut consists of: what becomes narrower, and what is taken out."""
    axes, drops = structure.axes(kept), structure.drops(kept)
    narrow = {name: units for name, units in kept.items() if units}
    edits: list[Edit] = [Keep(axes, narrow, epoch, step, cut, info or {})] if axes or narrow else []
    if drops:
        edits.append(Drop(drops, tuple(name for name, units in kept.items() if not units), epoch, step, cut))
    return tuple(edits)


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
    expected = history.widths.keys() - history.vanished
    if expected != structure.widths.keys():
        raise HistoryError(
            f"expected the groups the network was pruned with ({', '.join(sorted(expected))}), found "
            f"{', '.join(structure.widths)}. Resume with the code and versions that wrote the checkpoint."
        )
    cost = structure.cost
    memory = cost.memory(history.widths) if history.memory is None else history.memory
    table = history.latency or cost.latency_table
    latency = None if table is None else table.value(history.widths, memory)
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
    parameters, but their state has to be loaded too, and so have masks.

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
    if mine is not None and history is not None and _same(mine, history):
        attach(model, replace(history, dense=mine.dense))
        return
    change = Change()
    try:
        if mine is not None:
            _widen(change, model, mine)
        if history is not None:
            layers = {name: template(found, {}, {}) for name in history.drops if (found := layer(model, name))}
            history = replace(history, dense=replace(Dense.of(model, history.shapes), layers=layers))
            cut(model, history.axes, drops=history.drops)
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
    dense = history.dense
    change.edit_attributes(model, lambda: attach_masks(model, {}))
    with torch.inference_mode(False), torch.no_grad():
        restore(change, model, dense.layers)
        present = named(model)
        for name, shape in history.shapes.items():
            content = blank(present[name], shape)
            if name in dense.buffers:
                content.copy_(dense.buffers[name])
            change.assign(present[name], content, None)
    for prefix, module in model.named_modules():
        if canonical(prefix) in dense.attributes:
            change.set_attributes(module, dense.attributes[canonical(prefix)])


def _before(model: nn.Module, mine: History | None) -> dict[str, Tensor]:
    """The tensors by name of the network that ``model`` was: with what was taken out, without what replaces it."""
    present = named(model)
    for prefix, bare in mine.dense.layers.items() if mine is not None else ():
        present = {name: tensor for name, tensor in present.items() if name.rpartition(".")[0] != prefix}
        present.update((f"{prefix}.{local}", tensor) for local, tensor in tensors(bare).items())
    return present


def _differences(
    model: nn.Module, mine: History | None, history: History | None, state_dict: Mapping[str, Any]
) -> Iterator[str]:
    """In words: where a checkpoint does not fit the network that ``model`` was when it was dense."""
    present = _before(model, mine)
    # By object, as a tied tensor has several names and a history may know only one of them.
    dense = {id(tensor): tuple(tensor.shape) for tensor in present.values() if not is_lazy(tensor)}
    if mine is not None:
        dense.update((id(present[name]), shape) for name, shape in mine.shapes.items())
    expected = dict(dense)
    if history is not None:
        yield from (f"{name} was taken out, here it is missing" for name in history.drops if layer(model, name) is None)
        for name, shape in history.shapes.items():
            here = dense.get(id(present[name])) if name in present else None
            if here != shape:
                yield f"{name} was {list(shape)} before it was cut, here it is {list(here) if here else 'missing'}"
        expected |= _narrow(present, dense, history)
    for full_name, weight in state_dict.items():
        name = canonical(full_name)
        wanted = expected.get(id(present[name])) if name in present else None
        if wanted is not None and isinstance(weight, Tensor) and not is_lazy(weight) and tuple(weight.shape) != wanted:
            yield f"{name} is {list(weight.shape)}, here it should be {list(wanted)}"


def _narrow(present: Mapping[str, Tensor], dense: Mapping[int, Shape], history: History) -> dict[int, Shape]:
    """Shapes after all edits of what they change, by tensor of the dense network."""
    weights = {f"{name}.weight" for name, kind in history.drops.items() if kind == "constant"} & present.keys()
    shapes = {id(present[name]): (*dense[id(present[name])][:1], 0) for name in weights}
    return shapes | {id(present[name]): shape for name, shape in history.shapes_now.items() if name in present}


def _table(found: dict[str, Any]) -> LatencyTable:
    try:
        return LatencyTable.from_plain(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise plain.damaged(f"its table of latencies is none ({type(error).__name__}: {error})") from error


def _write_edit(edit: Edit, known: dict[bytes, Tensor]) -> dict[str, Any]:
    """One edit as plain data; equal positions share a tensor among all that is ``known``."""

    def tensor(positions: IndexArray | tuple[int, ...]) -> Tensor:
        # Most axes of a group have the same positions, and `torch.save` writes a tensor once.
        array = np.array(positions, dtype=np.int64)
        return known.setdefault(array.tobytes(), torch.from_numpy(array))

    when = {"epoch": int(edit.epoch), "step": int(edit.step), "cut": int(edit.cut)}
    if isinstance(edit, Drop):
        modules = {canonical(name): str(kind) for name, kind in edit.modules.items()}
        return {"kind": edit.kind, "modules": modules, "groups": [str(group) for group in edit.groups], **when}
    return {
        "kind": edit.kind,
        "axes": {name: {dim: tensor(kept) for dim, kept in axes.items()} for name, axes in edit.axes.items()},
        "kept": {group: tensor(units) for group, units in edit.kept.items()},
        **when,
        "info": {name: _plain_number(name, value) for name, value in edit.info.items()},
    }


def _plain_number(name: str, value: object) -> int | float:
    # Scalars of numpy pass for numbers, but do not load with `weights_only=True`.
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise HistoryError(f"Expected `info[{name!r}]` to be a plain number, got {type(value).__name__}.")


def _same(mine: History, history: History) -> bool:
    return mine.drops == history.drops and _same_axes(mine.axes, history.axes)


def _same_axes(first: Axes, second: Axes) -> bool:
    return first.keys() == second.keys() and all(
        first[name].keys() == second[name].keys()
        and all(np.array_equal(first[name][dim], second[name][dim]) for dim in first[name])
        for name in first
    )


def _read_edit(found: object, lengths: dict[str, list[int]], units: dict[str, int]) -> Edit:
    """One edit of a history; ``lengths`` of tensors and ``units`` of groups go from before it to after it."""
    edit: dict[str, Any] = plain.value(found, dict, "an edit")
    kind = plain.entry(edit, "kind", str)
    if kind == Keep.kind:
        return _read_keep(edit, lengths, units)
    if kind == Drop.kind:
        return _read_drop(edit, units)
    raise HistoryError(f"The pruning history holds an edit of the unknown kind {kind!r}. {_UPGRADE}")


def _read_drop(edit: dict[str, Any], units: dict[str, int]) -> Drop:
    modules = dict(plain.items(edit, "modules", str))
    if unknown := {kind for kind in modules.values() if kind not in get_args(Kind)}:
        raise HistoryError(f"The pruning history puts an unknown {min(unknown)!r} in place of a layer. {_UPGRADE}")
    groups = tuple(plain.value(group, str, "a group that is gone") for group in plain.entry(edit, "groups", list))
    for group in groups:
        if not units.get(group):
            raise plain.damaged(f"an edit takes out a group {group!r} that is not there")
        units[group] = 0
    epoch, step, index = (plain.entry(edit, key, int) for key in ("epoch", "step", "cut"))
    return Drop(modules, groups, epoch, step, index)


def _read_keep(edit: dict[str, Any], lengths: dict[str, list[int]], units: dict[str, int]) -> Keep:
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
