"""The report of a run as pages: Markdown for a repository, HTML for a browser or a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lightning_prune.reporting.comparison import Comparison
from lightning_prune.reporting.comparison_figure import comparison_figure
from lightning_prune.reporting.grid import Grid
from lightning_prune.reporting.over_depth import over_depth_figure
from lightning_prune.reporting.pages import Code, Heading, Page, Paragraph, Part, Picture, Row
from lightning_prune.reporting.plots import headline, panel_figures, report_figure, scores_figure
from lightning_prune.reporting.record import Record

__all__ = ["report_pages"]


def report_pages(
    report: Record, tables: Sequence[Grid], config: Mapping[str, Any], *, pictures: bool
) -> tuple[Page, Page]:
    """The report with one overview picture, for Markdown, and with each panel as a picture, for HTML.

    Args:
        report: The report.
        tables: Its tables.
        config: Its configuration in plain values.
        pictures: Whether to include pictures, which need the extra ``plot``.
    """
    rest = (*tables, *_made_with(report, config))
    if not pictures or report.dense is None:
        page = _page(report, (), rest)
        return page, page
    more = _more(report)
    overview = Picture.of("report", "metrics, size and widths", report_figure(report))
    captions = ("metrics during training", "remaining size of the network", _widths_caption(report))
    names = ("metric", "size", "widths")
    panels = [Picture.of(*each) for each in zip(names, captions, panel_figures(report), strict=True)]
    return _page(report, [overview, *more], rest), _page(report, [*panels, *more], rest)


def _widths_caption(report: Record) -> str:
    return "units of every group before and after" if report.what == "units" else "weights of every layer"


def _more(report: Record) -> list[Picture]:
    """Pictures that only some runs have: scores, several sizes, parameters over depth."""
    found = []
    networks, metric = report.networks(), report.main_metric
    if metric is not None and len(networks) > 1:
        figure = comparison_figure(Comparison(tuple(networks), metric, report.mode), ["params"])
        if report.what == "weights":
            figure.axes[0].set_xlabel("non-zero weights")
        caption = "metric against size, before each cut (hollow) and at the end; the Pareto front is grey"
        found.append(Picture.of("sizes", caption, figure))
    scored = [cut for cut in report.cuts if cut.scores]
    if scored:
        caption = f"scores of the units at cut {scored[-1].index + 1}, the last one"
        found.append(Picture.of("cut_scores", caption, scores_figure(scored[-1])))
    if report.shows_depth and report.dense is not None and report.final is not None:
        figure = over_depth_figure(report.dense.layers, report.final.layers)
        found.append(Picture.of("depth", "parameters over depth", figure))
    return found


def _page(report: Record, pictures: Sequence[Picture], rest: Sequence[Part]) -> Page:
    summary = [] if report.dense is None else [Paragraph(headline(report))]
    return Page("Pruning report", (*summary, *([Row(tuple(pictures))] if pictures else []), *rest))


def _made_with(report: Record, config: Mapping[str, Any]) -> list[Part]:
    """Seed, versions and configuration, if known."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    text = " ".join([*([] if report.seed is None else [f"Seed {report.seed}."]), versions]).strip()
    parts: list[Part] = [Paragraph(text)] if text else []
    if config:
        values = yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=None, width=100)
        parts.append(Code(values.rstrip(), "yaml"))
    return [Heading("Made with"), *parts] if parts else []
