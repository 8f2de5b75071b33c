"""Checkpoints on the command line: the best by whatever is logged, the last, and their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lightning_prune.cli import main, verbs
from lightning_prune.cli.checkpoints import BestCheckpoint
from lightning_prune.reporting.grid import short_count
from tests.cli.modules import REGRESSOR

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
DIGITS = ["--config=digits_mlp_contribution", "--data.train_limit=60", *QUIET]
SHORT = ["--trainer.max_epochs=4", "--trainer.callbacks.schedule=OneShot", "--trainer.callbacks.schedule.at=2"]
RUN = Path("runs/digits_mlp_contribution/001")


@pytest.fixture(autouse=True)
def _ready(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "find_spec", lambda name: None)  # W&B takes seconds to start; test_verbs has it


def saved() -> list[str]:
    return sorted(file.name for file in RUN.rglob("*.ckpt"))


def test_a_module_of_ones_own_with_any_metric(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe knows neither the module nor `val_mse`."""
    (in_tmp / "mine.py").write_text(REGRESSOR)
    main(["fit", *DIGITS, *SHORT, "--model", "mine.Regressor"])
    *best, last = saved()
    assert {name.rpartition("-")[2] for name in best} == {"params=4.8k.ckpt", "params=1.2k.ckpt"}
    assert last == "last.ckpt"
    assert f"Best checkpoint: {RUN}/checkpoints/" in capsys.readouterr().out
    state = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["BestCheckpoint"]
    assert state["monitor"] == "val_mse"


def test_names_tell_the_size() -> None:
    main(["fit", *DIGITS, *SHORT])
    dense, narrow, last = saved()
    assert dense.endswith("-params=5.1k.ckpt") or narrow.endswith("-params=5.1k.ckpt")
    assert last == "last.ckpt"
    assert [short_count(value) for value in (7, 949, 5143, 9_951, 12_345, 999_600, 1_240_000, 25_600_000)] == [
        *("7", "949", "5.1k", "10k", "12k", "1.0M", "1.2M", "26M")
    ]


def test_a_run_that_goes_on_keeps_its_best() -> None:
    main(["fit", *DIGITS, *SHORT, "--checkpoint.monitor=val_loss"])
    assert yaml.safe_load((RUN / "config.yaml").read_text())["checkpoint"] == {"monitor": "val_loss", "mode": None}
    stored = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["BestCheckpoint"]
    resumed = BestCheckpoint()
    resumed.dirpath = stored["dirpath"]
    resumed.load_state_dict(stored)
    assert (resumed.monitor, resumed.mode) == ("val_loss", "min")
    assert resumed.kth_value == stored["kth_value"] == stored["best_model_score"]


@pytest.mark.parametrize("own", ["ModelCheckpoint", "off"])
def test_callbacks_of_ones_own_are_left_alone(own: str) -> None:
    words = {
        "ModelCheckpoint": ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=mine"],
        "off": ["--trainer.enable_checkpointing=false"],
    }[own]
    main(["fit", *DIGITS, *SHORT, *words])
    assert saved() == (["mine.ckpt"] if own == "ModelCheckpoint" else [])


def test_a_metric_that_is_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *DIGITS, *SHORT, "--checkpoint.monitor=val_iou"])
    error = capsys.readouterr().err
    assert "expected a metric that the run logs, got 'val_iou'. It logs val_loss, val_acc." in error
    assert len(error.splitlines()) == 1


def test_a_metric_whose_name_says_nothing(in_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    (in_tmp / "odd.py").write_text(REGRESSOR.replace('"val_mse"', '"val_distance"'))
    main(["fit", *DIGITS, *SHORT, "--model=odd.Regressor"])
    assert saved() == ["last.ckpt"]
    assert "Only the last checkpoint was saved, no best one" in caplog.text
    with pytest.raises(ValueError, match=r"Give --checkpoint\.mode"):
        BestCheckpoint("val_distance")
    assert BestCheckpoint("val_distance", "min").mode == BestCheckpoint("val_mse").mode == "min"
    assert BestCheckpoint("val_f1").mode == "max"
