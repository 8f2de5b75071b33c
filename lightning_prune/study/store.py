"""Cells on disk: finished runs are moved into place atomically, and their folders are the whole state of a study."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock

from lightning_prune.reporting import require
from lightning_prune.study.configurations import FORMAT, Cell

__all__ = ["ARCHITECTURE", "WEIGHTS", "DamagedWarning", "Result", "Store", "checkpoints"]

#: Files that a cell leaves for others.
ARCHITECTURE, WEIGHTS = "architecture.pt", "weights.ckpt"

_RESULT, _CONFIG, _ERROR, _STUDY = "result.json", "config.yaml", "error.txt", "study.json"


class DamagedWarning(UserWarning):
    """Warning that a cell's files are damaged and it is run again."""


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        metrics: What was logged, as it last stood.
        curve: The same after every epoch, in order.
        params: Parameters of the network at the end.
        macs: Its MACs for one sample (1 MAC = 2 FLOPs).
        seconds: Time spent training, what was lost to kills left out.
        diverged: Whether the loss or a weight was not finite; the metrics are those it reached nevertheless.
        sizes: Parameters of the network after every epoch.
        spent: MACs of the training up to then, see `TrainingMacs`; empty if they were not counted.
        batches: Training batches, if MACs were counted.
    """

    metrics: dict[str, float]
    curve: list[dict[str, float]]
    params: int
    macs: int
    seconds: float
    diverged: bool = False
    sizes: list[int] = field(default_factory=list)
    spent: list[int] = field(default_factory=list)
    batches: int = 0


class Store:
    """The cells of a study on disk.

    ``cells/<key>`` are finished, ``running/<key>`` are being trained or were killed, ``failed/<key>`` ended in an
    error, ``damaged/<key>.<n>`` were set aside. A folder gets into ``cells`` by one rename.

    Args:
        folder: The study's folder; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read_before: dict[str, Result] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Claim the folder for a study.

        Args:
            identity: What no other study has, in plain data.

        Raises:
            ValueError: If it is another study's.
        """
        file = self.folder / _STUDY
        text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
        if not file.exists():
            new = file.with_suffix(f".{os.getpid()}")
            new.write_text(text, encoding="utf-8")
            new.replace(file)
        elif file.read_text(encoding="utf-8") != text:
            before = _identity(file)
            parts = ", ".join(key for key in identity if identity[key] != before.get(key))
            raise ValueError(
                f"expected a folder of its own for this study, got {self.folder}, where another one is, with another "
                f"{parts}. Give another `--folder`; more variants, seeds and points can be added to a study, but its "
                "recipe, prior, steps and metric stay."
            )

    def finished(self, cell: Cell) -> Path:
        """Folder of a finished cell."""
        return self.folder / "cells" / cell.key

    def running(self, cell: Cell) -> Path:
        """Folder in which a cell is trained."""
        return self.folder / "running" / cell.key

    def failed(self, cell: Cell) -> Path:
        """Folder of a failed cell."""
        return self.folder / "failed" / cell.key

    @contextmanager
    def lock(self, cell: Cell) -> Iterator[None]:
        """Lock a cell for this process; the operating system releases the lock if the process dies."""
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        with FileLock(locks / cell.key):
            yield

    def result(self, cell: Cell) -> Result | None:
        """Result of a finished cell, or ``None``. Damaged files are moved aside with a warning."""
        key, place = cell.key, self.finished(cell)
        if key in self._read_before or not place.is_dir():
            return self._read_before.get(key)
        try:
            self._read_before[key] = self._read(cell, place)
            return self._read_before[key]
        except (OSError, ValueError, KeyError, TypeError) as error:
            with self.lock(cell):
                if not place.is_dir():  # another process has seen it first
                    return None
                aside = _free(self.folder / "damaged" / cell.key)
                place.rename(aside)
            warnings.warn(
                f"the files of {cell.label} ({place}) are damaged ({error}): set aside as {aside}, the run is repeated",
                DamagedWarning,
                stacklevel=2,
            )
            return None

    def _read(self, cell: Cell, place: Path) -> Result:
        found = json.loads((place / _RESULT).read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["key"] != cell.key:
            raise ValueError(f"it is the result of {found['key']} in format {found['format']}")
        result = Result(**found["result"])
        require(result, Result, "the result")
        if cell.keep is not None and not zipfile.is_zipfile(place / _kept(cell)):
            raise ValueError(f"{_kept(cell)} is missing or torn")
        return result

    def failure(self, cell: Cell) -> str | None:
        """Error of a failed cell, or ``None``."""
        file = self.failed(cell) / _ERROR
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def begin(self, cell: Cell) -> Path:
        """Create or find the folder to train in, with the configuration in it."""
        place = self.running(cell)
        place.mkdir(parents=True, exist_ok=True)
        files = {need.key: str((self.finished(need) / _kept(need)).absolute()) for need in cell.needs}
        text = yaml.safe_dump(cell.with_files(files), sort_keys=False)
        (place / _CONFIG).write_text(f"# {cell.label}\n{text}", encoding="utf-8")
        return place

    def finish(self, cell: Cell, result: Result, facts: Mapping[str, Any]) -> None:
        """Write the result, delete what was only needed to resume, and move the folder to the finished ones."""
        place = self.running(cell)
        found = {
            "format": FORMAT,
            "key": cell.key,
            "label": cell.label,
            "result": asdict(result),
            **facts,
            "config": cell.config,
        }
        if cell.keep == "weights":
            max(checkpoints(place), key=_steps).rename(place / WEIGHTS)
        for folder in place.glob("fit/*/checkpoints"):
            shutil.rmtree(folder)
        with (place / _RESULT).open("w", encoding="utf-8") as file:
            file.write(json.dumps(found, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        target = self.finished(cell)
        target.parent.mkdir(exist_ok=True)
        if target.exists():  # its files were damaged before another process had looked
            target.rename(_free(self.folder / "damaged" / cell.key))
        place.rename(target)

    def fail(self, cell: Cell, error: str) -> None:
        """Move a cell to the failed ones with its error."""
        place = self.running(cell)
        place.mkdir(parents=True, exist_ok=True)
        (place / _ERROR).write_text(error, encoding="utf-8")
        target = self.failed(cell)
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        place.rename(target)

    def retry(self, cell: Cell) -> None:
        """Mark a failed cell to be run again from its last checkpoint."""
        place = self.failed(cell)
        (place / _ERROR).unlink()
        target = self.running(cell)
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        place.rename(target)


def checkpoints(place: Path) -> list[Path]:
    """Checkpoints that a run in ``place`` can resume from, oldest first; damaged ones are removed with a warning."""
    found = sorted(place.glob("fit/*/checkpoints/last*.ckpt"), key=lambda file: file.stat().st_mtime)
    whole = []
    for file in found:
        if _is_whole(file):
            whole.append(file)
        else:
            warnings.warn(f"the checkpoint {file} is damaged: the run goes on without it", DamagedWarning, stacklevel=2)
            file.unlink()
    return whole


def _is_whole(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def _steps(checkpoint: Path) -> int:
    """Number of training steps of a checkpoint; file times are unreliable across machines."""
    found = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return int(found["global_step"])


def _identity(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"expected the identity of a study in {file}, got a damaged file. Remove it if the folder is this study's; "
            "finished runs stay."
        )
    return found


def _kept(cell: Cell) -> str:
    return WEIGHTS if cell.keep == "weights" else ARCHITECTURE


def _free(path: Path) -> Path:
    """Return the first of ``path.1``, ``path.2``, ... that does not exist, and create its parent folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = (path.with_name(f"{path.name}.{number}") for number in count(1))
    return next(name for name in names if not name.exists())
