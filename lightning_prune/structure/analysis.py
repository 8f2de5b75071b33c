"""From a network and the ways it is run to what can be removed: groups of units, frozen parts with reasons, costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from lightning_prune.structure.atoms import Atoms
from lightning_prune.structure.cost import Axis, CostModel, Term
from lightning_prune.structure.graph import Frozen, Group, Member, Role, Structure
from lightning_prune.structure.rules import RULES, unknown
from lightning_prune.structure.tracing import Call, FakeCopy, Tracer, output_tensors

__all__ = ["StructureError", "Subject", "trace"]

IndexArray = npt.NDArray[np.int64]
#: What PyTorch raises where an operator's result depends on numbers that fake tensors do not have.
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


class StructureError(ValueError):
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
    """

    model: nn.Module
    calls: tuple[Call, ...]
    optional: tuple[Call, ...] = ()
    memo: Mapping[int, Any] | None = None
    prepare: Callable[[nn.Module], None] | None = None

    @classmethod
    def of(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Subject:
        """A plain module, run as ``model(*args, **kwargs)`` in eval and in train mode."""
        calls = tuple(Call(args, kwargs, training=training) for training in (False, True))
        return cls(model, calls)

    def copy(self, *, real: bool = False) -> FakeCopy:
        """A copy on fake (or real) tensors."""
        return FakeCopy(self.model, self.memo, self.prepare, real=real)


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
    with torch.inference_mode(False):
        return _Analysis(subject).structure(trial=trial)


class _Analysis:
    """One network's atoms, from the first run to the structure."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.notes: list[str] = []
        self.atoms = Atoms()
        try:
            self.fake = subject.copy()
        except Exception as error:
            raise StructureError(
                f"{type(subject.model).__name__} cannot be copied for analysis ({type(error).__name__}: {error}). "
                "Pruning runs a copy of the network on fake tensors; make `copy.deepcopy(model)` work, or keep what it "
                "stumbles over outside of the module."
            ) from error
        self.real: FakeCopy | None = None
        self.labels = {
            name: tuple(self.atoms.fresh(n) for n in tensor.shape) for name, tensor in self.fake.named.items()
        }
        self.tracer = Tracer(self.atoms, RULES, unknown)
        self.needs_real: set[int] = set()
        self.traced: list[Call] = []

    def structure(self, *, trial: bool) -> Structure:
        """Trace, group, try."""
        self._trace()
        self._freeze_unseen()
        groups = self._groups()
        if trial:
            groups = self._try(groups)
        cost = self._cost(groups)
        return Structure(tuple(groups), tuple(self._frozen(groups)), cost, tuple(self.notes))

    # -- running ----------------------------------------------------------------------------------------------------

    def _trace(self) -> None:
        for number, call in enumerate(self.subject.calls):
            self.tracer.counting = number == 0
            try:
                self._run(call, number)
            except Exception as error:
                mode = "train" if call.training else "eval"
                raise StructureError(
                    f"{type(self.subject.model).__name__}.{call.method} fails on the example in {mode} mode: "
                    f"{type(error).__name__}: {error}. The example was {_describe(call)}; give one that the network "
                    "accepts (`example_input_array` of the LightningModule, or the `example` argument)."
                ) from error
            self.traced.append(call)
        self.tracer.counting = False
        for number, call in enumerate(self.subject.optional, start=len(self.subject.calls)):
            try:
                self._run(call, number)
            except Exception as error:
                self.notes.append(
                    f"`{call.method}` could not be traced ({type(error).__name__}: {_first_line(error)}); layers that "
                    "only it uses are frozen"
                )
                continue
            self.traced.append(call)

    def _run(self, call: Call, number: int) -> None:
        """Run a call on fake tensors, or on real ones where its operators depend on data."""
        try:
            out = self.fake.run(self.tracer, call, self.labels)
        except _DATA_DEPENDENT:
            self.tracer.forget()
            self.needs_real.add(number)
            self.real = self.real or self.subject.copy(real=True)
            out = self.real.run(self.tracer, call, self.labels)
        if call.method == "forward":
            self._freeze_output(out)
        self.tracer.forget()

    def _freeze_output(self, out: Any) -> None:
        for tensor in output_tensors(out):
            self.tracer.freeze(self.tracer.value(tensor).axes, "an output of the network")

    def _freeze_unseen(self) -> None:
        """What no call has touched is frozen: how it is used is not known."""
        for name in self.fake.named:
            if name not in self.tracer.seen:
                for axis in self.labels[name]:
                    self.atoms.freeze(axis, "not used by any traced call")

    # -- grouping ---------------------------------------------------------------------------------------------------

    def _groups(self) -> list[Group]:
        """Classes of atoms with the same set of axes, in the order of execution."""
        frozen = self.atoms.class_reasons()
        # root → {(tensor, dim): positions}
        places: dict[int, dict[tuple[str, int], list[int]]] = {}
        for name, axes in self.labels.items():
            for dim, atoms in enumerate(axes):
                for position, root in enumerate(self.atoms.find(atoms).tolist()):
                    if root not in frozen:
                        places.setdefault(root, {}).setdefault((name, dim), []).append(position)
        by_signature: dict[frozenset[tuple[tuple[str, int], int]], list[dict[tuple[str, int], list[int]]]] = {}
        for units in places.values():
            by_signature.setdefault(frozenset((axis, len(p)) for axis, p in units.items()), []).append(units)
        groups = [self._group(units) for units in by_signature.values()]
        # An axis of length 1 that no layer produces (a class token's first) is no unit.
        groups = [group for group in groups if group.width > 1 or group.producers]
        groups.sort(key=lambda g: (self._rank(g), g.members[0].index[0].tolist()))
        names: dict[str, int] = {}
        renamed = []
        for group in groups:
            names[group.name] = names.get(group.name, 0) + 1
            suffix = f"#{names[group.name]}" if names[group.name] > 1 else ""
            renamed.append(Group(group.name + suffix, group.width, group.members))
        return renamed

    def _group(self, units: list[dict[tuple[str, int], list[int]]]) -> Group:
        order = self.tracer.order
        axes = sorted(units[0], key=lambda axis: (self._role(axis) != "out", order.get(axis[0], len(order)), axis))
        units = sorted(units, key=lambda unit: unit[axes[0]])
        members = tuple(
            Member(name, dim, self._role((name, dim)), np.array([unit[name, dim] for unit in units], dtype=np.int64))
            for name, dim in axes
        )
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
                texts = [reasons[root] for root in self.atoms.find(atoms).tolist() if root in reasons]
                found.append(Frozen(name, dim, stuck, texts[0] if texts else "its group failed the trial"))
        return found

    # -- trial ------------------------------------------------------------------------------------------------------

    def _try(self, groups: list[Group]) -> list[Group]:
        """Cut the fake copy, run it again, and freeze the groups that make it fail."""
        groups = self._try_some(groups, [g for g in groups if g.width > 2], follow=True)
        # An axis of length 1 broadcasts and shows no pattern: groups of two units are only seen to run with one.
        return self._try_some(groups, [g for g in groups if g.width == 2], follow=False)

    def _try_some(self, groups: list[Group], candidates: list[Group], *, follow: bool) -> list[Group]:
        shapes = {name: tuple(t.shape) for name, t in self.fake.named.items()}
        while candidates:
            bare = Structure(tuple(candidates), (), CostModel((), (), shapes))
            failing = self._failing(bare, [g.name for g in candidates], follow)
            if not failing:
                break
            for group in candidates:
                if group.name in failing:
                    for m in group.members:
                        self.atoms.freeze(self.labels[m.tensor][m.dim][m.index.ravel()], failing[group.name])
            candidates = [g for g in candidates if g.name not in failing]
        stuck = self.atoms.class_reasons()
        first = [(g, self.labels[g.members[0].tensor][g.members[0].dim][g.members[0].index[:, 0]]) for g in groups]
        return [g for g, atoms in first if int(self.atoms.find(atoms)[0]) not in stuck]

    def _failing(self, structure: Structure, names: list[str], follow: bool) -> dict[str, str]:
        """The smallest sets of groups whose cut fails, found by halving: ``{group: reason}``."""
        reason = self._attempt(structure, names, follow)
        if reason is None:
            return {}
        if len(names) == 1:
            return {names[0]: f"a trial cut failed: {reason}"}
        half = len(names) // 2
        failing = self._failing(structure, names[:half], follow)
        failing |= self._failing(structure, names[half:], follow)
        # Halves that work alone but not together: the later one gives way.
        return failing or dict.fromkeys(names[half:], f"a trial cut failed together with others: {reason}")

    def _attempt(self, structure: Structure, names: list[str], follow: bool) -> str | None:
        """Cut half of the units of these groups and run; None if nothing is coupled that was not before."""
        draw = np.random.default_rng(0)
        kept = {}
        for name in names:
            width = structure.group(name).width
            lost = draw.permutation(width)[: max((width - 1) // 2, 1)]
            kept[name] = tuple(np.setdiff1d(np.arange(width), lost).tolist())
        return self._mismatch(structure.axes(kept), follow)

    def _mismatch(self, axes: Mapping[str, Mapping[int, IndexArray]], follow: bool) -> str | None:
        """Why the copy cut along ``axes`` is not the masked original (or does not run); None if it is."""
        labels = {
            name: tuple(atoms[axes[name][d]] if d in axes.get(name, {}) else atoms for d, atoms in enumerate(dims))
            for name, dims in self.labels.items()
        }
        trial = self.atoms.sealed_copy()
        trial.sealed = follow
        tracer = Tracer(trial, RULES, unknown)
        calls = [*self.subject.calls, *self.subject.optional]
        for number, call in enumerate(calls):
            if call not in self.traced:
                continue
            copy = self.real if number in self.needs_real else self.fake
            assert copy is not None
            try:
                with copy.cut(axes):
                    out = copy.run(tracer, call, labels)
                if call.method == "forward":
                    for tensor in output_tensors(out):
                        tracer.freeze(tracer.value(tensor).axes, "an output of the network")
            except Exception as error:
                return f"{type(error).__name__}: {_first_line(error)}"
            finally:
                tracer.forget()
        return None

    # -- cost -------------------------------------------------------------------------------------------------------

    def _cost(self, groups: Sequence[Group]) -> CostModel:
        by_root: dict[int, str] = {}
        for group in groups:
            m = group.members[0]
            for root in self.atoms.find(self.labels[m.tensor][m.dim][m.index[:, 0]]).tolist():
                by_root[root] = group.name
        widths = {group.name: group.width for group in groups}

        def axis(atoms: IndexArray) -> Axis:
            counts: dict[str, int] = {}
            for root in self.atoms.find(atoms).tolist():
                if root in by_root:
                    counts[by_root[root]] = counts.get(by_root[root], 0) + 1
            repeat = tuple((name, n // widths[name]) for name, n in counts.items())
            return Axis(len(atoms) - sum(counts.values()), repeat)

        parameters = tuple(
            Term(1.0, tuple(axis(atoms) for atoms in self.labels[name]), name.rpartition(".")[0])
            for name, tensor in self.fake.named.items()
            if isinstance(tensor, nn.Parameter)
        )
        batch = _batch_size(self.subject.calls[0])
        macs = tuple(
            Term(record.factor / batch, tuple(axis(atoms) for atoms in record.axes), record.layer)
            for record in self.tracer.macs
        )
        shapes = {name: tuple(t.shape) for name, t in self.fake.named.items()}
        return CostModel(parameters, macs, shapes)


def _batch_size(call: Call) -> int:
    tensors = output_tensors((call.args, dict(call.kwargs)))
    return max(int(tensors[0].shape[0]), 1) if tensors and tensors[0].dim() > 0 else 1


def _describe(call: Call) -> str:
    tensors = output_tensors((call.args, dict(call.kwargs)))
    return ", ".join(f"a tensor of shape {tuple(t.shape)}, {t.dtype}" for t in tensors) or "without tensors"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
