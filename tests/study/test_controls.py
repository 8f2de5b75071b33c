"""Controls of pruning runs: which runs there are, how long they are, what is refused, what the report says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.cli.verbs import run as train
from lightning_prune.models import MLPClassifier
from lightning_prune.structure import Size
from lightning_prune.study import controls_runner
from lightning_prune.study.controls import Checked, ControlRun, Controls, _ratios, define
from lightning_prune.study.controls_report import controls_page, controls_to_plain
from lightning_prune.study.controls_runner import check, finished, run_controls
from lightning_prune.study.launchers import Job, Launcher
from lightning_prune.study.progress import Progress
from lightning_prune.study.store import Result
from lightning_prune.surgery import Drop, History, Keep
from tests.study.surfaces import Inline, silent

QUIET = Progress(silent)

PRUNING = {
    "class_path": "lightning_prune.StructuredPruning",
    "init_args": {"pruning_ratio": 0.5, "schedule": {"class_path": "OneShot", "init_args": {"at": 1, "unit": "epoch"}}},
}
RECIPE: dict[str, Any] = {
    "model": {"class_path": "lightning_prune.models.MLPClassifier", "init_args": {"sizes": [64, 12, 10]}},
    "data": {
        "class_path": "lightning_prune.data.Digits",
        "init_args": {"batch_size": 32, "train_limit": 96, "seed": 0, "split_seed": 0},
    },
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 2}},
    "trainer": {"max_epochs": 2, "callbacks": [PRUNING]},
}


def recipe(**changes: Any) -> dict[str, Any]:
    """The recipe with other entries; a mapping is merged into its own."""
    found = deepcopy(RECIPE)
    for name, change in changes.items():
        found[name] = {**found.get(name, {}), **change} if isinstance(change, dict) else change
    return found


class Stopping(Launcher):
    """Runs some jobs, then is interrupted."""

    def __init__(self, jobs: int) -> None:
        self.left = jobs

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str | None]]:
        for index, job in enumerate(jobs):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            job()
            yield index, None


def by_name(controls: Controls, checked: Checked, folder: Path) -> dict[str, list[ControlRun]]:
    found: dict[str, list[ControlRun]] = {}
    for run in finished(controls, checked, folder):
        found.setdefault(run.name, []).append(run)
    return found


def config_of(run: ControlRun, folder: Path) -> dict[str, Any]:
    for file in folder.glob("cells/*/result.json"):
        stored = json.loads(file.read_text())
        if stored["label"] == f"{run.name}, seed {run.seed}":
            return dict(stored["config"])
    raise AssertionError(run.name)


def test_from_random_weights_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    controls = define(RECIPE, [0, 1])
    checked = check(controls, train)
    assert checked == Checked("val_acc", "max", 32 * (2 * 64 * 12 + 3 * 12 * 10))
    monkeypatch.setattr(controls_runner, "check", lambda *_: checked)
    with pytest.raises(KeyboardInterrupt):
        run_controls(controls, tmp_path, train, Stopping(3), QUIET)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("cells/*/result.json")}
    assert len(before) == 3
    _, failed = run_controls(controls, tmp_path, train, Inline(), QUIET)
    assert not failed
    assert all(file.stat().st_mtime_ns == time for file, time in before.items()), "nothing is run twice"
    found = by_name(controls, checked, tmp_path)
    assert {name: [run.seed for run in runs] for name, runs in found.items()} == {
        name: [0, 1] for name in controls.names
    }
    pruned, dense, narrow, longer = (found[name][0] for name in controls.names)
    macs = 64 * 12 + 12 * 10
    step = 2 * 64 * 12 + 3 * 12 * 10  # inputs need no gradient
    assert (pruned.result.params, narrow.result.params) == (64 * 6 + 6 + 6 * 10 + 10,) * 2
    assert dense.result.macs == macs
    assert dense.macs == 2 * 96 * step
    assert narrow.macs == 2 * 96 * step // 2
    assert pruned.macs >= 96 * step + 96 * step // 2
    # The whole run of the pruned one, and no more than a batch more or less of each epoch.
    assert longer.macs == pytest.approx(pruned.macs, rel=0.2)
    assert len(longer.result.curve) == 3  # an epoch of the dense network, and one of the narrow one
    config = config_of(longer, tmp_path)
    assert config["lr_scheduler"]["init_args"]["T_max"] == config["trainer"]["max_epochs"] == 3
    assert config["data"]["init_args"]["seed"] == 0
    assert config_of(found[controls.names[0]][1], tmp_path)["data"]["init_args"]["seed"] == 1
    run_controls(controls, tmp_path, train, Stopping(0), QUIET)  # nothing is left to do
    with pytest.raises(ValueError, match="expected a folder of its own"):
        run_controls(define(recipe(trainer={"max_epochs": 3}), [0, 1]), tmp_path, train, Stopping(0), QUIET)


def test_from_pretrained_weights_l1_has_the_widths_of_each_seed(tmp_path: Path) -> None:
    torch.save(MLPClassifier((64, 12, 10)).state_dict(), tmp_path / "weights.pt")
    model = {
        "class_path": "lightning_prune.models.MLPClassifier",
        "init_args": {"sizes": [64, 12, 10], "pretrained": str(tmp_path / "weights.pt")},
    }
    extension = {"class_path": "lightning_prune.Distill"}
    pruning = {**PRUNING, "init_args": {**PRUNING["init_args"], "extensions": [extension]}}  # type: ignore[dict-item]
    controls = define(recipe(model=model, trainer={"callbacks": [pruning]}), [0, 1])
    assert controls.start == "pretrained"
    controls = replace(controls, seeds=(0,))
    folder = tmp_path / "controls"
    checked, failed = run_controls(controls, folder, train, Inline(), QUIET)
    assert not failed
    found = by_name(controls, checked, folder)
    pruned, dense, equal, longer = (found[name][0] for name in controls.names)
    assert dense.result.params == 64 * 12 + 12 + 12 * 10 + 10
    assert pruned.result.params == equal.result.params == longer.result.params
    assert equal.macs < longer.macs
    for run in (dense, longer):
        assert run.macs == pytest.approx(pruned.macs, rel=0.25)


@pytest.mark.filterwarnings("ignore:cut 0:lightning_prune.planning.target.NoEffectWarning")
def test_a_run_that_never_cuts_fails_after_a_batch(tmp_path: Path) -> None:
    at_once = {"class_path": "OneShot", "init_args": {"at": 0, "unit": "step"}}
    pruning = {**PRUNING, "init_args": {"pruning_ratio": 0.01, "schedule": at_once}}
    controls = define(recipe(trainer={"callbacks": [pruning]}), [0, 1])
    _, failed = run_controls(controls, tmp_path, train, Inline(), QUIET)
    assert len(failed) == 2, "and no control is run"
    assert "without any cut in its 2 epochs" in failed[0].error


def test_what_other_files_are_in_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="which holds other files"):
        run_controls(define(RECIPE, [0, 1]), tmp_path, train, Inline(), QUIET)


def test_a_metric_that_is_not_logged_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation to log 'val_f1', got .*val_acc, val_loss"):
        check(define(RECIPE, [0, 1], metric="val_f1"), train)


def test_a_schedule_that_does_not_end_with_the_run_is_refused_before_training() -> None:
    controls = define(recipe(lr_scheduler="torch.optim.lr_scheduler.LambdaLR"), [0, 1])
    with pytest.raises(ValueError, match="expected an `lr_scheduler` that can be stretched"):
        check(controls, train)


def test_a_module_with_a_schedule_of_fixed_length_needs_its_key() -> None:
    model = {"class_path": "tests.study.modules.FixedSchedule", "init_args": {"length": 2}}
    given = {key: value for key, value in recipe(model=model).items() if key not in ("optimizer", "lr_scheduler")}
    with pytest.raises(ValueError, match=r"scheduler 1, CosineAnnealingLR, whose rate after .* --stretch"):
        check(define(given, [0, 1]), train)
    assert check(define(given, [0, 1], stretch=["model.length"]), train).mode == "max"


@pytest.mark.parametrize(
    ("change", "seeds", "message"),
    [
        ({}, [0], "at least two different seeds"),
        ({}, [0, 0], "at least two different seeds"),
        ({"trainer": {"callbacks": []}}, [0, 1], "expected a pruning callback"),
        (
            {"trainer": {"callbacks": [{"class_path": "lightning_prune.MagnitudePruning"}]}},
            [0, 1],
            "MagnitudePruning, which masks weights",
        ),
        (
            {"trainer": {"callbacks": [PRUNING, {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]}},
            [0, 1],
            "`max_epochs` alone, got EarlyStopping",
        ),
        ({"trainer": {"max_steps": 100}}, [0, 1], "`max_epochs` alone, got max_steps"),
        ({"trainer": {"max_epochs": None}}, [0, 1], "expected `trainer.max_epochs`"),
        ({"ckpt_path": "last"}, [0, 1], "expected a run from its beginning"),
    ],
)
def test_what_has_no_controls_is_refused(change: dict[str, Any], seeds: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        define(recipe(**change), seeds)


# -- the report -------------------------------------------------------------------------------------------------------

CHECKED = Checked("val_acc", "max", 1)


def made(name: str, seed: int, *accuracies: float, sizes: Sequence[int] = ()) -> ControlRun:
    curve = [{"val_acc": accuracy} for accuracy in accuracies]
    sizes = list(sizes) or [50] * len(curve)
    spent = [1000 * (place + 1) for place in range(len(curve))]
    return ControlRun(name, seed, Result({}, curve, sizes[-1], 40, 1.0, False, sizes, spent, len(curve)))


def runs() -> list[ControlRun]:
    names = ("pruned", "dense, equal epochs", "narrow from scratch, equal epochs")
    return [
        made(names[0], 0, 0.95, 0.80, 0.84, sizes=[100, 50, 50]),
        made(names[0], 1, 0.95, 0.88, 0.86, sizes=[100, 50, 50]),
        made(names[1], 0, 0.80, 0.90, 0.90),
        made(names[1], 1, 0.80, 0.92, 0.92),
        made(names[2], 0, 0.60, 0.75, 0.79),
        made(names[2], 1, 0.60, 0.78, 0.81),
    ]


def test_differences_are_paired_with_student_intervals() -> None:
    found = controls_to_plain(runs(), CHECKED)["differences"]
    narrow = found["narrow from scratch, equal epochs"]
    assert narrow["last"]["mean"] == pytest.approx(0.05)
    assert narrow["last"]["half"] == pytest.approx(0, abs=1e-9)
    dense = found["dense, equal epochs"]
    assert dense["last"]["mean"] == pytest.approx(-0.06)
    # The best of the pruned network is that at its final size, not the dense one's before the cut.
    assert dense["best"]["mean"] == pytest.approx((0.84 - 0.90 + 0.88 - 0.92) / 2)
    assert dense["best"]["half"] == pytest.approx(12.706 * 0.01414214 / 2**0.5, rel=1e-4)
    assert dense["best"]["seeds"] == 2


def test_the_page_says_what_was_better_and_what_is_not_trained_out() -> None:
    text = controls_page(runs(), CHECKED, "Worth it?").markdown()
    assert "Against dense, equal epochs: pruning is worse (-6.00 ± 0.00 points in the last epoch, 2 seeds)." in text
    assert "Against narrow from scratch, equal epochs: pruning is better (+5.00 ± 0.00" in text
    (narrow,) = [line for line in text.splitlines() if line.startswith("| narrow from scratch, equal epochs | 2 | 50")]
    assert "80.00 ± 12.71" in narrow
    assert "not trained out" not in narrow, "3 and 4 points differ by more than they are"
    rising = [made("pruned", seed, 0.5, 0.6 + seed / 1000) for seed in (0, 1)]
    assert "60.05 ± 0.64, not trained out" in controls_page(rising, CHECKED, "Worth it?").markdown()


def test_lower_is_better_for_a_loss() -> None:
    def loss(run: ControlRun) -> ControlRun:
        curve = [{"val_loss": row["val_acc"]} for row in run.result.curve]
        return ControlRun(run.name, run.seed, Result({}, curve, 50, 40, 1.0, False, run.result.sizes, [1, 2, 3], 3))

    text = controls_page([loss(run) for run in runs()], Checked("val_loss", "min", 1), "Worth it?").markdown()
    assert "Against dense, equal epochs: pruning is better (-0.0600 ± 0.0000 in the last epoch" in text


def test_a_report_needs_the_pruned_run() -> None:
    with pytest.raises(ValueError, match="expected a finished run of the pruned network"):
        controls_page(runs()[2:], CHECKED, "Worth it?")


def test_removed_layers_are_removed_by_l1_too() -> None:
    history = History({}, Size(10, 10, {"a": 4, "b": 2, "c": 3}))
    keep, drop = Keep({}, {"a": (0, 1, 3)}, 0, 0, 0), Drop({}, ("b",), 0, 0, 0)
    narrow = Keep({}, {"a": (0,)}, 1, 1, 1)
    edited = History({}, history.size, (keep, drop, narrow))
    assert _ratios(edited) == {"a": 0.75, "b": 1.0}
