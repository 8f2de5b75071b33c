"""What the command line gives to W&B, read from offline runs."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_prune.cli import main
from tests.support import wandb_files

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SHORT = ["--trainer.max_epochs=11", "--trainer.callbacks.schedule.start=1", "--trainer.callbacks.schedule.every=1"]


@pytest.fixture(autouse=True)
def _here(in_tmp: Path) -> None:
    """Runs go to a folder of their own."""


def test_a_run_in_wandb(measured: None) -> None:
    main(["fit", "--config=digits_mlp_contribution", *SHORT, *QUIET])
    run = Path("runs/digits_mlp_contribution/001")
    (segment,) = wandb_files.segments(run)
    assert wandb_files.sections(segment) == {
        "",  # what the model logs
        "trainer",
        "pruning",
        *(f"pruning/{name}" for name in ("width", "scores", "split_half", "latency_ms", "tables", "pictures")),
    }
    assert wandb_files.group_and_tags(segment) == (
        "digits_mlp_contribution",
        ["MLPClassifier", "Digits", "ContributionPruning"],
    )
    config = wandb_files.config(segment)
    assert config["model"]["init_args"]["lr"] == 0.1
    assert config["trainer"].keys() == {
        *("callbacks", "max_epochs", "log_every_n_steps", "enable_progress_bar", "enable_model_summary")
    }
    assert config["pruning"]["schedule"]["class"] == "Geometric"
    assert config.keys().isdisjoint({"_instantiator", "config"})

    def has_none(value: Any) -> bool:
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return value is None or any(map(has_none, items))

    assert not has_none({name: config[name] for name in ("model", "data", "trainer")})
    results = wandb_files.summary(segment)
    assert results["pruning/ratio"] == 0.5
    assert results.keys() >= {"val_acc", "pruning/params_left", "pruning/macs_left", "pruning/params"}
    artifacts = {alias: one for one in wandb_files.artifacts(segment, "model") for alias in one[1]}
    assert {one[0] for one in artifacts.values()} == {f"pruned-{(run / 'wandb.id').read_text()}"}
    final, best = (artifacts[alias][2] for alias in ("final", "best"))
    assert final["params"] == best["params"] == results["pruning/params"]
    assert final["val_acc"] == pytest.approx(results["val_acc"])
    assert best["val_acc"] == pytest.approx(results["pruning/val_acc_best"])
    assert best["val_acc"] >= final["val_acc"]


@pytest.mark.filterwarnings("ignore:cut .* removes nothing")  # of so small a network in so short a run
def test_an_agent_runs_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    main(["recipes", "copy", "sweeps/digits"])
    text = Path("digits.yaml").read_text()
    assert text.partition("\n")[2] in (Path(__file__).parents[2] / "docs" / "wandb.md").read_text(encoding="utf-8")
    sweep = yaml.safe_load(text)
    names = [name.rpartition(".")[2] for name in sweep["parameters"]]
    assert names == ["pruning_ratio", "criterion", "schedule"]
    runs = [
        dict(zip(sweep["parameters"], values, strict=True))
        for values in product(*(parameter["values"] for parameter in sweep["parameters"].values()))
    ]
    monkeypatch.setenv("WANDB_SWEEP_ID", "one")
    for number, chosen in enumerate((runs[0], runs[-1]), 1):
        program, *words = wandb_files.agent_words(sweep, chosen)
        assert program == "lightning-prune"
        main([*words, *SHORT, *QUIET])
        (segment,) = wandb_files.segments(Path(f"runs/digits_mlp_contribution/{number:03d}"))
        config, results = wandb_files.config(segment)["pruning"], wandb_files.summary(segment)
        ratio, criterion, schedule = chosen.values()
        assert (config["criterion"]["class"], config["schedule"]["class"]) == (criterion, schedule)
        assert config["target"]["remaining"] == pytest.approx(1 - ratio)
        assert results["pruning/ratio"] == pytest.approx(ratio, abs=0.02)
        assert 0 < results[sweep["metric"]["name"]] <= 1
