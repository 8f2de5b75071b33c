"""What was won and lost, as tables, pages and files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_prune.reporting.grid import MISSING, Grid, as_rich, as_text, count, kib, number, plural, share
from lightning_prune.reporting.inspection import reached
from lightning_prune.reporting.layer_scores import ScoredDepth, ScoredLayer, depths_grid, layers_grid
from lightning_prune.reporting.over_depth import over_depth_grid
from lightning_prune.reporting.record import Cut, Measurement, Record, Size, SizeCheckpoint
from lightning_prune.reporting.typed import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group as RichGroup

__all__ = ["Report", "plain"]

# Form of `Report.to_plain`; a reader of old checkpoints needs it.
_FORMAT = 3

# Where each form has the checkpoints of each size.
_SIZES = {1: "rungs", 2: "size_checkpoints", 3: "size_checkpoints"}

# Two medians of a latency that differ by less, as a share of the larger, are not told apart.
_NOISE = 0.1


@dataclass
class Report(Record):
    """Everything that a run tells about its pruning: collected while it goes on, stored and shown.

    See `Record` for what it holds.
    """

    # storing

    def to_plain(self) -> dict[str, Any]:
        """Dicts, lists, numbers and strings only, as checkpoints take them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        result: dict[str, Any] = plain({"format": _FORMAT} | values)
        return result

    @classmethod
    def from_plain(cls, stored: Mapping[str, Any]) -> Report:
        """The report that `to_plain` wrote.

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
        values["cuts"] = [Cut(**cut) for cut in stored["cuts"]]
        values["history"] = [Measurement(**row) for row in stored["history"]]
        values["size_checkpoints"] = [SizeCheckpoint(**saved) for saved in stored.get(_SIZES[stored["format"]], [])]
        values["scored"] = [ScoredLayer(**row) for row in stored.get("scored", [])]
        values["depths"] = [ScoredDepth(**row) for row in stored.get("depths", [])]
        report = cls(**values)
        require(report, cls, "report")
        empty = [name for name, width in (report.dense.widths if report.dense else {}).items() if width < 1]
        if empty:
            raise ValueError(f"expected a dense network with units, got none of {empty[0]!r}")
        return report

    def to_json(self, path: str | Path) -> None:
        """Write everything, and `metrics` as ``summary``; what is not a number becomes null."""
        content = _without_nan({**self.to_plain(), "summary": plain(self.metrics())})
        Path(path).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    # showing

    def figure(self) -> Figure:
        """The picture: metric and size over the run with the cuts marked, and the widths.

        Needs the extra ``plot``. Save it with ``report.figure().savefig("report.png")``.
        """
        from lightning_prune.reporting.plots import report_figure  # which draws reports, and so imports this

        return report_figure(self)

    def grids(self) -> tuple[Grid, ...]:
        """The tables: what was won and lost, the cuts, the networks saved on the way, the widths, scores of layers."""
        metric = str(self.config.get("metric", "metric"))
        scores = [layers_grid(self.scored, metric), depths_grid(self.depths, metric), self._over_depth()]
        grids = [self._summary(), self._cuts(), self._sizes(), self._widths(), *scores]
        return tuple(grid for grid in grids if grid.rows)

    def table(self) -> RichGroup:
        """The tables for a terminal."""
        return as_rich(self.grids())

    def to_markdown(self, picture: str | None = None, sizes: str | None = None, depth: str | None = None) -> str:
        """The report as a page.

        Args:
            picture: Address of the figure, relative to the page.
            sizes: Address of the figure of metric against size.
            depth: Address of the figure of parameters over depth.
        """
        parts = ["# Pruning report", *([f"![metrics, size and widths]({picture})"] if picture else [])]
        parts += [f"![metric against size]({sizes})"] if sizes else []
        parts += [f"![parameters over depth]({depth})"] if depth else []
        parts += [grid.markdown() for grid in self.grids()]
        made_with = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        seed = f"Seed {self.seed}. " if self.seed is not None else ""
        if made_with or seed:
            parts.append(f"{seed}{made_with}")
        if self.config:
            parts.append(f"```json\n{json.dumps(_without_nan(plain(self.config)), indent=2)}\n```")
        return "\n\n".join(parts) + "\n"

    def __str__(self) -> str:
        return as_text(self.grids()) or "nothing recorded"

    def __rich__(self) -> RichGroup:
        return self.table()

    def _repr_html_(self) -> str:
        return "".join(grid.html() for grid in self.grids())

    def _summary(self) -> Grid:
        dense, now = self.dense, self.size
        if dense is None or now is None:
            return Grid("", (), ())
        rows = [
            ("parameters", count(dense.params), count(now.params), share(now.params, dense.params)),
            *self._backbone(dense, now),
            ("MACs per sample", count(dense.macs), count(now.macs), share(now.macs, dense.macs)),
            ("activations per sample, KiB", kib(dense.memory), kib(now.memory), share(now.memory, dense.memory)),
            ("size on disk, KiB", kib(dense.bytes), kib(now.bytes), share(now.bytes, dense.bytes)),
        ]
        for batch in dense.latency:
            old, new = dense.latency[batch], now.latency.get(batch)
            left = "±" if _is_noise(old, new) else share(new, old)
            rows.append((f"latency at batch {batch}, ms", number(old, 2), number(new, 2), left))
        if dense.table_latency is not None:
            old, new = dense.table_latency, now.table_latency
            rows.append(("latency by the table, ms", number(old), number(new), share(new, old)))
        before, best, last = self.outcome
        if self.main_metric:
            rows.append(
                (f"{self.main_metric}, before the first cut and at the end", number(before), number(last), MISSING)
            )
            rows.append((f"{self.main_metric}, best at the final size", MISSING, number(best), MISSING))
        before_this = f", {self.earlier} of them earlier" if self.earlier else ""
        cuts = plural(self.earlier + len(self.cuts), "cut")
        gone = f"{100 * self.pruning_ratio:.1f} % of the {self.what} are gone, in {cuts}{before_this}."
        legend = [gone, "1 MAC = 2 FLOPs."]
        if dense.reachable and self.what == "units":
            legend.insert(1, f"What can be pruned holds {reached(dense.reachable)}.")
        if any(row[-1] == "±" for row in rows):
            legend.append(f"± = less than {100 * _NOISE:.0f} % apart, which timing does not tell from noise.")
        note = " ".join([*legend, *self.notes])
        return Grid("What was won and lost", ("", "dense", "pruned", "left"), tuple(rows), note=note)

    @staticmethod
    def _backbone(dense: Size, now: Size) -> list[tuple[str, str, str, str]]:
        """The row of the backbone's parameters, where they are known; they may be known of one network only."""
        old, new = dense.backbone, now.backbone
        if old is None and new is None:
            return []
        before, after = (MISSING if one is None else count(one) for one in (old, new))
        return [("parameters of the backbone", before, after, share(new, old))]

    def _cuts(self) -> Grid:
        metric = self.main_metric
        widths = Report(self.dense, start=self.start).widths
        columns: tuple[str, ...] = ("cut", "after epoch", "step", self.what, "parameters", "MACs", "seconds")
        rows = []
        for cut in self.cuts:
            units = f"{sum(widths.values()):,} → {sum({**widths, **cut.after}.values()):,}"
            widths.update(cut.after)
            cells = (str(cut.index + 1), str(cut.epoch), f"{cut.step:,}", units, count(cut.params), count(cut.macs))
            measured = tuple(number(value) for value in self.around(cut)) if metric else ()
            rows.append((*cells, f"{cut.seconds:.3g}", *measured))
        note = f"{self.what.capitalize()} are those of the whole network."
        if metric:
            columns = (*columns, "last before", "first after", "at the end")
            note += (
                f" {metric}: as last measured before the cut; as first measured after it, when the network had trained "
                "on (right after a cut nothing is measured); as last measured before the next cut or the end."
            )
        return Grid("Cuts", columns, tuple(rows), words=0, note=note)

    @property
    def shows_depth(self) -> bool:
        """Whether it is told where in the backbone parameters are: of runs that score layers, with a backbone."""
        return bool(self.scored and self.final and self.dense and len(self.dense.layers) > 1)

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
        columns = ("checkpoint", "after epoch", "parameters", "MACs", "left", self.main_metric or "metric")
        note = "Each network as it was before the next cut or at the end, the metric as last measured at that size."
        return Grid("Sizes", columns, rows, note=note)

    def _widths(self) -> Grid:
        dense, now = self.dense.widths if self.dense else {}, self.widths
        rows = tuple((name, count(old), count(now[name]), share(now[name], old)) for name, old in dense.items())
        if self.what == "weights":
            return Grid("Weights that are not masked", ("layer", "dense", "pruned", "left"), rows)
        return Grid("Widths", ("group", "dense", "pruned", "left"), rows)


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


def _size(stored: Mapping[str, Any] | None) -> Size | None:
    if stored is None:
        return None
    return Size(**{**stored, "latency": {int(batch): ms for batch, ms in stored["latency"].items()}})


def _is_noise(old: float, new: float | None) -> bool:
    return new is not None and abs(old - new) < _NOISE * max(old, new)


def _without_nan(value: Any) -> Any:
    """NaN and infinity as ``None``: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
