"""The report of a study: tables in the thesis' form, pictures, and what a practitioner should do."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_prune.reporting.grid import MISSING, Grid, count, share
from lightning_prune.reporting.pages import Bullets, Heading, Page, Paragraph, Picture
from lightning_prune.study.analysis import NARROW, WIDE, Analysis, EllipseFigures, Space
from lightning_prune.study.axes import Axis
from lightning_prune.study.definition import Study
from lightning_prune.study.plots import grid_figure, risk_figure, spaces_figure
from lightning_prune.study.recipe import Config, get
from lightning_prune.study.statistics import FEWEST, Interval

__all__ = ["page", "recommendations", "tables"]


def page(study: Study, analysis: Analysis, title: str, accept: float = 0.5) -> Page:
    """The whole report.

    Args:
        study: The definition.
        analysis: Its results.
        title: Heading of the page.
        accept: Risk that the reader accepts for keeping the hyperparameters, in percentage points.
    """
    overview, ellipses, intervals, risks = tables(analysis)
    batch, momentum = _sgd(study.recipe)
    parts: list[Any] = [
        Paragraph(_summary(study, analysis)),
        Heading("Recommendation"),
        Bullets(tuple(recommendations(analysis, accept))),
        Heading("Networks"),
        overview,
        Heading("Effects of pruning"),
        Picture.of("spaces", _spaces_caption(batch is not None), spaces_figure(analysis, batch, momentum)),
    ]
    if any(np.isfinite(space.top5).any() for space in analysis.spaces):
        caption = "The same of top-5. The ellipses are those of top-1."
        parts.append(Picture.of("top5", caption, spaces_figure(analysis, batch, momentum, top5=True)))
    parts += [
        ellipses,
        *([intervals] if intervals.rows else []),
        Picture.of("grid", _grid_caption(analysis), grid_figure(analysis)),
        Heading("Risk of not tuning"),
        risks,
        Picture.of("risk", _risk_caption(analysis), risk_figure(analysis)),
    ]
    return Page(title, tuple(parts))


def tables(analysis: Analysis) -> tuple[Grid, Grid, Grid, Grid]:
    """Networks, confidence ellipses (table 4.1), their bootstrap intervals, and performance risk (table 4.2)."""
    return _overview(analysis), _ellipses(analysis), _intervals(analysis), _risks(analysis)


def recommendations(analysis: Analysis, accept: float) -> list[str]:
    """For each pruned variant: keep the hyperparameters, or where to look.

    What is compared with the accepted risk is the cross-fitted mean where there are several seeds.
    """
    found = []
    for space in analysis.spaces[1:]:
        risk = analysis.risk(space)
        mean = risk.mean if risk.crossed is None else risk.crossed
        kind = "one seed" if risk.crossed is None else "cross-fitted"
        if risk.configurations < FEWEST:
            kind += f", only {risk.configurations:g} configurations, so that this says little"
        if mean <= accept:
            advice = "keep the unpruned network's hyperparameters"
        else:
            advice = f"tune again: {_corner(analysis, space)}"
        found.append(
            f"{space.name}: {advice}. Keeping them costs {mean:.2f} points on average ({kind}); accepted: {accept:g}."
        )
    return found


def _corner(analysis: Analysis, space: Space) -> str:
    """Which way the optimum has moved, by more than half a step."""
    moved = analysis.centre(space) - analysis.centre(analysis.unpruned)
    words = [
        f"{'larger' if distance > 0 else 'smaller'} {_words(axis)}"
        for axis, distance in zip(analysis.axes, moved, strict=True)
        if abs(distance) > axis.step / 2
    ]
    if words:
        return f"try {' and '.join(words)} first"
    best = analysis.values[int(np.nanargmax(space.mean))]
    values = ", ".join(f"{axis.name} {value:g}" for axis, value in zip(analysis.axes, best, strict=True))
    return f"the region has not moved as a whole; start from its best point ({values})"


def _summary(study: Study, analysis: Analysis) -> str:
    runs = sum(int(np.isfinite(space.accuracy).sum()) for space in analysis.spaces)
    across, down = (len(np.unique(analysis.positions[:, side])) for side in (0, 1))
    names = " × ".join(
        f"{_words(axis)} ({size} values)" for axis, size in zip(analysis.axes, (across, down), strict=True)
    )
    seeds = len(analysis.seeds)
    missing = sum(space.accuracy.size for space in analysis.spaces) - runs
    text = f"{runs} runs: {names}, {len(analysis.spaces)} networks, {seeds} seed{'s' if seeds > 1 else ''}."
    text += f" {missing} runs of this grid are missing." if missing else ""
    if get(study.recipe, "data.val_share") == 0:
        text += " Selected on test: the accuracies are those of the test images, which also chose the best points."
    edges = analysis.edges()
    if edges:
        text += f" A 1.0-ROI touches the edge of the grid, so that ellipses may be cut short ({_sides(edges)})."
    return text


def _sides(edges: dict[str, list[str]]) -> str:
    return "; ".join(f"{side}: {', '.join(names)}" for side, names in edges.items())


def _overview(analysis: Analysis) -> Grid:
    dense = analysis.unpruned
    rows = [
        (
            space.name,
            count(space.params),
            count(space.macs),
            share(space.macs, dense.macs),
            f"{space.best:.2f}",
            _number(float(space.mean[analysis.prior])),
            f"{int(np.isfinite(space.accuracy).sum())}",
            f"{space.diverged}",
        )
        for space in analysis.spaces
    ]
    columns = ("network", "parameters", "MACs", "FLOPs left", "best top-1", "top-1 at the prior", "runs", "diverged")
    note = "1 MAC = 2 FLOPs, for one sample. The best of each seed, averaged. Accuracies in per cent."
    return Grid("Networks", columns, tuple(rows), note=note)


def _ellipses(analysis: Analysis) -> Grid:
    rows = []
    for space in analysis.spaces:
        wide, narrow = (analysis.ellipse(space, threshold) for threshold in (WIDE, NARROW))
        rows.append((space.name, *_figures(wide), *_figures(narrow)))
    heads = [f"{threshold:.1f}-ROI {word}" for threshold in (WIDE, NARROW) for word in ("length", "width", "centre")]
    x, y = analysis.axes
    note = (
        f"Confidence ellipses at two standard deviations; full diameters; centre = ({_words(x)}, {_words(y)}); in "
        "powers of ten where the axis is logarithmic. Fitted for each seed with at least five points in the region, "
        "then averaged."
    )
    return Grid("Confidence ellipses", ("network", *heads), tuple(rows), note=note)


def _intervals(analysis: Analysis) -> Grid:
    x, y = (_words(axis) for axis in analysis.axes)
    columns = ("network", "region", "seed", "points", "length", "width", f"centre, {x}", f"centre, {y}")
    rows = [
        (space.name, f"{threshold:.1f}-ROI", str(seed), str(points), *(_interval(found[name]) for name in found))
        for space in analysis.spaces
        for threshold in (WIDE, NARROW)
        for seed, points, found in analysis.intervals(space, threshold)
    ]
    return Grid("How sure the ellipses are: 95 % bootstrap intervals", columns, tuple(rows), words=2)


def _risks(analysis: Analysis) -> Grid:
    rows = []
    for space in analysis.spaces:
        risk = analysis.risk(space)
        rows.append(
            (
                space.name,
                f"{risk.mean:.3f}",
                f"{risk.std:.3f}",
                f"{risk.relative_mean:.4f}",
                f"{risk.relative_std:.4f}",
                MISSING if risk.crossed is None else f"{risk.crossed:.3f}",
                MISSING if risk.crossed_std is None else f"{risk.crossed_std:.3f}",
                f"{100 * risk.within:.0f} %",
                f"{risk.configurations:g}",
            )
        )
    columns = ("network", "d mean", "d std", "dR mean", "dR std", "cross-fitted mean", "std", "within twice", "points")
    note = (
        "Over all configurations of the unpruned network's 0.5-ROI, against each network's own best: d in percentage "
        "points, dR as a share. Cross-fitted: region and optimum chosen by the other seeds. Within twice: share of the "
        "configurations whose risk is at most twice the unpruned network's largest. Per seed, then averaged."
    )
    return Grid("Performance risk", columns, tuple(rows), note=note)


def _figures(found: EllipseFigures | None) -> tuple[str, str, str]:
    if found is None:
        return (MISSING,) * 3
    x, y = found.centre
    return f"{found.length:.2f}", f"{found.width:.2f}", f"({x:.1f}, {y:.1f})"


def _interval(found: Interval) -> str:
    return f"{found.low:.2f} to {found.high:.2f}"


def _spaces_caption(line: bool) -> str:
    text = (
        "Above: contours of top-1, mean over seeds. The colours span the best 15 % of all observations of all "
        "networks; points below have the lowest colour. Below: every configuration, with the confidence ellipse "
        "of each seed at two standard deviations, fitted to its 1.0-ROI (white) and 0.5-ROI (black)."
    )
    return text + (" Dashed: lr · wd / (B (1 − μ)) = 1e-6 (eq. 2.2)." if line else "")


def _grid_caption(analysis: Analysis) -> str:
    return f"Top-1 of the {analysis.unpruned.name} network at every point; darker: the first grid; framed: the prior."


def _risk_caption(analysis: Analysis) -> str:
    name = analysis.unpruned.name
    return f"Risk at the {name} network's 0.5-ROI, all seeds together; its own is darker. Triangle: mean."


def _sgd(recipe: Config) -> tuple[int | None, float]:
    """Batch size and momentum, for eq. 2.2."""
    momentum = get(recipe, "optimizer.momentum") or get(recipe, "model.momentum") or 0.0
    batch = get(recipe, "data.batch_size")
    return (int(batch) if batch else None), float(momentum)


def _words(axis: Axis) -> str:
    return {"lr": "learning rate", "weight_decay": "weight decay"}.get(axis.name, axis.name)


def _number(value: float) -> str:
    return MISSING if np.isnan(value) else f"{value:.2f}"
