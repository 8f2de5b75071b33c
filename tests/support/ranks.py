"""Functions in processes of their own that train together, forked from one that has imported everything already.

Starting Lightning takes seconds, forking takes none: what needs many runs in fresh processes starts them here. Each
gets the environment that a launcher (torchrun, SLURM) would give it, so that Lightning starts none itself.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.quick_reports import quick_reports

__all__ = ["PROCESSES", "run", "start", "wait"]

#: Environment variable with the number of processes; Lightning removes its own at the end of a fit.
PROCESSES = "CREW_PROCESSES"

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lightning_prune.callbacks", "tests.support.quick_reports"])


def start(work: Callable[..., Any], *args: Any, processes: int = 1, elastic: bool = False) -> list[BaseProcess]:
    """Start ``work(*args)`` in one or several processes.

    Args:
        work: A function of a module.
        *args: Its arguments, plain data.
        processes: How many. One alone trains without a process group.
        elastic: As torchrun starts them, rather than as Lightning does.
    """
    with _free_port() as port:
        crew = [
            _FORKS.Process(target=_work, args=(work, args, _environment(rank, processes, port, elastic=elastic), rank))
            for rank in range(processes)
        ]
    for process in crew:
        process.start()
    return [*crew]


def wait(crew: list[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Exit codes of all, when the last has ended; who is left after another's failure, or in the end, is killed."""
    ends = time.monotonic() + seconds
    while any(process.exitcode is None for process in crew) and time.monotonic() < ends:
        if any(process.exitcode for process in crew):
            ends = min(ends, time.monotonic() + 20)  # its collectives fail by themselves, or never
        time.sleep(0.005)
    codes = [process.exitcode for process in crew]
    for process in crew:
        process.kill()
        process.join()
    return codes


def run(work: Callable[..., Any], *args: Any, processes: int = 1, elastic: bool = False, seconds: float = 120) -> Any:
    """What ``work(*args)`` returned in the first of ``processes``.

    Raises:
        RuntimeError: If any of them failed; with the texts of all.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        codes = wait(start(_keep, work, args, result, processes=processes, elastic=elastic), seconds)
        if any(codes) or not result.is_file():
            texts = [file.read_text(encoding="utf-8") for file in sorted(result.parent.glob("error*"))]
            raise RuntimeError(f"exit codes {codes}\n" + "\n".join(texts))
        return torch.load(result, weights_only=False)


def _keep(work: Callable[..., Any], args: tuple[Any, ...], result: Path) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        found = work(*args)
    except BaseException:
        (result.parent / f"error {rank}").write_text(f"process {rank}: {traceback.format_exc()}", encoding="utf-8")
        raise
    if rank == 0:
        torch.save(found, result)


def _work(work: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str], rank: int) -> None:
    os.environ.update(environment)
    # Nobody reads what the processes print; what matters is returned.
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    quick_reports(pytest.MonkeyPatch())  # the suite's fixture is not known here
    torch.manual_seed(rank)  # what must be the same everywhere has to be made so
    work(*args)


def _environment(rank: int, processes: int, port: int, *, elastic: bool) -> dict[str, str]:
    if processes == 1:
        return {}
    everyone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    everyone |= {"WORLD_SIZE": str(processes), PROCESSES: str(processes)}
    if not elastic:
        return everyone
    return everyone | {
        "RANK": str(rank),
        "GROUP_RANK": "0",
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCHELASTIC_RUN_ID": "none",
    }


@contextmanager
def _free_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener.getsockname()[1]
