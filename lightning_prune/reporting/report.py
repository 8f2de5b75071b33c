"""The report of a run: the network before and after pruning, as tables, pages and files."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_prune.planning import NoEffectWarning
from lightning_prune.reporting.grid import MISSING, Grid, as_rich, as_text, count, kib, number, plural, share, timed
from lightning_prune.reporting.inspection import reached
from lightning_prune.reporting.layer_scores import ScoredDepth, ScoredLayer, depths_grid, layers_grid
from lightning_prune.reporting.over_depth import over_depth_grid
from lightning_prune.reporting.pages import Page, Picture, html_of
from lightning_prune.reporting.plots import report_figure
from lightning_prune.reporting.record import Cut, Measurement, Record, Scores, SizeCheckpoint
from lightning_prune.reporting.report_pages import report_pages
from lightning_prune.reporting.typed import require
from lightning_prune.structure import LatencyTable, Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group as RichGroup


__all__ = ["Report", "note_latency_table", "plain", "warn_of_kept_units"]

# Relative error of a latency table that is worth a note.
_NOISY = 0.15
# Form of `Report.to_plain`; a reader of old checkpoints needs it.
_FORMAT = 4

#: Fields of a size that were stored directly in a cut before format 4.
_SIZES_OF_CUTS = ("params", "macs", "memory", "table_latency", "backbone", "zeros")

# Latencies that differ by a smaller share of the larger one count as equal, however small their spread.
_NOISE = 0.1


@dataclass
class Report(Record):
    """Everything that is recorded about pruning in a run: how it is stored and shown.

    See `Record` for the fields.
    """

    # storing

    def to_plain(self) -> dict[str, Any]:
        """Dicts, lists, numbers and strings only, as checkpoints take them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        result: dict[str, Any] = plain({"format": _FORMAT} | values)
        return result

    @classmethod
    def from_plain(cls, stored: Mapping[str, Any]) -> Report:
        """The report from what `to_plain` returned.

        Raises:
            ValueError: If a newer version of this package wrote it.
            TypeError: If a value is of another type.
            ValueError: If a number is impossible.
        """
        if stored["format"] > _FORMAT:
            raise ValueError(
                f"expected a report of format {_FORMAT} or older, got {stored['format']}. A newer "
                f"lightning-prune wrote it: update this one."
            )
        if stored["format"] < 3:
            stored = _with_table_latency(stored)
        values = {f.name: stored[f.name] for f in fields(cls) if f.name in stored}
        values["dense"], values["final"] = (_size(stored[name]) for name in ("dense", "final"))
        values["start"] = _size(stored.get("start"))
        values["cuts"] = [_cut(cut) for cut in stored["cuts"]]
        values["history"] = [Measurement(**row) for row in stored["history"]]
        saved_sizes = "rungs" if stored["format"] == 1 else "size_checkpoints"
        values["size_checkpoints"] = [SizeCheckpoint(**saved) for saved in stored.get(saved_sizes, [])]
        values["scored"] = [ScoredLayer(**row) for row in stored.get("scored", [])]
        values["depths"] = [ScoredDepth(**row) for row in stored.get("depths", [])]
        report = cls(**values)
        require(report, cls, "report")
        empty = [name for name, width in (report.dense.widths if report.dense else {}).items() if width < 1]
        if empty:
            raise ValueError(f"expected a dense network with units, got none of {empty[0]!r}")
        return report

    def to_json(self, path: str | Path) -> None:
        """Write everything, and `summary`; NaN becomes null."""
        content = _without_nan({**self.to_plain(), "summary": plain(self.summary())})
        Path(path).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    # showing

    def figure(self) -> Figure:
        """The picture: metric and size over the run with the cuts marked, and the widths.

        Needs the extra ``plot``. Save it with ``report.figure().savefig("report.png")``.
        """
        return report_figure(self)

    def grids(self) -> tuple[Grid, ...]:
        """The tables: before and after, the cuts, the networks saved on the way, the widths, scores of layers."""
        metric = str(self.config.get("metric", "metric"))
        scores = [layers_grid(self.scored, metric), depths_grid(self.depths, metric), self._over_depth()]
        grids = [self._summary(), self._cuts(), self._sizes(), self._widths(), *scores]
        return tuple(grid for grid in grids if grid.rows)

    def table(self) -> RichGroup:
        """The tables for a terminal."""
        return as_rich(self.grids())

    def pages(self, *, pictures: bool = True) -> tuple[Page, Page]:
        """The report for a repository, in Markdown, and for a browser: ``pages()[1].html()`` is one file.

        Args:
            pictures: Whether to include pictures, which need the extra ``plot``.
        """
        return report_pages(self, self.grids(), self.to_plain()["config"], pictures=pictures)

    def __str__(self) -> str:
        return as_text(self.grids()) or "nothing recorded"

    def __rich__(self) -> RichGroup:
        return self.table()

    def _repr_html_(self) -> str:
        """The tables and, with the extra ``plot``, the picture."""
        tables = "".join(grid.html() for grid in self.grids())
        if not tables or find_spec("matplotlib") is None:
            return tables
        return html_of(Picture.of("report", "", self.figure())) + tables

    def _summary(self) -> Grid:
        dense, start, now = self.dense, self.start, self.size
        if dense is None or now is None:
            return Grid("", (), ())
        sizes = [dense, now] if start is None else [dense, start, now]
        rows, noise = self._costs(sizes), []
        for batch in dict.fromkeys(batch for size in sizes for batch in size.latency):
            label, *cells, left = _latency_row(sizes, batch)
            if _is_noise(sizes[-2], now, batch):
                noise.append(f"{label} ({cells[-2]} ms before, {cells[-1]} ms after)")
            else:
                rows.append((f"{label}, ms", *cells, left))
        if dense.table_latency is not None:
            rows.append(_row("latency by the table, ms", [size.table_latency for size in sizes], number))
        before, best, last = self.outcome
        unknown = [None] * (len(sizes) - 2)
        if self.main_metric:
            label = f"{self.main_metric}, best at the final size"
            rows.append(_row(self.main_metric, [*unknown, before, last], number, shares=False))
            rows.append(_row(label, [*unknown, None, best], number, shares=False))
        return Grid("Before and after", ("", *self._heads(), "left"), tuple(rows), note=self._legend(rows, noise))

    def _heads(self) -> tuple[str, ...]:
        """Headings of the columns: the dense network, the network at the start if pruned earlier, and at the end."""
        before, now = self.when
        if not self.cuts:
            return ("dense", "now") if self.start is None else ("dense", "at the start", "now")
        if self.start is None:
            return f"dense, {before}", f"pruned, {now}" if now else "pruned"
        return "dense", f"pruned earlier, {before}", f"pruned, {now}" if now else "pruned"

    def _costs(self, sizes: Sequence[Size]) -> list[tuple[str, ...]]:
        """Rows of what is counted, the most important first."""
        masked = self.what == "weights"
        word = "non-zero weights" if masked else "parameters"
        rows = [_row(word, [size.params for size in sizes], count)]
        if any(size.zeros is not None for size in sizes):
            rows.append(_row("zero weights (masked)", [size.zeros for size in sizes], count, shares=False))
        if any(size.backbone is not None for size in sizes):
            rows.append(_row(f"{word} of the backbone", [size.backbone for size in sizes], count))
        return [
            *rows,
            _row("MACs per sample", [size.macs for size in sizes], count),
            _row("activations per sample, KiB", [size.memory for size in sizes], kib),
            _row("size on disk, KiB", [size.bytes for size in sizes], kib),
        ]

    def _legend(self, rows: Sequence[tuple[str, ...]], noise: Sequence[str]) -> str:
        """Notes below the summary."""
        earlier = f", {self.earlier} of them earlier" if self.earlier else ""
        cuts = plural(self.earlier + len(self.cuts), "cut")
        gone = "units are gone" if self.what == "units" else "maskable weights are zero or gone"
        legend = [f"{100 * self.pruning_ratio:.1f} % of the {gone}, in {cuts}{earlier}."]
        if self.dense and self.dense.reachable and self.what == "units":
            legend.append(f"The prunable layers hold {reached(self.dense.reachable)}.")
        legend.append("1 MAC = 2 FLOPs.")
        if self.what == "weights":
            legend.append("A masked weight is stored and multiplied like any other.")
        if noise or any("±" in cell for row in rows for cell in row):
            legend.append("Latency: median ± half of the interquartile range.")
        if noise:
            legend.append(f"Too close to measure a difference: {', '.join(noise)}.")
        if self.trained_before and self.main_metric and self.start is None:
            legend.append(
                f"The dense network had trained for {self.trained_before} when it was first cut, so it is no baseline: "
                "train without pruning for the whole run, too (`lightning-prune compare` shows both side by side)."
            )
        return " ".join([*legend, *self.notes])

    def _cuts(self) -> Grid:
        metric = self.main_metric
        counted = self.dense_widths
        widths = {name: n for name, n in Report(self.dense, start=self.start).widths.items() if name in counted}
        sizes = ("units", "parameters") if self.what == "units" else ("zero weights", "non-zero weights")
        columns: tuple[str, ...] = ("cut", "after epoch", "step", *sizes, "MACs", "seconds")
        rows = []
        for cut in self.cuts:
            units = f"{sum(widths.values()):,} → {sum({**widths, **cut.after}.values()):,}"
            widths.update(cut.after)
            what = units if self.what == "units" else MISSING if cut.size.zeros is None else count(cut.size.zeros)
            cells = (
                str(cut.index + 1),
                str(cut.epoch),
                f"{cut.step:,}",
                what,
                count(cut.size.params),
                count(cut.size.macs),
            )
            measured = tuple(number(value) for value in self.around(cut)) if metric else ()
            rows.append((*cells, f"{cut.seconds:.3g}", *measured))
        notes = ["Units are counted over the whole network; MACs are per sample."]
        if self.what == "weights":
            notes = ["MACs are per sample."]
        if metric:
            columns = (*columns, "last before", "first after", "at the end")
            notes.append(
                f"{metric}: the last value before the cut; the first value after it, measured after some more "
                "training; the last value before the next cut or the end."
            )
        return Grid("Cuts", columns, tuple(rows), words=0, note=" ".join(notes))

    def _over_depth(self) -> Grid:
        if not self.shows_depth or self.dense is None or self.final is None:
            return Grid("", (), ())
        return over_depth_grid(self.dense.layers, self.final.layers)

    def _sizes(self) -> Grid:
        whole = self.dense.params if self.dense else None
        rows = tuple(
            (r.file, str(r.epoch), count(r.params), count(r.macs), share(r.params, whole), number(r.metric))
            for r in self.size_checkpoints
        )
        metric = self.main_metric or "metric"
        columns = ("checkpoint", "after epoch", "parameters", "MACs", "parameters left", metric)
        note = (
            "Each network just before the next cut or at the end, with the last metric measured at that size. MACs "
            "are per sample."
        )
        return Grid("Sizes", columns, rows, note=note)

    def _widths(self) -> Grid:
        dense, now = self.dense_widths, self.widths
        if self.what == "weights":
            zeros = {name: old - now[name] for name, old in dense.items()}
            cells = [(n, count(w), count(zeros[n]), count(now[n]), share(zeros[n], w)) for n, w in dense.items()]
            columns = ("layer", "weights", "zero or gone", "non-zero", "zero or gone, share")
            return Grid("Weights by layer", columns, tuple(cells))
        rows = tuple((name, count(old), count(now[name]), share(now[name], old)) for name, old in dense.items())
        return Grid("Widths", ("group", "dense, units", "pruned, units", "left"), rows)


def note_latency_table(report: Report, table: LatencyTable | None, *, is_given: bool) -> None:
    """Note the device of a latency table that was given, and whether a table fits badly."""
    notes = [f"Latencies by the table are those of {table.device}."] if table is not None and is_given else []
    if table is not None and table.error > _NOISY:
        notes.append(
            f"The latency table is off by up to {100 * table.error:.0f} % for the networks that were timed for it: "
            "other programs may have run meanwhile."
        )
    report.notes[:] = dict.fromkeys([*report.notes, *notes])


def warn_of_kept_units(report: Report, stays: Mapping[str, str]) -> None:
    """Warn, and note in the report, which groups keep more units than their share, and why."""
    for note in stays.values():
        if note not in report.notes:
            report.notes.append(note)
        warnings.warn(note, NoEffectWarning, stacklevel=3)


def plain(value: Any) -> Any:
    """A value in dicts with string keys, lists, numbers, strings, bools and ``None``; anything else as its ``repr``."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1):
        return value.item()
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _with_table_latency(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored report with its latencies from a table as ``table_latency``, whatever the version called them."""

    def renamed(size: Any) -> Any:
        if not isinstance(size, Mapping):
            return size
        return {"table_latency" if name == "reckoned" else name: value for name, value in size.items()}

    sizes = {name: renamed(stored[name]) for name in ("dense", "final", "start") if name in stored}
    return {**stored, **sizes, "cuts": [renamed(cut) for cut in stored["cuts"]]}


def _cut(stored: Mapping[str, Any]) -> Cut:
    cut = {**stored, "scores": {name: Scores(**found) for name, found in stored.get("scores", {}).items()}}
    if "size" not in cut:
        cut["size"] = {name: cut.pop(name) for name in _SIZES_OF_CUTS if name in cut}
    return Cut(**{**cut, "size": _size(cut["size"])})


def _size(stored: Mapping[str, Any] | None) -> Size | None:
    if stored is None:
        return None
    names = ("latency", "latency_spread")
    by_batch = {name: {int(batch): ms for batch, ms in stored.get(name, {}).items()} for name in names}
    return Size(**{**stored, **by_batch})


def _row(label: str, values: Sequence[Any], show: Callable[[Any], str], *, shares: bool = True) -> tuple[str, ...]:
    """One quantity before and after, and the share that is left where that is meaningful."""
    cells = (MISSING if value is None else show(value) for value in values)
    return (label, *cells, share(values[-1], values[0]) if shares else MISSING)


def _latency_row(sizes: Sequence[Size], batch: int) -> tuple[str, ...]:
    cells = (
        MISSING if batch not in size.latency else timed(size.latency[batch], size.latency_spread.get(batch))
        for size in sizes
    )
    left = share(sizes[-1].latency.get(batch), sizes[0].latency.get(batch))
    return (f"latency at batch {batch}", *cells, left)


def _is_noise(before: Size, after: Size, batch: int) -> bool:
    """Whether two latencies differ by no more than their spread, or by less than a machine varies over hours."""
    old, new = before.latency.get(batch), after.latency.get(batch)
    if old is None or new is None:
        return False
    spread = before.latency_spread.get(batch, 0) + after.latency_spread.get(batch, 0)
    return abs(old - new) < max(spread, _NOISE * max(old, new))


def _without_nan(value: Any) -> Any:
    """NaN and infinity as ``None``: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
