"""The results of a study as a tidy table with one row per run."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_prune.study.axes import Axis, Point
from lightning_prune.study.configurations import FORMAT

__all__ = ["Row", "read_table", "write_table"]

_BEFORE = ("variant", "pipeline", "remaining")
_AFTER = ("seed", "top1", "top5", "params", "macs", "seconds", "diverged", "key", "format")


@dataclass(frozen=True)
class Row:
    """One finished run.

    Attributes:
        variant: Name of the variant.
        pipeline: How it is pruned and trained.
        remaining: Share of the FLOPs that was asked for; ``None`` if the network is unpruned.
        values: Of the two hyperparameters, in the order of the axes.
        seed: Its seed.
        top1: The metric, a share.
        top5: The same of the best five; ``None`` if it was not logged.
        params: Parameters.
        macs: MACs for one sample (1 MAC = 2 FLOPs).
        seconds: Time spent training.
        diverged: Whether the run diverged.
        key: Name of its folder.
    """

    variant: str
    pipeline: str
    remaining: float | None
    values: tuple[float, ...]
    seed: int
    top1: float
    top5: float | None
    params: int
    macs: int
    seconds: float
    diverged: bool
    key: str

    def point(self, axes: Sequence[Axis]) -> Point:
        """Position in the grid, in steps from the prior."""
        steps = (
            round((axis.position(value) - axis.position(axis.prior)) / axis.step)
            for axis, value in zip(axes, self.values, strict=True)
        )
        return tuple(steps)


def write_table(rows: Iterable[Row], axes: Sequence[Axis], file: Path) -> None:
    """Write a table as CSV, in the order of ``rows``; an empty field is a missing value.

    The file appears whole, or stays as it was.
    """
    new = file.with_suffix(f".{os.getpid()}")
    with new.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*_BEFORE, *(axis.key for axis in axes), *_AFTER])
        for row in rows:
            before = [getattr(row, name) for name in _BEFORE]
            after = [getattr(row, name) for name in _AFTER[:-1]]
            writer.writerow(["" if cell is None else cell for cell in (*before, *row.values, *after, FORMAT)])
    new.replace(file)


def read_table(file: Path, axes: Sequence[Axis]) -> list[Row]:
    """Read a table written by :func:`write_table`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another table, or one of another version.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"expected a study's table, got {file}, which does not exist. `lightning-prune study export` writes one."
        )
    with file.open(encoding="utf-8", newline="") as stream:
        return list(_rows(csv.DictReader(stream), axes, file))


def _rows(lines: csv.DictReader[str], axes: Sequence[Axis], file: Path) -> Iterator[Row]:
    keys = [axis.key for axis in axes]
    expected = [*_BEFORE, *keys, *_AFTER]
    found = list(lines.fieldnames or [])
    if found != expected:
        raise ValueError(
            f"expected a study's table with the columns {', '.join(expected)} in {file}, got {', '.join(found)}. Give "
            "the table of this study, written by `lightning-prune study export`."
        )
    for line in lines:
        if line["format"] != str(FORMAT):
            raise ValueError(
                f"expected a table of version {FORMAT} in {file}, got version {line['format']}. Read it with the "
                "lightning_prune that wrote it, or export it again."
            )
        yield Row(
            line["variant"],
            line["pipeline"],
            float(line["remaining"]) if line["remaining"] else None,
            tuple(float(line[key]) for key in keys),
            int(line["seed"]),
            float(line["top1"]),
            float(line["top5"]) if line["top5"] else None,
            int(line["params"]),
            int(line["macs"]),
            float(line["seconds"]),
            line["diverged"] == "True",
            line["key"],
        )
