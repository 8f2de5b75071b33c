"""Launchers: every job once, a worker that dies, workers that do not outlive their launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_prune.study.launchers import Launcher, Local, Ray, Slurm
from tests.study.jobs import Note


def test_every_job_is_run_once(tmp_path: Path) -> None:
    jobs = [Note(tmp_path / str(number)) for number in range(4)]
    assert sorted(Local(2).run(jobs)) == [(index, None) for index in range(4)]
    processes = [job.file.read_text().split() for job in jobs]
    assert all(len(each) == 1 for each in processes)
    assert str(os.getpid()) not in {process for each in processes for process in each}


def test_workers_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The reports of their runs would stand between the lines of progress."""
    list(Local(1).run([Note(tmp_path / "a")]))
    assert (tmp_path / "a").is_file()
    assert not capfd.readouterr().out


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    jobs = [Note(tmp_path / "a"), Note(tmp_path / "b", kills=2), Note(tmp_path / "c", kills=9), Note(tmp_path / "d")]
    ended = dict(Local(1, deaths=3).run(jobs))
    assert ended == {0: None, 1: None, 2: "its worker process died 3 times (killed, or out of memory)", 3: None}


def test_an_error_of_a_job_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(Local(1).run([Note(tmp_path / "absent" / "file")]))
    with pytest.raises(ValueError, match="at least one worker"):
        Local(0)


_LAUNCH = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from lightning_prune.study.launchers import Local
from tests.study.jobs import Sleep

if __name__ == "__main__":
    list(Local(1).run([Sleep(Path({file!r}))]))
"""


def test_workers_do_not_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    script, file = tmp_path / "launch.py", tmp_path / "worker"
    root = str(Path(__file__).parents[2])
    script.write_text(_LAUNCH.format(root=root, file=str(file)))
    launcher = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": root})
    try:
        wait_until(lambda: file.is_file() and bool(file.read_text()), 120)
    finally:
        launcher.kill()
        launcher.wait()
    worker = int(file.read_text())
    wait_until(lambda: not is_alive(worker), 20)
    assert not is_alive(worker)


def wait_until(condition: object, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.1)


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not collected does not."""
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ray", "slurm"])
def test_the_other_launchers(kind: str, tmp_path: Path) -> None:
    launcher: Launcher = Ray() if kind == "ray" else Slurm(tmp_path / "logs", cluster="local", every=0.2)
    jobs = [Note(tmp_path / str(number)) for number in range(3)]
    assert sorted(launcher.run(jobs)) == [(index, None) for index in range(3)]
    assert all(len(job.file.read_text().split()) == 1 for job in jobs)
