"""Budgets of latency on another device, while Lightning trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import ContributionPruning, LinearSchedule, NetworkSlimming, StructuredPruning
from lightning_prune.structure import latency
from tests.callbacks.networks import Net, fit, make
from tests.support.planted_times import write_table

SCHEDULE = LinearSchedule(start=1, end=2, cuts=2)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A table of a phone, where nothing may be measured here."""

    def refuse(*_: object) -> float:
        raise AssertionError("nothing is measured here")

    monkeypatch.setattr(latency, "median_seconds", refuse)
    model = make(Net)
    return write_table(tmp_path, model, model.example_input_array)


def test_a_run_meets_the_budget_of_another_device(table: str, tmp_path: Path) -> None:
    pruner = StructuredPruning(budget={"latency": 0.5, "params": 0.9}, schedule=SCHEDULE, latency_table=table)
    fit(tmp_path, make(Net), pruner, epochs=3)
    dense, left = pruner.report.dense, pruner.report.size
    assert dense is not None
    assert left is not None
    assert dense.table_latency == pytest.approx(1e-6 * dense.macs, rel=0.05)
    assert left.table_latency == pytest.approx(1e-6 * left.macs, rel=0.1)
    assert left.table_latency <= 0.5 * dense.table_latency  # type: ignore[operator]


def test_a_checkpoint_has_the_table_of_the_other_device(table: str, tmp_path: Path) -> None:
    first = StructuredPruning(budget={"latency": 0.5}, schedule=SCHEDULE, latency_table=table)
    fit(tmp_path, make(Net), first, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), epochs=3)
    torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    Path(table).unlink()
    again = StructuredPruning(budget={"latency": 0.5}, schedule=SCHEDULE)
    fit(tmp_path, make(Net), again, epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    dense, left = again.report.dense, again.report.size
    assert dense is not None
    assert left is not None
    assert left.table_latency <= 0.5 * dense.table_latency  # type: ignore[operator]


def test_what_the_device_cannot_reach_is_refused_before_training(table: str, tmp_path: Path) -> None:
    pruner = StructuredPruning(budget={"latency_ms": 1e-9}, latency_table=table)
    with pytest.raises(ValueError, match=r"1e-09 milliseconds of latency cannot be reached: .* are left"):
        fit(tmp_path, make(Net), pruner, epochs=3)
    with pytest.raises(FileNotFoundError, match="expected `latency_table` to be a file"):
        fit(tmp_path, make(Net), StructuredPruning(0.5, latency_table="nowhere.json"), epochs=3)


@pytest.mark.parametrize("kind", [ContributionPruning, NetworkSlimming])
def test_presets_take_a_table(kind: type[StructuredPruning]) -> None:
    assert kind(budget={"latency": 0.5}, latency_table="table.json").latency_table == "table.json"
    with pytest.raises(TypeError, match=f"{kind.__name__}: expected `latency_table`"):
        kind(budget={"latency": 0.5}, latency_table=3)  # type: ignore[arg-type]
