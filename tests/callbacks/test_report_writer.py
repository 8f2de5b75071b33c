"""What a run shows: curves in every logger, the progress bar, files, and what W&B keeps."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_prune import (
    AtStart,
    Contribution,
    ContributionPruning,
    LinearSchedule,
    MagnitudePruning,
    OneShot,
    SaveEachSize,
    StructuredPruning,
)
from lightning_prune.callbacks.display import report_writer, wandb_run
from lightning_prune.callbacks.display.report_writer import Pace
from lightning_prune.reporting import Timing
from tests.callbacks.networks import BATCHES, Curves, fit, loader, make, refit, trainer
from tests.support import wandb_files

SCHEDULE = LinearSchedule(start=1, end=3, cuts=2)


def contribution(**options: Any) -> ContributionPruning:
    return ContributionPruning(0.5, criterion=Contribution(every_n_batches=2), schedule=SCHEDULE, **options)


def test_curves_reach_every_logger(tmp_path: Path) -> None:
    table, curves = CSVLogger(tmp_path, name="", version="v"), Curves()
    # Lightning's own curves would show nothing: there are fewer steps than 50 to an epoch.
    fit(tmp_path, make(), contribution(), epochs=5, logger=[table, curves], log_every_n_steps=50)
    rows = list(csv.DictReader((tmp_path / "v" / "metrics.csv").read_text().splitlines()))
    cuts = [row for row in rows if row.get("pruning/seconds")]
    assert [int(row["step"]) for row in cuts] == [BATCHES, 3 * BATCHES]
    assert [float(row["pruning/width/first"]) for row in cuts] == [9, 6]
    assert [float(row["pruning/width/second"]) for row in cuts] == [6, 4]
    scores = ("scores/first/median", "scores/second/max", "split_half/first")
    for name in ("params", "macs", "memory_bytes", "ratio", *scores):
        assert all(row[f"pruning/{name}"] for row in cuts), name
    assert float(cuts[-1]["pruning/ratio"]) == 0.5
    assert float(cuts[0]["pruning/scores/first/min"]) < float(cuts[0]["pruning/scores/first/max"])
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
    pruner = contribution(dirpath=str(tmp_path / "report"))
    model = make()
    fit(tmp_path, model, pruner, epochs=5)
    pictures = {"report.png", "sizes.png", "cut_scores.png"}
    files = {file.name for file in (tmp_path / "report").iterdir()}
    assert files == {"report.json", "report.md", "report.html", *pictures}
    stored = json.loads((tmp_path / "report" / "report.json").read_text())
    assert stored["final"]["params"] == sum(p.numel() for p in model.parameters())
    assert set(stored["dense"]["latency"]) == set(stored["final"]["latency"]) == {"1", "64"}
    assert stored["dense"]["bytes"] > stored["final"]["bytes"]
    for cut in stored["cuts"]:
        assert cut["scores"].keys() == {"first", "second"}
        assert cut["scores"]["first"]["min"] <= cut["scores"]["first"]["removed"] < cut["scores"]["first"]["max"]
    assert [cut["epoch"] for cut in stored["cuts"]] == [1, 3]
    assert stored["config"]["criterion"].startswith("Contribution(")
    assert stored["config"]["cuts"] == [["epoch", 1, 0.5], ["epoch", 3, 1.0]]
    metrics = {name for row in stored["history"] for name in row["metrics"]}
    assert metrics == {"val_loss", "train_loss"}
    printed = capsys.readouterr().out
    assert "Before and after" in printed
    assert "50.0 % of the units are gone" in printed


@pytest.mark.parametrize("which", ["the same", "another"])
def test_a_network_that_was_validated_before_the_fit_has_a_dense_metric(which: str, tmp_path: Path) -> None:
    """A pretrained network is cut before it has trained here; `Trainer.validate` says how good it was."""
    pruner, model = StructuredPruning(0.5, schedule=AtStart()), make()
    run = trainer(tmp_path, pruner, epochs=2)
    (found,) = run.validate(model if which == "the same" else make(), loader(2), verbose=False)
    refit(run, model)
    before, _, last = pruner.report.outcome
    assert before == (pytest.approx(found["val_loss"]) if which == "the same" else None)
    assert last is not None
    assert pruner.report.grids()[0].columns[1] == "dense, before the first cut"


def test_dense_and_pruned_are_timed_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine was busy with when the run began is no difference between the networks."""
    timed: list[list[int]] = []

    def latencies(call: Any, networks: list[torch.nn.Module]) -> list[dict[int, Timing]]:
        for network in networks:
            network(*call.args, **call.kwargs)
        timed.append([sum(p.numel() for p in network.parameters()) for network in networks])
        return [{1: Timing(float(len(timed)))}] * len(networks)

    monkeypatch.setattr(report_writer, "latencies", latencies)
    pruner = contribution()
    fit(tmp_path, make(), pruner, epochs=5)
    assert timed == [[pruner.report.dense.params], [pruner.report.final.params, pruner.report.dense.params]]
    assert pruner.report.dense.latency == pruner.report.final.latency == {1: 2.0}
    assert (
        "Too close to measure a difference: latency at batch 1 (2 ms before, 2 ms after)."
        in pruner.report.grids()[0].note
    )


@pytest.mark.parametrize("kind", ["units", "masks"])
def test_after_a_resume_the_dense_network_is_timed_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latency in the checkpoint may be of another machine, with which the pruned network is not to be compared."""

    def machine(times: float) -> None:
        def latencies(call: Any, networks: list[torch.nn.Module]) -> list[dict[int, Timing]]:
            for network in networks:
                network(*call.args, **call.kwargs)
            return [{1: Timing(times * sum(p.numel() for p in network.parameters()))} for network in networks]

        monkeypatch.setattr(report_writer, "latencies", latencies)

    def pruning() -> Any:
        return contribution() if kind == "units" else MagnitudePruning(0.5, schedule=SCHEDULE)

    machine(1000)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, make(), pruning(), saver, epochs=5)
    machine(1)
    for epoch in (0, 1, 3):
        pruner, model = pruning(), make()
        fit(tmp_path, model, pruner, epochs=5, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        dense, final = pruner.report.dense, pruner.report.final
        assert dense.latency == {1: dense.params}, f"resumed after epoch {epoch}"
        assert final.latency == {1: sum(p.numel() for p in model.parameters())}


def test_the_best_checkpoint_is_that_of_a_monitor(
    measured: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, best = ModelCheckpoint(tmp_path, "last"), ModelCheckpoint(tmp_path, "best", monitor="val_loss")
    fit(tmp_path, make(), contribution(), last, best, epochs=5)
    assert f"Best checkpoint: {best.best_model_path}" in capsys.readouterr().out
    fit(tmp_path / "plain", make(), contribution(), ModelCheckpoint(tmp_path / "plain", "last"), epochs=5)
    printed = capsys.readouterr().out
    assert f"Last checkpoint: {tmp_path / 'plain' / 'last.ckpt'}" in printed
    assert "Best checkpoint" not in printed


def test_a_metric_is_written_down_when_it_was_measured(tmp_path: Path) -> None:
    """The value of an earlier validation is none of this epoch's."""
    pruner = StructuredPruning(0.5, schedule=SCHEDULE)
    fit(tmp_path, make(), pruner, epochs=6, check_val_every_n_epoch=3)
    assert [step for step, _ in pruner.report.values("val_loss")] == [3 * BATCHES, 6 * BATCHES]
    pruner = StructuredPruning(0.5, schedule=SCHEDULE)
    fit(tmp_path / "often", make(), pruner, epochs=4, val_check_interval=2)
    assert [step for step, _ in pruner.report.values("val_loss")] == [2 * i for i in range(1, 9)]


@pytest.fixture
def wandb() -> Iterator[Any]:
    """W&B as it is, offline; a run that a test leaves open ends."""
    import wandb as module

    yield module
    module.finish()


class Crash(Callback):
    """The machine stops in the third epoch, right after a checkpoint."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 10:
            trainer.save_checkpoint(Path(trainer.default_root_dir, "last.ckpt"))
            raise InterruptedError


def test_wandb_over_a_resume(measured: None, wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One W&B run with `watch`, in two parts; what counts is in the files that `wandb sync` sends."""
    monkeypatch.setattr(report_writer, "latencies", lambda _, networks: [{1: Timing(1.0)}] * len(networks))

    def part(name: str | None, *callbacks: Callback, ckpt: Path | None = None) -> Any:
        logger, model = WandbLogger(save_dir=tmp_path, offline=True, id=name), make()
        logger.watch(model, log="all", log_freq=1, log_graph=False)
        with contextlib.suppress(InterruptedError):
            fit(
                tmp_path, model, contribution(extensions=[SaveEachSize()]), *callbacks,
                epochs=5, logger=logger, log_every_n_steps=1, ckpt_path=ckpt,
            )  # fmt: skip
        wandb.finish()
        return logger.version

    name = part(None, Crash())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["ContributionPruning"]
    assert state["report"]["config"]["wandb"] == name
    part(name, ckpt=tmp_path / "last.ckpt")
    beside_the_checkpoints = tmp_path / "lightning_logs" / str(name)
    assert {"report.json", "report.png"} <= {file.name for file in beside_the_checkpoints.iterdir()}
    first, second = wandb_files.segments(tmp_path)
    assert wandb_files.run_id(first) == wandb_files.run_id(second) == name
    before, after = wandb_files.rows(first), wandb_files.rows(second)
    steps = [row["trainer/global_step"] for row in before + after]
    assert steps == sorted(steps)
    # Lightning writes a step down after the hook that crashed here.
    assert {step for step in steps if step < 20} == set(range(20)) - {9}, "a curve has a hole"
    assert before[-1]["trainer/global_step"] < 10 <= after[0]["trainer/global_step"]
    # Every unit is in the histogram of the cut that it came to, every weight in those of `watch`.
    cuts = [row for row in before + after if "pruning/scores/first.values" in row]
    assert [row["trainer/global_step"] for row in cuts] == [BATCHES, 3 * BATCHES]
    assert [sum(row["pruning/scores/first.values"]) for row in cuts] == [12, 9]
    assert [sum(row["pruning/scores/second.values"]) for row in cuts] == [8, 6]
    for kind in ("gradients", "parameters"):
        # The second `watch` of one process has a number in its names.
        named = re.compile(rf"{kind}/(graph_1)?first\.weight\.values")
        seen = [sum(value) for row in before + after for name, value in row.items() if named.fullmatch(name)]
        assert (seen[0], seen[-1], sorted(seen, reverse=True)) == (12 * 6, 6 * 6, seen), kind
    settings, results = wandb_files.config(second)["pruning"], wandb_files.summary(second)
    assert settings["schedule"].items() >= {"class": "LinearSchedule", "start": 1, "end": 3, "cuts": 2}.items()
    assert settings["criterion"]["every_n_batches"] == 2
    assert settings["extensions"] == [{"class": "SaveEachSize"}]
    assert settings.keys().isdisjoint({"run", "wandb"})
    assert (results["pruning/ratio"], results["pruning/width/first"]) == (0.5, 6)
    assert 0 < results["pruning/macs_left"] < results["pruning/params_left"] < 1
    assert results.keys() >= {"val_loss", "pruning/val_loss_dense", "pruning/val_loss_best"}
    tables = ("tables/summary", "tables/cuts", "tables/widths", "metric_against_size_table")
    for table in tables:
        file = next(row[f"pruning/{table}.path"] for row in after if f"pruning/{table}.path" in row)
        rows = json.loads((second / "files" / file).read_text())["data"]
        assert all(isinstance(cell, int | float | None) for row in rows for cell in row[1:]), table
        assert rows
    assert wandb_files.charts(second) == {"pruning/metric_against_size"}
    for name in ("report", "sizes"):
        key = f"pruning/pictures/{name}.path"
        picture = next(row[key] for row in after if key in row)
        assert (second / "files" / picture).stat().st_size > 10_000
    assert all("trainer/global_step" in row for row in before + after)


def test_two_callbacks_are_both_seen(wandb: Any, tmp_path: Path) -> None:
    logger, curves = WandbLogger(save_dir=tmp_path, offline=True), Curves()
    masks, cuts = MagnitudePruning(0.5, schedule=OneShot(at=1)), contribution(extensions=[SaveEachSize()])
    fit(tmp_path, make(), masks, cuts, epochs=5, logger=[logger, curves], validate=False)
    wandb.finish()
    (segment,) = wandb_files.segments(tmp_path)
    config, rows = wandb_files.config(segment), wandb_files.rows(segment)
    assert config["pruning"]["sparsity"] == 0.5
    assert config["pruning-2"]["target"] == {"quantity": "units", "remaining": 0.5}
    for name in ("pruning/tables/widths", "pruning-2/tables/widths", "pruning/tables/cuts", "pruning-2/tables/cuts"):
        assert any(f"{name}.path" in row for row in rows), name
    assert len(wandb_files.sections(segment)) <= 12
    assert len(curves.of("pruning/overhead")) == len(curves.of("pruning-2/overhead")) == 5
    assert (len(curves.of("pruning/seconds")), len(curves.of("pruning-2/seconds"))) == (1, 2)
    for pruner in (masks, cuts):
        assert {name for row in pruner.report.history for name in row.metrics} == {"train_loss"}
    # The networks of each size were saved beside a report that is written after another one.
    home = tmp_path / "lightning_logs" / str(logger.version)
    assert (home / "report.json").is_file()
    assert len(cuts.report.size_checkpoints) == 3
    for saved in cuts.report.size_checkpoints:
        assert (home / "pruning-2" / saved.file).is_file()


def test_another_wandb_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(wandb_run, "rank_zero_info", said.append)

    def before(name: str | None, known: str | None) -> str | None:
        loggers = [CSVLogger(tmp_path), WandbLogger(save_dir=tmp_path, id=name)] if name else [CSVLogger(tmp_path)]
        return wandb_run.wandb_run(SimpleNamespace(loggers=loggers), known)  # type: ignore[arg-type]

    assert [before(None, None), before("a", None), before("a", "a"), before(None, "a")] == [None, "a", "a", "a"]
    assert said == []
    assert before("b", "a") == "b"
    assert "WandbLogger(id='a')" in said[0]


def test_tensorboard_has_scores_and_report(measured: None, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="v")
    fit(tmp_path, make(), contribution(), epochs=5, logger=logger, log_every_n_steps=50)
    curves = EventAccumulator(str(tmp_path / "v"), size_guidance={"histograms": 0})
    curves.Reload()
    assert {"pruning/pictures/report", "pruning/pictures/sizes"} <= set(curves.Tags()["images"])
    (text,) = curves.Tensors("pruning/report/text_summary")
    assert b"Before and after" in text.tensor_proto.string_val[0]
    drawn = curves.Histograms("pruning/scores/first")
    assert [(event.step, event.histogram_value.num) for event in drawn] == [(BATCHES, 12), (3 * BATCHES, 9)]


@pytest.mark.parametrize(
    ("written", "nested"),
    [
        (repr(LinearSchedule(start=1, end=3, cuts=2)), {"class": "LinearSchedule", "start": 1, "end": 3, "cuts": 2}),
        ("Outer(inner=Inner(x=-1), rows=(1, 'b'))", {"inner": {"class": "Inner", "x": -1}, "rows": [1, "b"]}),
        ("local", "local"),
        ("<lambda> at 0x7f>", "<lambda> at 0x7f>"),
        ({"a": ["AtStart()", 1, None]}, {"a": [{"class": "AtStart"}, 1, None]}),
    ],
)  # fmt: skip
def test_settings_are_nested_values(written: Any, nested: Any) -> None:
    found = wandb_run.nested(written)
    assert found == nested or found.items() >= nested.items()


def test_overhead_is_the_share_of_observed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(observed=[3.0, 3.0], plain=[1.0] * 18)
    assert pace.overhead() == pytest.approx(4 / 20)
    assert pace.overhead() == 0  # nothing since
    assert Pace(observed=[1.0]).overhead() is None


@pytest.mark.parametrize("seed", [None, 7])
def test_a_report_names_the_seed_of_the_run(seed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    if seed is not None:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
    pruning = contribution()
    fit(tmp_path, make(), pruning, epochs=4)
    assert pruning.report.seed == seed
