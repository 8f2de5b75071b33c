"""Features of attention heads that are units of several groups, such as those that rotary embeddings turn and others.

Code has one number for all of them (`head_dim`), so each group changes it by its own features. Values, which no
rotary embedding turns, lose the features at the same places where their number is that of the queries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_prune.structure.graph import Group, IndexArray
from lightning_prune.structure.layers import is_within

__all__ = ["Part", "in_parts", "named_by_place", "part_in", "parts_of", "whole_again"]


@dataclass(frozen=True, eq=False)
class Part:
    """The features of a head that the units of a group are, in one of its attentions.

    Attributes:
        module: The module that multiplies queries and keys.
        total: Number of features of a head, in this group and others.
        places: Which of these each unit is, shape ``(width, features per unit)``.
        of: For features of values, the group of queries and keys at these places, or themselves if there is none;
            ``""`` for all others.
        whole: For features of values, the name of the group of all of them; ``""`` for all others.
    """

    module: str
    total: int
    places: IndexArray
    of: str = ""
    whole: str = ""

    def positions(self, number: int) -> IndexArray:
        """Positions of each unit on a size of this number, which counts all features of a head, or several times so."""
        times = self.total * np.arange(number // self.total)[:, None]
        return (self.places[:, None] + times).reshape(len(self.places), -1)


def part_in(parts: Sequence[Part], module: str, number: int) -> Part | None:
    """The part in a module where a number counts all features of a head, or several times so; None if there is none.

    Args:
        parts: Parts of a group.
        module: Name of a module around its attentions, or of one of these.
        number: The number.
    """
    inside = (part for part in parts if not module or is_within(part.module, [module]))
    return next((part for part in inside if number % part.total == 0), None)


def parts_of(units: Mapping[str, IndexArray], products: Iterable[tuple[str, IndexArray]]) -> dict[str, list[Part]]:
    """The parts of groups of which no one has all features of a head, by name, in the order of their places.

    Args:
        units: Representatives of the units of each group.
        products: Modules that multiply queries and keys, and the representatives of the features of a head.
    """
    parts: dict[str, list[Part]] = defaultdict(list)
    for module, features in products:
        found = {}
        for name, roots in units.items():
            equal = features == roots[:, None]
            times = equal.sum(1)
            if times.min() > 0 and (times == times[0]).all() and equal.sum() < len(features):
                found[name] = Part(module, len(features), equal.nonzero()[1].reshape(len(roots), -1))
        for name, part in sorted(found.items(), key=lambda item: int(item[1].places.min())):
            if not any((known.module, known.total) == (module, part.total) for known in parts[name]):
                parts[name].append(part)
    return dict(parts)


def named_by_place(groups: Sequence[Group], parts: Mapping[str, Sequence[Part]]) -> dict[str, str]:
    """Names of groups of parts: the second one of the features of a head is ``"layer#2"``."""
    others = {group.name for group in groups} - parts.keys()
    by_module: dict[str, list[str]] = defaultdict(list)
    for name, own in parts.items():
        for part in own:
            by_module[part.module].append(name)
    names: dict[str, str] = {}
    for some in by_module.values():
        for number, name in enumerate(some):
            new = name.partition("#")[0] + (f"#{number + 1}" if number else "")
            if new not in others and new not in names.values():
                names.setdefault(name, new)
    kept = {name for name in parts if name not in names}
    return names if not kept & {*names.values()} else {}


def in_parts(
    groups: Sequence[Group], heads: Mapping[str, tuple[str, ...]], parts: Mapping[str, Sequence[Part]]
) -> tuple[list[Group], dict[str, list[Part]]]:
    """The groups, those of values in parts where the queries and keys of their heads are, and all parts by name.

    Args:
        groups: Groups of features.
        heads: The groups of heads of each, by name.
        parts: The parts of those of queries and keys.
    """
    by_module: dict[str, dict[str, Part]] = defaultdict(dict)
    for name, own in parts.items():
        for part in own:
            by_module[part.module].setdefault(name, part)
    split, every = list[Group](), {name: list(own) for name, own in parts.items()}
    for group in groups:
        among = (
            some
            for some in by_module.values()
            if group.name not in parts
            and all(part.total == group.width and {*heads[group.name]} <= {*heads[name]} for name, part in some.items())
        )
        along = next(among, None)
        if along is None:
            split.append(group)
            continue
        rest = np.setdiff1d(np.arange(group.width), np.concatenate([part.places.ravel() for part in along.values()]))
        places = {name: part.places.T.ravel() for name, part in along.items()} | ({"": rest} if rest.size else {})
        module = next(iter(along.values())).module
        for number, (name, rows) in enumerate(places.items()):
            own_name = f"{group.name}#{number}"
            every[own_name] = [Part(module, group.width, rows[:, None], name or own_name, group.name)]
            members = tuple(replace(member, index=member.index[rows]) for member in group.members)
            split.append(replace(group, name=own_name, width=len(rows), members=members))
    return split, every


def whole_again(groups: Sequence[Group], parts: Mapping[str, Sequence[Part]], before: Sequence[Group]) -> list[Group]:
    """The groups, those of values whole again of which all parts are left.

    Args:
        groups: Groups of features.
        parts: Their parts.
        before: The groups before they were in parts.
    """
    left: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if group.name in parts and parts[group.name][0].whole:
            left[parts[group.name][0].whole].append(group)
    wholes: dict[str, Group] = {}
    for whole in before:
        some = left[whole.name]
        sizes = [{size.tensor: size for size in group.sizes} for group in some]
        if (
            some
            and sum(group.width for group in some) == whole.width
            and all(sizes[0].keys() == s.keys() for s in sizes)
        ):
            joined = {tensor: np.concatenate([one[tensor].index for one in sizes]) for tensor in sizes[0]}
            own = tuple(
                replace(sizes[0][tensor], index=index[np.argsort(index[:, 0])], length=0)
                for tensor, index in joined.items()
            )
            wholes |= {group.name: replace(whole, sizes=own) for group in some}
    return list({one.name: one for one in (wholes.get(group.name, group) for group in groups)}.values())
