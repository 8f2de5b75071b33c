"""The command line end to end, in this process and in a folder of its own."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_prune.cli import main, verbs
from tests.cli.modules import MODULE
from tests.support import wandb_files

QUICK = ["--data=Digits", "--data.train_limit=40", "--data.batch_size=20", "--trainer.max_epochs=1"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
MODEL = ["--model=MLPClassifier", "--model.sizes=[64,12,10]"]


@pytest.fixture(autouse=True)
def _ours(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_tmp / "mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(in_tmp))


@pytest.fixture
def without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without W&B, and three seconds faster."""
    monkeypatch.setattr(verbs, "find_spec", lambda name: None)


def config(run: str | Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((Path(run) / "config.yaml").read_text())
    return loaded


def epochs(run: str | Path, file: str = "metrics.csv") -> set[int]:
    with (Path(run) / file).open() as rows:
        return {int(row["epoch"]) for row in csv.DictReader(rows)}


@pytest.mark.usefixtures("without_wandb")
def test_every_fit_has_its_own_folder() -> None:
    for _ in range(2):
        main(["fit", *MODEL, *QUICK, *QUIET])
    for run in ("runs/MLPClassifier/001", "runs/MLPClassifier/002"):
        assert config(run)["model"]["init_args"]["sizes"] == [64, 12, 10]
        assert epochs(run) == {0}
        assert list(Path(run, "checkpoints").glob("*.ckpt"))
    assert {path.name for path in Path.cwd().iterdir()} == {"mine.py", "runs"}, "a run writes into its folder only"


@pytest.mark.usefixtures("without_wandb")
def test_name_and_root() -> None:
    main(["fit", *MODEL, *QUICK, *QUIET, "--name=mine", "--trainer.default_root_dir=elsewhere"])
    assert config("elsewhere/mine/001")["name"] == "mine"
    assert not Path("runs").exists()


@pytest.mark.usefixtures("without_wandb")
def test_a_saved_configuration_repeats_the_run() -> None:
    main(["fit", *MODEL, *QUICK, *QUIET, "--name=first"])
    main(["fit", "--config=runs/first/001/config.yaml"])
    first, second = (Path(f"runs/first/{number}/metrics.csv").read_text() for number in ("001", "002"))
    assert first == second
    assert len(first.splitlines()) > 2


@pytest.mark.usefixtures("without_wandb")
@pytest.mark.parametrize("ckpt", ["last", "runs/first/001/checkpoints/last.ckpt"])
def test_a_resumed_run_goes_on_in_its_folder(ckpt: str) -> None:
    saving = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    words = ["fit", *MODEL, *QUICK, *QUIET, *saving, "--name=first"]
    main(words)
    main([*words, f"--ckpt_path={ckpt}", "--trainer.max_epochs=3"])
    run = Path("runs/first/001")
    assert [path.name for path in Path("runs/first").iterdir()] == ["001"]
    assert (config(run)["ckpt_path"], config(run)["trainer"]["max_epochs"]) == (ckpt, 3)
    assert yaml.safe_load((run / "config.1.yaml").read_text())["trainer"]["max_epochs"] == 1
    assert (epochs(run, "metrics.1.csv"), epochs(run)) == ({0}, {1, 2})
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 2


@pytest.mark.usefixtures("without_wandb")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_foreign_checkpoint_starts_a_new_folder() -> None:
    main(["fit", *MODEL, *QUICK, *QUIET])
    (found,) = Path("runs").rglob("last.ckpt")
    foreign = found.rename("foreign.ckpt")
    main(["fit", *MODEL, *QUICK, *QUIET, f"--ckpt_path={foreign}", "--trainer.max_epochs=2"])
    assert epochs("runs/MLPClassifier/002") == {1}


@pytest.mark.usefixtures("without_wandb")
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_the_other_verbs_leave_the_run_alone(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *MODEL, *QUICK, *QUIET, "--name=first"])
    run = Path("runs/first/001")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    (checkpoint,) = run.rglob("last.ckpt")
    words = [f"--config={run}/config.yaml", f"--ckpt_path={checkpoint}"]
    for number, ordered in (("001", words), ("002", words[::-1])):
        main([verb, *ordered, *QUIET])
        assert config(run / verb / number)["ckpt_path"] == str(checkpoint)
    assert {file: file.read_bytes() for file in before} == before
    if verb == "predict":
        assert f"Predictions: {run}/predict/002/predictions.pt, a tensor of 359 in the order" in capsys.readouterr().out
        assert torch.load(run / "predict/002/predictions.pt", weights_only=True).shape == (359,)
    else:
        assert f"{verb[:4].replace('vali', 'val')}_acc" in capsys.readouterr().out


@pytest.mark.usefixtures("without_wandb")
def test_no_logger_still_keeps_the_configuration() -> None:
    main(["fit", *MODEL, *QUICK, *QUIET, "--trainer.logger=false"])
    assert {path.name for path in Path("runs/MLPClassifier/001").iterdir()} == {"config.yaml", "checkpoints"}


@pytest.mark.usefixtures("without_wandb")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_logger_of_ones_own() -> None:
    """Even one that uses the same folder for every run."""
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.version=same"]
    for _ in range(2):
        main(["fit", *MODEL, *QUICK, *QUIET, *logger])
    assert {path.name for path in Path("logs/lightning_logs/same").iterdir()} >= {"metrics.csv", "metrics.1.csv"}
    assert Path("runs/MLPClassifier/002/config.yaml").is_file()


def test_fast_dev_run_leaves_nothing() -> None:
    main(["fit", *MODEL, *QUICK, *QUIET, "--trainer.fast_dev_run=true"])
    assert not Path("runs").exists()


@pytest.mark.usefixtures("without_wandb")
def test_a_module_of_ones_own() -> None:
    main(["fit", "--model=mine.Mine", "--model.hidden=7", *QUICK, *QUIET])
    assert config("runs/Mine/001")["model"] == {"class_path": "mine.Mine", "init_args": {"hidden": 7}}


def test_wandb_is_offline_and_inside_the_run() -> None:
    main(["fit", *MODEL, *QUICK, *QUIET])
    run = Path("runs/MLPClassifier/001")
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert not Path("wandb").exists()
    import wandb

    assert wandb.run is None, "the next command would log into this one's run"


@pytest.mark.parametrize("own", [False, True])
def test_a_resumed_run_goes_on_in_its_wandb_run(own: bool) -> None:
    saving = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    words = ["fit", *MODEL, *QUICK, *QUIET, *saving, "--name=first", "--trainer.log_every_n_steps=1"]
    run = Path("runs/first/001").absolute()
    if own:  # a logger that keeps its files elsewhere; its checkpoints would lie there, too
        words += ["--trainer.logger=WandbLogger", f"--trainer.logger.save_dir={Path('elsewhere').absolute()}"]
        words += [f"--trainer.callbacks.dirpath={run / 'checkpoints'}"]
    main(words)
    main([*words, "--ckpt_path=last", "--trainer.max_epochs=2"])
    first, second = wandb_files.segments(Path("elsewhere") if own else run)
    assert wandb_files.run_id(first) == wandb_files.run_id(second) == (run / "wandb.id").read_text()
    steps = [row["trainer/global_step"] for row in wandb_files.rows(first) + wandb_files.rows(second)]
    assert steps == sorted(steps)
    assert steps[0] < 2 < steps[-1]
    if own:  # else a run repeated by this file would draw into this one's curves
        assert config(run)["trainer"]["logger"]["init_args"]["id"] is None
    else:
        main(words)
        (other,) = wandb_files.segments(Path("runs/first/002"))
        assert wandb_files.run_id(other) != wandb_files.run_id(first)


@pytest.mark.parametrize(("switch", "mode"), [(None, "offline"), ("online", "online"), ("disabled", "disabled")])
def test_wandb_obeys_its_own_switch(switch: str | None, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    if switch:
        monkeypatch.setenv("WANDB_MODE", switch)
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    csv_logger, wandb_logger = verbs._loggers(Path("runs/first/001"), ["Digits"])
    assert isinstance(csv_logger, CSVLogger)
    assert csv_logger.log_dir == "runs/first/001"
    assert isinstance(wandb_logger, WandbLogger)
    assert wandb_logger._wandb_init["mode"] == mode
    assert (wandb_logger._project, wandb_logger._name) == ("ours", "first/001")
    monkeypatch.setenv("WANDB_SWEEP_ID", "one")  # the agent of a sweep has to be online
    wandb_logger = verbs._loggers(Path("runs/first/001"), ["Digits"])[1]
    assert wandb_logger._wandb_init["mode"] == switch  # type: ignore[attr-defined]


def test_help_names_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for verb in ("fit", "validate", "test", "predict", "inspect", "recipes"):
        assert re.search(rf"\b{verb}\b", text), verb


def test_unknown_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *MODEL, "--model.nonsense=1"])
    assert "nonsense" in capsys.readouterr().err
    assert not Path("runs").exists()
