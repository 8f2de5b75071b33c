"""From a network and the ways it is run to what can be removed: groups of units, frozen parts with reasons, costs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from lightning_prune.errors import PruningError
from lightning_prune.structure.atoms import Atoms, IndexArray, MismatchError, NumberError, SealedAtoms
from lightning_prune.structure.cost import Axis, CostModel, Term
from lightning_prune.structure.graph import Axes, Frozen, Group, Member, Role, Structure
from lightning_prune.structure.rules import RULES, unknown
from lightning_prune.structure.tracing import (
    Blocks,
    Call,
    Decision,
    FakeCopy,
    Kind,
    SplitKey,
    Tracer,
    flat_tensors,
    output_tensors,
)

__all__ = ["StructureError", "Subject", "Tracing", "rehearse", "trace"]

_LOG = logging.getLogger("lightning_prune")
#: Operators that all trials of a network together may run; then the search for the groups that fail ends.
_MOST_OPERATORS = 500_000
#: Trials that every network has, however many operators it runs.
_LEAST_TRIALS = 64

#: Kinds of copies, the cheapest first.
_KINDS: tuple[Kind, ...] = ("meta", "fake", "real")
_NAMES: dict[Kind, str] = {"meta": "the meta device", "fake": "fake tensors", "real": "real tensors"}


class StructureError(PruningError, ValueError):
    """A network whose structure could not be found."""


@dataclass(frozen=True)
class Subject:
    """A network and all that is needed to run a copy of it.

    Attributes:
        model: The network.
        calls: How it is run; the first is a plain forward pass in eval mode, which costs are counted on.
        optional: Calls that may fail to be traced, which leaves a note (a ``training_step`` with side effects, say).
        memo: Objects of the network that a copy must not copy: ``{id(object): replacement}``.
        prepare: Makes a copy ready to run (replaces metrics and loggers).
        with_hooks: Whether users' hooks that take part in what the network computes run on a copy.
    """

    model: nn.Module
    calls: tuple[Call, ...]
    optional: tuple[Call, ...] = ()
    memo: Mapping[int, Any] | None = None
    prepare: Callable[[nn.Module], None] | None = None
    with_hooks: bool = True

    @classmethod
    def of(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Subject:
        """A plain module, run as ``model(*args, **kwargs)`` in eval and in train mode."""
        calls = tuple(Call(args, kwargs, training=training) for training in (False, True))
        return cls(model, calls)

    def copy(self, kind: Kind) -> FakeCopy:
        """A copy of the network on tensors of this kind."""
        return FakeCopy(self.model, self.memo, self.prepare, kind=kind, with_hooks=self.with_hooks)


def trace(subject: Subject, *, trial: bool = True) -> Structure:
    """Find what can be removed together.

    Every index of every axis of every parameter and buffer gets an atom; the network runs on fake tensors and each
    operator's rule unites the atoms that can only go together. Classes of atoms are units; units on the same axes are
    a group. Inputs, outputs, what an unknown operator touches and what never runs is frozen, with the reason. At last
    the copy is cut for trial and run again: a group for which the cut network couples anything anew is frozen too.

    Args:
        subject: The network and how it is run.
        trial: Try a cut of every group. Only tests of the rules themselves leave it out.

    Raises:
        StructureError: If the network cannot be copied or its forward pass fails on the example.
    """
    return Tracing(subject, trial=trial).structure


class Tracing:
    """A network that was traced (see :func:`trace`), and its rehearsals as long as it does not change.

    Args:
        subject: The network and how it is run.
        trial: Try a cut of every group.

    Attributes:
        structure: What was found.

    Raises:
        StructureError: If the network cannot be copied or its forward pass fails on the example.
    """

    def __init__(self, subject: Subject, *, trial: bool = True) -> None:
        if _batch_size(subject.calls[0]) == 0:
            raise StructureError("expected an example of at least one sample, got an empty batch")
        _require_names(subject.model)
        _require_followable(subject.model)
        with torch.inference_mode(False):
            self._analysis = _analysed(subject, trial=trial)
            self.structure = self._analysis.structure()

    def rehearse(self, kept: Mapping[str, Iterable[int]]) -> None:
        """Do what :func:`rehearse` does; the network is traced again only if something speaks against the cut.

        This trace compares the lengths of axes as well, which may differ where nothing else does.
        """
        try:
            _rehearse(lambda: self._analysis, self.structure, kept)
        except StructureError:
            rehearse(self._analysis.subject, self.structure, kept)


def rehearse(subject: Subject, structure: Structure, kept: Mapping[str, Iterable[int]]) -> None:
    """Run a copy of the network at the widths that a cut leaves, and compare what it computes with.

    The trial of `trace` halves every width. What a network makes of a width only below that (``if width < 12``,
    ``min(8, width)``) shows here, before anything is cut.

    Args:
        subject: The network as it is, and how it is run.
        structure: Its structure.
        kept: Units to keep per group. Groups that lose all are left whole: their layers go. Those that keep one unit
            are tried with two: an axis of length 1 lies otherwise in memory, and other operators run for the same. Then
            the functions that its code calls are compared.

    Raises:
        StructureError: If a narrower network is not the masked one; the text names the groups to leave out.
    """

    def analysis() -> _Analysis:
        found = _Analysis(subject)
        # Of a network that was cut before, axes of length 1 have lost what couples them; the structure knows it.
        found.tracer.compares_lengths = False
        found.follow(structure)
        return found

    _rehearse(analysis, structure, kept)


def _rehearse(analyse: Callable[[], _Analysis], structure: Structure, kept: Mapping[str, Iterable[int]]) -> None:
    units = {name: tuple(rows) for name, rows in kept.items()}
    narrower = {
        name: rows if len(rows) > 1 else tuple(sorted((*rows, int(rows[0] == 0))))
        for name, rows in units.items()
        if rows and structure.widths[name] > 2
    }
    groups = [g for g in (structure.group(name) for name in narrower) if len(narrower[g.name]) < g.width]
    single = [structure.group(name) for name, rows in units.items() if len(rows) == 1 < structure.widths[name]]
    if not groups and not single:
        return
    with torch.inference_mode(False):
        try:
            analysis = analyse()
        except StructureError as error:  # training may leave in a module what cannot be copied
            warnings.warn(f"A cut was not rehearsed: {error}", stacklevel=3)
            return
        # What is coupled was settled by the trial, and what cannot run at all shows in the cut itself.
        failure = analysis._compare(structure.axes(narrower), follow=False)
        suspects = groups if failure is None else analysis._suspects(groups, failure) or groups
        reason = failure.reason if failure is not None and failure.numbers else None
        if reason is None and single:
            exactly = {name: rows for name, rows in units.items() if rows}
            at_two, at_one = (analysis._called(structure.axes(kept)) for kept in (narrower, exactly))
            if at_one is not None and at_one != at_two:
                suspects, reason = single, "its code calls other functions where one unit is left"
        if reason is None:
            return
    raise StructureError(
        f"{type(analysis.subject.model).__name__} works otherwise at the widths of this cut "
        f"({', '.join(f'{g.name}: {len(units[g.name])}' for g in suspects)}): {reason}. Nothing has changed. "
        "Leave these layers out (`ignore`), keep more of them, or do not compute with their widths in `forward`."
    )


def _analysed(subject: Subject, *, trial: bool) -> _Analysis:
    """The groups of a network; without its hooks if it cannot be followed with them."""
    analysis = _Analysis(subject)
    try:
        return analysis.best(trial=trial)
    except StructureError as error:
        if not analysis.first.hooks:
            raise
        try:
            without = _Analysis(replace(subject, with_hooks=False)).best(trial=trial)
        except StructureError:
            raise error from error.__cause__
        without.notes.append(f"the network's hooks were left out, as it could not be followed with them: {error}")
        return without


def _require_names(model: nn.Module) -> None:
    """Refuse an attribute with the name that `torch.compile` gives to the module inside: names are read without it."""
    for prefix, module in model.named_modules():
        if "_orig_mod" in module._modules and not isinstance(module, OptimizedModule):
            where = f"{prefix} ({type(module).__name__})" if prefix else type(module).__name__
            raise StructureError(
                f"{where}: expected no attribute `_orig_mod`, which is the name that `torch.compile` gives to the "
                "module that it stands around. Give the attribute another name."
            )


def _require_followable(model: nn.Module) -> None:
    """Refuse modules whose parameters or whose code are not there."""
    for prefix, module in model.named_modules():
        where = f"{prefix or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise StructureError(
                f"{where}: expected modules in Python, got a ScriptModule, whose operators cannot be followed. Prune "
                "the network that it was made from, and script that."
            )
        lazy = [name for name, parameter in module._parameters.items() if is_lazy(parameter)]
        if lazy:
            raise StructureError(
                f"{where}: expected initialized parameters, got `{lazy[0]}` of a lazy layer. Run the network once on "
                "an example before: `model(example)`."
            )


@dataclass(frozen=True)
class _Failure:
    """Why a trial cut failed, and representatives of the atoms at the latest operators, the last one first."""

    reason: str
    trail: list[IndexArray]
    numbers: bool = False  # whether it computed with others


@dataclass(frozen=True)
class _Run:
    """A call as it was traced: on what kind of copy, with which operators and numbers, and which parts of splits."""

    call: Call
    kind: Kind
    script: list[tuple[Any, ...]]
    decisions: list[Decision]
    views: list[Blocks | None]


class _Called(TorchFunctionMode):
    """Writes down what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[tuple[str, tuple[float, ...]]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        fractions = tuple(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, float))
        self.functions.append((getattr(func, "__qualname__", repr(func)), fractions))
        return func(*args, **(kwargs or {}))


class _Analysis:
    """One network's atoms, from the first run to the structure."""

    def __init__(
        self,
        subject: Subject,
        choices: Mapping[SplitKey, int] | None = None,
        copies: dict[Kind, FakeCopy] | None = None,
    ) -> None:
        self.subject = subject
        self.notes: list[str] = []
        self.atoms = Atoms()
        self.copies = copies or {}
        try:
            self.first = self._copy(_KINDS[0])
        except Exception as error:
            raise StructureError(
                f"{type(subject.model).__name__} cannot be copied for analysis ({type(error).__name__}: {error}). "
                "Pruning runs a copy of the network on fake tensors; make `copy.deepcopy(model)` work, or keep what it "
                "stumbles over outside of the module."
            ) from error
        self.notes += self.first.notes
        self.labels = {
            name: tuple(self.atoms.fresh(n) for n in tensor.shape) for name, tensor in self.first.named.items()
        }
        self.shapes = {name: tuple(t.shape) for name, t in self.first.named.items()}
        self.tracer = Tracer(self.atoms, RULES, unknown)
        self.tracer.choices = choices or {}
        self.runs: list[_Run] = []
        self.groups: list[Group] = []
        self.same_in_both_modes: list[Call] = []
        self.patterns: list[tuple[IndexArray, tuple[tuple[str, int], ...]]] = []
        self.remarks: dict[str, None] = {}
        self._trials = 0

    def _copy(self, kind: Kind) -> FakeCopy:
        if kind not in self.copies:
            self.copies[kind] = self.subject.copy(kind)
        return self.copies[kind]

    def best(self, *, trial: bool) -> _Analysis:
        """Find the groups; where a split axis froze, let another of its parts keep the units apart if that frees more.

        Returns:
            This analysis, or a better one of the same network.
        """
        self._find(trial=trial)
        choices: dict[SplitKey, int] = {}
        for key, (parts, labels) in self.tracer.splits.items():
            if not self.atoms.frozen()[self.atoms.find(np.concatenate(labels))].any():
                continue
            for part in parts[:-1]:
                other = self._with({**choices, key: part})
                if other._can_cut(key):
                    choices[key] = part
                    break
        if not choices:
            return self
        other = self._with(choices)
        other._find(trial=trial)
        return other if other._free() > self._free() else self

    def structure(self) -> Structure:
        """What was found, as values."""
        groups = self.groups
        return Structure(
            tuple(groups), tuple(self._frozen(groups)), self._cost(groups), tuple(self.notes), tuple(self.remarks)
        )

    def follow(self, structure: Structure) -> None:
        """Trace with the units of a known structure, so that every split keeps apart what it keeps apart."""
        self.labels = {name: tuple(axis.copy() for axis in axes) for name, axes in self.labels.items()}
        for group in structure.groups:
            first = group.members[0]
            units = self.labels[first.tensor][first.dim][first.index[:, :1]]
            for member in group.members:
                self.labels[member.tensor][member.dim][member.index] = units
        self._trace()

    def _find(self, *, trial: bool) -> None:
        """Trace, group, try."""
        self._trace()
        self._freeze_unseen()
        self.groups = self._groups()
        if trial:
            self.groups = self._try(self.groups)

    def _with(self, choices: Mapping[SplitKey, int]) -> _Analysis:
        """A new analysis of the same network, on the same copies."""
        return _Analysis(self.subject, choices, self.copies)

    def _can_cut(self, key: SplitKey) -> bool:
        """Whether, with the choices made, units of this split are left and can be removed, as the first call shows."""
        for call in (*self.subject.calls, *self.subject.optional):
            self._run_if_possible(call)
            if key in self.tracer.splits:
                break
        else:
            return False
        self._freeze_unseen()
        self.groups = self._groups()
        atoms = self.atoms.find(np.concatenate(self.tracer.splits[key][1]))
        groups = [g for g in self.groups if g.width > 1 and np.isin(self._atoms_of(g), atoms).any()]
        return bool(groups) and self._attempt(groups, follow=all(group.width > 2 for group in groups)) is None

    # -- running ----------------------------------------------------------------------------------------------------

    def _freeze_recurrent(self) -> None:
        """Widths of recurrent layers are not followed through their kernels, which take whole sequences."""
        for prefix, module in self.first.module.named_modules():
            if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
                continue
            cell = isinstance(module, nn.RNNCellBase)
            reason = f"`{prefix}` ({type(module).__name__}) is recurrent: its widths cannot be cut"
            for name in module._parameters:
                axes = self.labels.get(f"{prefix}.{name}" if prefix else name, ())
                # The inputs of a cell are those of two linear layers.
                for atoms in axes[:1] if cell and name.startswith("weight_ih") else axes:
                    self.atoms.freeze(atoms, reason)

    def _trace(self) -> None:
        self._freeze_recurrent()
        for number, call in enumerate(self.subject.calls):
            if self._is_known(call):
                continue
            self.tracer.counting, self.tracer.batch = number == 0, _batch_size(call)
            try:
                self._run(call)
            except Exception as error:
                mode = "train" if call.training else "eval"
                raise StructureError(
                    f"{type(self.subject.model).__name__}.{call.method} fails on the example in {mode} mode: "
                    f"{type(error).__name__}: {error}. The example was {_describe(call)}; give one that the network "
                    "accepts (`example_input_array` of the LightningModule, or the `example` argument)."
                ) from error
        self.tracer.counting = False
        for call in self.subject.optional:
            self._run_if_possible(call)

    def _is_known(self, call: Call) -> bool:
        """Whether the same call was traced in the other mode and nothing asked which one it was."""
        return any(
            known.args is call.args and known.kwargs is call.kwargs and known.method == call.method
            for known in self.same_in_both_modes
        )

    def _run_if_possible(self, call: Call) -> None:
        try:
            self._run(call)
        except Exception as error:
            self.notes.append(
                f"`{call.method}` could not be traced ({type(error).__name__}: {_first_line(error)}); layers that "
                "only it uses are frozen"
            )

    def _run(self, call: Call) -> None:
        """Run a call on the cheapest kind of tensors that it runs on."""
        for kind in _KINDS:
            counted = self.tracer.macs, self.tracer.written
            self.tracer.macs, self.tracer.written = list(counted[0]), list(counted[1])
            try:
                out = self._copy(kind).run(self.tracer, call, self.labels)
            except Exception as error:
                self.tracer.forget()
                self.tracer.macs, self.tracer.written = counted
                # Tensors without content and devices may be too little for a network; real ones are slow.
                if kind == _KINDS[-1]:
                    raise
                dearer = _NAMES[_KINDS[_KINDS.index(kind) + 1]]
                why = f"it does not run on {_NAMES[kind]} ({type(error).__name__}: {_first_line(error)})"
                self.remarks[f"`{call.method}` was traced on {dearer}, which takes longer, as {why}"] = None
                continue
            self._freeze_output(self.tracer, call, out)
            self.runs.append(_Run(call, kind, self.tracer.script, self.tracer.decisions, self.tracer.views))
            if not self._copy(kind).mode_matters:
                self.same_in_both_modes.append(call)
            self.tracer.forget()
            return

    def _freeze_output(self, tracer: Tracer, call: Call, out: Any) -> None:
        if call.method == "forward":
            for tensor in output_tensors(out):
                tracer.freeze(tracer.value(tensor).axes, "an output of the network")

    def _freeze_unseen(self) -> None:
        """What no call has touched is frozen: how it is used is not known."""
        for name in self.first.named:
            if name not in self.tracer.seen:
                for axis in self.labels[name]:
                    self.atoms.freeze(axis, "not used by any traced call")

    def _free(self) -> int:
        """Indices of all axes that may be removed."""
        atoms = np.concatenate([atoms for axes in self.labels.values() for atoms in axes])
        return int((~self.atoms.frozen()[self.atoms.find(atoms)]).sum())

    # -- grouping ---------------------------------------------------------------------------------------------------

    def _groups(self) -> list[Group]:
        """Classes of atoms with the same set of axes, in the order of execution."""
        self.patterns = patterns = self._patterns()
        if not patterns:
            return []
        root = np.concatenate([roots for roots, _ in patterns])
        pattern = np.repeat(np.arange(len(patterns)), [len(roots) for roots, _ in patterns])
        position = np.concatenate([np.arange(len(roots)) for roots, _ in patterns])
        free = np.flatnonzero(~self.atoms.frozen()[root])
        # The places of every unit, one after another: sorted by unit, pattern and position.
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
        renamed = []
        for group in groups:
            names[group.name] = names.get(group.name, 0) + 1
            suffix = f"#{names[group.name]}" if names[group.name] > 1 else ""
            renamed.append(Group(group.name + suffix, group.width, group.members))
        return renamed

    def _learns(self, group: Group) -> bool:
        """Whether a parameter holds the units, and not merely as an axis of length 1 that no layer produces.

        The axes of a table of coordinates that a layer reads have no units, nor has the first one of a class token.
        """
        own = [m for m in group.members if isinstance(self.first.named[m.tensor], nn.Parameter) and m.role != "in"]
        return any(m.role == "out" or group.width > 1 for m in own)

    def _patterns(self) -> list[tuple[IndexArray, tuple[tuple[str, int], ...]]]:
        """Axes with the same units at the same positions: representatives, and names and dimensions."""
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
        """A group of units with the axes ``places`` (repeated where a unit repeats) and these positions on them."""
        columns: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for column, alike in enumerate(places):
            columns.setdefault(alike, []).append(column)
        order = self.tracer.order
        ranks = ("out", "along", "in")
        axes = sorted(
            ((axis, alike) for alike in columns for axis in alike),
            key=lambda one: (ranks.index(self._role(one[0])), order.get(one[0][0], len(order)), one[0]),
        )
        units = units[np.argsort(units[:, columns[axes[0][1]][0]], kind="stable")]
        index = {alike: units[:, chosen] for alike, chosen in columns.items()}
        members = tuple(Member(*axis, self._role(axis), index[alike]) for axis, alike in axes)
        return Group(members[0].layer, len(units), members)

    def _role(self, axis: tuple[str, int]) -> Role:
        return self.tracer.roles.get(axis, "along")  # type: ignore[return-value]

    def _rank(self, group: Group) -> int:
        return min(
            self.tracer.order.get(m.tensor, len(self.tracer.order))
            for m in group.members
            if m.tensor == group.members[0].tensor
        )

    def _frozen(self, groups: Sequence[Group]) -> list[Frozen]:
        """Every produced axis, and every bare or unused tensor's axis, that is not wholly in a group."""
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

    # -- trial ------------------------------------------------------------------------------------------------------

    def _try(self, groups: list[Group]) -> list[Group]:
        """Cut the copy, run it again, and freeze the groups that make it fail."""
        groups = self._try_some(groups, [g for g in groups if g.width > 2], follow=True)
        # Of two units a cut leaves one: an axis of length 1 broadcasts and shows no pattern. Only numbers are compared,
        # which tell enough: positions, parts of splits and views, and counts of groups are among them.
        return self._try_some(groups, [g for g in groups if g.width == 2], follow=False)

    def _try_some(self, groups: list[Group], candidates: list[Group], *, follow: bool) -> list[Group]:
        failed: set[str] = set()
        while candidates:
            if not self._is_out_of_trials():
                failing = self._failing(candidates, follow)
            else:  # what has passed its trial goes on if all of it passes together
                failing = self._undecided(candidates) if self._attempt(candidates, follow) else []
            if not failing:
                break
            for group, reason in failing:
                for m in group.members:
                    self.atoms.freeze(self.labels[m.tensor][m.dim][m.index.ravel()], reason)
            failed |= {group.name for group, _ in failing}
            candidates = [g for g in candidates if g.name not in failed]
        return [g for g in groups if g.name not in failed]

    def _failing(self, groups: list[Group], follow: bool) -> list[tuple[Group, str]]:
        """Groups whose cut fails, each with the reason: those at the operator that fails, or else found by halving."""
        if self._is_out_of_trials():
            return self._undecided(groups)
        failure = self._attempt(groups, follow)
        self._trials += 1
        if self._trials % 50 == 0:
            _LOG.info("%d trial cuts, and the groups that fail are still being searched for", self._trials)
        if failure is None:
            return []
        if len(groups) == 1:
            return [(groups[0], f"a trial cut failed: {failure.reason}")]
        suspects = self._suspects(groups, failure)
        if 0 < len(suspects) < len(groups):
            found = self._failing(suspects, follow)
            if found:
                return found
        half = len(groups) // 2
        found = self._failing(groups[:half], follow) + self._failing(groups[half:], follow)
        # Halves that work alone but not together: the later one gives way.
        return found or [(g, f"a trial cut failed together with others: {failure.reason}") for g in groups[half:]]

    def _is_out_of_trials(self) -> bool:
        operators = sum(len(run.script) for run in self.runs)
        return self._trials >= max(_LEAST_TRIALS, _MOST_OPERATORS // max(operators, 1))

    def _undecided(self, groups: list[Group]) -> list[tuple[Group, str]]:
        """Groups that stay since there are no trials left."""
        self.notes.append(
            f"the search for what cannot be cut ended after {self._trials} trials: {', '.join(g.name for g in groups)} "
            "stay undecided"
        )
        return [(group, f"undecided after {self._trials} trial cuts") for group in groups]

    def _suspects(self, groups: list[Group], failure: _Failure) -> list[Group]:
        """The groups at the operator that failed, or else at the nearest one before it that has any."""
        for roots in failure.trail:
            suspects = [group for group in groups if np.isin(self._atoms_of(group), roots).any()]
            if suspects:
                return suspects
        return []

    def _atoms_of(self, group: Group) -> IndexArray:
        first = group.members[0]
        return self.atoms.find(self.labels[first.tensor][first.dim][first.index[:, 0]])

    def _attempt(self, groups: list[Group], follow: bool) -> _Failure | None:
        """Cut half of the units of these groups and run; None if it computes and couples as before."""
        draw = np.random.default_rng(0)
        kept = {}
        for group in groups:
            lost = draw.permutation(group.width)[: max((group.width - 1) // 2, 1)]
            kept[group.name] = np.setdiff1d(np.arange(group.width), lost).tolist()
        return self._compare(Structure(tuple(groups), (), CostModel((), (), self.shapes)).axes(kept), follow)

    def _compare(self, axes: Axes, follow: bool) -> _Failure | None:
        """Run a cut copy and compare what it computes with; with `follow`, what it couples too."""
        labels, atoms = self._labels_at(axes), SealedAtoms(self.atoms)
        tracer = self._second_tracer(atoms)
        for run in self.runs:
            call, copy = run.call, self._copy(run.kind)
            try:
                if run.kind == "real":
                    run = self._masked(run, copy, axes)
                tracer.decided, tracer.decided_views = run.decisions, run.views
                tracer.expected = run.script
                with copy.cut(axes):
                    out = copy.run(tracer, call, labels)
                tracer.finish()
                self._freeze_output(tracer, call, out)
                if follow:
                    atoms.check()
            except Exception as error:
                return self._failure(error, tracer, atoms if follow else None)
            finally:
                tracer.forget()
        return None

    def _labels_at(self, axes: Axes) -> dict[str, tuple[IndexArray, ...]]:
        """Labels of what is kept."""
        return {
            name: tuple(atoms[axes[name][d]] if d in axes.get(name, {}) else atoms for d, atoms in enumerate(dims))
            for name, dims in self.labels.items()
        }

    def _called(self, axes: Axes) -> list[tuple[str, tuple[float, ...]]] | None:
        """Functions that a cut copy's code calls, with fractions among their arguments; None if it does not run."""
        labels, called = self._labels_at(axes), _Called()
        for run in self.runs:
            tracer = self._second_tracer(SealedAtoms(self.atoms))
            tracer.choices = self.tracer.choices
            copy = self._copy(run.kind)
            try:
                with copy.cut(axes), called:
                    copy.run(tracer, run.call, labels)
            except Exception:  # which shows in the cut itself
                return None
        return called.functions

    def _masked(self, run: _Run, copy: FakeCopy, axes: Axes) -> _Run:
        """The same run of the masked network: where sizes hang on data, a right cut has them in common with it."""
        tracer = self._second_tracer(SealedAtoms(self.atoms))
        tracer.choices = self.tracer.choices
        with copy.masked(axes):
            copy.run(tracer, run.call, self.labels)
        return _Run(run.call, run.kind, tracer.script, tracer.decisions, tracer.views)

    def _second_tracer(self, atoms: SealedAtoms) -> Tracer:
        tracer = Tracer(atoms, RULES, unknown)
        tracer.units, tracer.compares_lengths = self.tracer.units, self.tracer.compares_lengths
        tracer.whole_groups = dict(self.tracer.whole_groups)
        return tracer

    def _failure(self, error: Exception, tracer: Tracer, atoms: SealedAtoms | None) -> _Failure:
        """Why a trial failed; what it coupled before an operator failed comes first."""
        if atoms is not None and not isinstance(error, MismatchError):
            try:
                atoms.check()
            except MismatchError as earlier:
                error = earlier
        trail = [self._roots(flat_tensors(*arguments), tracer) for arguments in reversed(tracer.trail)]
        if isinstance(error, MismatchError) and error.atoms.size:
            trail = [error.atoms]
        return _Failure(f"{type(error).__name__}: {_first_line(error)}", trail, isinstance(error, NumberError))

    def _roots(self, inputs: Sequence[torch.Tensor], tracer: Tracer) -> IndexArray:
        axes = [axis for x in inputs for axis in tracer.value(x).axes if isinstance(axis, np.ndarray)]
        atoms = np.concatenate([*axes, np.empty(0, dtype=np.int64)])
        return self.atoms.find(atoms[atoms < len(self.atoms)])

    # -- cost -------------------------------------------------------------------------------------------------------

    def _cost(self, groups: Sequence[Group]) -> CostModel:
        owner = np.full(len(self.atoms), -1)
        for number, group in enumerate(groups):
            owner[self._atoms_of(group)] = number

        def length(roots: IndexArray) -> Axis:
            counts = np.bincount(owner[roots] + 1, minlength=1)
            repeat = [(groups[i], int(counts[i + 1])) for i in np.flatnonzero(counts[1:]).tolist()]
            return Axis(int(counts[0]), tuple((group.name, n // group.width) for group, n in repeat))

        known = {
            id(self.labels[name][dim]): shared
            for shared, places in ((length(roots), places) for roots, places in self.patterns)
            for name, dim in places
        }

        def axis(atoms: IndexArray) -> Axis:
            if id(atoms) not in known:
                known[id(atoms)] = length(self.atoms.find(atoms))
            return known[id(atoms)]

        parameters = tuple(
            Term(1.0, tuple(axis(atoms) for atoms in self.labels[name]), name.rpartition(".")[0])
            for name, tensor in self.first.named.items()
            if isinstance(tensor, nn.Parameter)
        )
        batch = _batch_size(self.subject.calls[0])
        if self.tracer.samples is not None:  # an example without a batch dimension gets one of length 1
            batch = min(batch, self.tracer.samples)
        macs, memory = (
            tuple(
                Term(r.factor / (1 if r.once else batch), tuple(axis(atoms) for atoms in r.axes), r.layer)
                for r in records
            )
            for records in (self.tracer.macs, self.tracer.written)
        )
        return CostModel(parameters, macs, self.shapes, memory)


def _batch_size(call: Call) -> int:
    """Samples in an example: the images of a list (as detectors take them), else the length of the first tensor."""
    first = next(iter((*call.args, *call.kwargs.values())), None)
    if isinstance(first, list) and all(isinstance(item, torch.Tensor) and item.dim() == 3 for item in first):
        return max(len(first), 1)
    tensors = output_tensors((call.args, dict(call.kwargs)))
    if not tensors or tensors[0].dim() == 0 or (tensors[0].dim() == 1 and tensors[0].is_floating_point()):
        return 1
    return int(tensors[0].shape[0])


def _describe(call: Call) -> str:
    tensors = output_tensors((call.args, dict(call.kwargs)))
    return ", ".join(f"a tensor of shape {tuple(t.shape)}, {t.dtype}" for t in tensors) or "without tensors"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
