"""``lightning-prune compare``: a table and a figure of finished runs of any kind."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

import lightning_prune
from lightning_prune.cli import runs
from lightning_prune.cli.messages import OneLineParser
from lightning_prune.cli.verbs import example_of
from lightning_prune.reporting import ComparedNetwork, Comparison, Report, comparison_figure
from lightning_prune.reporting.grid import console_for
from lightning_prune.reporting.pages import Page, Picture
from lightning_prune.structure import Size

__all__ = ["FinishedRun", "compare", "main", "read_runs"]

_REPORT, _CELL, _CURVES = "report.json", "result.json", "metrics.csv"

# Keys of a configuration in which runs of one setting may differ.
_OWN = frozenset({"seed", "seed_everything", "name", "ckpt_path", "default_root_dir"})

# With more differing entries, a setting is named after its first run.
_MOST_WORDS = 3

# Columns if the output is a file or a pipe.
_FILE_WIDTH = 140

# Stands for an entry that a configuration does not have.
_ABSENT = object()


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, read from its folder.

    Attributes:
        name: Its name.
        label: The name of all runs of its setting, unless another setting has the same name.
        config: Its complete configuration.
        report: Metrics and sizes.
    """

    name: str
    label: str
    config: Mapping[str, Any]
    report: Report

    @property
    def seed(self) -> int | None:
        """The seed of the configuration."""
        seed = self.config.get("seed_everything", self.report.seed)
        return int(seed) if isinstance(seed, int) and not isinstance(seed, bool) else None

    @property
    def setting(self) -> str:
        """The configuration without entries that differ between seeds."""
        return json.dumps(_common(self.config), sort_keys=True, default=str)


def main(words: Sequence[str]) -> None:
    """``lightning-prune compare RUNS...``."""
    parser = OneLineParser("lightning-prune compare", description="Compare finished runs in a table and a figure.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or folders that contain such folders")
    parser.add_argument("--metric", help="metric to compare (default: the accuracy or loss of the first run)")
    parser.add_argument(
        "--out", type=Path, default=Path("comparison"), help="folder for the page (default: comparison)"
    )
    given = parser.parse_args(words)
    comparison = compare(read_runs(given.runs), given.metric)
    console_for(_FILE_WIDTH).print(comparison)
    for file in _page(comparison).write(given.out, "comparison"):
        print(file)


def read_runs(places: Iterable[Path]) -> list[FinishedRun]:
    """Read runs from folders: runs of ``fit``, pruned or not, and cells of a study.

    Args:
        places: Folders of runs, or their parent folders.

    Raises:
        FileNotFoundError: If there is no finished run.
        ValueError: If a run has not ended, its files are damaged, or it is given twice.
    """
    folders = [folder for place in places for folder in _folders(place)]
    twice = sorted({str(folder) for folder in folders if folders.count(folder) > 1})
    if twice:
        raise ValueError(f"compare: expected every run once, got {', '.join(twice)} more than once.")
    if len(folders) < 2:
        raise ValueError(f"compare: expected at least two runs, got {folders[0]}. Add the folder of another run.")
    return [_read(folder) for folder in folders]


def compare(found: Sequence[FinishedRun], metric: str | None = None) -> Comparison:
    """Compare runs.

    Args:
        found: The runs; the others are compared with the first.
        metric: The metric to compare; by default the main metric of the first run.

    Raises:
        ValueError: If not every run logged the metric.
    """
    first = found[0].report
    metric = metric or first.main_metric
    if metric is None:
        raise ValueError(f"compare: {found[0].name} logged no accuracy or loss. Name a metric with --metric.")
    lacking = [run for run in found if not run.report.values(metric)]
    if lacking:
        logged = sorted({name for run in lacking for row in run.report.history for name in row.metrics})
        raise ValueError(
            f"compare: expected all runs to have logged {metric!r}, but it is missing in "
            f"{', '.join(run.name for run in lacking)}, which logged {', '.join(logged) or 'nothing'}. Name a metric "
            "that all have with --metric."
        )
    names = _setting_names(found)
    networks = [network for run in found for network in _networks(run, names[run.setting], metric)]
    return Comparison(tuple(networks), metric, Report(metric=metric, history=first.history).mode)


def _networks(run: FinishedRun, setting: str, metric: str) -> Iterator[ComparedNetwork]:
    report, final = run.report, run.report.size
    if final is None:
        raise AssertionError("a run that was read has a size")
    last = report.values(metric)[-1][1]
    for saved in report.size_checkpoints:
        since = max((cut.step for cut in report.cuts if cut.step < saved.step), default=-1)
        measured = [value for step, value in report.values(metric) if since < step <= saved.step]
        if measured and (saved.params, saved.macs) != (final.params, final.macs):
            size = saved.params, saved.macs
            yield ComparedNetwork(run.name, setting, measured[-1], *size, run.seed, is_final=False)
    yield ComparedNetwork(run.name, setting, last, final.params, final.macs, run.seed, final.latency)


def _setting_names(found: Sequence[FinishedRun]) -> dict[str, str]:
    """A name for each setting: the label of its runs; if ambiguous, with what differs, or the name of its first run."""
    firsts: dict[str, FinishedRun] = {}
    for run in found:
        firsts.setdefault(run.setting, run)
    names = {}
    for setting, run in firsts.items():
        namesakes = [each for each in firsts.values() if each.label == run.label]
        words = _differing(run, namesakes)
        alone = len(namesakes) == len(firsts) and words
        short = 0 < len(words) <= _MOST_WORDS
        named = " ".join(words) if alone else " ".join((run.label, *words))
        names[setting] = run.label if len(namesakes) == 1 else named if short else run.name
    return names if len(set(names.values())) == len(names) else {key: run.name for key, run in firsts.items()}


def _differing(run: FinishedRun, namesakes: Sequence[FinishedRun]) -> list[str]:
    """Entries of a run's configuration that not all runs of the same label share, by the last part of their keys."""
    others = [dict(_leaves(_common(each.config))) for each in namesakes]
    own = dict(_leaves(_common(run.config)))
    keys = dict.fromkeys(key for each in others for key in each)
    return [
        f"{key.rpartition('.')[2]}={own.get(key)}"
        for key in keys
        if any(each.get(key, _ABSENT) != own.get(key, _ABSENT) for each in others)
    ]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}")
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for place, item in enumerate(value):
            yield from _leaves(item, f"{key}.{place}")
    else:
        yield key, value


def _folders(place: Path) -> list[Path]:
    if place.name in (_REPORT, _CELL, _CURVES):
        place = place.parent
    if _is_run(place):
        return [place]
    candidates = (folder for pattern in ("*", "cells/*", "lightning_logs/*") for folder in place.glob(pattern))
    inside = sorted(folder for folder in candidates if _is_run(folder))
    if not inside:
        raise FileNotFoundError(
            f"compare: expected the folder of a finished run (with {_REPORT}, {_CELL} or {_CURVES}), or of several, "
            f"got {place}, which {'contains none' if place.is_dir() else 'does not exist'}."
        )
    return inside


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_REPORT, _CELL, _CURVES))


def _read(folder: Path) -> FinishedRun:
    try:
        config = yaml.safe_load(_text(folder / runs.CONFIG) or "") or {}
        name = "/".join(folder.absolute().parts[-2:])
        if (folder / _CELL).is_file():
            return _cell(folder, name, config)
        report = _report(folder, config)
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"compare: the files of {folder} cannot be read: {error}") from error
    if not config:  # trained in Python, without the command line
        config = {key: value for key, value in report.config.items() if key != "run"}
    label = folder.absolute().parent.name if folder.name.isdecimal() else folder.name
    return FinishedRun(name, label, config, report)


def _cell(folder: Path, name: str, config: Mapping[str, Any]) -> FinishedRun:
    """A cell of a study, see `lightning_prune.study`."""
    stored = json.loads((folder / _CELL).read_text(encoding="utf-8"))
    result = stored["result"]
    report = Report(final=Size(result["params"], result["macs"]))
    for place, metrics in enumerate(result["curve"]):
        report.log(place, place, metrics)
    return FinishedRun(name, stored["label"].rpartition(", seed ")[0] or stored["label"], config, report)


def _report(folder: Path, config: Mapping[str, Any]) -> Report:
    if (folder / _REPORT).is_file():
        report = Report.from_plain(json.loads((folder / _REPORT).read_text(encoding="utf-8")))
        if report.size is None:
            raise ValueError(f"its {_REPORT} does not have the size of the network")
        return report
    report = Report()
    with (folder / _CURVES).open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            metrics = {name: float(value) for name, value in row.items() if value and name not in ("epoch", "step")}
            report.log(int(float(row["epoch"] or 0)), int(row["step"]), metrics)
    report.final = _size(folder, config)
    return report


def _size(folder: Path, config: Mapping[str, Any]) -> Size:
    """The size of a network that no callback has pruned, from its configuration and its last checkpoint."""
    if "model" not in config:
        raise ValueError(
            f"expected `model` in its {runs.CONFIG} to determine the size, got none. A run in Python without a pruning "
            "callback leaves no size: train it by `lightning-prune fit`, or compare by `trainer.validate`."
        )
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
    parts = {key: config[key] for key in ("model", "data") if config.get(key)}
    built = parser.instantiate_classes(parser.parse_object(parts))
    model, checkpoint = built.model, runs.newest(folder.glob("checkpoints/*.ckpt"))
    if checkpoint is not None:
        model = lightning_prune.load_from_checkpoint(type(model), checkpoint)
    found = lightning_prune.inspect(model, example_of(model, built.get("data")))
    return Size(found.params, found.macs)


def _page(comparison: Comparison) -> Page:
    caption = (
        f"{comparison.metric} against the cost of the network. Filled: at the end of a run; hollow: saved earlier. "
        "Grey: the Pareto front."
    )
    return Page("Comparison", (*comparison.grids(), Picture.of("pareto", caption, comparison_figure(comparison))))


def _common(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _common(item) for key, item in value.items() if key not in _OWN}
    return [_common(item) for item in value] if isinstance(value, list) else value


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None
