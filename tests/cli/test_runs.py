"""Folders of runs: made once, found again, never written over."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lightning_prune.cli import runs


def make_run(parent: Path) -> Path:
    run = runs.new(parent)
    (run / runs.CONFIG).touch()
    return run


def test_new_counts_up_past_what_is_there(tmp_path: Path) -> None:
    assert runs.new(tmp_path / "mine").name == "001"
    assert runs.new(tmp_path / "mine").name == "002"
    (tmp_path / "mine" / "041").mkdir()
    (tmp_path / "mine" / "notes").mkdir()
    assert runs.new(tmp_path / "mine").name == "042"
    assert runs.new(tmp_path / "other").name == "001"


def test_new_gives_everybody_a_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: runs.new(tmp_path), range(40)))
    assert len(set(folders)) == 40


def test_latest_is_the_highest_number(tmp_path: Path) -> None:
    assert runs.latest(tmp_path / "nothing") is None
    for name in ("9", "010", "notes"):
        (tmp_path / name).mkdir()
    assert runs.latest(tmp_path) == tmp_path / "010"


def test_of_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert runs.of_checkpoint(run / "checkpoints" / "last.ckpt") == run
    assert runs.of_checkpoint(run / "last.ckpt") == run
    assert runs.of_checkpoint(run / "some" / "deep" / "last.ckpt") is None
    assert runs.of_checkpoint(tmp_path / "last.ckpt") is None


def test_last_checkpoint_is_the_newest(tmp_path: Path) -> None:
    assert runs.last_checkpoint(tmp_path) is None
    first, second = make_run(tmp_path), make_run(tmp_path)
    for run, seconds in ((first, 200), (second, 100)):
        file = run / "checkpoints" / "last.ckpt"
        file.parent.mkdir()
        file.touch()
        os.utime(file, (seconds, seconds))
    (second / "checkpoints" / "epoch=3.ckpt").touch()
    assert runs.last_checkpoint(tmp_path) == first / "checkpoints" / "last.ckpt"


def test_set_aside_keeps_everything(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    runs.set_aside(file)
    for content in "abc":
        file.write_text(content)
        runs.set_aside(file)
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {
        "config.1.yaml": "a",
        "config.2.yaml": "b",
        "config.3.yaml": "c",
    }
