"""Finding the structure of a network, and verifying a cut before it is made."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from lightning_prune.structure.analysis import Analysis
from lightning_prune.structure.graph import Group, Structure
from lightning_prune.structure.head_features import add_head_features
from lightning_prune.structure.traced_model import (
    StructureError,
    TracedModel,
    batch_size_of,
    require_names,
    require_traceable,
)
from lightning_prune.structure.tracing import (
    SplitKey,
)
from lightning_prune.structure.trials import Trials

__all__ = ["Tracing", "trace", "verify_shapes"]


def trace(traced: TracedModel, *, trial: bool = True) -> Structure:
    """Find the groups of units that can be removed together.

    Every index of every axis of every parameter and buffer gets an atom. The network runs on fake tensors, and the rule
    of each operator unites the atoms that can only be removed together. Classes of atoms are units; units on the same
    axes form a group. Axes of inputs and outputs, of unused tensors and of operators without a rule are frozen, with
    the reason. Finally the copy is cut and run again: groups for which the narrower network differs are frozen too.

    Args:
        traced: The network and its calls.
        trial: Whether to run trial cuts; False only in tests of the rules themselves.

    Raises:
        StructureError: If the network cannot be copied or its forward pass fails on the example.
    """
    return Tracing(traced, trial=trial).structure


class Tracing:
    """The analysis of a network (see :func:`trace`), reused to verify cuts as long as the network does not change.

    Args:
        traced: The network and its calls.
        trial: Whether to run trial cuts.

    Attributes:
        structure: The structure that was found.

    Raises:
        StructureError: If the network cannot be copied or its forward pass fails on the example.
    """

    def __init__(self, traced: TracedModel, *, trial: bool = True) -> None:
        if batch_size_of(traced.calls[0]) == 0:
            raise StructureError("expected an example of at least one sample, got an empty batch")
        require_names(traced.model)
        require_traceable(traced.model)
        with torch.inference_mode(False):
            self._analysis = _analysed(traced, trial=trial)
            self.structure = self._analysis.structure()

    def verify_shapes(self, kept: Mapping[str, Iterable[int]]) -> None:
        """Verify a cut like :func:`verify_shapes`, but trace the network again only if the cut fails.

        The existing trace also compares the lengths of axes, which may differ without consequence.
        """
        try:
            _verify_shapes(lambda: self._analysis, self.structure, kept)
        except StructureError:
            verify_shapes(self._analysis.traced, self.structure, kept)


def verify_shapes(traced: TracedModel, structure: Structure, kept: Mapping[str, Iterable[int]]) -> None:
    """Run a copy of the network at the widths of a cut and compare its operators with the original's.

    The trial of `trace` halves every width. Code that depends on smaller widths (``if width < 12``, ``min(8, width)``)
    is detected here, before anything is cut.

    Args:
        traced: The network and its calls.
        structure: Structure of the network.
        kept: Units to keep per group. Groups without units are left whole, since their layers are removed. Groups with
            one unit are run with two, since PyTorch runs other operators for axes of length 1, and the functions called
            with one and with two units are compared.

    Raises:
        StructureError: If the narrower network computes something else; the message names the groups to ignore.
    """

    def analysis() -> Analysis:
        found = Analysis(traced)
        # In a network that was cut before, axes of length 1 are no longer coupled by their operators.
        found.tracer.compares_lengths = False
        found.follow(structure)
        return found

    _verify_shapes(analysis, structure, kept)


def _verify_shapes(analyse: Callable[[], Analysis], structure: Structure, kept: Mapping[str, Iterable[int]]) -> None:
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
    _check_projections(structure, {name: rows for name, rows in units.items() if rows})
    with torch.inference_mode(False):
        try:
            analysis = analyse()
        except StructureError as error:  # training may have stored what cannot be copied in a module
            warnings.warn(f"The shapes of a cut were not verified beforehand: {error}", stacklevel=3)
            return
        # Couplings were checked by the trial, and a network that cannot run fails in the cut itself.
        trials = Trials(analysis)
        crossed = any(group.within for group in groups)
        failure = trials.compare(structure.axes(narrower), follow=False, crossed=crossed)
        suspects = groups if failure is None else trials.suspects(groups, failure) or groups
        reason = failure.reason if failure is not None and failure.numbers else None
        if reason is None and single:
            exactly = {name: rows for name, rows in units.items() if rows}
            at_two, at_one = (trials.functions_called(structure.axes(kept)) for kept in (narrower, exactly))
            if at_one is not None and at_one != at_two:
                suspects, reason = single, "its code calls other functions where one unit is left"
        if reason is None:
            return
    raise StructureError(
        f"{type(analysis.traced.model).__name__} computes something else at the widths of this cut "
        f"({', '.join(f'{g.name}: {len(units[g.name])}' for g in suspects)}): {reason}. Nothing has changed. "
        "Leave these layers out (`ignore`), keep more of them, or do not compute with their widths in `forward`."
    )


def _analysed(traced: TracedModel, *, trial: bool) -> Analysis:
    """Analyse a network, without its hooks if it cannot be traced with them."""
    analysis = Analysis(traced)
    try:
        return _with_features(_best(analysis, trial=trial), trial=trial)
    except StructureError as error:
        if not analysis.first.hooks:
            raise
        try:
            without = _with_features(_best(Analysis(replace(traced, with_hooks=False)), trial=trial), trial=trial)
        except StructureError:
            raise error from error.__cause__
        without.notes.append(f"the network's hooks were ignored, as it could not be traced with them: {error}")
        return without


def _with_features(analysis: Analysis, *, trial: bool) -> Analysis:
    """The analysis with the features of heads; they are found by trial cuts alone."""
    if trial:
        add_head_features(analysis)
    return analysis


def _check_projections(structure: Structure, kept: Mapping[str, Iterable[int]]) -> None:
    """Raise an error if an LSTM would have as many hidden units as projections: PyTorch takes it for one without."""
    for name, axes in structure.axes(kept).items():
        if name.rpartition(".")[2] != "weight_hr_l0":
            continue
        projected, hidden = (len(axes.get(dim, range(size))) for dim, size in enumerate(structure.cost.shapes[name]))
        if projected == hidden:
            raise StructureError(
                f"{name.rpartition('.')[0]}: this cut leaves {hidden} hidden units and as many projections, which "
                "PyTorch's LSTM cannot run. Nothing has changed. Keep another number of either (`pruning_ratio`)."
            )


def _best(analysis: Analysis, *, trial: bool) -> Analysis:
    """Find the groups; where slices freeze units in an attention, let their bounds follow if that frees more units.

    Returns:
        The best analysis.
    """
    best = _best_of_splits(analysis, trial=trial)
    if trial and not best.tracer.attentions.isdisjoint(best.tracer.bounds):
        other = _best_of_splits(best.with_bounds_that_follow(), trial=trial)
        best = other if other.free_indices() > best.free_indices() else best
    return best


def _best_of_splits(analysis: Analysis, *, trial: bool) -> Analysis:
    """Find the groups; where a split axis is frozen, try the other parts of the split and keep what frees more units.

    Returns:
        The best analysis.
    """
    _find(analysis, trial=trial)
    if ties := _of_one_width(analysis):
        other = analysis.with_ties(ties)
        _find(other, trial=trial)
        analysis = other if other.free_indices() > analysis.free_indices() else analysis
    frozen = analysis.atoms.frozen()
    splits = {
        key: parts
        for key, (parts, labels) in analysis.tracer.splits.items()
        if len(parts) > 1 and frozen[analysis.atoms.find(np.concatenate(labels))].any()
    }
    # Queries and keys of other widths are split by other sizes, and are heads of one attention.
    together = {key: parts[-2] for key, parts in splits.items() if _has_heads(parts)}
    with_together = analysis.with_choices(together) if len(splits) > 1 and together else None
    choices: dict[SplitKey, int] = {}
    for key, parts in splits.items():
        if with_together is not None and key in together and _can_cut(with_together, key):
            choices = together
            break
        for part in parts[:-1]:
            if _can_cut(analysis.with_choices({**choices, key: part}), key):
                choices[key] = part
                break
    best = analysis
    if choices:
        other = analysis.with_choices(choices)
        _find(other, trial=trial)
        best = other if other.free_indices() > analysis.free_indices() else analysis
    if trial and not any(map(_is_view, choices)) and (heads := _heads(analysis)):
        other = analysis.with_choices(heads)
        _find(other, trial=trial)
        best = other if other.free_indices() >= best.free_indices() else best
    tied = _with_tied_heads(best, {**together, **choices})
    return tied if tied is not None and tied.free_indices() > best.free_indices() else best


def _of_one_width(analysis: Analysis) -> list[list[tuple[str, int]]]:
    """Whole axes of the groups whose cuts failed, by width: code may view one as wide as another."""
    found: dict[int, list[tuple[str, int]]] = {}
    for member in (group.members[0] for group in analysis.failed):
        width = analysis.shapes[member.tensor][member.dim]
        if member.index.shape == (width, 1):
            found.setdefault(width, []).append((member.tensor, member.dim))
    return [axes for axes in found.values() if len(axes) > 1]


def _heads(analysis: Analysis) -> dict[SplitKey, int]:
    """The parts that are heads, for splits in modules that take a softmax: attention loses heads if it can.

    A layer in such a module may make the split, as those of einops do.
    """
    tracer = analysis.tracer

    def is_in_attention(module: str) -> bool:
        return not tracer.attentions.isdisjoint((module, module.rpartition(".")[0]))

    return {
        key: parts[-2]
        for key, (parts, _) in tracer.splits.items()
        if len(parts) > 1 and _is_view(key) and all(map(is_in_attention, tracer.split_in[key]))
    }


def _is_view(key: SplitKey) -> bool:
    """Whether a view makes the split, rather than a slice, which takes a single part."""
    return len(key[1]) > 1


def _has_heads(parts: Sequence[int]) -> bool:
    """Whether the part before the features is that of heads; a single head has no part."""
    return len(parts) > 1 and parts[-2] == parts[-1] - 1


def _with_tied_heads(analysis: Analysis, choices: Mapping[SplitKey, int]) -> Analysis | None:
    """An analysis where heads leave with as many channels of the embedding.

    Code that reads the embedding width from its input, and views the features of all heads as that many, cannot lose
    one without the other. Nor can other layers of that width whose cut failed, as code may view their channels as that
    many, too. A unit of the embedding may be several channels already: where it is split into heads itself (a query of
    all windows), or into halves.
    """
    single: dict[int, list[Group]] = {}
    several: dict[int, list[Group]] = {}
    for group in analysis.failed:
        index = group.members[0].index
        (single if index.shape[1] == 1 else several).setdefault(index.size, []).append(group)
    failed = {**several, **single}
    if not (failed and choices):
        return None
    every = _with_tied(analysis, choices, failed)
    if every is None or every.free_indices() > analysis.free_indices() or max(map(len, failed.values())) == 1:
        return every
    return _with_tied(analysis, choices, {width: groups[-1:] for width, groups in failed.items()})


def _with_tied(
    analysis: Analysis, choices: Mapping[SplitKey, int], streams: Mapping[int, Sequence[Group]]
) -> Analysis | None:
    """An analysis with these choices where heads leave with the groups of their width; None if there are no heads."""
    other = analysis.with_choices(choices)
    other.trace()
    found = False
    for key in filter(_is_view, choices.keys() & other.tracer.splits.keys()):
        for label in other.tracer.splits[key][1]:
            # Queries, keys and values may be one axis.
            likely = math.prod(key[1][choices[key] :])
            single = (w for w, groups in streams.items() if groups[0].members[0].index.shape[1] == 1)
            width = max((w for w in single if len(label) in (w, 2 * w, 3 * w)), default=None)
            width = likely if likely in streams else width
            if width is not None:
                for first in (group.members[0] for group in streams[width]):
                    other.atoms.unite(label[:width], other.labels[first.tensor][first.dim][np.sort(first.index, None)])
                found = True
    if not found:
        return None
    other.freeze_unused()
    other.find_groups()
    other.groups = Trials(other).passing(other.groups)
    return other


def _find(analysis: Analysis, *, trial: bool) -> None:
    """Trace, group and run trial cuts."""
    analysis.trace()
    analysis.freeze_unused()
    analysis.find_groups()
    if trial:
        analysis.groups = Trials(analysis).passing(analysis.groups)


def _can_cut(analysis: Analysis, key: SplitKey) -> bool:
    """Whether units of this split can be removed with the analysis' choices, judged by the first calls with it."""
    for call in (*analysis.traced.calls, *analysis.traced.optional):
        if key in analysis.tracer.splits:
            break
        if all(run.call is not call for run in analysis.runs):
            analysis.run_if_possible(call)
    if key not in analysis.tracer.splits:
        return False
    analysis.freeze_unused()
    analysis.find_groups()
    atoms = analysis.atoms.find(np.concatenate(analysis.tracer.splits[key][1]))
    groups = [g for g in analysis.groups if g.width > 1 and np.isin(analysis.atoms_of(g), atoms).any()]
    if not groups:
        return False
    trials, follow = Trials(analysis), all(g.width > 2 for g in groups)
    return (
        trials.attempt(groups, follow) is None
        or trials.attempt(groups[:1], follow) is None
        or trials.repaired(groups[0], groups[1:], follow) is not None
    )
