"""Tracing: from a network and the ways it is run to what can be removed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch

from lightning_prune.structure.analysis import Analysis
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.subject import StructureError, Subject, batch_size_of, require_names, require_traceable
from lightning_prune.structure.tracing import (
    SplitKey,
)
from lightning_prune.structure.trials import Trials

__all__ = ["Tracing", "trace", "verify_shapes"]


def trace(subject: Subject, *, trial: bool = True) -> Structure:
    """Find what can be removed together.

    Every index of every axis of every parameter and buffer gets an atom; the network runs on fake tensors and each
    operator's rule unites the atoms that can only go together. Classes of atoms are units; units on the same axes are
    a group. Inputs, outputs, what an unknown operator touches and what never runs is frozen, with the reason. At last
    the copy is cut for trial and run again: a group for which the cut network couples anything else is frozen too.

    Args:
        subject: The network and how it is run.
        trial: Try a cut of every group. Only tests of the rules themselves leave it out.

    Raises:
        StructureError: If the network cannot be copied or its forward pass fails on the example.
    """
    return Tracing(subject, trial=trial).structure


class Tracing:
    """A network that was traced (see :func:`trace`), and what its cuts would do as long as it does not change.

    Args:
        subject: The network and how it is run.
        trial: Try a cut of every group.

    Attributes:
        structure: What was found.

    Raises:
        StructureError: If the network cannot be copied or its forward pass fails on the example.
    """

    def __init__(self, subject: Subject, *, trial: bool = True) -> None:
        if batch_size_of(subject.calls[0]) == 0:
            raise StructureError("expected an example of at least one sample, got an empty batch")
        require_names(subject.model)
        require_traceable(subject.model)
        with torch.inference_mode(False):
            self._analysis = _analysed(subject, trial=trial)
            self.structure = self._analysis.structure()

    def verify_shapes(self, kept: Mapping[str, Iterable[int]]) -> None:
        """Do what :func:`verify_shapes` does; the network is traced again only if something speaks against the cut.

        This trace compares the lengths of axes as well, which may differ where nothing else does.
        """
        try:
            _verify_shapes(lambda: self._analysis, self.structure, kept)
        except StructureError:
            verify_shapes(self._analysis.subject, self.structure, kept)


def verify_shapes(subject: Subject, structure: Structure, kept: Mapping[str, Iterable[int]]) -> None:
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

    def analysis() -> Analysis:
        found = Analysis(subject)
        # Of a network that was cut before, axes of length 1 have lost what couples them; the structure knows it.
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
    with torch.inference_mode(False):
        try:
            analysis = analyse()
        except StructureError as error:  # training may leave in a module what cannot be copied
            warnings.warn(f"The shapes of a cut were not verified beforehand: {error}", stacklevel=3)
            return
        # What is coupled was settled by the trial, and what cannot run at all shows in the cut itself.
        trials = Trials(analysis)
        failure = trials.compare(structure.axes(narrower), follow=False)
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
        f"{type(analysis.subject.model).__name__} works otherwise at the widths of this cut "
        f"({', '.join(f'{g.name}: {len(units[g.name])}' for g in suspects)}): {reason}. Nothing has changed. "
        "Leave these layers out (`ignore`), keep more of them, or do not compute with their widths in `forward`."
    )


def _analysed(subject: Subject, *, trial: bool) -> Analysis:
    """The groups of a network; without its hooks if it cannot be followed with them."""
    analysis = Analysis(subject)
    try:
        return _best(analysis, trial=trial)
    except StructureError as error:
        if not analysis.first.hooks:
            raise
        try:
            without = _best(Analysis(replace(subject, with_hooks=False)), trial=trial)
        except StructureError:
            raise error from error.__cause__
        without.notes.append(f"the network's hooks were left out, as it could not be followed with them: {error}")
        return without


def _best(analysis: Analysis, *, trial: bool) -> Analysis:
    """Find the groups; where a split axis froze, let another of its parts keep the units apart if that frees more.

    Returns:
        This analysis, or a better one of the same network.
    """
    _find(analysis, trial=trial)
    choices: dict[SplitKey, int] = {}
    for key, (parts, labels) in analysis.tracer.splits.items():
        if not analysis.atoms.frozen()[analysis.atoms.find(np.concatenate(labels))].any():
            continue
        for part in parts[:-1]:
            if _can_cut(analysis.with_choices({**choices, key: part}), key):
                choices[key] = part
                break
    if not choices:
        return analysis
    other = analysis.with_choices(choices)
    _find(other, trial=trial)
    return other if other.free_indices() > analysis.free_indices() else analysis


def _find(analysis: Analysis, *, trial: bool) -> None:
    """Trace, group, try."""
    analysis.trace()
    analysis.freeze_unseen()
    analysis.find_groups()
    if trial:
        analysis.groups = Trials(analysis).passing(analysis.groups)


def _can_cut(analysis: Analysis, key: SplitKey) -> bool:
    """Whether, with the choices made, units of this split are left and can be removed, as the first call shows."""
    for call in (*analysis.subject.calls, *analysis.subject.optional):
        analysis.run_if_possible(call)
        if key in analysis.tracer.splits:
            break
    else:
        return False
    analysis.freeze_unseen()
    analysis.find_groups()
    atoms = analysis.atoms.find(np.concatenate(analysis.tracer.splits[key][1]))
    groups = [g for g in analysis.groups if g.width > 1 and np.isin(analysis.atoms_of(g), atoms).any()]
    return bool(groups) and Trials(analysis).attempt(groups, follow=all(g.width > 2 for g in groups)) is None
