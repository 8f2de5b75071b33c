"""One folder per run: made once, found again by its checkpoints, never written over."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path

__all__ = [
    "CONFIG",
    "WANDB",
    "discard_empty",
    "last_checkpoint",
    "latest",
    "new",
    "newest",
    "of_checkpoint",
    "set_aside",
]

#: The file that makes a folder a run: the whole configuration of its last start.
CONFIG = "config.yaml"
#: Holds the id of the run's W&B run, so that a resume continues its curves.
WANDB = "wandb.id"

# What is in a run's folder before anything was trained.
_BEGUN = {CONFIG, WANDB, "wandb", "hparams.yaml"}


def new(parent: Path) -> Path:
    """Make the next free folder ``parent/001``, ``parent/002``, ...

    Two processes that ask at the same time get two folders.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for number in count(1 + max(_numbers(parent), default=0)):
        folder = parent / f"{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("numbers do not end")


def latest(parent: Path) -> Path | None:
    """The folder with the highest number under ``parent``; ``None`` if there is none."""
    numbers = _numbers(parent)
    return parent / f"{max(numbers):03d}" if numbers else None


def last_checkpoint(parent: Path) -> Path | None:
    """The newest ``last.ckpt`` of any run under ``parent``; ``None`` if there is none."""
    return newest(parent.glob("*/checkpoints/last*.ckpt"))


def newest(files: Iterable[Path]) -> Path | None:
    """The file that was written last; ``None`` if there is none."""
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def of_checkpoint(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to; ``None`` if it lies in no run's folder.

    Checkpoints lie in the run's folder or in a folder of it.
    """
    return next((folder for folder in checkpoint.parents[:2] if (folder / CONFIG).is_file()), None)


def set_aside(file: Path) -> None:
    """Rename ``name.ext`` to the first free of ``name.1.ext``, ``name.2.ext``, ..., if it exists."""
    if file.exists():
        names = (file.with_name(f"{file.stem}.{number}{file.suffix}") for number in count(1))
        file.rename(next(name for name in names if not name.exists()))


def discard_empty(folder: Path) -> None:
    """Remove the folder of a run that has left nothing but its configuration."""
    if {file.name for file in folder.iterdir()} <= _BEGUN:
        shutil.rmtree(folder)
        with suppress(OSError):  # other runs are there
            folder.parent.rmdir()


def _numbers(parent: Path) -> list[int]:
    return [int(folder.name) for folder in parent.glob("*") if folder.name.isdecimal()]
