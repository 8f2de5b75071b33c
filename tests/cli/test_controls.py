"""``lightning-prune controls``: what it refuses, and the report of what is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_prune.cli import controls, main
from lightning_prune.study.controls import Checked, ControlRun
from lightning_prune.study.store import Result

RECIPE = ["--config", "digits_mlp_contribution"]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(["controls", *words])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_one_seed_is_refused(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--seeds: expected at least 2, for an interval, got 1" in refused([*RECIPE, "--seeds", "1"], capsys)
    assert not list(in_tmp.iterdir())


def test_mistakes_in_the_arguments_of_fit_are_told(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model.lrr" in refused([*RECIPE, "--model.lrr=1"], capsys)
    assert "expected a pruning callback" in refused(["--model=MLPClassifier", "--data=Digits"], capsys)
    assert not list(in_tmp.iterdir())


def test_the_report_is_written_where_the_runs_are(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def run_controls(*arguments: Any) -> tuple[Checked, list[Any]]:
        given.extend(arguments)
        return Checked("val_acc", "max", 1), []

    def finished(*_: Any) -> list[ControlRun]:
        result = Result({}, [{"val_acc": 0.5}], 10, 20, 1.0, False, [10], [100], 1)
        return [ControlRun(name, seed, result) for name in given[0].names[:2] for seed in given[0].seeds]

    monkeypatch.setattr(controls, "run_controls", run_controls)
    monkeypatch.setattr(controls, "finished", finished)
    main(["controls", *RECIPE, "--seeds=2", "--model.lr=0.2"])
    report = in_tmp / "runs" / "digits_mlp_contribution-controls" / "report"
    files = sorted(file.name for file in report.iterdir())
    assert files == ["controls.html", "controls.json", "controls.md", "controls.png"]
    assert "no difference is shown (+0.00 ± 0.00 points" in (report / "controls.md").read_text()
    assert str(Path("runs") / "digits_mlp_contribution-controls" / "report" / "controls.md") in capsys.readouterr().out
    assert given[0].recipe["model"]["init_args"]["lr"] == 0.2
    assert (given[0].seeds, given[0].start) == ((0, 1), "random")
