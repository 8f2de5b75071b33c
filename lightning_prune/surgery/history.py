"""History of a network's edits, stored with the network and in its checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.structure import Size
from lightning_prune.structure.cost import LatencyTable
from lightning_prune.structure.graph import Axes, Structure
from lightning_prune.structure.latency import measure_latency
from lightning_prune.structure.latency_file import read_table
from lightning_prune.structure.layers import is_within, options, tensors
from lightning_prune.structure.size_attributes import size_attributes
from lightning_prune.structure.traced_model import TracedModel
from lightning_prune.surgery import plain
from lightning_prune.surgery.depth import layer, templates
from lightning_prune.surgery.edits import (
    UPGRADE,
    Drop,
    Edit,
    Keep,
    NetworkState,
    Replace,
    read_edit,
    write_edit,
)
from lightning_prune.surgery.plain import HistoryError
from lightning_prune.surgery.tensors import canonical, named, non_persistent

__all__ = [
    "ATTRIBUTE",
    "KEY",
    "VERSION",
    "Dense",
    "History",
    "HistoryError",
    "attach",
    "edits_of",
    "history_of",
    "history_or_new",
    "original_of",
    "save_into",
    "shapes_of",
    "table_of",
]

#: Key of the history in a checkpoint.
KEY = "lightning_prune"
#: Version of the format; all earlier versions can be read.
VERSION = 3

#: The attribute of a network that holds its history.
ATTRIBUTE = "_lightning_prune_history"

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Dense:
    """State of the dense network that checkpoints do not contain, to widen the live network again.

    Attributes:
        buffers: Non-persistent buffers.
        attributes: Configuration attributes of layers, by name of the module.
        layers: Templates of modules that were removed or replaced, by name.
    """

    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layers: Mapping[str, nn.Module] = field(default_factory=dict)

    def with_cut(self, model: nn.Module, names: Iterable[str]) -> Dense:
        """Add the state of ``model`` before its tensors ``names`` are cut for the first time."""
        names = set(names)
        present, unsaved, sizes = named(model), non_persistent(model), size_attributes(model, sorted(names))
        touched = {id(present[name]) for name in names - sizes.keys()}
        buffers = {name: present[name].detach().clone() for name in unsaved if id(present.get(name)) in touched}
        attributes = {
            canonical(prefix): found
            for prefix, module in model.named_modules()
            if any(id(t) in touched for t in tensors(module).values()) and (found := options(module))
        }
        for name, place in sizes.items():
            owner = name.rpartition(".")[0]
            attributes[owner] = {**attributes.get(owner, {}), **place.attributes}
        # Earlier entries take precedence.
        known = {owner: {**found, **self.attributes.get(owner, {})} for owner, found in attributes.items()}
        return replace(self, buffers={**buffers, **self.buffers}, attributes={**self.attributes, **known})

    def shape_of(self, name: str, shape: Shape) -> Shape:
        """The dense shape of a tensor that was not cut yet, given its shape now."""
        owner, _, own = name.rpartition(".")
        bare = self.layers.get(owner)
        return shape if bare is None else tuple(tensors(bare)[own].shape)

    def without(
        self, model: nn.Module, names: Iterable[str], shapes: Mapping[str, Shape], replaced: Collection[str]
    ) -> Dense:
        """Add the state of ``model`` before the modules ``names`` are removed.

        Args:
            model: The network.
            names: Modules to remove.
            shapes: Dense shapes of the dense network's tensors that were cut.
            replaced: Modules that were replaced before, and so are not part of the dense network.
        """
        names = [name for name in names if not is_within(name, replaced)]
        present = named(model)
        buffers = {
            name: present[name].detach().clone()
            for name in non_persistent(model)
            if name in present and is_within(name, names) and not is_within(name, replaced)
        }
        layers = templates(model, names, self.layers, shapes, self.attributes)
        return replace(self, buffers={**buffers, **self.buffers}, layers=layers)


@dataclass(frozen=True, eq=False)
class History:
    """All edits of a network since it was dense.

    Attributes:
        shapes: Dense shape of every tensor of the dense network that was ever cut.
        size: Size of the dense network; its memory is unknown in files of version 1.
        edits: What was done, in order.
        dense: What it takes to widen the live network; not part of a checkpoint.
        latency: What its latency is computed from, if that was measured: one table for all of the network's life.
    """

    shapes: Mapping[str, Shape]
    size: Size
    edits: tuple[Edit, ...] = ()
    dense: Dense = field(default_factory=Dense)
    latency: LatencyTable | None = None

    @classmethod
    def begin(cls, structure: Structure) -> History:
        """The empty history of a dense network."""
        size = Size.of(structure)
        return cls({}, replace(size, table_latency=None), latency=structure.cost.latency_table)

    def add(self, edit: Edit, model: nn.Module) -> History:
        """Append ``edit``; must be called before it is applied to ``model``.

        Raises:
            HistoryError: If the edit does not match the model and this history, or does not consist of plain numbers.
        """
        known, present = self._state_now(), shapes_of(model, edit.axes if isinstance(edit, Keep) else ())
        new: dict[str, Shape] = {}
        if isinstance(edit, Keep):
            axes = {canonical(name): kept for name, kept in edit.axes.items()}
            factors = {canonical(name): rows for name, rows in edit.factors.items()}
            edit = replace(edit, axes=axes, factors=factors)
            for name in edit.axes:
                if name not in present:
                    raise HistoryError(
                        f"Expected the name of a parameter, a buffer or a whole number of the network, got {name!r}."
                    )
            first = [name for name in edit.axes if name not in known.lengths]
            new = {name: self.dense.shape_of(name, present[name]) for name in first}
            known.lengths |= {name: list(present[name]) for name in first}
            dense = self.dense.with_cut(model, new)
        else:
            for name in map(canonical, edit.modules):
                if layer(model, name) is None:
                    raise HistoryError(f"Expected the name of a layer of the network, got {name!r}.")
            shapes = {name: shape for name, shape in self.shapes.items() if not is_within(name, known.replaced)}
            dense = self.dense.without(model, map(canonical, edit.modules), shapes, known.replaced)
        # Verify that the edit can be read back.
        edit = read_edit(write_edit(edit, {}), known)
        # A latency table is valid only for the same groups.
        latency = None if isinstance(edit, Replace) else self.latency
        shapes = {**self.shapes, **new}
        return replace(self, shapes=shapes, edits=(*self.edits, edit), dense=dense, latency=latency)

    def found(self, structure: Structure, *, new_dense: bool) -> History:
        """Complete the last edit, a `Replace`, with the structure that was traced after it.

        Args:
            structure: Structure of the network.
            new_dense: Whether shares refer to this network from here on, rather than to the previous dense network, to
                which only the widths of new groups are added.
        """
        last = self.edits[-1]
        if not isinstance(last, Replace):
            raise HistoryError(f"Expected the last edit to be a replacement, got {last.kind!r}.")
        before = replace(self, edits=self.edits[:-1])
        if new_dense:
            original = Size.of(structure)
        else:
            units = before.widths_now
            fresh = {
                name: width
                for name, width in structure.widths.items()
                if is_within(name, last.modules) or units.get(name) != width
            }
            original = replace(last.original, widths={**last.original.widths, **fresh})
        edit = replace(last, widths=structure.widths, original=original, new_dense=new_dense)
        read_edit(write_edit(edit, {}), before._state_now())
        return replace(self, edits=(*before.edits, edit), latency=structure.cost.latency_table)

    def _state_now(self) -> NetworkState:
        """Shapes and units after the last edit."""
        known = NetworkState({name: list(shape) for name, shape in self.shapes.items()}, dict(self.size.widths))
        for edit in self.edits:
            known.follow(edit)
        return known

    @property
    def original(self) -> Size:
        """The dense network that shares refer to; its memory is 0 for files of version 1."""
        for edit in reversed(self.edits):
            if isinstance(edit, Replace):
                return edit.original
        size = self.size
        if self.latency is None or not size.memory:
            return size
        return replace(size, table_latency=self.latency.value(size.widths, size.memory))

    @property
    def dense_is_measurable(self) -> bool:
        """Whether a latency table measured now covers the dense network."""
        last = [edit for edit in self.edits if isinstance(edit, Replace)][-1:]
        return not last or last[0].new_dense

    @property
    def drops(self) -> dict[str, str]:
        """Layers that were removed since the last replacement, with the kinds of their stubs."""
        drops = [edit for edit in self.since_replaced if isinstance(edit, Drop)]
        return {name: kind for edit in drops for name, kind in edit.modules.items()}

    @property
    def vanished(self) -> frozenset[str]:
        """Groups of the dense network that were removed, alone or with a replaced module."""
        units = self.widths_now
        return frozenset(name for name in self.original.widths if not units.get(name))

    @property
    def groups_now(self) -> frozenset[str]:
        """Groups that have units left."""
        return frozenset(self.original.widths) - self.vanished

    @property
    def axes(self) -> Axes:
        """All cuts since the last replacement as one."""
        return _composed(self.since_replaced)

    @property
    def widths_now(self) -> dict[str, int]:
        """Units by group after the last edit; 0 for removed groups."""
        return self._state_now().units

    @property
    def shapes_now(self) -> dict[str, Shape]:
        """Shapes after the last edit, of tensors that were cut or replaced."""
        return {name: tuple(lengths) for name, lengths in self._state_now().lengths.items()}

    @property
    def steps(self) -> tuple[Edit, ...]:
        """Equivalent edits, with cuts between replacements merged."""
        steps: list[Edit] = []
        since: list[Edit] = []
        for edit in (*self.edits, None):
            if edit is not None and not isinstance(edit, Replace):
                since.append(edit)
                continue
            axes = _composed(since)
            drops = {name: kind for one in since if isinstance(one, Drop) for name, kind in one.modules.items()}
            steps += [Keep(axes, {}, 0, 0, 0)] if axes else []
            steps += [Drop(drops, (), 0, 0, 0)] if drops else []
            steps += [edit] if edit is not None else []
            since = []
        return tuple(steps)

    @property
    def until_replaced(self) -> tuple[Edit, ...]:
        """The edits up to the last replacement."""
        return self.edits[: len(self.edits) - len(self.since_replaced)]

    @property
    def since_replaced(self) -> tuple[Edit, ...]:
        """The edits since the last replacement."""
        last = max((number for number, edit in enumerate(self.edits) if isinstance(edit, Replace)), default=-1)
        return self.edits[last + 1 :]

    def to_plain(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings, numbers and int64 tensors, loadable with ``weights_only=True``."""
        known: dict[bytes, Tensor] = {}
        return {
            "version": VERSION,
            "original": {
                "shapes": {name: list(shape) for name, shape in self.shapes.items()},
                "params": int(self.size.params),
                "macs": int(self.size.macs),
                "widths": {group: int(width) for group, width in self.size.widths.items()},
                **({} if self.size.memory is None else {"memory": int(self.size.memory)}),
                **({} if self.latency is None else {"latency": self.latency.to_plain()}),
            },
            "edits": [write_edit(edit, known) for edit in self.edits],
        }

    @classmethod
    def from_plain(cls, found: object) -> History:
        """Read what :meth:`to_plain` returned.

        Raises:
            HistoryError: If it is of a newer version, or anything is missing, of another type, out of range or
                inconsistent.
        """
        top: dict[str, Any] = plain.value(found, dict, "the history")
        version = plain.count(top, "version", least=1)
        if version > VERSION:
            raise HistoryError(f"The pruning history has version {version}, {VERSION} is the last known. {UPGRADE}")
        original = plain.entry(top, "original", dict)
        shapes = {name: plain.shape(lengths, name) for name, lengths in plain.items(original, "shapes", list)}
        widths = plain.counts(original, "widths")
        known = NetworkState({name: list(shape) for name, shape in shapes.items()}, dict(widths))
        edits = tuple(read_edit(edit, known) for edit in plain.entry(top, "edits", list))
        untouched = shapes.keys() - known.cut
        if untouched:
            raise plain.damaged(f"it has a dense shape for {min(untouched)!r}, which no edit cuts")
        params, macs = (plain.count(original, key) for key in ("params", "macs"))
        memory = plain.count(original, "memory") if "memory" in original else None
        latency = _table(plain.entry(original, "latency", dict), known.units) if "latency" in original else None
        return cls(shapes, Size(params, macs, widths, memory=memory), edits, latency=latency)


def shapes_of(model: nn.Module, names: Iterable[str] = ()) -> dict[str, Shape]:
    """Shapes of all parameters and buffers that have one, by canonical name.

    Args:
        model: The network.
        names: Names of which some may be sizes in attributes (`size_attributes`), whose shape is their value.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in named(model).items() if not is_lazy(tensor)}
    others = [canonical(name) for name in names if canonical(name) not in shapes]
    return {**shapes, **{name: (place.value,) for name, place in size_attributes(model, others).items()}}


def attach(model: nn.Module, history: History | None) -> None:
    """Store ``history`` with ``model``; None removes it."""
    if history is not None:
        setattr(model, ATTRIBUTE, history)
    elif history_of(model) is not None:
        delattr(model, ATTRIBUTE)


def history_of(model: nn.Module) -> History | None:
    """The history of ``model``, or None."""
    history: History | None = getattr(model, ATTRIBUTE, None)
    return history


def history_or_new(model: nn.Module, structure: Structure) -> History:
    """The history of ``model``, or a new one, with the structure's latency table if it has none or another one."""
    history = history_of(model) or History.begin(structure)
    return replace(history, latency=_table_now(history, structure))


def _table_now(history: History, structure: Structure) -> LatencyTable | None:
    """The latency table of the history, or the structure's if that was measured elsewhere or at another time."""
    known, given = history.latency, structure.cost.latency_table
    if known is None or (given is not None and given.about != known.about):
        return given
    return known  # which has the layers that were removed since


def edits_of(
    structure: Structure,
    kept: Mapping[str, tuple[int, ...]],
    epoch: int,
    step: int,
    cut: int,
    info: Mapping[str, float] | None = None,
) -> tuple[Edit, ...]:
    """The edits of a cut: a `Keep` and a `Drop`."""
    axes, drops = structure.axes(kept), structure.drops(kept)
    narrow = {name: units for name, units in kept.items() if units}
    edits: list[Edit] = []
    if axes or narrow:
        edits.append(Keep(axes, narrow, epoch, step, cut, info or {}, structure.factors(kept)))
    if drops:
        gone = {name for name, units in kept.items() if not units}
        features = (group.name for group in structure.groups if group.vanishes_with(gone))
        edits.append(Drop(drops, (*(name for name in kept if name in gone), *features), epoch, step, cut))
    return tuple(edits)


def table_of(
    traced: TracedModel,
    structure: Structure,
    file: str | None = None,
    progress: Callable[[float], object] = lambda _: None,
) -> LatencyTable:
    """The latency table in a file, else that of earlier cuts, else a new one.

    Args:
        traced: The network and its calls.
        structure: Structure of the network.
        file: What the script of `latency_script` wrote.
        progress: Called with the share that is done, if the latency is measured.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of this network.
    """
    history = history_of(traced.model)
    known, dense = (None, None) if history is None else (history.latency, history.size.widths)
    if file is not None:
        table = read_table(file, traced, structure, dense)
        if known is not None and known.about != table.about:
            warnings.warn(
                f"the network was pruned with a latency table of {known.device}; budgets and the report now refer to "
                f"{file}, measured on {table.device}",
                stacklevel=2,
            )
        return table
    return known if known is not None else measure_latency(traced, structure, dense, progress)


def original_of(model: nn.Module, structure: Structure) -> Size:
    """The size of the dense network.

    Args:
        model: The network, with its history if it was cut.
        structure: Structure of the network, with a latency table if needed.

    Raises:
        HistoryError: If the groups are not those of the history.
    """
    history = history_of(model)
    if history is None:
        return Size.of(structure)
    original = history.original
    if structure.widths.keys() != history.groups_now:
        raise HistoryError(
            f"expected the groups the network was pruned with ({', '.join(sorted(history.groups_now))}), found "
            f"{', '.join(structure.widths)}. Resume with the code and versions that wrote the checkpoint."
        )
    cost, table = structure.cost, _table_now(history, structure)
    memory = original.memory or cost.memory(original.widths)
    is_other = history.latency is not None and table is not history.latency
    latency = None if is_other else original.table_latency
    if latency is None and table is not None and history.dense_is_measurable:
        latency = table.value(original.widths, memory)
    return replace(original, memory=memory, table_latency=latency)


def save_into(checkpoint: MutableMapping[str, Any], model: nn.Module) -> None:
    """Add the history of ``model``, if any, to a checkpoint."""
    history = history_of(model)
    if history is not None:
        checkpoint[KEY] = history.to_plain()


def _table(found: dict[str, Any], units: Mapping[str, int]) -> LatencyTable:
    """Read a latency table and check that it is valid for the network after the last edit."""
    gone = [group for group, width in units.items() if not width]
    try:
        table = LatencyTable.from_plain(found)
        milliseconds = table.without(gone).value(units, 1)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise plain.damaged(f"its table of latencies is none ({type(error).__name__}: {error})") from error
    numbers = [table.fixed, table.per_byte, milliseconds, *(n for part in table.layers for row in part.ms for n in row)]
    if not all(map(math.isfinite, numbers)):
        raise plain.damaged("its table of latencies has entries that are no numbers")
    return table


def _composed(edits: Iterable[Edit]) -> Axes:
    """Compose several cuts."""
    whole: Axes = {}
    for edit in edits:
        if not isinstance(edit, Keep):
            continue
        for name, axes in edit.axes.items():
            remaining = whole.setdefault(name, {})
            for dim, kept in axes.items():
                remaining[dim] = remaining[dim][kept] if dim in remaining else kept
    return whole
