"""Trial cuts of a copy, and the search for the groups that make them fail."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, islice
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from lightning_prune.structure.analysis import Analysis, TracedRun
from lightning_prune.structure.atoms import IndexArray, MismatchError, NumberError, SealedAtoms
from lightning_prune.structure.cost import CostModel
from lightning_prune.structure.feature_parts import Part
from lightning_prune.structure.graph import Axes, Group, Member, Structure
from lightning_prune.structure.layers import is_within
from lightning_prune.structure.rules import RULES, unknown
from lightning_prune.structure.size_attributes import candidates, unread
from lightning_prune.structure.traced_model import first_line
from lightning_prune.structure.tracing import (
    DiscreteResults,
    FakeCopy,
    Tracer,
    flat_tensors,
    is_recurrent,
)

__all__ = ["Failure", "Trials"]

_LOG = logging.getLogger("lightning_prune")
#: Total number of operators that the trials of a network may run before the search for failing groups ends.
_MOST_OPERATORS = 500_000
#: Minimum number of trials per network.
_LEAST_TRIALS = 64
#: Largest number of combinations of sizes in attributes that are tried where a cut fails.
_MOST_COMBINATIONS = 24
#: Number of like groups of other blocks, none of which was repaired, after which the next ones are frozen at once.
_LIKE_BLOCKS = 2
#: Largest number of groups that are tried where none is at the operator that fails.
_MOST_TIED = 3


@dataclass(frozen=True)
class Failure:
    """Why a trial cut failed, and the atoms (representatives) at the latest operators, the last one first."""

    reason: str
    trail: list[IndexArray]
    numbers: bool = False  # whether operators or their numbers differed
    module: str = ""  # the module of the latest operator
    position: tuple[int, int] = (0, 0)  # the run that failed, and the number of operators that had run
    is_masked: bool = False  # whether the masked network itself shows it, at the first of these atoms


class _Called(TorchFunctionMode):
    """Records the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[tuple[str, tuple[float, ...]]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        fractions = tuple(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, float))
        self.functions.append((getattr(func, "__qualname__", repr(func)), fractions))
        return func(*args, **(kwargs or {}))


class Trials:
    """Runs trial cuts of half the units of some groups, on copies of an analysed network.

    Args:
        analysis: Analysis of the network; failing groups are frozen in it, with notes.
        heads: The groups of attention heads of each group, by name, if the units are features of heads. Those of one
            attention may be tied, as code may use one number for the features of queries, keys and values.
        parts: The features of a head that the units are, by the name of the group, where there are others.
        of_heads: Sizes that count heads, and how many each counts of a unit. Those of features of all heads do, too.
    """

    def __init__(
        self,
        analysis: Analysis,
        heads: Mapping[str, tuple[str, ...]] | None = None,
        parts: Mapping[str, Sequence[Part]] | None = None,
        of_heads: Mapping[str, int] | None = None,
    ) -> None:
        self.analysis = analysis
        self._heads = heads or {}
        self._parts = parts or {}
        self._of_heads = of_heads or {}
        self._count = 0
        self._draw = 0  # which of `_draws` is tried
        self._furthest: dict[str, str] = {}  # why the first repair of a group failed where it got furthest
        self._beyond_repair = Counter[tuple[tuple[str, int], ...]]()  # groups by their place in a block

    def passing(self, groups: list[Group]) -> list[Group]:
        """Run trial cuts, freeze the groups that fail and return the others."""
        groups = self._try_some(groups, [g for g in groups if g.width > 2], follow=True)
        # With one of two units left, axes of length 1 broadcast and couplings cannot be compared, only the script.
        return self._with_unread_sizes(self._try_some(groups, [g for g in groups if g.width == 2], follow=False))

    def _try_some(self, groups: list[Group], candidates: list[Group], *, follow: bool) -> list[Group]:
        tried: set[str] = set()
        while candidates:
            failing = self._failing_in_a_draw(candidates, follow)
            if not failing:
                break
            for group, reason in failing:
                if any(group is known for known in candidates):  # else it was tied to another one
                    for old, new, absorbed in self._mended(group, reason, candidates, tried, follow):
                        groups, candidates = (_replaced(known, old, new, absorbed) for known in (groups, candidates))
        return groups

    def _failing_in_a_draw(self, groups: list[Group], follow: bool) -> list[tuple[Group, str]]:
        """Groups whose cut fails in one of the draws: lengths that code takes for one another are equal in others."""
        failing: list[tuple[Group, str]] = []
        for draw, _ in enumerate(self._draws(groups)):
            self._draw = draw
            if not self._is_out_of_trials():
                failing = self._failing(groups, follow)
            else:  # those that passed alone are kept if they pass together
                failing = self._undecided(groups) if self.attempt(groups, follow) else []
            if failing:
                break
        return failing

    def _mended(
        self, group: Group, reason: str, candidates: Sequence[Group], tried: set[str], follow: bool
    ) -> list[tuple[Group, Group | None, list[Group]]]:
        """What takes the place of a failing group, and of groups like it: the group, the new one, what it absorbs.

        If nothing repairs its cut, the group is frozen and leaves.
        """
        others = [g for g in candidates if g is not group and g.name not in tried]
        place, found = _place(group), None
        if group.name not in tried and self._beyond_repair[place] < _LIKE_BLOCKS:
            found = self.repaired(group, others, follow)
        tried.add(group.name)
        if found is None:
            self._beyond_repair[place] += 1
            self._freeze(group, self._furthest.get(group.name, reason) if self._heads else reason)
            return [(group, None, [])]
        whole, absorbed = found
        if absorbed:
            whole = self._tied(whole, [_in_units(one, whole.width) for one in absorbed])
            tried.add(whole.name)
        left = [g for g in others if all(g is not other for other in absorbed)]
        return [(group, whole, absorbed), *self._alike(whole, len(absorbed), left, follow)]

    def _alike(
        self, group: Group, absorbed: int, others: Sequence[Group], follow: bool
    ) -> list[tuple[Group, Group, list[Group]]]:
        """Groups of the same width, such as the same layers of other blocks, and what they are with the same sizes.

        There are none if their cut fails with these.

        Args:
            group: The repaired group.
            absorbed: Number of groups that were tied to it.
            others: Groups that may be like it.
            follow: As in `attempt`.
        """
        wanted, claimed = Counter(map(_kind, group.sizes)), {size.tensor for size in group.sizes}
        found: list[tuple[Group, Group, list[Group]]] = []
        for other in others:
            if not wanted or other.sizes or other.width != group.width or any(other in tied for _, _, tied in found):
                continue
            tied = [one for one in others if one is not other and self._is_of_one_attention(one, other)]
            if self._heads and len(tied) != absorbed:
                continue
            longer = other
            for one in tied:
                longer = _merged(longer, one)
            fitting = self._candidates(longer)
            sizes = tuple(size for sizes in fitting.values() for size in sizes if _kind(size) in wanted)
            if Counter(map(_kind, sizes)) == wanted and not claimed & {size.tensor for size in sizes}:
                claimed |= {size.tensor for size in sizes}
                found.append((other, replace(longer, sizes=sizes), tied))
        # All of them, or else those of the same place in their blocks.
        for some in (found, [one for one in found if _place(one[1]) == _place(group)]):
            self._count += bool(some)
            if some and self.attempt([group, *(longer for _, longer, _ in some)], follow) is None:
                return [(old, self._tied(new, tied) if tied else new, tied) for old, new, tied in some]
        return []

    def _tied(self, whole: Group, parts: Sequence[Group]) -> Group:
        """The group with others that were tied to it; by its name, its part of the features of heads is known."""
        tied = self.analysis.tied(whole, parts)
        return replace(tied, name=whole.name) if whole.name in self._parts else tied

    def _candidates(self, group: Group) -> dict[str, tuple[Member, ...]]:
        """Sizes that may follow a group, by module; for features, without those that count heads alone."""
        parts = self._parts.get(group.name, ())
        width = parts[0].total if parts else group.width
        return {
            module: left
            for module, sizes in candidates(self.analysis.first.module, group, parts).items()
            if (left := tuple(size for size in sizes if self._of_heads.get(size.tensor, width) % width == 0))
        }

    def _have_places(self, one: Group, other: Group) -> bool:
        """Whether features of one attention are at the same places of its heads, as far as these are known."""
        first, second = (self._parts[group.name][0].of if group.name in self._parts else "" for group in (one, other))
        return not (first or second) or first == other.name or second == one.name

    def _is_of_one_attention(self, one: Group, other: Group) -> bool:
        """Whether groups of features have the same heads, which several attentions may share, and lie in one module."""
        heads, (first, second) = self._heads.get(one.name), sorted((one.around, other.around), key=len)
        is_same = heads is not None and heads == self._heads.get(other.name) and one.width == other.width
        return is_same and self._have_places(one, other) and (not first or is_within(second, [first]))

    def _freeze(self, group: Group, reason: str) -> None:
        self.analysis.failed.append(group)
        for m in group.members:
            self.analysis.atoms.freeze(self.analysis.labels[m.tensor][m.dim][m.index.ravel()], reason)

    def repaired(self, group: Group, others: Sequence[Group], follow: bool) -> tuple[Group, list[Group]] | None:
        """The group with what must change with it, if its cut passes then.

        A cut is repaired where it fails: attributes of the module in which it does are set, or all others, the fewest
        first, or another group of this width is cut alike, as code may use the width of one for both, until it gets
        further. For features of heads, an attribute and another group are also tried at once.

        Args:
            group: A group whose cut fails.
            others: Groups that may be tied to it.
            follow: As in `attempt`.

        Returns:
            The group with its `sizes` and the members of tied groups, and these groups; None if its cut fails with
            them, or passes alone.
        """
        found = self._candidates(group)
        alike = {id(other): _in_units(other, group.width) for other in others if self._can_tie(group, other)}
        failure = self.attempt([group], follow) if found or alike else None
        if failure is None:
            return None
        whole, first = self._search(group, failure, found, alike.values(), follow)
        if whole is None and first and (self._heads or self.analysis.tracer.choices):
            # Of heads and features, both may be numbers of this attention, and the wrong one got further by chance.
            left = {module: tuple(size for size in sizes if size not in first) for module, sizes in found.items()}
            whole, _ = self._search(group, failure, left, alike.values(), follow)
        if whole is None:
            return None
        return whole, [other for other in others if id(other) in alike and _is_part(alike[id(other)], whole)]

    def _search(
        self,
        start: Group,
        failure: Failure | None,
        found: Mapping[str, Sequence[Member]],
        alike: Collection[Group],
        follow: bool,
    ) -> tuple[Group | None, tuple[Member, ...]]:
        """The group with what makes its cut pass, None if nothing does, and the sizes that first got it further."""
        group, first = start, tuple[Member, ...]()
        while failure is not None:
            here = [size for size in found.get(failure.module, ()) if size not in group.sizes]
            elsewhere = [size for sizes in found.values() for size in sizes if size not in (*group.sizes, *here)]
            further = self._further(_with_sizes(group, here), failure, follow)
            further = further or self._further(_with_sizes(group, elsewhere, most=0), failure, follow)
            if further is None:
                left = [other for other in alike if not _is_part(other, group)]
                near = self.suspects(left, failure) or left[:_MOST_TIED]
                further = self._further((_merged(group, other) for other in near), failure, follow)
                if further is None and self._heads:  # code may use one number for queries, keys and values at once
                    sized = (_with_sizes(_merged(group, other), [*here, *elsewhere], most=0) for other in near)
                    further = self._further(chain.from_iterable(sized), failure, follow)
            if further is None:
                self._furthest.setdefault(start.name, f"a trial cut failed: {failure.reason}")
                return None, first
            group, failure = self._fewest(group, *further, follow)
            first = first or group.sizes
            like = _as_in_one_block(start, group, found, alike)
            if failure is not None and like is not None:
                group, failure = self._further([like], failure, follow) or (group, failure)
        return group, first

    def _fewest(
        self, before: Group, group: Group, failure: Failure | None, follow: bool
    ) -> tuple[Group, Failure | None]:
        """The group without the sizes, of several new ones, that its cut gets as far without."""
        new = [size for size in group.sizes if size not in before.sizes]
        for size in new if len(new) > 1 else ():
            less = replace(group, sizes=tuple(other for other in group.sizes if other != size))
            self._count += 1
            now = self.attempt([less], follow)
            if now is None or (failure is not None and now.position >= failure.position):
                group, failure = less, now
        return group, failure

    def _can_tie(self, group: Group, other: Group) -> bool:
        """Whether every unit of these groups is a single output of each layer that produces it, or of each gate.

        Features of heads have an output for every head, and some of them may be two features.
        """
        if self._heads:
            heads, theirs = self._heads.get(group.name, ()), self._heads.get(other.name, ())
            is_inside = bool(theirs) and {*theirs} <= {*heads} and other.width % group.width == 0
            return is_inside and self._have_places(group, other)
        if other.width != group.width:
            return False
        members = (member for one in (group, other) for member in one.members if member.role == "out")
        several = {member.layer for member in members if member.index.shape[1] > 1}
        modules = dict(self.analysis.first.module.named_modules()) if several else {}
        return all(layer in modules and is_recurrent(modules[layer]) for layer in several)

    def _with_unread_sizes(self, groups: list[Group]) -> list[Group]:
        """The groups with those attributes too that the network does not compute with, but that name its heads."""

        def with_unread(group: Group) -> Group:
            found = self._candidates(group) if group.width > 1 else {}
            named = [size for sizes in found.values() for size in unread(group, sizes, features=bool(self._heads))]
            others = [size for size in named if size not in group.sizes]
            return replace(group, sizes=(*group.sizes, *others)) if others else group

        whole = [with_unread(group) for group in groups]
        # A number that two attentions share is that of neither.
        claims = Counter(size.tensor for group in whole for size in group.sizes)
        whole = [
            new if all(claims[size.tensor] == 1 for size in new.sizes) else old
            for new, old in zip(whole, groups, strict=True)
        ]
        changed = [new for new, old in zip(whole, groups, strict=True) if new is not old]
        self._draw = 0  # in which all of them lose units
        return whole if changed and self.attempt(changed, follow=False) is None else groups

    def _further(self, groups: Iterable[Group], failure: Failure, follow: bool) -> tuple[Group, Failure | None] | None:
        """The first of these groups whose cut passes or fails later; None if there is none."""
        for group in groups:
            if self._is_out_of_trials():
                return None
            self._count += 1
            now = self.attempt([group], follow)
            if now is None or now.position > failure.position:
                return group, now
        return None

    def _failing(self, groups: list[Group], follow: bool) -> list[tuple[Group, str]]:
        """Groups whose cut fails, with reasons: those at the failing operator, or else found by bisection."""
        if self._is_out_of_trials():
            return self._undecided(groups)
        failure = self.attempt(groups, follow)
        self._count += 1
        if self._count % 50 == 0:
            _LOG.info("%d trial cuts, and the groups that fail are still being searched for", self._count)
        if failure is None:
            return []
        if len(groups) == 1:
            return [(groups[0], f"a trial cut failed: {failure.reason}")]
        suspects = self.suspects(groups, failure)
        if suspects and failure.is_masked:
            return [(group, f"a trial cut failed: {failure.reason}") for group in suspects]
        if 0 < len(suspects) < len(groups):
            found = self._failing(suspects, follow)
            if found:
                return found
        half = len(groups) // 2
        found = self._failing(groups[:half], follow) + self._failing(groups[half:], follow)
        # Both halves work alone but not together: the later one is frozen.
        return found or [(g, f"a trial cut failed together with others: {failure.reason}") for g in groups[half:]]

    def _is_out_of_trials(self) -> bool:
        operators = sum(len(run.script) for run in self.analysis.runs)
        return self._count >= max(_LEAST_TRIALS, _MOST_OPERATORS // max(operators, 1))

    def _undecided(self, groups: list[Group]) -> list[tuple[Group, str]]:
        """Groups that are frozen because no trials are left."""
        self.analysis.notes.append(
            f"the search for what cannot be cut ended after {self._count} trials: {', '.join(g.name for g in groups)} "
            "stay undecided"
        )
        return [(group, f"undecided after {self._count} trial cuts") for group in groups]

    def suspects(self, groups: list[Group], failure: Failure) -> list[Group]:
        """The groups at the operator that failed, or else at the nearest one before it that has any."""
        for roots in failure.trail:
            suspects = [group for group in groups if np.isin(self.analysis.atoms_of(group), roots).any()]
            if suspects:
                return suspects
        return []

    def attempt(self, groups: list[Group], follow: bool) -> Failure | None:
        """Cut about half of the units of these groups and run the copy; None if the trial passes."""
        random, draws = np.random.default_rng(0), self._draws(groups)
        numbers = draws[min(self._draw, len(draws) - 1)]
        lost = [random.permutation(group.width)[:number] for group, number in zip(groups, numbers, strict=True)]
        kept = {g.name: np.setdiff1d(np.arange(g.width), rows).tolist() for g, rows in zip(groups, lost, strict=True)}
        axes = Structure(tuple(groups), (), CostModel((), (), self.analysis.shapes)).axes(kept)
        return self.compare(axes, follow, crossed=any(group.within for group in groups))

    def _draws(self, groups: Sequence[Group]) -> list[list[int]]:
        """How many units each group loses, in draws of which one tells any two groups apart.

        Two groups are told apart where they lose different shares of their units, as code may use the length of one for
        that of the other, or a multiple of it. There are two draws, and more only where many groups have few units: of
        three, one or none is lost.
        """
        alike, first = Counter[int](), []
        for group in groups:
            member = group.members[0]
            length = self.analysis.shapes[member.tensor][member.dim] // member.index.shape[1]
            first.append(max(min((group.width - 1) // 2 + alike[length] % 3, group.width - 2), 1))
            alike[length] += 1
        draws = [first]
        shares: list[tuple[float, ...]] = [(number / group.width,) for number, group in zip(first, groups, strict=True)]
        narrow_first = sorted(range(len(groups)), key=lambda at: groups[at].width)
        while len(draws) < 2 or len(set(shares)) < len(groups):
            numbers, taken = [0] * len(groups), defaultdict[tuple[float, ...], list[float]](list)
            for at in narrow_first:
                width, others = groups[at].width, taken[shares[at]]
                free = (number for number in _other_numbers(first[at], width) if number / width not in others)
                numbers[at] = next(free, len(others) % 2)
                others.append(numbers[at] / width)
            draws.append(numbers)
            shares = [(*share, n / group.width) for share, n, group in zip(shares, numbers, groups, strict=True)]
        return draws

    def compare(self, axes: Axes, follow: bool, *, crossed: bool = False) -> Failure | None:
        """Run a cut copy and compare its script with the first trace.

        Args:
            axes: Positions to keep.
            follow: Compare the couplings, too.
            crossed: Whether heads lose features, so that axes of fixed size are shorter.
        """
        labels, atoms = self._labels_at(axes), SealedAtoms(self.analysis.atoms)
        tracer = self._second_tracer(atoms)
        tracer.crossed = crossed
        for number, run in enumerate(self.analysis.runs):
            call, copy = run.call, self.analysis.copy(run.kind)
            try:
                tracer.discrete = None
                if run.kind == "real":
                    run, tracer.discrete, bound = self._masked(run, copy, axes)
                    if follow and bound is not None:
                        return replace(self._failure(bound, tracer, None), position=(number, 0), is_masked=True)
                tracer.first_decisions, tracer.first_views = run.decisions, run.views
                tracer.expected, tracer.first_query_widths = run.script, run.query_widths
                with copy.cut(axes):
                    out = copy.run(tracer, call, labels)
                tracer.finish()
                self.analysis.freeze_output(tracer, call, out)
                if follow:
                    atoms.check()
            except Exception as error:
                failure = self._failure(error, tracer, atoms if follow else None)
                return replace(failure, position=(number, len(tracer.script)))
            finally:
                tracer.forget()
        return None

    def _labels_at(self, axes: Axes) -> dict[str, tuple[IndexArray, ...]]:
        """Labels of the kept positions."""
        return {
            name: tuple(atoms[axes[name][d]] if d in axes.get(name, {}) else atoms for d, atoms in enumerate(dims))
            for name, dims in self.analysis.labels.items()
        }

    def functions_called(self, axes: Axes) -> list[tuple[str, tuple[float, ...]]] | None:
        """Functions that a cut copy calls, with their float arguments; None if it does not run."""
        labels, called = self._labels_at(axes), _Called()
        for run in self.analysis.runs:
            tracer = self._second_tracer(SealedAtoms(self.analysis.atoms))
            tracer.choices = self.analysis.tracer.choices
            tracer.first_query_widths, tracer.crossed = run.query_widths, True  # a cut keeps the scale of attention
            copy = self.analysis.copy(run.kind)
            try:
                with copy.cut(axes), called:
                    copy.run(tracer, run.call, labels)
            except Exception:  # the cut itself will fail
                return None
        return called.functions

    def _masked(
        self, run: TracedRun, copy: FakeCopy, axes: Axes
    ) -> tuple[TracedRun, DiscreteResults, MismatchError | None]:
        """The same run of the masked network, which has the same data-dependent sizes as a correct cut.

        Returns:
            The run, its discrete results, and units that may not be removed where data are like this, if there are any.
        """
        atoms = SealedAtoms(self.analysis.atoms)
        tracer = self._second_tracer(atoms)
        tracer.choices = self.analysis.tracer.choices
        tracer.discrete = discrete = DiscreteResults()
        tracer.removed = np.zeros(len(atoms), dtype=np.bool_)
        for name, dims in self.analysis.labels.items():
            for dim, positions in axes.get(name, {}).items():
                tracer.removed[atoms.find(np.delete(dims[dim], positions))] = True
        with copy.masked(axes):
            copy.run(tracer, run.call, self.analysis.labels)
        discrete.give()
        try:
            atoms.check()
        except MismatchError as error:
            return TracedRun.of(run.call, run.kind, tracer), discrete, error
        return TracedRun.of(run.call, run.kind, tracer), discrete, None

    def _second_tracer(self, atoms: SealedAtoms) -> Tracer:
        tracer = Tracer(atoms, RULES, unknown)
        tracer.units, tracer.compares_lengths = self.analysis.tracer.units, self.analysis.tracer.compares_lengths
        tracer.own_norms, tracer.of_features = self.analysis.tracer.own_norms, self.analysis.tracer.of_features
        tracer.bounds_follow = self.analysis.tracer.bounds_follow
        tracer.whole_groups = dict(self.analysis.tracer.whole_groups)
        return tracer

    def _failure(self, error: Exception, tracer: Tracer, atoms: SealedAtoms | None) -> Failure:
        """The failure of a trial; a wrong coupling before the failing operator takes precedence."""
        if atoms is not None and not isinstance(error, MismatchError):
            try:
                atoms.check()
            except MismatchError as earlier:
                error = earlier
        trail = [self._roots(flat_tensors(*arguments), tracer) for arguments in reversed(tracer.trail)]
        if isinstance(error, MismatchError) and error.atoms.size:
            trail = [error.atoms]
        reason = f"{type(error).__name__}: {first_line(error)}"
        return Failure(reason, trail, isinstance(error, NumberError), tracer.module)

    def _roots(self, inputs: Sequence[torch.Tensor], tracer: Tracer) -> IndexArray:
        axes = [axis for x in inputs for axis in tracer.value(x).axes if isinstance(axis, np.ndarray)]
        atoms = np.concatenate([*axes, np.empty(0, dtype=np.int64)])
        return self.analysis.atoms.find(atoms[atoms < len(self.analysis.atoms)])


def _other_numbers(first: int, width: int) -> Iterator[int]:
    """Numbers of units that a group may lose instead of the first, which comes late, and none at the end."""
    yield from range(first + 1, width - 1)
    yield from range(1, first + 1)
    yield 0


def _with_sizes(group: Group, found: Sequence[Member], most: int = _MOST_COMBINATIONS) -> Iterator[Group]:
    """The group with one of these sizes, with all of them, and with at most so many combinations of two or three."""
    some = (sizes for number in (2, 3) for sizes in combinations(found, number) if number < len(found))
    for sizes in (*((size,) for size in found), *([tuple(found)] if len(found) > 1 else []), *islice(some, most)):
        yield replace(group, sizes=(*group.sizes, *sizes))


def _place(group: Group) -> tuple[tuple[str, int], ...]:
    """The axes of a group by names without numbers, the same for those of all blocks."""
    return tuple(sorted((re.sub(r"\d+", "#", member.tensor), member.dim) for member in group.members))


def _kind(size: Member) -> tuple[str, int]:
    """The name of a size within its module, and what it counts of a unit."""
    return size.tensor.rpartition(".")[2], size.index.shape[1]


def _in_units(group: Group, width: int) -> Group:
    """The group in so many units, each of which is as many of its own."""

    def folded(member: Member) -> Member:
        by_unit = member.index.reshape(-1, width, member.index.shape[1]).transpose(1, 0, 2)
        return replace(member, index=np.sort(by_unit.reshape(width, -1), axis=1))

    if group.width == width:
        return group
    return replace(group, width=width, members=tuple(map(folded, group.members)), sizes=tuple(map(folded, group.sizes)))


def _as_in_one_block(
    before: Group, group: Group, found: Mapping[str, Sequence[Member]], alike: Iterable[Group]
) -> Group | None:
    """The group with the sizes and groups of all blocks that are like those it has in one; None if there are none.

    Args:
        before: The group without any.
        group: The group.
        found: Sizes that may follow the group, by module.
        alike: Groups that may be tied to it.
    """

    def place(size: Member) -> tuple[str, int]:
        return re.sub(r"\d+", "#", size.tensor), size.index.shape[1]

    got = {place(size) for size in group.sizes if size not in before.sizes}
    sizes = [size for some in found.values() for size in some if size not in group.sizes and place(size) in got]
    others = [other for other in alike if not _is_part(other, before)]
    tied = {_place(other) for other in others if _is_part(other, group)}
    more = [other for other in others if not _is_part(other, group) and _place(other) in tied]
    for other in more:
        group = _merged(group, other)
    return replace(group, sizes=(*group.sizes, *sizes)) if sizes or more else None


def _merged(group: Group, other: Group) -> Group:
    return replace(group, members=(*group.members, *other.members), sizes=(*group.sizes, *other.sizes))


def _is_part(other: Group, group: Group) -> bool:
    return any(member is other.members[0] for member in group.members)


def _replaced(groups: list[Group], group: Group, whole: Group | None, absorbed: Sequence[Group]) -> list[Group]:
    """The groups with ``whole`` in the place of ``group``, and without those that it has absorbed."""
    left = (g for g in groups if all(g is not other for other in absorbed))
    return [whole if g is group else g for g in left if g is not group or whole is not None]  # type: ignore[misc]
