"""Runs a study: preparations, the grid, and extensions of the grid."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from lightning_prune.study.axes import Extent, Point, points, sides
from lightning_prune.study.configurations import Cell, cells, preparations, run
from lightning_prune.study.definition import Study, Variant
from lightning_prune.study.launchers import Launcher
from lightning_prune.study.progress import Progress
from lightning_prune.study.statistics import region_of_interest
from lightning_prune.study.store import Store
from lightning_prune.study.table import Row
from lightning_prune.study.training import Task, Train

__all__ = ["Failure", "check", "extent_of", "failures", "identity", "retry_failed", "rows", "run_study"]

# The threshold of the region that the grid has to hold, as a share.
_ROI = 0.01


@dataclass(frozen=True)
class Failure:
    """A run that ended in an error.

    Attributes:
        cell: Which one.
        error: Its traceback.
    """

    cell: Cell
    error: str


def run_study(study: Study, folder: Path, train: Train, launcher: Launcher, progress: Progress) -> list[Failure]:
    """Run all unfinished cells. If interrupted, call it again to continue.

    Args:
        study: What to run.
        folder: Where its cells are.
        train: The command line, as in `Task`.
        launcher: Who runs the cells.
        progress: Told of every run that ends.

    Returns:
        What failed, now or before; the rest of the study is done nevertheless.

    Raises:
        ValueError: If the folder holds another study.
    """
    store = Store(folder)
    store.claim(identity(study))
    for stage in _stages(study, store):
        todo = [cell for cell in stage if _is_due(store, cell)]
        progress.stage(len(stage), len(stage) - len(todo))
        for index, death in launcher.run([Task(folder.absolute(), cell, train, study.metric) for cell in todo]):
            cell = todo[index]
            if death is not None:
                with store.lock(cell):  # another launcher's worker may be running it
                    if not store.finished(cell).is_dir():
                        store.fail(cell, death)
            progress.ended(cell.label, store.result(cell), study.metric)
    return failures(study, folder)


def check(study: Study, train: Train) -> None:
    """Parse the configuration of one run of every variant, as ``fit`` would.

    Raises:
        ValueError: If the command line refuses one; the text says why.
    """
    for variant in study.variants:
        cell = run(study, variant, (0,) * len(study.axes), study.seeds[0])
        with TemporaryDirectory() as folder:
            file = Path(folder) / "config.yaml"
            file.write_text(yaml.safe_dump(cell.config), encoding="utf-8")
            try:
                # It exits after printing.
                with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                    train(["fit", f"--config={file}", "--print_config"], [])
            except ValueError as error:
                raise ValueError(
                    f"the configuration of {variant.name!r} is refused by `fit`; look at `recipe`, `grid`, `set` and "
                    f"`variants`: {error}"
                ) from error


def extent_of(study: Study, store: Store) -> Extent:
    """Extent of the grid, including the extensions that the results so far require."""
    extent = study.extent
    while _is_done(study, store, extent):
        larger = _extended(study, store, extent)
        if larger is None:
            break
        extent = larger
    return extent


def rows(study: Study, folder: Path) -> list[Row]:
    """Every finished run of the grid, variant by variant."""
    store = Store(folder)
    found = []
    for variant, point, seed, cell in cells(study, extent_of(study, store)):
        result = store.result(cell)
        if result is not None:
            values = tuple(axis.value(steps) for axis, steps in zip(study.axes, point, strict=True))
            row = Row(
                variant.name,
                variant.pipeline if variant.method else "",
                variant.remaining,
                values,
                seed,
                result.metrics[study.metric],
                result.metrics.get(study.top5),
                result.params,
                result.macs,
                result.seconds,
                result.diverged,
                cell.key,
            )
            found.append(row)
    order = {variant.name: place for place, variant in enumerate(study.variants)}
    return sorted(found, key=lambda row: (order[row.variant], row.values, row.seed))


def failures(study: Study, folder: Path) -> list[Failure]:
    """Every run, or preparation of runs, that ended in an error."""
    store = Store(folder)
    groups = preparations(study)
    everything = [cell for group in groups for cell in group]
    everything += [cell for *_, cell in cells(study, extent_of(study, store))]
    errors = {cell.key: (cell, store.failure(cell)) for cell in everything}
    return [Failure(cell, error) for cell, error in errors.values() if error is not None]


def retry_failed(study: Study, folder: Path) -> int:
    """Mark every failed run to be run again, and return how many there are."""
    store, failed = Store(folder), failures(study, folder)
    for failure in failed:
        store.retry(failure.cell)
    return len(failed)


def identity(study: Study) -> dict[str, Any]:
    """Return the settings that must not change; variants, seeds and points may be added to a study."""
    axes = [{"key": axis.key, "prior": axis.prior, "step": axis.step, "scale": axis.scale} for axis in study.axes]
    return {"recipe": study.recipe, "axes": axes, "metric": study.metric}


def _stages(study: Study, store: Store) -> Iterator[list[Cell]]:
    """Yield the cells to run in groups, each of which needs the previous ones."""
    yield from (group for group in preparations(study) if group)
    done: Extent | None = None
    while (extent := extent_of(study, store)) != done:
        yield [cell for *_, cell in cells(study, extent)]
        done = extent


def _is_due(store: Store, cell: Cell) -> bool:
    """Whether a cell can run: it is not finished, has not failed, and its inputs are finished."""
    if store.result(cell) is not None or store.failure(cell) is not None:
        return False
    return all(store.result(need) is not None for need in cell.needs)


def _is_done(study: Study, store: Store, extent: Extent) -> bool:
    return all(
        store.result(cell) is not None or any(store.failure(each) is not None for each in (cell, *cell.needs))
        for *_, cell in cells(study, extent)
    )


def _extended(study: Study, store: Store, extent: Extent) -> Extent | None:
    """The grid extended at one side that a 1.0-ROI touches, within the cap, or ``None``."""
    touched = _touched(study, store, extent)
    for side, larger in sides(extent, study.most):
        if side in touched:
            return larger
    return None


def _touched(study: Study, store: Store, extent: Extent) -> set[tuple[int, int]]:
    """Sides of the grid, as ``(axis, edge)``, where the 1.0-ROI of any variant and seed has a point."""
    grid = list(points(extent))
    found: set[tuple[int, int]] = set()
    for variant in study.variants:
        for seed in study.seeds:
            accuracy = np.array([_accuracy(study, store, variant, point, seed) for point in grid])
            if np.isfinite(accuracy).any():
                region = region_of_interest(accuracy, _ROI)
                found |= {(axis, edge) for point in _chosen(grid, region) for axis, edge in enumerate(point)}
    return found


def _accuracy(study: Study, store: Store, variant: Variant, point: Point, seed: int) -> float:
    result = store.result(run(study, variant, point, seed))
    return float("nan") if result is None else result.metrics[study.metric]


def _chosen(grid: Sequence[Point], region: np.ndarray) -> list[Point]:
    return [point for point, inside in zip(grid, region, strict=True) if inside]
