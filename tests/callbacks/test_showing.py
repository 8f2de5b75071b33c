"""What a run shows: curves in every logger, the progress bar, files, and what W&B keeps."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_prune import Contribution, ContributionPruning, Linear, StructuredPruning
from lightning_prune.callbacks.showing import Pace
from tests.callbacks.networks import BATCHES, Curves, fit, make

SCHEDULE = Linear(start=1, end=3, cuts=2)


def contribution(**options: Any) -> ContributionPruning:
    return ContributionPruning(0.5, criterion=Contribution(every_n_batches=2), schedule=SCHEDULE, **options)


def test_curves_reach_every_logger(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, curves = CSVLogger(tmp_path, name="", version="v"), Curves()
    # Lightning's own curves would show nothing: there are fewer steps than 50 to an epoch.
    fit(tmp_path, make(), contribution(), epochs=5, logger=[table, curves], log_every_n_steps=50)
    rows = list(csv.DictReader((tmp_path / "v" / "metrics.csv").read_text().splitlines()))
    cuts = [row for row in rows if row.get("pruning/seconds")]
    assert [int(row["step"]) for row in cuts] == [BATCHES, 3 * BATCHES]
    assert [float(row["pruning/width/first"]) for row in cuts] == [9, 6]
    assert [float(row["pruning/width/second"]) for row in cuts] == [6, 4]
    for name in ("params", "macs", "ratio", "score/first/median", "score/second/max", "split_half/first"):
        assert all(row[f"pruning/{name}"] for row in cuts), name
    assert float(cuts[-1]["pruning/ratio"]) == 0.5
    assert float(cuts[0]["pruning/score/first/min"]) < float(cuts[0]["pruning/score/first/max"])
    assert len(curves.of("pruning/overhead")) >= 3
    assert all(share >= 0 for share in curves.of("pruning/overhead"))
    # One row at every epoch's end, so that the curve of the size has no holes.
    sizes = {step: row["pruning/params"] for step, row in curves.rows if "pruning/params" in row}
    assert len({*sizes}) >= 5
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    steps = [step for step, _ in curves.rows]
    assert steps == sorted(steps)


def test_other_callbacks_see_the_size_and_the_progress_bar_the_parameters(tmp_path: Path) -> None:
    class Watch(Callback):
        bar: list[float]
        metric: list[float]

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.bar.append(trainer.progress_bar_metrics["params"])

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.metric.append(float(trainer.callback_metrics["pruning/ratio"]))

    watch = Watch()
    watch.bar, watch.metric = [], []
    pruner = contribution()
    model = make()
    fit(tmp_path, model, pruner, watch, epochs=5)
    assert watch.metric == [0, 0.25, 0.25, 0.5, 0.5]
    assert watch.bar[0] == pruner.report.dense.params
    assert watch.bar[-1] == sum(p.numel() for p in model.parameters())
    assert len(set(watch.bar)) == 3
    assert watch.bar[BATCHES] < watch.bar[BATCHES - 1]


def test_files(measured: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pruner = contribution(dirpath=str(tmp_path / "report"))
    model = make()
    fit(tmp_path, model, pruner, epochs=5)
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"report.json", "report.md", "report.png"}
    stored = json.loads((tmp_path / "report" / "report.json").read_text())
    assert stored["final"]["params"] == sum(p.numel() for p in model.parameters())
    assert set(stored["dense"]["latency"]) == set(stored["final"]["latency"]) == {"1", "64"}
    assert stored["dense"]["bytes"] > stored["final"]["bytes"]
    assert [cut["epoch"] for cut in stored["cuts"]] == [1, 3]
    assert stored["config"]["criterion"].startswith("Contribution(")
    assert stored["config"]["cuts"] == [["epoch", 1, 0.5], ["epoch", 3, 1.0]]
    metrics = {name for row in stored["history"] for name in row["metrics"]}
    assert metrics == {"val_loss", "train_loss"}
    printed = capsys.readouterr().out
    assert "What was won and lost" in printed
    assert "50.0 % of the units are gone" in printed


def test_a_metric_is_written_down_when_it_was_measured(tmp_path: Path) -> None:
    """The value of an earlier validation is none of this epoch's."""
    pruner = StructuredPruning(0.5, schedule=SCHEDULE)
    fit(tmp_path, make(), pruner, epochs=6, check_val_every_n_epoch=3)
    assert [step for step, _ in pruner.report.values("val_loss")] == [3 * BATCHES, 6 * BATCHES]
    pruner = StructuredPruning(0.5, schedule=SCHEDULE)
    fit(tmp_path / "often", make(), pruner, epochs=4, val_check_interval=2)
    assert [step for step, _ in pruner.report.values("val_loss")] == [2 * i for i in range(1, 9)]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")

    class Run:
        """In place of W&B's process."""

        def __init__(self) -> None:
            self.config, self.summary, self.logged = _Dict(), _Dict(), []
            self.name, self.id = "run", "1"

        def log(self, values: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            self.logged.append(values)

        def define_metric(self, *args: Any, **kwargs: Any) -> None:
            pass

    class _Dict(dict):  # type: ignore[type-arg]
        def update(self, values: Any, allow_val_change: bool = False) -> None:  # type: ignore[override]
            super().update(values)

    run = Run()
    logger._experiment = run
    tables: dict[str, Any] = {}
    monkeypatch.setattr(logger, "log_table", lambda key, columns, data: tables.update({key: (columns, data)}))
    images: list[str] = []
    monkeypatch.setattr(logger, "log_image", lambda key, images: images.append(key))
    monkeypatch.setattr(type(logger), "experiment", property(lambda self: run))
    fit(tmp_path, make(), contribution(), epochs=5, logger=logger, log_every_n_steps=50)
    assert run.config["pruning"]["final_widths"] == {"first": 6, "second": 4}
    assert run.config["pruning"]["criterion"].startswith("Contribution(")
    assert run.summary["pruning/ratio"] == 0.5
    assert {"pruning/What was won and lost", "pruning/Cuts", "pruning/Widths"} == set(tables)
    assert any("pruning/seconds" in values for values in run.logged)
    assert images == []  # no picture was drawn here


def test_overhead_is_the_share_of_observed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(observed=[3.0, 3.0], plain=[1.0] * 18)
    assert pace.overhead() == pytest.approx(4 / 20)
    assert pace.overhead() == 0  # nothing since
    assert Pace(observed=[1.0]).overhead() is None
