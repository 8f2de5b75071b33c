"""Analysis of a traced network: groups of units, frozen axes with their reasons, and the cost model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from lightning_prune.structure.atoms import Atoms, IndexArray
from lightning_prune.structure.cost import Axis, CostModel, Term
from lightning_prune.structure.graph import Frozen, Group, Member, Role, Structure
from lightning_prune.structure.own_norms import own_norms
from lightning_prune.structure.rules import RULES, unknown
from lightning_prune.structure.sharding import has_shards, plain_classes
from lightning_prune.structure.traced_model import StructureError, TracedModel, batch_size_of, describe, first_line
from lightning_prune.structure.tracing import (
    Blocks,
    Call,
    Decision,
    FakeCopy,
    Kind,
    MacsRecord,
    SplitKey,
    Tracer,
    output_tensors,
)

__all__ = ["KINDS", "Analysis", "HeadFeatures", "TracedRun"]

#: Kinds of copies, the cheapest first.
KINDS: tuple[Kind, ...] = ("meta", "fake", "real")
_NAMES: dict[Kind, str] = {"meta": "the meta device", "fake": "fake tensors", "real": "real tensors"}


@dataclass(frozen=True)
class HeadFeatures:
    """Groups of features of attention heads, and the analysis that found them, in which features are the units."""

    groups: list[Group]
    analysis: Analysis


@dataclass(frozen=True)
class TracedRun:
    """A traced call: the kind of copy it ran on, its operators with their numbers, its splits, views and queries."""

    call: Call
    kind: Kind
    script: list[tuple[Any, ...]]
    decisions: list[Decision]
    views: list[Blocks | None]
    query_widths: list[int]

    @classmethod
    def of(cls, call: Call, kind: Kind, tracer: Tracer) -> TracedRun:
        """The latest run of a tracer."""
        return cls(call, kind, tracer.script, tracer.decisions, tracer.views, tracer.query_widths)


class Analysis:
    """Traces a network and groups its atoms into units."""

    def __init__(
        self,
        traced: TracedModel,
        choices: Mapping[SplitKey, int] | None = None,
        copies: dict[Kind, FakeCopy] | None = None,
        ties: Sequence[Sequence[tuple[str, int]]] = (),
    ) -> None:
        self.traced = traced
        self.ties = ties
        self.notes: list[str] = []
        self.atoms = Atoms()
        self.copies = copies or {}
        try:
            self.first = self.copy(KINDS[0])
        except Exception as error:
            raise StructureError(
                f"{type(traced.model).__name__} cannot be copied for analysis ({type(error).__name__}: {error}). "
                "Pruning runs a copy of the network on fake tensors; make `copy.deepcopy(model)` work, or keep what it "
                "cannot copy outside of the module."
            ) from error
        self.notes += self.first.notes
        self.labels = {
            name: tuple(self.atoms.fresh(n) for n in tensor.shape) for name, tensor in self.first.named.items()
        }
        self.shapes = {name: tuple(t.shape) for name, t in self.first.named.items()}
        self.tracer = Tracer(self.atoms, RULES, unknown)
        self.tracer.choices = choices or {}
        self.tracer.axes = {
            int(axis[0]): (name, dim, len(axis))
            for name, axes in self.labels.items()
            for dim, axis in enumerate(axes)
            if len(axes) > 1 and len(axis)
        }
        with plain_classes(traced.model):
            self.tracer.own_norms = own_norms(traced.model)
        self.norm_sizes: dict[str, IndexArray] = {}  # atoms that the sizes of norms without weights count
        self.runs: list[TracedRun] = []
        self.groups: list[Group] = []
        self.failed: list[Group] = []  # groups whose trial cuts failed
        self.head_features: HeadFeatures | None = None
        self.same_in_both_modes: list[Call] = []
        self.patterns: list[tuple[IndexArray, tuple[tuple[str, int], ...]]] = []
        self.remarks: dict[str, None] = {}

    def copy(self, kind: Kind) -> FakeCopy:
        """The copy of the network on tensors of this kind, made once."""
        if kind not in self.copies:
            self.copies[kind] = self.traced.copy(kind)
        return self.copies[kind]

    def with_choices(self, choices: Mapping[SplitKey, int]) -> Analysis:
        """A new analysis of the same network on the same copies, with these parts chosen for splits."""
        other = Analysis(self.traced, choices, self.copies, self.ties)
        other.tracer.bounds_follow = self.tracer.bounds_follow
        return other

    def with_ties(self, ties: Sequence[Sequence[tuple[str, int]]]) -> Analysis:
        """A new analysis where axes of tensors that are tied lose the same units."""
        return Analysis(self.traced, self.tracer.choices, self.copies, ties)

    def with_bounds_that_follow(self) -> Analysis:
        """A new analysis where bounds of slices follow units on both sides, as trials decide."""
        other = Analysis(self.traced, None, self.copies, self.ties)
        other.tracer.bounds_follow = True
        return other

    def structure(self) -> Structure:
        """The structure that was found."""
        groups, inner = self._with_norm_sizes(self.groups), self.head_features
        features = [] if inner is None else inner.analysis._with_norm_sizes(inner.groups)
        every = [one for group in groups for one in (group, *(f for f in features if f.within[0] == group.name))]
        return Structure(
            tuple(every), tuple(self._frozen(groups)), self._cost(groups), tuple(self.notes), tuple(self.remarks)
        )

    def _with_norm_sizes(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with the sizes of norms without weights that count their units."""
        counted = {name: self.atoms.find(label) for name, label in self.norm_sizes.items()}
        found = []
        for group in groups:
            units, sizes = self.atoms_of(group), []
            for name, roots in counted.items():
                positions = [np.flatnonzero(roots == unit) for unit in units]
                if len(positions[0]):
                    sizes.append(Member(name, 0, "along", np.stack(positions), len(roots)))
            found.append(replace(group, sizes=(*group.sizes, *sizes)))
        return found

    def follow(self, structure: Structure) -> None:
        """Trace again with the units of a known structure."""
        self.label_units(structure)
        self.trace()

    def label_units(self, structure: Structure) -> None:
        """Give all positions of a unit one atom, as they are coupled in a known structure."""
        self.labels = {name: tuple(axis.copy() for axis in axes) for name, axes in self.labels.items()}
        for group in structure.groups:
            if group.within:  # its features are coupled through the heads
                continue
            first = group.members[0]
            units = self.labels[first.tensor][first.dim][first.index[:, :1]]
            for member in group.members:
                self.labels[member.tensor][member.dim][member.index] = units

    def trace(self) -> None:
        """Run all calls and unite the atoms that can only be removed together."""
        for number, call in enumerate(self.traced.calls):
            if self._is_known(call):
                continue
            self.tracer.counting, self.tracer.batch = number == 0, batch_size_of(call)
            try:
                self._run(call)
            except Exception as error:
                mode = "train" if call.training else "eval"
                raise StructureError(
                    f"{type(self.traced.model).__name__}.{call.method} fails on the example in {mode} mode: "
                    f"{type(error).__name__}: {error}. The example was {describe(call)}; give one that the network "
                    "accepts (`example_input_array` of the LightningModule, or the `example` argument)."
                ) from error
        self.tracer.counting = False
        for call in self.traced.optional:
            self.run_if_possible(call)
        for (tensor, dim), *others in self.ties:
            for other, at in others:
                self.atoms.unite(self.labels[tensor][dim], self.labels[other][at])

    # -- tracing ----------------------------------------------------------------------------------------------------

    def _is_known(self, call: Call) -> bool:
        """Whether the same call was traced in the other mode and no module read `training`."""
        return any(
            known.args is call.args and known.kwargs is call.kwargs and known.method == call.method
            for known in self.same_in_both_modes
        )

    def run_if_possible(self, call: Call) -> None:
        """Trace a call, or add a note if it fails."""
        try:
            self._run(call)
        except Exception as error:
            self.notes.append(
                f"`{call.method}` could not be traced ({type(error).__name__}: {first_line(error)}); layers that "
                "only it uses are frozen"
            )

    def _run(self, call: Call) -> None:
        """Trace a call on the cheapest kind of tensors that it runs on."""
        kinds = KINDS[:-1] if has_shards(self.traced.model) else KINDS  # no process has all weights
        for kind in kinds:
            counted = self.tracer.macs, self.tracer.written
            self.tracer.macs, self.tracer.written = list(counted[0]), list(counted[1])
            try:
                out = self._run_on(kind, call)
            except Exception as error:
                self.tracer.forget()
                self.tracer.macs, self.tracer.written = counted
                if kind == kinds[-1]:
                    raise
                dearer = _NAMES[kinds[kinds.index(kind) + 1]]
                why = f"it does not run on {_NAMES[kind]} ({type(error).__name__}: {first_line(error)})"
                self.remarks[f"`{call.method}` was traced on {dearer}, which takes longer, as {why}"] = None
                continue
            self.freeze_output(self.tracer, call, out)
            self._note_norm_sizes(self.copy(kind))
            self.runs.append(TracedRun.of(call, kind, self.tracer))
            if not self.copy(kind).depends_on_mode:
                self.same_in_both_modes.append(call)
            self.tracer.forget()
            return

    def _note_norm_sizes(self, copy: FakeCopy) -> None:
        """Note what the sizes of norms without weights count; calls of one norm lose the same units."""
        for name, axes in copy.unweighted_norms.axes():
            for tensor, dim in axes:
                label = self.tracer.value(tensor).axes[dim]
                if not isinstance(label, np.ndarray):
                    continue
                known = self.norm_sizes.setdefault(name, label)
                if len(known) == len(label):
                    self.atoms.unite(known, label)
                else:
                    self.atoms.freeze(np.concatenate([known, label]), f"normalised at two widths by `{name}`")
        copy.unweighted_norms.inputs.clear()

    def _run_on(self, kind: Kind, call: Call) -> Any:
        """Run a call, and again with the weights of its attention layers if it turns out to use them."""
        copy, counted = self.copy(kind), (list(self.tracer.macs), list(self.tracer.written))
        try:
            out = copy.run(self.tracer, call, self.labels)
        except Exception:
            if not copy.uses_attention_weights(call, failed=True):
                raise
        else:
            if not copy.uses_attention_weights(call, failed=False):
                return out
        self.tracer.forget()
        self.tracer.macs, self.tracer.written = counted
        return copy.run(self.tracer, call, self.labels)

    def freeze_output(self, tracer: Tracer, call: Call, out: Any) -> None:
        """Freeze the axes of the network's outputs."""
        if call.method == "forward":
            for tensor in output_tensors(out):
                tracer.freeze(tracer.value(tensor).axes, "an output of the network")

    def freeze_unused(self) -> None:
        """Freeze parameters and buffers that no call uses."""
        for name in self.first.named:
            if name not in self.tracer.seen:
                for axis in self.labels[name]:
                    self.atoms.freeze(axis, "not used by any traced call")

    def free_indices(self) -> int:
        """Number of indices, over all axes of parameters, that may be removed."""
        named, none = self.first.named, np.empty(0, dtype=np.int64)
        learned = (axes for name, axes in self.labels.items() if isinstance(named[name], nn.Parameter))
        atoms = np.concatenate([none, *(atoms for axes in learned for atoms in axes)])
        return int((~self.atoms.frozen()[self.atoms.find(atoms)]).sum())

    # -- grouping ---------------------------------------------------------------------------------------------------

    def find_groups(self) -> None:
        """Set ``groups``: classes of atoms with the same set of axes, in the order of execution."""
        self.patterns = patterns = self._patterns()
        self.groups = []
        if not patterns:
            return
        root = np.concatenate([roots for roots, _ in patterns])
        pattern = np.repeat(np.arange(len(patterns)), [len(roots) for roots, _ in patterns])
        position = np.concatenate([np.arange(len(roots)) for roots, _ in patterns])
        free = np.flatnonzero(~self.atoms.frozen()[root])
        # All occurrences, sorted by unit, pattern and position.
        order = free[np.lexsort((position[free], pattern[free], root[free]))]
        pattern, position = pattern[order], position[order]
        starts = np.flatnonzero(np.diff(root[order], prepend=-1))
        sizes = np.diff(starts, append=len(order))
        by_signature: dict[bytes, list[IndexArray]] = {}
        signatures: dict[bytes, list[int]] = {}
        for size in np.unique(sizes).tolist():
            places = starts[sizes == size][:, None] + np.arange(size)
            signature, positions = pattern[places], position[places]
            bounds = np.flatnonzero((signature[1:] != signature[:-1]).any(1)) + 1
            for first, last in zip([0, *bounds.tolist()], [*bounds.tolist(), len(places)], strict=True):
                key = signature[first].tobytes()
                signatures[key] = signature[first].tolist()
                by_signature.setdefault(key, []).append(positions[first:last])
        groups = [
            self._group([patterns[p][1] for p in signatures[key]], np.concatenate(units))
            for key, units in by_signature.items()
        ]
        groups = [group for group in groups if self._learns(group)]
        groups.sort(key=lambda g: (self._rank(g), g.members[0].index[0].tolist()))
        names: dict[str, int] = {}
        for group in groups:
            names[group.name] = names.get(group.name, 0) + 1
            suffix = f"#{names[group.name]}" if names[group.name] > 1 else ""
            self.groups.append(replace(group, name=group.name + suffix))

    def _learns(self, group: Group) -> bool:
        """Whether a parameter has these units, other than as an axis of length 1 that no layer produces.

        A table of coordinates that a layer reads has no units, nor has the first axis of a class token.
        """
        own = [m for m in group.members if isinstance(self.first.named[m.tensor], nn.Parameter) and m.role != "in"]
        return any(m.role == "out" or group.width > 1 for m in own)

    def _patterns(self) -> list[tuple[IndexArray, tuple[tuple[str, int], ...]]]:
        """Axes grouped by content: representatives of their atoms, and the (tensor, dim) pairs that have them."""
        axes = [(name, dim) for name, dims in self.labels.items() for dim in range(len(dims))]
        if not axes:
            return []
        roots = self.atoms.find(np.concatenate([self.labels[name][dim] for name, dim in axes]))
        alike: dict[bytes, list[tuple[str, int]]] = {}
        end = 0
        for name, dim in axes:
            start, end = end, end + len(self.labels[name][dim])
            alike.setdefault(roots[start:end].tobytes(), []).append((name, dim))
        return [(np.frombuffer(key, dtype=np.int64), tuple(places)) for key, places in alike.items() if key]

    def _group(self, places: list[tuple[tuple[str, int], ...]], units: IndexArray) -> Group:
        """Build a group from axes (one entry per occurrence of a unit) and the positions of the units on them."""
        columns: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for column, alike in enumerate(places):
            columns.setdefault(alike, []).append(column)
        axes = sorted(((axis, alike) for alike in columns for axis in alike), key=lambda one: self._place(one[0]))
        units = units[np.argsort(units[:, columns[axes[0][1]][0]], kind="stable")]
        index = {alike: units[:, chosen] for alike, chosen in columns.items()}
        members = tuple(Member(*axis, self._role(axis), index[alike]) for axis, alike in axes)
        return Group(members[0].layer, len(units), members)

    def tied(self, whole: Group, parts: Sequence[Group]) -> Group:
        """A group that was extended by others of its width: their units leave together."""
        first = whole.members[0]
        units = self.labels[first.tensor][first.dim][first.index[:, 0]]
        for part in parts:
            other = part.members[0]
            theirs = self.labels[other.tensor][other.dim][other.index]
            self.atoms.unite(np.repeat(units, theirs.shape[1]), theirs.ravel())
        members = tuple(sorted(whole.members, key=lambda m: self._place((m.tensor, m.dim))))
        return Group(members[0].layer, whole.width, members, whole.sizes)

    def _place(self, axis: tuple[str, int]) -> tuple[int, int, tuple[str, int]]:
        """Where an axis stands among the members of a group."""
        order = self.tracer.order
        return ("out", "along", "in").index(self._role(axis)), order.get(axis[0], len(order)), axis

    def _role(self, axis: tuple[str, int]) -> Role:
        return self.tracer.roles.get(axis, "along")  # type: ignore[return-value]

    def _rank(self, group: Group) -> int:
        return min(
            self.tracer.order.get(m.tensor, len(self.tracer.order))
            for m in group.members
            if m.tensor == group.members[0].tensor
        )

    def _frozen(self, groups: Sequence[Group]) -> list[Frozen]:
        """Frozen axes: output axes and first axes of unused tensors that are not entirely in a group."""
        free: dict[tuple[str, int], int] = {}
        for group in groups:
            for m in group.members:
                free[m.tensor, m.dim] = free.get((m.tensor, m.dim), 0) + m.index.size
        reasons = self.atoms.class_reasons()
        found = []
        for name, axes in self.labels.items():
            for dim, atoms in enumerate(axes):
                stuck = len(atoms) - free.get((name, dim), 0)
                shown = self._role((name, dim)) == "out" or (name not in self.tracer.seen and dim == 0)
                if not (stuck and shown):
                    continue
                texts = (reasons[root] for root in self.atoms.find(atoms).tolist() if root in reasons)
                found.append(Frozen(name, dim, stuck, next(texts, "its group failed the trial")))
        return found

    def atoms_of(self, group: Group) -> IndexArray:
        """Representatives of the units of a group."""
        first = group.members[0]
        return self.atoms.find(self.labels[first.tensor][first.dim][first.index[:, 0]])

    # -- cost -------------------------------------------------------------------------------------------------------

    def _cost(self, groups: Sequence[Group]) -> CostModel:
        length, inner = self._lengths(groups), self._inner_lengths()

        def axis(name: str, dim: int) -> Axis:
            whole = length(self.labels[name][dim])
            part = None if inner is None else inner(self.head_features.analysis.labels[name][dim])  # type: ignore[union-attr]
            return replace(whole, inner=(part, self.shapes[name][dim])) if part and part.repeat else whole

        parameters = tuple(
            Term(1.0, tuple(axis(name, dim) for dim in range(tensor.dim())), name.rpartition(".")[0])
            for name, tensor in self.first.named.items()
            if isinstance(tensor, nn.Parameter)
        )
        batch = batch_size_of(self.traced.calls[0])
        if self.tracer.samples is not None:  # an example without a batch dimension gets one of length 1
            batch = self.tracer.samples if self.tracer.time_first else min(batch, self.tracer.samples)

        def terms(records: Sequence[MacsRecord], others: Sequence[MacsRecord]) -> tuple[Term, ...]:
            """Records of both analyses: heads are labelled in one, their features in the other."""
            found = []
            for record, other in zip(records, others, strict=True):
                axes = [length(atoms) for atoms in record.axes]
                inside = [] if inner is None else [(inner(atoms), len(atoms)) for atoms in other.axes]
                shares = [(part, full) for part, full in inside if part.repeat]
                factor = record.factor / math.prod(full for _, full in shares) / (1 if record.once else batch)
                found.append(Term(factor, (*axes, *(part for part, _ in shares)), record.layer))
            return tuple(found)

        tracer = self.tracer
        other = tracer if self.head_features is None else self.head_features.analysis.tracer
        return CostModel(parameters, terms(tracer.macs, other.macs), self.shapes, terms(tracer.written, other.written))

    def _lengths(self, groups: Sequence[Group]) -> Callable[[IndexArray], Axis]:
        """A function from the atoms of an axis to its length."""
        owner = np.full(len(self.atoms), -1)
        for number, group in enumerate(groups):
            owner[self.atoms_of(group)] = number

        def length(roots: IndexArray) -> Axis:
            counts = np.bincount(owner[roots] + 1, minlength=1)
            repeat = [(groups[i], int(counts[i + 1])) for i in np.flatnonzero(counts[1:]).tolist()]
            return Axis(int(counts[0]), tuple((group.name, n // group.width) for group, n in repeat))

        known = {
            id(self.labels[name][dim]): shared
            for shared, places in ((length(self.atoms.find(roots)), places) for roots, places in self.patterns)
            for name, dim in places
        }

        def axis(atoms: IndexArray) -> Axis:
            if id(atoms) not in known:
                known[id(atoms)] = length(self.atoms.find(atoms))
            return known[id(atoms)]

        return axis

    def _inner_lengths(self) -> Callable[[IndexArray], Axis] | None:
        """The same for the features of heads, of which another analysis has the atoms."""
        return None if self.head_features is None else self.head_features.analysis._lengths(self.head_features.groups)
