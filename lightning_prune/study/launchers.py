"""Launchers that run cells: processes on this machine, a Ray cluster, or SLURM."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, final

from typing_extensions import override

from lightning_prune.extras import require

__all__ = ["Job", "Launcher", "Local", "Ray", "Slurm"]

#: What is run: without arguments and result, picklable. Whatever becomes of it is in files.
Job = Callable[[], None]


class Launcher(ABC):
    """Base class of launchers."""

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str | None]]:
        """Run all jobs.

        Yields:
            Place of each job in ``jobs`` when it has ended, and what killed its worker, if anything did.
        """


@final
@dataclass(frozen=True)
class Local(Launcher):
    """Worker processes on this machine.

    A job whose worker dies (killed, out of memory) is run again.

    Args:
        workers: Processes; each one trains on one thread.
        deaths: Deaths of workers after which a job is given up.
    """

    workers: int = 1
    deaths: int = 3

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"expected at least one worker, got {self.workers}")

    @override
    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str | None]]:
        waiting, died = list(range(len(jobs))), dict.fromkeys(range(len(jobs)), 0)
        while waiting:
            lost: list[int] = []
            for index, alive in self._until_a_death(jobs, waiting):
                if alive:
                    yield index, None
                else:
                    died[index] += 1
                    lost.append(index)
            for index in [index for index in lost if died[index] >= self.deaths]:
                lost.remove(index)
                yield index, f"its worker process died {died[index]} times (killed, or out of memory)"
            waiting = [*lost, *waiting]

    def _until_a_death(self, jobs: Sequence[Job], waiting: list[int]) -> Iterator[tuple[int, bool]]:
        """Run pending jobs in a process pool, which stops at the first process that dies."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, mp_context=context, initializer=_begin_worker) as pool:
            running: dict[Future[None], int] = {}
            while waiting or running:
                try:
                    # Never more than are being run: those in flight are those that a death takes along.
                    while waiting and len(running) < self.workers:
                        running[pool.submit(jobs[waiting[0]])] = waiting[0]
                        waiting.pop(0)
                except BrokenProcessPool:
                    yield from ((index, False) for index in running.values())
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    error = future.exception()
                    if error is not None and not isinstance(error, BrokenProcessPool):
                        raise error
                    yield running.pop(future), error is None
                    if error is not None:
                        yield from ((index, False) for index in running.values())
                        return


@final
@dataclass(frozen=True)
class Ray(Launcher):
    """Ray Core tasks on this machine or a cluster (needs the extra ``study``).

    Every machine sees the study's folder and the data under the same paths.

    Args:
        address: Of a running cluster, ``"auto"`` for the one of this machine; by default Ray starts one here.
        cpus: Processor cores of a run.
        gpus: GPUs of a run, also a part of one.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float = 0

    @override
    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str | None]]:
        ray: Any = require("ray", extra="study")
        started = not ray.is_initialized()
        if started:
            ray.init(self.address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            remote = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=3)(_call)
            pending = {remote.remote(job): index for index, job in enumerate(jobs)}
            while pending:
                (ready,), _ = ray.wait(list(pending), num_returns=1)
                try:
                    ray.get(ready)
                    death = None
                except ray.exceptions.WorkerCrashedError as error:
                    death = f"its worker died more than three times ({error})"
                yield pending.pop(ready), death
        finally:
            if started:
                ray.shutdown()


@final
@dataclass(frozen=True)
class Slurm(Launcher):
    """SLURM jobs, one a run (needs the extra ``slurm``).

    Args:
        logs: Folder for scripts and output of the jobs.
        cluster: ``"slurm"``, or ``"local"`` for processes on this machine.
        parameters: Of ``submitit``'s executor: ``timeout_min``, ``slurm_partition``, ``gpus_per_node``, ...
        every: Seconds between two looks at what has ended.
    """

    logs: Path
    cluster: str = "slurm"
    parameters: tuple[tuple[str, Any], ...] = ()
    every: float = 5.0

    @override
    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str | None]]:
        submitit: Any = require("submitit", extra="slurm")
        executor = submitit.AutoExecutor(folder=self.logs, cluster=self.cluster)
        executor.update_parameters(**dict(self.parameters))
        # Without SLURM, submitit starts all at once: no more than there are cores.
        together = (os.cpu_count() or 1) if self.cluster == "local" else max(len(jobs), 1)
        for first in range(0, len(jobs), together):
            submitted = executor.map_array(_call, jobs[first : first + together])
            places = {id(job): index for index, job in enumerate(submitted, first)}
            for job in submitit.helpers.as_completed(submitted, poll_frequency=self.every):
                error = job.exception()
                yield places[id(job)], None if error is None else f"its job ended without a result ({error})"


def _call(job: Job) -> None:
    job()


def _begin_worker() -> None:
    """Use one thread per worker, print nothing, and end workers with the process that started them."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # reports of runs would stand between the lines of progress
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:  # with the program's main module; otherwise the first job imports it
        sys.modules["torch"].set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)
