"""Removal of whole groups: which groups can lose all their units, and which layers are removed with them.

The network is a list of operators with their input and output tensors; each tensor lists the groups of its axes. A
tensor is empty if an axis consists only of removed groups. Tensors that no longer depend on the inputs are constant
(forward pass over the operators); tensors that no output depends on are dead (backward pass). Groups can be removed as
long as every output still depends on the inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

__all__ = ["Flow", "Op", "Operand", "Pass", "Removal"]

Names = frozenset[str]


@dataclass(frozen=True)
class Operand:
    """A tensor that enters or leaves an operator.

    Attributes:
        storage: Id of its storage, which views share.
        covers: Groups of each axis that consists of groups alone. The tensor is empty when all groups of one axis are
            removed.
    """

    storage: int
    covers: tuple[Names, ...] = ()

    def gone(self, groups: Names) -> bool:
        """Whether the tensor is empty without these groups."""
        return any(cover <= groups for cover in self.covers)


@dataclass(frozen=True)
class Op:
    """An operator with its inputs and outputs, and whether it reads the content of its inputs (not only shapes)."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    reads: bool = True


@dataclass(frozen=True)
class Pass:
    """The operators of one call of the network.

    Attributes:
        ops: Operators in order.
        inputs: Storages of the inputs.
        outputs: Returned tensors.
        parameters: Names of the parameters by storage.
        guarded: Whether all outputs must depend on the inputs (a loss may depend on the targets alone).
    """

    ops: tuple[Op, ...]
    inputs: frozenset[int]
    outputs: tuple[Operand, ...]
    parameters: Mapping[int, tuple[str, ...]]
    guarded: bool

    def liveness(self, gone: Names) -> _Liveness:
        """Liveness analysis without the groups ``gone``."""
        carries = set(self.inputs)
        fed: set[str] = set()
        for op in self.ops:
            if not op.reads or not any(p.storage in carries and not p.gone(gone) for p in op.inputs):
                continue
            outputs = [p.storage for p in op.outputs if not p.gone(gone)]
            carries.update(outputs)
            if outputs:
                fed.update(name for p in op.inputs for name in self.parameters.get(p.storage, ()))
        live = {p.storage for p in self.outputs}
        for op in reversed(self.ops):
            if op.reads and any(p.storage in live and not p.gone(gone) for p in op.outputs):
                live.update(p.storage for p in op.inputs if not p.gone(gone))
        reached = frozenset(i for i, p in enumerate(self.outputs) if p.storage in carries and not p.gone(gone))
        used = frozenset(name for storage in live for name in self.parameters.get(storage, ()))
        return _Liveness(reached, used, frozenset(fed))


@dataclass(frozen=True)
class _Liveness:
    """Result of a liveness analysis.

    Attributes:
        reached: Outputs that depend on the inputs.
        used: Parameters that an output depends on.
        fed: Parameters of operators that depend on the inputs.
    """

    reached: frozenset[int]
    used: Names
    fed: Names


@dataclass(frozen=True)
class Removal:
    """Groups and layers that are removed together.

    Attributes:
        groups: Removed groups, including those removed as a consequence.
        modules: Removed layers with the kind of stub that replaces each: ``"nothing"`` without outputs, ``"constant"``
            without inputs, ``"identity"`` for a norm whose result is no longer used.
    """

    groups: Names = frozenset()
    modules: Mapping[str, str] = field(default_factory=dict)

    @property
    def emptied(self) -> Names:
        """Layers that keep no tensor."""
        return frozenset(name for name, kind in self.modules.items() if kind != "constant")


@dataclass(frozen=True, eq=False)
class Flow:
    """Operators of a network and the owners of its parameters.

    Attributes:
        passes: One pass per call.
        covers: Groups of each dimension of a parameter that consists of groups alone.
        owners: Module of each parameter.
        kinds: ``"linear"``, ``"norm"`` or the reason why it cannot be removed, per module.
        producers: Parameters that produce the units of each group.
        counted: Attribute that holds the number of units, for groups that have one (`Group.sizes`).
        removal: Groups and layers that are removed already.
    """

    passes: tuple[Pass, ...]
    covers: Mapping[str, Mapping[int, Names]]
    owners: Mapping[str, str]
    kinds: Mapping[str, str]
    producers: Mapping[str, tuple[str, ...]]
    counted: Mapping[str, str] = field(default_factory=dict)
    removal: Removal = field(default_factory=Removal)
    _known: dict[Names, Removal | str] = field(default_factory=dict)

    def without(self, groups: Iterable[str]) -> Removal | str:
        """The removal of ``groups``; a string with the reason if they cannot be removed."""
        wanted = frozenset(groups) | self.removal.groups
        if inner := wanted - self.producers.keys() - self.removal.groups:
            return f"each head keeps at least one feature ({', '.join(sorted(inner))})"
        if wanted not in self._known:
            self._known[wanted] = self._without(wanted) if wanted else Removal()
        return self._known[wanted]

    def take(self, removal: Removal) -> Flow:
        """The flow after a removal."""
        return replace(self, removal=removal, _known={})

    def _without(self, gone: Names) -> Removal | str:
        before = [one.liveness(frozenset()) for one in self.passes]
        used = _union(liveness.used for liveness in before)
        fed = _union(liveness.fed for liveness in before)
        while True:
            now = [one.liveness(gone) for one in self.passes]
            for one, was, liveness in zip(self.passes, before, now, strict=True):
                if one.guarded and liveness.reached < was.reached:
                    return "without it nothing of the input would reach the output: no other path leads around it"
            # Groups whose layers no longer depend on the inputs, or that no output depends on, are removed too.
            still_fed, still_used = _union(s.fed for s in now), _union(s.used for s in now)
            more = {
                group
                for group, names in self.producers.items()
                if group not in gone
                and any(name in fed & used for name in names)
                and not any(name in still_fed & still_used for name in names)
            }
            if not more:
                break
            gone |= more
        if counted := sorted(self.counted.keys() & gone):
            return f"the network computes with their number, {self.counted[counted[0]]}"
        return self._modules(gone, used - still_used)

    def _modules(self, gone: Names, dead: Names) -> Removal | str:
        """The layers to remove for groups and unused parameters."""
        modules: dict[str, str] = {}
        for name, owner in self.owners.items():
            empty = [dim for dim, cover in self.covers.get(name, {}).items() if cover <= gone]
            if not empty and name not in dead:
                continue
            kind = self.kinds[owner]
            if kind == "norm" and (0 in empty or name in dead):
                modules[owner] = "identity"
            elif kind == "linear" and 0 in empty:
                modules[owner] = "nothing"
            elif kind == "linear" and empty:
                modules.setdefault(owner, "constant")
            elif kind == "linear" and modules.get(owner) is None:
                return f"{owner} would be computed for nothing, but its own outputs cannot go"
            elif kind not in ("linear", "norm"):
                return f"{owner or name} would go along, and {kind}"
        changed = [name for name, kind in self.removal.modules.items() if modules.get(name) != kind]
        return f"{changed[0]} was taken out before" if changed else Removal(gone, modules)


def _union(names: Collection[Names] | Iterable[Names]) -> Names:
    return frozenset().union(*names)
