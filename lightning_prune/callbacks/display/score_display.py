"""Progress bar, tables and figures of layer scores."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_prune.callbacks.display.layer_progress import LayerProgress
from lightning_prune.callbacks.display.report_writer import step_of
from lightning_prune.callbacks.display.wandb_run import log_media
from lightning_prune.callbacks.layer_scores import Scored
from lightning_prune.packages import both
from lightning_prune.planning import dividing_threshold, widths_at
from lightning_prune.reporting import (
    LayerScores,
    ScoredDepth,
    SizeAtThreshold,
    importance_figure,
    score_figure,
    threshold_figure,
)
from lightning_prune.reporting.grid import console_for
from lightning_prune.reporting.numeric import Table, of_dataclasses
from lightning_prune.scoring.xgb import LayerScore, unit_axes
from lightning_prune.structure import Structure
from lightning_prune.structure.graph import Group
from lightning_prune.structure.layers import is_within

__all__ = ["ScoreProgress", "show_scores", "sizes_at_thresholds", "table_of"]

# Thresholds of the table.
_SERIES = tuple(float(f"{digit}e{exponent}") for exponent in range(-9, 0) for digit in (1, 1.5, 2, 3, 5, 7))


class ScoreProgress(LayerProgress):
    """Progress bar of a scoring, shown if the Trainer has a progress bar.

    Args:
        trainer: The run.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, "Scoring layers")

    def see(self, found: LayerScore, layers: int) -> None:
        """Update the bar.

        Args:
            found: Score of the finished layer.
            layers: Number of layers.
        """
        description = f"{found.station.layer}: μ {found.score:.3f}"
        self._bar.update(self._task, total=layers, advance=1, description=description)


def table_of(
    scored: Scored,
    groups: Sequence[Group],
    metric: str,
    threshold: float | None = None,
    sizes: Sequence[SizeAtThreshold] = (),
    whole: str = "the network",
) -> LayerScores:
    """Create the tables of a scoring.

    Args:
        scored: Result of the scoring.
        groups: Scored groups.
        metric: Name of the metric μ.
        threshold: Global threshold ρ, if any; else one is derived for each group.
        sizes: Sizes at other thresholds, see `sizes_at_thresholds`.
        whole: Name of the part whose parameters are counted.
    """
    layers = [found for station, found in scored.layers.items() if station.point == "activation"]
    depths = [
        ScoredDepth(
            end.name, len(end.layers), end.width, score, end == scored.end or (scored.end is None and not end.tail)
        )
        for end, score in scored.depths
    ]
    thresholds = _thresholds(scored, groups, threshold)
    return LayerScores(layers, _kept_channels(scored, groups), metric, depths, thresholds, sizes, whole)


def sizes_at_thresholds(scored: Scored, structure: Structure, backbone: Iterable[str] | None) -> list[SizeAtThreshold]:
    """Sizes of the network at a series of thresholds, at the chosen depth.

    Args:
        scored: Result of a one-shot scoring.
        structure: Structure of the network before the cut.
        backbone: Modules whose parameters are counted; all if None.
    """
    tail = () if scored.end is None else scored.end.tail
    modules = {term.layer for term in structure.cost.parameters} if backbone is None else set(backbone)
    left = {name for name in modules if not is_within(name, tail)}
    used = [use.importance[use.importance > 0] for use in scored.use.values()]
    found = np.concatenate([np.empty(0), *used])
    if not len(found):
        return []
    of_units = sum(len(use.importance) for use in scored.use.values())
    of_params = structure.cost.params(structure.widths, modules)
    rows = []
    for threshold in (0.0, *(rho for rho in _SERIES if found.min() <= rho < found.max())):
        widths = widths_at(structure, scored.use, threshold)
        units, params = sum(widths[name] for name in scored.use), structure.cost.params(widths, left)
        rows.append(SizeAtThreshold(threshold, units, params, of_units, of_params))
    return rows


def _thresholds(scored: Scored, groups: Iterable[Group], threshold: float | None) -> dict[str, float]:
    """Threshold ρ > 0 between kept and removed channels, by layer."""
    found: dict[str, float] = {}
    for group in groups:
        use, kept = scored.use.get(group.name), scored.plan.kept.get(group.name)
        rho = threshold
        if rho is None and use is not None and kept is not None:
            rho = dividing_threshold(use, kept)
        if rho:
            found |= dict.fromkeys(unit_axes(group), rho)
    return found


def _kept_channels(scored: Scored, groups: Iterable[Group]) -> dict[str, list[int]]:
    """Kept output channels of every layer, ascending."""
    widths = {station.layer: len(found.importance) for station, found in scored.layers.items()}
    tail = scored.end.tail if scored.end is not None else ()
    kept: dict[str, set[int]] = {}
    for group in groups:
        gone = np.setdiff1d(np.arange(group.width), scored.plan.kept.get(group.name, range(group.width)))
        for layer, members in unit_axes(group).items():
            if layer not in widths:
                continue
            left = kept.setdefault(layer, set(range(widths[layer])))
            if is_within(layer, tail):
                left.clear()
            for member in members:
                left.difference_update(np.unique(member.index[gone]).tolist())
    return {layer: sorted(channels) for layer, channels in kept.items()}


def show_scores(trainer: Trainer, table: LayerScores, folder: Path, threshold: float | None, *, prints: bool) -> None:
    """Write ``scores.md`` with its pictures, log these and their numbers to W&B, and print the table if requested.

    Args:
        trainer: The run.
        table: The scores.
        folder: Folder of the scores and of the files.
        threshold: ρ, if there is one for all layers.
        prints: Whether to print the table, for a run that only scores.
    """
    if getattr(trainer, "fast_dev_run", False):
        return
    pictures = _pictures(table, folder, threshold)
    parts = ["# Scores of layers", *(f"![{path.stem}]({path.name})" for path in pictures)]
    page = "\n\n".join([*parts, *(grid.markdown() for grid in table.grids())])
    (folder / "scores.md").write_text(f"{page}\n", encoding="utf-8")
    if prints:
        console = console_for()
        console.print(table)
        console.print(f"Scores: {folder}", soft_wrap=True)
    for logger in trainer.loggers:
        if isinstance(logger, both(WandbLogger)):
            log_media(logger, "pruning", _tables(table), pictures, step_of(trainer))


def _tables(table: LayerScores) -> dict[str, Table]:
    """The numbers in the page and its histograms."""
    channels = Table(("layer", "channel", "importance", "log importance", "decided"), list(table.channels()))
    found = {
        "layers": of_dataclasses(table.rows),
        "depths": of_dataclasses(table.depths),
        "thresholds": of_dataclasses(table.sizes),
        "channels": channels,
    }
    return {name: rows for name, rows in found.items() if rows.rows}


def _pictures(table: LayerScores, folder: Path, threshold: float | None) -> list[Path]:
    curves = {f"held-out {table.metric}": [(found.station.layer, found.score) for found in table.layers]}
    if table.depths:
        curves = {
            f"held-out {table.metric} at truncation points": [(depth.name, depth.score) for depth in table.depths]
        }
    figures: dict[str, Any] = {
        "importances.png": lambda: importance_figure(table.layers, table.kept, table.thresholds),
        "scores.png": lambda: score_figure(curves),
    }
    if len(table.sizes) > 1:
        figures["thresholds.png"] = lambda: threshold_figure(table.sizes, table.whole, threshold)
    written = []
    for name, draw in figures.items():
        try:
            draw().savefig(folder / name)
        except ModuleNotFoundError as error:
            warnings.warn(f"no picture of the scores: {error}", stacklevel=2)
            return []
        written.append(folder / name)
    return written
