"""One folder per run: created once, found by its checkpoints, never overwritten."""

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

#: The file that marks a folder as a run: the complete configuration of its last start.
CONFIG = "config.yaml"
#: Holds the id of the run's W&B run, so that a resume continues its curves.
WANDB = "wandb.id"

# Contents of a run's folder before any training.
_BEGUN = {CONFIG, WANDB, "wandb", "hparams.yaml"}


def new(parent: Path) -> Path:
    """Create the next free folder ``parent/001``, ``parent/002``, ...

    Concurrent processes get different folders.
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
    """The folder with the highest number in ``parent``, or ``None``."""
    numbers = _numbers(parent)
    return parent / f"{max(numbers):03d}" if numbers else None


def last_checkpoint(parent: Path) -> Path | None:
    """The newest ``last.ckpt`` of any run in ``parent``, or ``None``."""
    return newest(parent.glob("*/checkpoints/last*.ckpt"))


def newest(files: Iterable[Path]) -> Path | None:
    """The file that was written last, or ``None`` if there is no file."""
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def of_checkpoint(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to, or ``None``.

    Checkpoints are in the run's folder or in a direct sub-folder.
    """
    return next((folder for folder in checkpoint.parents[:2] if (folder / CONFIG).is_file()), None)


def set_aside(file: Path) -> None:
    """Rename ``name.ext``, if it exists, to the first free of ``name.1.ext``, ``name.2.ext``, ..."""
    if file.exists():
        names = (file.with_name(f"{file.stem}.{number}{file.suffix}") for number in count(1))
        file.rename(next(name for name in names if not name.exists()))


def discard_empty(folder: Path) -> None:
    """Remove the folder of a run if it contains nothing but the configuration."""
    if {file.name for file in folder.iterdir()} <= _BEGUN:
        shutil.rmtree(folder)
        with suppress(OSError):  # it contains other runs
            folder.parent.rmdir()


def _numbers(parent: Path) -> list[int]:
    return [int(folder.name) for folder in parent.glob("*") if folder.name.isdecimal()]
