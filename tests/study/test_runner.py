"""Studies run on known surfaces: what is run, what is repeated, how the grid grows, what survives damage."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_prune.study.configurations import cells, cut_of, prior, run
from lightning_prune.study.launchers import Job
from lightning_prune.study.progress import Progress
from lightning_prune.study.runner import extent_of, failures, retry_failed, rows, run_study
from lightning_prune.study.store import DamagedWarning, Store
from lightning_prune.study.transfer import export_study, import_study
from tests.study.surfaces import Inline, Surface, hill, silent, study

QUIET = Progress(silent)


def test_everything_is_run_once(tmp_path: Path) -> None:
    found, surface = study(variants=[{"remaining": 0.5}], seeds=[0, 1]), Surface(hill)
    assert run_study(found, tmp_path, surface, Inline(), QUIET) == []
    table = rows(found, tmp_path)
    # Nine points, two networks, two seeds; one of them is also what the cut starts from.
    assert (len(table), len(surface.calls)) == (36, 37)
    assert [row.variant for row in table] == ["unpruned"] * 18 + ["50% uniform"] * 18
    best = max(table, key=lambda row: row.top1)
    assert (best.values, best.seed, best.top1) == ((1e-3, 0.1), 0, pytest.approx(0.9))
    run_study(found, tmp_path, surface, Inline(), QUIET)
    assert len(surface.calls) == 37, "a second call finds nothing to do"
    assert rows(found, tmp_path) == table


def test_a_stopped_study_goes_on(tmp_path: Path) -> None:
    found, surface = study(), Surface(hill)

    def stops(lr: float, decay: float, pruned: bool, seed: int) -> float:
        if len(stopping.calls) == 5:
            raise KeyboardInterrupt
        return hill(lr, decay, pruned, seed)

    stopping = Surface(stops)
    with pytest.raises(KeyboardInterrupt):
        run_study(found, tmp_path, stopping, Inline(), QUIET)
    assert len(rows(found, tmp_path)) == 4
    run_study(found, tmp_path, surface, Inline(), QUIET)
    assert len(surface.calls) == 5
    run_study(found, tmp_path / "undisturbed", Surface(hill), Inline(), QUIET)
    assert rows(found, tmp_path) == rows(found, tmp_path / "undisturbed")


def slope(lr: float, decay: float, pruned: bool, seed: int) -> float:
    """Best at lr 10 (two steps above the prior), pruned at 100; indifferent to weight decay below 0.01."""
    return 0.9 - 0.05 * abs(lr - (2 if pruned else 1)) - 0.2 * max(0.0, decay + 2)


def test_the_grid_grows_one_side_at_a_time_up_to_the_cap(tmp_path: Path) -> None:
    found = study(variants=[{"remaining": 0.5}], most=6)
    run_study(found, tmp_path, Surface(slope), Inline(), QUIET)
    # Weight decay first, downwards until it has six values; then the learning rate, until 100 is not at the edge.
    assert extent_of(found, Store(tmp_path)) == ((-4, 1), (-1, 4))
    assert len(rows(found, tmp_path)) == 2 * 36


def test_a_finished_grid_grows_when_the_cap_is_raised(tmp_path: Path) -> None:
    surface = Surface(slope)
    run_study(study(), tmp_path, surface, Inline(), QUIET)
    assert len(surface.calls) == 9
    larger = study(most=4)
    run_study(larger, tmp_path, surface, Inline(), QUIET)
    assert extent_of(larger, Store(tmp_path)) == ((-2, 1), (-1, 2))
    assert len(surface.calls) == 16


def test_a_failure_is_recorded_and_retried(tmp_path: Path) -> None:
    def fails(lr: float, decay: float, pruned: bool, seed: int) -> float:
        if (lr, decay) == (0, -3):
            raise RuntimeError("no memory left")
        return hill(lr, decay, pruned, seed)

    found, broken = study(), Surface(fails)
    (failure,) = run_study(found, tmp_path, broken, Inline(), QUIET)
    assert failure.cell.label == "unpruned, weight_decay 0.001, lr 1, seed 0"
    assert "RuntimeError: no memory left" in failure.error
    assert len(rows(found, tmp_path)) == 8
    calls = len(broken.calls)
    run_study(found, tmp_path, broken, Inline(), QUIET)
    assert len(broken.calls) == calls, "a failure is not run again by itself"
    assert retry_failed(found, tmp_path) == 1
    assert run_study(found, tmp_path, Surface(hill), Inline(), QUIET) == []
    assert len(rows(found, tmp_path)) == 9


def test_without_its_preparation_a_variant_waits_and_the_others_are_run(tmp_path: Path) -> None:
    class Breaks(Surface):
        def __call__(self, words: Any, callbacks: Any) -> None:
            super().__call__(words, callbacks)
            if any("StructuredPruning" in str(callback) for callback in self.calls[-1]["trainer"]["callbacks"]):
                raise ValueError("nothing to prune")

    found = study(variants=[{"remaining": 0.5}])
    (failure,) = run_study(found, tmp_path, Breaks(hill), Inline(), QUIET)
    assert failure.cell.key == cut_of(found, found.variants[1]).key
    assert {row.variant for row in rows(found, tmp_path)} == {"unpruned"}


def test_a_metric_that_no_run_logged(tmp_path: Path) -> None:
    found = study(metric="accuracy")
    failed = run_study(found, tmp_path, Surface(hill), Inline(), QUIET)
    assert len(failed) == 9
    assert "expected the run to log 'accuracy', got val_acc" in failed[0].error


@pytest.mark.parametrize("damage", ["torn", "other", "missing", "weights"])
def test_damaged_cells_are_run_again_and_it_is_said(tmp_path: Path, damage: str) -> None:
    found, surface = study(variants=[{"remaining": 0.5}]), Surface(hill)
    run_study(found, tmp_path, surface, Inline(), QUIET)
    table, calls = rows(found, tmp_path), len(surface.calls)
    place = Store(tmp_path).finished(prior(found))
    file = place / ("weights.ckpt" if damage == "weights" else "result.json")
    if damage == "other":
        file.write_text(file.read_text().replace(place.name, "0" * 16))
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:40])
    with pytest.warns(DamagedWarning, match="unpruned, weight_decay 0.001, lr 0.1, seed 0 .* the run is repeated"):
        run_study(found, tmp_path, surface, Inline(), QUIET)
    assert len(surface.calls) == calls + 1
    assert rows(found, tmp_path) == table
    assert (tmp_path / "damaged" / f"{place.name}.1").is_dir()


def test_a_result_of_another_format_is_damaged(tmp_path: Path) -> None:
    found, surface = study(), Surface(hill)
    run_study(found, tmp_path, surface, Inline(), QUIET)
    file = Store(tmp_path).finished(prior(found)) / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 0}))
    with pytest.warns(DamagedWarning, match="in format 0"):
        assert Store(tmp_path).result(prior(found)) is None


def test_a_run_that_diverged_is_a_point(tmp_path: Path) -> None:
    class Diverges(Surface):
        def __call__(self, words: Any, callbacks: Any) -> None:
            super().__call__(words, callbacks)
            if self.calls[-1]["model"]["init_args"]["lr"] == 1.0:
                callbacks[0].diverged = True
                raise FloatingPointError("scores are NaN")

    found = study()
    assert run_study(found, tmp_path, Diverges(hill), Inline(), QUIET) == []
    table = rows(found, tmp_path)
    assert [row.diverged for row in table] == [row.values[1] == 1.0 for row in table]
    assert len(table) == 9


def test_a_damaged_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    found = study()
    cell = run(found, found.unpruned, (0, 0), 0)
    folder = Store(tmp_path).running(cell) / "fit" / "001" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"PK torn")
    with pytest.warns(DamagedWarning, match=r"last\.ckpt is damaged"):
        run_study(found, tmp_path, Surface(hill), Inline(), QUIET)
    assert len(rows(found, tmp_path)) == 9


def test_a_run_that_cannot_be_resumed_begins_again(tmp_path: Path) -> None:
    class Resumes(Surface):
        def __call__(self, words: Any, callbacks: Any) -> None:
            super().__call__(words, callbacks)
            if "--ckpt_path=last" in words or len(self.calls) == 1:
                raise RuntimeError("a checkpoint of another network")

    found, surface = study(), Resumes(hill)
    assert len(run_study(found, tmp_path, surface, Inline(), QUIET)) == 1
    retry_failed(found, tmp_path)
    with pytest.warns(DamagedWarning, match="cannot be resumed .a checkpoint of another network.: it is run again"):
        run_study(found, tmp_path, surface, Inline(), QUIET)
    assert failures(found, tmp_path) == []


def test_progress_says_what_is_done_what_is_best_and_what_is_left(tmp_path: Path) -> None:
    lines: list[str] = []
    clock = iter(range(0, 10_000, 60))
    found = study()
    run_study(found, tmp_path, Surface(hill), Inline(), Progress(lines.append, lambda: float(next(clock))))
    assert lines[0] == "9 of 9 runs to do"
    assert lines[1].startswith("1/9 · unpruned, weight_decay 0.001, lr 0.1, seed 0: 90.00 % · best 90.00 % (unpruned")
    assert lines[1].endswith("8 min left")
    assert lines[-1].startswith("9/9")
    assert lines[-1].endswith("0 s left")


def test_points_are_run_from_the_prior_outwards() -> None:
    order = [max(map(abs, point)) for _, point, _, _ in cells(study(points=5), ((-2, 2), (-2, 2)))]
    assert order == sorted(order)


def test_two_studies_in_one_folder_are_refused(tmp_path: Path) -> None:
    run_study(study(), tmp_path, Surface(hill), Inline(), QUIET)
    for other, part in ((study(set={"trainer.max_epochs": 9}), "recipe"), (study(metric="loss"), "metric")):
        with pytest.raises(ValueError, match=f"where another one is, with another {part}. Give"):
            run_study(other, tmp_path, Surface(hill), Inline(), QUIET)
    more = study(variants=[{"remaining": 0.5}], seeds=[0, 1], points=5)
    assert run_study(more, tmp_path, Surface(hill), Inline(), QUIET) == [], "a study may become larger"
    assert len(rows(more, tmp_path)) == 2 * 2 * 25


def test_a_study_goes_on_from_its_exported_files(tmp_path: Path) -> None:
    found = study(variants=[{"remaining": 0.5}], seeds=[0, 1])
    run_study(found, tmp_path / "first", Surface(hill), Inline(), QUIET)
    export_study(found, tmp_path / "first", tmp_path / "files")
    assert len(list((tmp_path / "files" / "architectures").iterdir())) == 1
    surface = Surface(hill)
    assert import_study(found, tmp_path / "files", tmp_path / "second") == 35
    run_study(found, tmp_path / "second", surface, Inline(), QUIET)
    assert len(surface.calls) == 1, "only the run whose weights others start from"
    assert rows(found, tmp_path / "second") == rows(found, tmp_path / "first")
    with pytest.raises(ValueError, match="got a run that it does not have: unpruned"):
        import_study(study(set={"trainer.max_epochs": 7}), tmp_path / "files", tmp_path / "third")


def test_weights_are_those_of_the_last_step_whatever_the_clocks_say(tmp_path: Path) -> None:
    class Two(Surface):
        def __call__(self, words: Any, callbacks: Any) -> None:
            super().__call__(words, callbacks)
            folder = Path(words[1].removeprefix("--config=")).parent / "fit" / "001" / "checkpoints"
            torch.save({"global_step": 9}, folder / "last-v1.ckpt")
            os.utime(folder / "last-v1.ckpt", (0, 0))

    found = study(variants=[{"remaining": 0.5}])
    run_study(found, tmp_path, Two(hill), Inline(), QUIET)
    kept = torch.load(Store(tmp_path).finished(prior(found)) / "weights.ckpt", weights_only=True)
    assert kept["global_step"] == 9


def test_a_full_disk_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result cannot be written: the study stops, no cell is finished by it, and another call goes on."""
    found, fsync = study(), os.fsync

    def full(_: int) -> None:
        if len(list((tmp_path / "cells").glob("*"))) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run_study(found, tmp_path, Surface(hill), Inline(), QUIET)
    assert len(rows(found, tmp_path)) == 3
    monkeypatch.setattr(os, "fsync", fsync)
    surface = Surface(hill)
    assert run_study(found, tmp_path, surface, Inline(), QUIET) == []
    assert (len(surface.calls), len(rows(found, tmp_path))) == (6, 9)


def test_two_processes_see_the_same_damage(tmp_path: Path) -> None:
    found = study()
    run_study(found, tmp_path, Surface(hill), Inline(), QUIET)
    cell = prior(found)
    one, other = Store(tmp_path), Store(tmp_path)
    (one.finished(cell) / "result.json").write_text("{")
    lock = other.lock

    def first(cell: Any) -> Any:
        """The other process comes to the lock after this one has put the cell aside."""
        with pytest.warns(DamagedWarning):
            assert one.result(cell) is None
        return lock(cell)

    other.lock = first  # type: ignore[method-assign]
    assert other.result(cell) is None
    assert len(list((tmp_path / "damaged").iterdir())) == 1


def test_a_damaged_identity_is_named(tmp_path: Path) -> None:
    run_study(study(), tmp_path, Surface(hill), Inline(), QUIET)
    (tmp_path / "study.json").write_text("")
    with pytest.raises(ValueError, match=r"study\.json, got a damaged file. Remove it"):
        run_study(study(), tmp_path, Surface(hill), Inline(), QUIET)
    (tmp_path / "study.json").unlink()
    surface = Surface(hill)
    run_study(study(), tmp_path, surface, Inline(), QUIET)
    assert not surface.calls


def test_two_launchers_at_once_share_the_cells(tmp_path: Path) -> None:
    """Both are given every cell; a lock and a look let one of them train it."""
    found, surface = study(variants=[{"remaining": 0.5}]), Surface(hill)

    class Second(Inline):
        def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str | None]]:
            with ThreadPoolExecutor(2) as pool:
                for index, job in enumerate(jobs):
                    list(pool.map(lambda each: each(), [job, job]))
                    yield index, None

    run_study(found, tmp_path, surface, Second(), QUIET)
    assert len(surface.calls) == 19
    assert len(rows(found, tmp_path)) == 18


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_is_asked_to_stop_goes_on_later(tmp_path: Path, resumed: bool) -> None:
    """SIGTERM, as SLURM sends it, is no failure, and what is done so far stays."""
    found, place = study(), Store(tmp_path).running(prior(study()))
    kept = place / "fit" / "001" / "checkpoints" / "last.ckpt"
    if resumed:
        kept.parent.mkdir(parents=True)
        torch.save({"global_step": 1}, kept)

    def stopped(*_: Any) -> None:
        raise SIGTERMException

    with pytest.raises(SIGTERMException):
        run_study(found, tmp_path, stopped, Inline(), QUIET)
    assert failures(found, tmp_path) == []
    assert place.is_dir()
    assert kept.is_file() == resumed
    assert run_study(found, tmp_path, Surface(hill), Inline(), QUIET) == []
