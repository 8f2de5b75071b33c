"""Features of attention heads as units of their own, beside whole heads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from lightning_prune.errors import listed
from lightning_prune.structure.analysis import Analysis, HeadFeatures
from lightning_prune.structure.feature_parts import in_parts, named_by_place, parts_of, whole_again
from lightning_prune.structure.graph import Group, IndexArray, Member
from lightning_prune.structure.query_rows import with_query_rows
from lightning_prune.structure.size_attributes import stored_scales
from lightning_prune.structure.tracing import MEETS_FIXED
from lightning_prune.structure.trials import Trials

__all__ = ["SUFFIX", "add_head_features"]

#: Of the names of groups of features.
SUFFIX = "#head_dim"


def add_head_features(analysis: Analysis) -> None:
    """Find the groups of features that every head of an attention can lose, if there are whole heads to remove.

    Where the halves of an axis have other units each, as where rotary embeddings turn one of them, they are in groups
    of their own. If not all of these can be cut, the halves leave together where more can be removed so.

    Args:
        analysis: The analysis, whose `head_features` are set.
    """
    notes, remarks = list(analysis.notes), dict(analysis.remarks)
    if _set_head_features(analysis, halves_leave=False):
        return
    apart, notes_apart, remarks_apart = analysis.head_features, analysis.notes, analysis.remarks
    analysis.head_features, analysis.notes, analysis.remarks = None, notes, remarks
    _set_head_features(analysis, halves_leave=True)
    if _reach(analysis.head_features) <= _reach(apart):
        analysis.head_features, analysis.notes, analysis.remarks = apart, notes_apart, remarks_apart


def _reach(features: HeadFeatures | None) -> int:
    """Number of positions, over all axes, that groups of features may lose."""
    groups = [] if features is None else features.groups
    return sum(member.index.size for group in groups for member in group.members)


def _set_head_features(analysis: Analysis, *, halves_leave: bool) -> bool:
    """Set the features of heads, if any are found.

    A view splits an axis into heads and features. In the analysis heads are the units; in a second one features are. A
    group of the second is taken if each of its units has as many positions of every head of the groups that it meets,
    so that cuts of both take rows and columns of one block, and if a trial cut of both passes.

    Args:
        analysis: The analysis.
        halves_leave: Whether both halves of an axis, of which slices take one, always lose the same indices.

    Returns:
        False if halves with other units each are in groups that cannot be cut.
    """
    owners = _Owners((group for group in analysis.groups if group.width > 1), analysis.shapes)
    if not (analysis.tracer.choices and owners.with_several):
        return True
    other = analysis.with_choices({})
    other.tracer.of_features = True
    # Both have the same atoms of parameters. Positions, for one, are frozen by operators behind the heads. What is
    # frozen as it meets features, which have no units there, may have them here: the angles of rotary embeddings.
    frozen = analysis.atoms.frozen(besides=MEETS_FIXED)[analysis.atoms.find(np.arange(analysis.tracer.units))]
    other.atoms.freeze(np.flatnonzero(frozen), "frozen beside the heads")
    other.trace()
    differ = _unite_halves(other, always=halves_leave)
    other.freeze_unused()
    other.find_groups()
    tracers = analysis.tracer, other.tracer
    if len({len(tracer.macs) for tracer in tracers}) > 1 or len({len(tracer.written) for tracer in tracers}) > 1:
        return True
    crossing = [(group, owned) for group in other.groups if group.width > 2 and (owned := owners.of(group))]
    units = {group.name: other.atoms_of(group) for group, _ in crossing}
    are_frozen = other.atoms.frozen()
    products = ((module, other.atoms.find(label)) for module, label in other.tracer.products)
    parts = parts_of(units, ((module, roots) for module, roots in products if not are_frozen[roots].all()))
    names = named_by_place(other.groups, parts)
    parts = {names.get(name, name): own for name, own in parts.items()}
    whole = [replace(group, name=names.get(group.name, group.name)) for group, _ in crossing]
    heads = {one.name: tuple(g.name for g in owned) for one, (_, owned) in zip(whole, crossing, strict=True)}
    split, parts = in_parts(whole, heads, parts)
    heads |= {name: heads[part.whole] for name, (part, *_) in parts.items() if part.whole}
    of_heads = {size.tensor: size.index.shape[1] for group in analysis.groups for size in group.sizes}
    other.groups = whole_again(Trials(other, heads, parts, of_heads).passing(split), parts, whole)
    analysis.remarks |= dict.fromkeys(_failed(other, heads))
    found = [
        replace(
            group,
            name=f"{group.name}{SUFFIX}",
            sizes=tuple(map(_by_feature, group.sizes)),
            within=heads[group.name],
        )
        for group in other.groups
    ]
    found = _passing(analysis, _with_fixed_angles(analysis, found))
    modules = {group.name: _with_own_scale(other, group) for group in found}
    for number, group in enumerate(found):
        own = parts.get(group.name.removesuffix(SUFFIX), ())
        scales = stored_scales(other.first.module, group, modules[group.name], own)
        found[number] = replace(group, sizes=(*group.sizes, *scales))
    found = with_query_rows(analysis, found, modules)
    if found:
        analysis.head_features = HeadFeatures(found, other)
    in_halves = {f"{name}{SUFFIX}" for name, (part, *_) in parts.items() if not part.whole}
    return not differ or in_halves <= {group.name for group in found}


def _unite_halves(analysis: Analysis, *, always: bool) -> bool:
    """Unite the halves of axes that were split in two, where each has as many units; whether others have not.

    Args:
        analysis: The analysis.
        always: Whether to unite all of them.
    """
    differ = False
    for axis in analysis.tracer.halves:
        first, second = axis.reshape(2, -1)
        counts = {len(np.unique(analysis.atoms.find(half))) for half in (first, second)}
        if always or len(counts) == 1:
            analysis.atoms.unite(first, second)
        else:
            differ = True
    return differ


def _failed(analysis: Analysis, heads: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Notes on the features whose trial cuts failed, one for the same layer of all blocks.

    Of each attention only those that failed first are named, as the others fail without them.
    """
    alike: dict[str, list[Group]] = {}
    for group in reversed({heads[group.name]: group for group in reversed(analysis.failed)}.values()):
        alike.setdefault(re.sub(r"\d+", "#", group.name), []).append(group)
    reasons = analysis.atoms.class_reasons()
    return [
        f"the features of heads of {listed([f'{group.name}{SUFFIX}' for group in groups], 3)} stay: "
        f"{reasons[int(analysis.atoms_of(groups[0])[0])]}"
        for groups in alike.values()
    ]


def _with_fixed_angles(analysis: Analysis, features: list[Group]) -> list[Group]:
    """The groups without those whose angles are computed again for inputs that are longer than any before.

    Dynamic rotary embeddings of transformers are, from the configuration, in as many pairs as at first.
    """
    modules = dict(analysis.first.module.named_modules())

    def are_fixed(group: Group) -> bool:
        owners = (modules.get(member.tensor.rpartition(".")[0]) for member in group.members)
        return not any("dynamic" in str(getattr(owner, "rope_type", "")) for owner in owners)

    lost = [group.name for group in features if not are_fixed(group)]
    if lost:
        analysis.notes.append(
            f"the features of heads of {', '.join(lost)} were left out, as the angles of their rotary embeddings are "
            "computed again for long inputs (`rope_type` is 'dynamic')"
        )
    return [group for group in features if group.name not in lost]


def _with_own_scale(analysis: Analysis, features: Group) -> set[str]:
    """The modules whose attention computes its scale from the number of these features."""
    units = analysis.atoms_of(features)
    return {
        module
        for module, labels in analysis.tracer.own_scales.items()
        if any(np.isin(analysis.atoms.find(label), units).any() for label in labels)
    }


def _passing(analysis: Analysis, features: list[Group]) -> list[Group]:
    """The groups of features whose trial cuts pass together with those of all other groups."""
    trials, wide = Trials(analysis), [group for group in analysis.groups if group.width > 2]
    if not features or trials.attempt([*wide, *features], follow=True) is None:
        return features
    by_name = {group.name: group for group in analysis.groups}
    alone, failed = [], dict[str, str]()
    for one in features:
        failure = trials.attempt([*map(by_name.__getitem__, one.within), one], follow=False)
        if failure is None:
            alone.append(one)
        else:
            failed[one.name] = failure.reason
    if failed:
        names, why = listed([*failed], 3), next(iter(failed.values()))
        note = f"the features of heads of {names} stay: a trial cut failed together with their heads: {why}"
        analysis.remarks[note] = None
    if not alone or trials.attempt([*wide, *alone], follow=True) is None:
        return alone
    analysis.notes.append(
        f"the features of heads were left out, as a trial cut of all groups failed with them: "
        f"{', '.join(group.name for group in alone)}"
    )
    return []


def _by_feature(size: Member) -> Member:
    """A size that counts the features of all heads, in their order: head by head."""
    if size.length:  # it is in this order
        return size
    width, times = size.index.shape
    return replace(size, index=np.ascontiguousarray(size.index.reshape(times, width).T))


class _Owners:
    """Looks up the heads that the positions of an axis belong to."""

    def __init__(self, groups: Iterable[Group], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.groups, self.shapes = list(groups), shapes
        self.with_several = any(m.index.shape[1] > 1 for g in self.groups for m in g.members if m.role == "out")
        self._units: dict[tuple[str, int], list[tuple[int, IndexArray]]] = {}
        for number, group in enumerate(self.groups):
            for member in group.members:
                self._units.setdefault((member.tensor, member.dim), []).append((number, member.index))

    def of(self, features: Group) -> list[Group]:
        """The groups of heads that these features cross; none if an axis has other units beside heads."""
        axes = {(m.tensor, m.dim): m for m in features.members}
        numbers = {self._crossed(member) for axis, member in axes.items() if axis in self._units}
        found = [group for number, group in enumerate(self.groups) if number in numbers]
        return [] if None in numbers else found

    def _crossed(self, member: Member) -> int | None:
        """The group whose units alone are on this axis, and have equally many positions of each feature."""
        found = self._units[member.tensor, member.dim]
        if len(found) != 1:
            return None
        ((number, index),) = found
        heads, times = index.shape
        if times == 1 or index.size != self.shapes[member.tensor][member.dim] or member.index.shape[1] % heads:
            return None
        unit = np.empty(index.size, dtype=np.int64)
        unit[index] = np.arange(heads)[:, None]
        each = np.repeat(np.arange(heads), member.index.shape[1] // heads)
        return number if (np.sort(unit[member.index], axis=1) == each).all() else None
