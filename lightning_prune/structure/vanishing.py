"""What a network still computes when whole groups are gone: which of them may go, and which layers go along.

A network is a list of operators, each with the tensors that enter and leave it, each tensor with the groups that its
axes are made of. A tensor with an axis that is wholly made of groups that are gone is empty: nothing comes through it.
From there, forwards, what does no longer depend on the inputs is constant; backwards, what no output looks at is dead.
Groups may go as long as every output still depends on the inputs. Plain values, no model needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

__all__ = ["Flow", "Op", "Pass", "Piece", "Removal"]

Names = frozenset[str]


@dataclass(frozen=True)
class Piece:
    """A tensor as an operator meets it.

    Attributes:
        storage: Number of its memory: views share it.
        covers: Per axis that consists of groups alone: which. The tensor is empty when all groups of one are gone.
    """

    storage: int
    covers: tuple[Names, ...] = ()

    def gone(self, groups: Names) -> bool:
        """Whether it is empty without these groups."""
        return any(cover <= groups for cover in self.covers)


@dataclass(frozen=True)
class Op:
    """One operator: what enters, what leaves, and whether the content of what enters counts (not only its shape)."""

    inputs: tuple[Piece, ...]
    outputs: tuple[Piece, ...]
    reads: bool = True


@dataclass(frozen=True)
class Pass:
    """One way in which the network is run.

    Attributes:
        ops: Operators in order.
        inputs: Storages of the inputs.
        outputs: What is returned.
        parameters: Names of the parameters by storage.
        guarded: Whether its outputs have to depend on its inputs (a loss may depend on the targets alone).
    """

    ops: tuple[Op, ...]
    inputs: frozenset[int]
    outputs: tuple[Piece, ...]
    parameters: Mapping[int, tuple[str, ...]]
    guarded: bool

    def look(self, gone: Names) -> _Sight:
        """What is alive without the groups ``gone``."""
        carries = set(self.inputs)
        heard: set[str] = set()
        for op in self.ops:
            if not op.reads or not any(p.storage in carries and not p.gone(gone) for p in op.inputs):
                continue
            outputs = [p.storage for p in op.outputs if not p.gone(gone)]
            carries.update(outputs)
            if outputs:
                heard.update(name for p in op.inputs for name in self.parameters.get(p.storage, ()))
        live = {p.storage for p in self.outputs}
        for op in reversed(self.ops):
            if op.reads and any(p.storage in live and not p.gone(gone) for p in op.outputs):
                live.update(p.storage for p in op.inputs if not p.gone(gone))
        reached = frozenset(i for i, p in enumerate(self.outputs) if p.storage in carries and not p.gone(gone))
        used = frozenset(name for storage in live for name in self.parameters.get(storage, ()))
        return _Sight(reached, used, frozenset(heard))


@dataclass(frozen=True)
class _Sight:
    """Outputs that depend on the inputs, parameters that an output looks at, parameters that meet what depends."""

    reached: frozenset[int]
    used: Names
    heard: Names


@dataclass(frozen=True)
class Removal:
    """What goes when groups go.

    Attributes:
        groups: They and the groups that go along.
        modules: Layers that go, and what takes their place: ``"nothing"`` where all outputs are gone, ``"constant"``
            where all inputs are, ``"identity"`` for a norm whose result nobody looks at any more.
    """

    groups: Names = frozenset()
    modules: Mapping[str, str] = field(default_factory=dict)

    @property
    def silent(self) -> Names:
        """Layers of which no tensor is left."""
        return frozenset(name for name, kind in self.modules.items() if kind != "constant")


@dataclass(frozen=True, eq=False)
class Flow:
    """The operators of a network, and who owns its tensors.

    Attributes:
        passes: Every way in which it is run.
        covers: Per parameter and dimension, the groups that it is wholly made of.
        owners: Module of each parameter.
        kinds: Per module with parameters ``"linear"``, ``"norm"`` or why it cannot go.
        producers: Per group, the parameters that produce its units.
        removal: What is gone already.
    """

    passes: tuple[Pass, ...]
    covers: Mapping[str, Mapping[int, Names]]
    owners: Mapping[str, str]
    kinds: Mapping[str, str]
    producers: Mapping[str, tuple[str, ...]]
    removal: Removal = field(default_factory=Removal)
    _known: dict[Names, Removal | str] = field(default_factory=dict)

    def without(self, groups: Iterable[str]) -> Removal | str:
        """What goes when ``groups`` lose all their units; a string, which says why, if they cannot."""
        wanted = frozenset(groups) | self.removal.groups
        if wanted not in self._known:
            self._known[wanted] = self._without(wanted) if wanted else Removal()
        return self._known[wanted]

    def take(self, removal: Removal) -> Flow:
        """The flow of a network from which this is gone."""
        return replace(self, removal=removal, _known={})

    def _without(self, gone: Names) -> Removal | str:
        before = [one.look(frozenset()) for one in self.passes]
        used = _union(sight.used for sight in before)
        heard = _union(sight.heard for sight in before)
        while True:
            now = [one.look(gone) for one in self.passes]
            for one, was, sight in zip(self.passes, before, now, strict=True):
                if one.guarded and sight.reached < was.reached:
                    return "without it nothing of the input would reach the output: no other path leads around it"
            # A group whose layers get nothing that depends on the inputs, or give to nobody, goes along.
            still_heard, still_used = _union(s.heard for s in now), _union(s.used for s in now)
            more = {
                group
                for group, names in self.producers.items()
                if group not in gone
                and any(name in heard & used for name in names)
                and not any(name in still_heard & still_used for name in names)
            }
            if not more:
                break
            gone |= more
        return self._modules(gone, used - still_used)

    def _modules(self, gone: Names, dead: Names) -> Removal | str:
        """The layers that go with groups and the parameters that nobody looks at any more."""
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
