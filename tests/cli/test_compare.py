"""``lightning-prune compare`` on real small runs: dense ones, pruned ones with a ladder, and cells of a study."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.cli import main, verbs
from lightning_prune.cli.compare import compare, read_runs
from lightning_prune.reporting import Report
from tests.support.quick_reports import quick_reports

DENSE = """
model: {class_path: MLPClassifier, init_args: {sizes: [64, 12, 10], lr: 0.2}}
data: {class_path: Digits, init_args: {batch_size: 64, train_limit: 192, split_seed: 0}}
trainer: {max_epochs: 3, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""
PRUNED = """
trainer:
  callbacks:
    - class_path: StructuredPruning
      init_args:
        pruning_ratio: 0.5
        schedule: {class_path: LinearSchedule, init_args: {start: 1, end: 2, cuts: 2}}
        extensions: [{class_path: lightning_prune.SaveEachSize}]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``dense`` and ``pruned`` with the seeds 0 and 1."""
    home = tmp_path_factory.mktemp("compared")
    (home / "dense.yaml").write_text(DENSE)
    (home / "pruned.yaml").write_text(PRUNED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbs, "find_spec", lambda _: None)
        quick_reports(patch)
        for seed in (0, 1):
            words = ["fit", f"--config={home / 'dense.yaml'}", f"--trainer.default_root_dir={home / 'runs'}"]
            seeded = [f"--seed_everything={seed}", f"--data.seed={seed}"]
            main([*words, "--name=dense", *seeded])
            main([*words, f"--config={home / 'pruned.yaml'}", "--name=pruned", *seeded])
    return home / "runs"


def stored(run: Path) -> Report:
    return Report.from_plain(json.loads((run / "report.json").read_text()))


def test_dense_and_pruned_runs_side_by_side(trained: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", str(trained / "dense"), str(trained / "pruned")])
    assert "comparison/comparison.html" in capsys.readouterr().out
    page = (in_tmp / "comparison" / "comparison.html").read_text()
    assert page.count("<img ") == 1
    comparison = compare(read_runs([trained / "dense", trained / "pruned"]))
    assert comparison.settings == ["dense", "pruned"]
    assert comparison.metric == "val_acc"
    dense, *_ = comparison.networks
    assert (dense.params, dense.macs) == (64 * 12 + 12 + 12 * 10 + 10, 64 * 12 + 12 * 10)
    pruned = stored(trained / "pruned" / "001")
    assert pruned.dense is not None
    assert (dense.params, dense.macs) == (pruned.dense.params, pruned.dense.macs)
    final = next(each for each in comparison.networks if each.run == "pruned/001" and each.is_final)
    assert pruned.final is not None
    assert (final.params, final.latency) == (pruned.final.params, pruned.final.latency)
    assert final.metric == pruned.values("val_acc")[-1][1]
    assert final.seed == 0
    # Paired: seeds 0 and 1 of both.
    row = comparison.grids()[1].rows[0]
    ends = {each.run: each.metric for each in comparison.networks if each.is_final}
    difference = sum(ends[f"pruned/{n}"] - ends[f"dense/{n}"] for n in ("001", "002")) / 2
    assert row[:2] == ("pruned", "seeds 0, 1")
    assert float(row[4]) == pytest.approx(difference, rel=1e-3, abs=1e-6)


def test_a_ladder_has_a_point_for_each_size(trained: Path) -> None:
    report = stored(trained / "pruned" / "001")
    comparison = compare(read_runs([trained / "pruned"]))
    own = [each for each in comparison.networks if each.run == "pruned/001"]
    assert [each.params for each in own] == [saved.params for saved in report.size_checkpoints]
    assert [each.metric for each in own] == [saved.metric for saved in report.size_checkpoints]
    assert [each.is_final for each in own] == [False, False, True]
    losses = compare(read_runs([trained / "pruned"]), "val_loss")
    assert losses.mode == "min"
    assert len(losses.networks) == len(comparison.networks)


def test_cells_of_a_study(tmp_path: Path) -> None:
    def cell(name: str, seed: int, accuracy: float) -> Path:
        folder = tmp_path / "cells" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"seed_everything: {seed}\nmodel: {{init_args: {{lr: 0.1}}}}\n")
        result = {"params": 10, "macs": 20, "curve": [{"val_acc": 0.1}, {"val_acc": accuracy}], "metrics": {}}
        text = json.dumps({"label": f"unpruned, lr 0.1, seed {seed}", "result": result})
        (folder / "result.json").write_text(text)
        return folder

    places = [cell("a", 0, 0.5), cell("b", 1, 0.6)]
    comparison = compare(read_runs(places))
    assert comparison.settings == ["unpruned, lr 0.1"]
    assert [(each.metric, each.seed, each.macs) for each in comparison.networks] == [(0.5, 0, 20), (0.6, 1, 20)]
    assert compare(read_runs([tmp_path / "cells"])) == comparison
    assert compare(read_runs([tmp_path])) == comparison, "the study's folder"


def test_runs_of_one_name_are_called_by_what_differs(trained: Path, tmp_path: Path) -> None:
    for place, rate in ((1, 0.2), (2, 0.1), (3, 0.2)):
        run = tmp_path / "mine" / f"00{place}"
        shutil.copytree(trained / "pruned" / "001", run)
        text = (run / "config.yaml").read_text()
        assert "lr: 0.2" in text
        (run / "config.yaml").write_text(text.replace("lr: 0.2", f"lr: {rate}"))
    assert compare(read_runs([tmp_path / "mine"])).settings == ["lr=0.2", "lr=0.1"]
    both = compare(read_runs([tmp_path / "mine", trained / "dense"]))
    assert both.settings == ["mine lr=0.2", "mine lr=0.1", "dense"]


def _nothing(run: Path) -> list[str]:
    (run.parent / "empty").mkdir()
    return [str(run.parent / "empty"), str(run)]


def _torn(run: Path) -> list[str]:
    (run / "report.json").write_text((run / "report.json").read_text()[:100])
    return [str(run), str(run.parent / "002")]


def _newer(run: Path) -> list[str]:
    file = run / "report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    return [str(run), str(run.parent / "002")]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda run: [str(run)], "expected at least two runs, got"),
        (lambda run: [str(run), str(run / "report.json")], "expected every run once"),
        (lambda run: [str(run), str(run / "absent")], "which does not exist"),
        (_nothing, "which contains none"),
        (_torn, "cannot be read"),
        (_newer, "update this one"),
        (lambda run: [str(run.parent), "--metric=f1"], "logged 'f1'"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    wrong: Any, text: str, trained: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "pruned", in_tmp / "pruned")
    with pytest.raises(SystemExit) as end:
        main(["compare", *wrong(in_tmp / "pruned" / "001")])
    assert end.value.code == 2
    assert text in capsys.readouterr().err
    assert not (in_tmp / "comparison").exists()


def test_a_dense_run_in_python_has_no_size(tmp_path: Path) -> None:
    """Its folder is found where Lightning puts it, and what to do is said."""
    for version in (0, 1):
        folder = tmp_path / "lightning_logs" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("epoch,step,val_acc\n0,9,0.5\n")
    with pytest.raises(ValueError, match=r"version_0 cannot be read: .* without a pruning callback leaves no size"):
        read_runs([tmp_path])
