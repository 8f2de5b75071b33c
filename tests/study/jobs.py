"""Jobs for launchers; importing them takes no time, because every new worker does."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Note:
    """A job that adds a line to a file, and kills its worker before as often as asked."""

    file: Path
    kills: int = 0

    def __call__(self) -> None:
        with self.file.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        print(os.getpid())
        if len(self.file.read_text().split()) <= self.kills:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Sleep:
    """A job that says who runs it, and takes long."""

    file: Path

    def __call__(self) -> None:
        self.file.write_text(str(os.getpid()))
        time.sleep(120)
