"""Cells that a W&B sweep's agents run, settings of SLURM on the command line, and reports that are logged to W&B."""

from __future__ import annotations

import csv
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_prune.cli import main, study
from lightning_prune.reporting.grid import Grid
from lightning_prune.reporting.numeric import Table
from lightning_prune.reporting.pages import Page, Picture
from lightning_prune.study.axes import points
from lightning_prune.study.configurations import run
from lightning_prune.study.definition import load
from lightning_prune.study.launchers import Local, Slurm
from lightning_prune.study.store import Store
from lightning_prune.study.sweep import cell_at, log_page
from tests.study.definitions import DEFINITION
from tests.support import wandb_files


@pytest.fixture(autouse=True)
def _here(in_tmp: Path) -> None:
    (in_tmp / "small.yaml").write_text(DEFINITION)


def test_an_agents_command_runs_a_cell(capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", "sweep", "small.yaml"])
    sweep = yaml.safe_load(Path("runs/small/sweep.yaml").read_text())
    assert sweep["metric"] == {"name": "val_acc", "goal": "maximize"}
    names = list(sweep["parameters"])
    assert names == ["variant", "seed", "model.weight_decay", "model.lr"]
    chosen = {"variant": "50% uniform", "seed": 0, "model.weight_decay": 0.00316228, "model.lr": 0.05}
    assert all(value in sweep["parameters"][name]["values"] for name, value in chosen.items())
    program, *words = wandb_files.agent_words(sweep, chosen)
    assert Path(program).name == "lightning-prune"
    main(words)
    out = capsys.readouterr().out
    assert "50% uniform, weight_decay 0.00316228, lr 0.05, seed 0: " in out
    found = load(Path("small.yaml"))
    store = Store(Path("runs/small"))
    result = store.result(run(found, found.variants[1], (1, 0), 0))
    assert result is not None
    (segment,) = wandb_files.segments(Path("runs/small"))
    (row,) = wandb_files.rows(segment)
    assert row["val_acc"] == pytest.approx(result.metrics["val_acc"])
    assert (row["params"], row["macs"]) == (result.params, result.macs)


def test_every_combination_of_a_sweep_is_a_cell_of_the_study() -> None:
    found = load(Path("small.yaml"))
    main(["study", "sweep", "small.yaml", "--out", "somewhere/sweep.yaml"])
    parameters = yaml.safe_load(Path("somewhere/sweep.yaml").read_text())["parameters"]
    combinations = product(*(parameters[name]["values"] for name in parameters))
    keys = {
        cell_at(found, variant, seed, dict(zip(list(parameters)[2:], values, strict=True))).key
        for variant, seed, *values in combinations
    }
    assert keys == {
        run(found, variant, point, seed).key
        for variant in found.variants
        for seed in found.seeds
        for point in points(found.extent)
    }


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"variant": "40% uniform"}, "expected a variant of unpruned, 50% uniform, got '40% uniform'"),
        ({"seed": 7}, "expected a seed of 0, got 7"),
        ({"model.lr": 0.06}, "expected a value of model.lr on the grid, such as 0.05, got 0.06"),
    ],
)
def test_what_is_no_cell_is_refused(changed: dict[str, Any], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"variant": "unpruned", "seed": 0, "model.weight_decay": 0.001, "model.lr": 0.05} | changed
    with pytest.raises(SystemExit) as end:
        main(["study", "cell", "small.yaml", *(f"--{key}={value}" for key, value in values.items())])
    assert end.value.code == 2
    assert text in capsys.readouterr().err


def test_settings_of_slurm(capsys: pytest.CaptureFixture[str]) -> None:
    def launcher(*words: str) -> Any:
        return study.launcher_of(Path("here"), study._parser().parse_args(["run", "small.yaml", *words]))

    settings = ["--slurm", "timeout_min=60", "slurm_partition=gpu"]
    expected = Slurm(Path("here/slurm"), "slurm", (("timeout_min", 60), ("slurm_partition", "gpu")))
    assert launcher("--launcher=slurm", *settings) == expected
    assert launcher("--launcher=slurm", "--cluster=local").cluster == "local"
    assert launcher("--workers=3") == Local(3)
    with pytest.raises(ValueError, match="expected KEY=VALUE"):
        launcher("--launcher=slurm", "--slurm", "timeout_min")
    with pytest.raises(ValueError, match="expected `--launcher slurm`"):
        launcher(*settings)
    with pytest.raises(SystemExit):
        main(["study", "run", "small.yaml", "--nonsense"])
    assert "got '--nonsense'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["ray"], ["slurm", "--cluster=local"]])
def test_other_launchers_give_the_same_rows(launcher: list[str]) -> None:
    Path("small.yaml").write_text(DEFINITION.replace("variants:\n  - {remaining: 0.5}\n", ""))
    main(["study", "run", "small.yaml", "--folder=here"])
    main(["study", "run", "small.yaml", "--folder=there", "--launcher", *launcher])
    here, there = (
        [{key: row[key] for key in row if key != "seconds"} for row in csv.DictReader(table.splitlines())]
        for table in (Path(f"{name}/table.csv").read_text() for name in ("here", "there"))
    )
    assert len(here) == 9
    assert here == there


def test_a_report_in_wandb() -> None:
    pixel = bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
        "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
    )
    grid = Grid("Performance risk", ("network", "d mean"), (("unpruned", "0.1"),))
    tables = {"networks": Table(("network", "macs_left"), [("unpruned", 1.0), ("pruned", None)])}
    log_page(Page("mine", (grid, Picture("risk", "words", pixel))), tables, Path())
    (segment,) = wandb_files.segments(Path())
    (row,) = wandb_files.rows(segment)
    assert {name.partition("._")[0] for name in row} >= {"study/networks", "study/risk", "study/report"}
    (file,) = segment.rglob("networks*.json")
    assert json.loads(file.read_text())["data"] == [["unpruned", 1.0], ["pruned", None]]
    (page,) = segment.rglob("*.html")
    assert "Performance risk" in page.read_text()
