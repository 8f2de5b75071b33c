"""The XGB pruner on the command line: its recipe, and scores without pruning."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import lightning_prune
from lightning_prune.callbacks.display import score_display
from lightning_prune.cli import main, verbs
from lightning_prune.models import CNNClassifier
from lightning_prune.scoring.score_file import read_scores
from tests.cli.modules import REGRESSOR

WORDS = ["--config=digits_cnn_xgb", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
AT_ONCE = ["--trainer.callbacks.schedule.at=0", "--trainer.callbacks.samples=300", "--trainer.max_epochs=2"]


@pytest.fixture(autouse=True)
def _ready(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "find_spec", lambda name: None)  # W&B takes seconds to start
    monkeypatch.setattr(score_display, "_pictures", lambda *_: [])


def twice(*_: object) -> None:
    raise AssertionError("a layer is scored twice")


def test_the_recipe() -> None:
    """In fewer epochs: the network is smaller, and as good as before."""
    main(["fit", *WORDS, "--trainer.max_epochs=8"])
    run = Path("runs/digits_cnn_xgb/001")
    small = lightning_prune.load_from_checkpoint(CNNClassifier, run / "checkpoints/last.ckpt")
    dense = CNNClassifier((1, 8, 8), channels=(16, 32), hidden=(64, 32))
    left, whole = (sum(p.numel() for p in network.parameters()) for network in (small, dense))
    assert 0.1 * whole < left < 0.7 * whole
    assert {"report.json", "scores.md"} <= {path.name for path in run.iterdir()}
    report = lightning_prune.reporting.Report.from_plain(json.loads((run / "report.json").read_text()))
    before, best, _ = report.outcome
    assert before is not None
    assert best is not None
    assert best > before - 0.02
    assert [row.layer for row in report.scored] == ["features.0", "features.4", "classifier.1", "classifier.3"]


def test_scores_are_taken_up_by_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main(["score", *WORDS, *AT_ONCE])
    printed = capsys.readouterr().out
    assert "features.4" in printed
    run = Path("runs/digits_cnn_xgb/001")
    assert f"Scores: {run}" in printed
    assert not (run / "checkpoints").exists()
    (file,) = run.glob("scores-*.jsonl")
    _, layers = read_scores(file)
    assert [one.station.layer for one in layers] == ["features.0", "features.4", "classifier.1", "classifier.3"]

    monkeypatch.setattr(lightning_prune.XGBoost, "train", twice)
    main(["fit", *WORDS, *AT_ONCE])
    assert (Path("runs/digits_cnn_xgb/002") / file.name).read_text() == file.read_text()
    main(
        ["fit", *WORDS, *AT_ONCE, "--name=other", f"--trainer.callbacks.scores={file}", "--trainer.callbacks.gain=0.5"]
    )
    assert Path("runs/other/001/report.json").is_file()


def test_scores_of_a_checkpoint_serve_the_run_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.filename=last", "--trainer.max_epochs=1"]
    main(["fit", *WORDS, *dense])
    run = Path("runs/digits_cnn_xgb/001")
    resumed = [*WORDS, *AT_ONCE, f"--ckpt_path={run}/checkpoints/last.ckpt"]
    main(["score", *resumed])
    (file,) = (run / "score/001").glob("scores-*.jsonl")
    monkeypatch.setattr(lightning_prune.XGBoost, "train", twice)
    main(["fit", *resumed])
    assert (run / file.name).read_text() == file.read_text()


def test_scores_before_the_moment_of_the_schedule() -> None:
    """The recipe prunes at half time, when scores are others."""
    with pytest.warns(UserWarning, match="scored as it is now, and OneShot.* prunes it after further training"):
        main(["score", *WORDS, "--trainer.callbacks.samples=300"])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scores of the recipe's network as it begins."""
    home = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_display, "_pictures", lambda *_: [])
        main(["score", *WORDS, *AT_ONCE, f"--trainer.default_root_dir={home}"])
    (file,) = home.rglob("scores-*.jsonl")
    return file


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("reduction=max", "reduction is avg, here max"),
        ("samples=290", "the training samples differ"),
        ("surrogate=NeuralProbe", r"surrogate is XGBoost\(.*, here NeuralProbe\("),
        ("held_back=0.3", "held_back is 0.2, here 0.3"),
    ],
)
def test_a_table_of_something_else_is_refused(
    changed: str, message: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = f"--trainer.callbacks.scores={table}"
    with pytest.raises(SystemExit):
        main(["fit", *WORDS, *AT_ONCE, "--name=other", taken, f"--trainer.callbacks.{changed}"])
    assert re.search(rf"expected a table of this network, .*{message}.* Score again, or leave it out", _flat(capsys))


def _flat(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_without_the_callback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["score", "--config=digits_mlp_contribution", *WORDS[1:]])
    assert "score: expected one `XGBPruning` in `trainer.callbacks`, got 0" in capsys.readouterr().err


RUN = """
model: {model}
data:
  class_path: Digits
  init_args: {{batch_size: 64, val_share: 0.2}}
trainer:
  max_epochs: 2
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {{filename: last}}
    - class_path: XGBPruning
      init_args:
        pruning_ratio: 0.5
        samples: 300
        schedule: {{class_path: OneShot, init_args: {{at: 1}}}}
        surrogate: {surrogate}
"""

CNN = (
    "{class_path: CNNClassifier, init_args: "
    "{input_shape: [1, 8, 8], channels: [8, 12], hidden: [24, 16], optimizer: adam}}"
)


@pytest.mark.parametrize(
    ("model", "surrogate", "metric"),
    [
        ("my_module.Regressor", "{class_path: XGBoost, init_args: {task: regression, rounds: 20}}", "r2"),
        (
            CNN,
            "{class_path: SklearnEstimator, init_args: {estimator: sklearn.ensemble.ExtraTreesClassifier, "
            "params: {n_estimators: 20}}}",
            "accuracy",
        ),
        (
            "my_module.Regressor",
            "{class_path: SklearnEstimator, init_args: {estimator: sklearn.linear_model.Ridge, task: regression}}",
            "r2",
        ),
        # The tables of 210 samples and 8 to 24 channels are at least 6 KiB: XGBoost reads them part by part.
        (CNN, "{class_path: XGBoost, init_args: {rounds: 10, memory_limit: 5000}}", "accuracy"),
        (CNN, "{class_path: NeuralProbe, init_args: {epochs: 5}}", "accuracy"),
    ],
    ids=["regression", "scikit-learn", "regression by scikit-learn", "external memory", "probe"],
)
def test_surrogates_by_configuration(
    model: str, surrogate: str, metric: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit on digits from a file: half of every layer goes, and what is found tells more than chance."""
    (in_tmp / "my_module.py").write_text(REGRESSOR)
    monkeypatch.syspath_prepend(str(in_tmp))
    (in_tmp / "run.yaml").write_text(RUN.format(model=model, surrogate=surrogate))
    main(["fit", "--config=run.yaml"])
    run = Path("runs/run/001")
    report = lightning_prune.reporting.Report.from_plain(json.loads((run / "report.json").read_text()))
    assert report.config["metric"] == metric
    assert all(row.kept == row.channels // 2 for row in report.scored)
    assert len(report.scored) >= 2
    assert max(row.score for row in report.scored) > 0.3
    assert report.size is not None
    assert report.dense is not None
    assert report.size.params < 0.6 * report.dense.params
