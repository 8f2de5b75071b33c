"""A study as a W&B sweep, whose agents run one cell after another, and logging of studies to W&B."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_prune.extras import require
from lightning_prune.reporting.numeric import Table
from lightning_prune.reporting.pages import Page
from lightning_prune.study.axes import Extent, Point
from lightning_prune.study.configurations import Cell, run
from lightning_prune.study.definition import Study
from lightning_prune.study.runner import identity
from lightning_prune.study.store import Result, Store
from lightning_prune.study.training import Task, Train, work

__all__ = ["cell_at", "log_page", "log_result", "run_cell", "sweep"]


def sweep(study: Study, extent: Extent, command: Sequence[str], name: str) -> dict[str, Any]:
    """Return the sweep over every run of a grid, for ``wandb sweep``.

    Args:
        study: The definition.
        extent: The grid as far as it has grown.
        command: What an agent runs; a run's variant, seed and hyperparameters follow as options.
        name: What W&B calls it.
    """
    axes = {
        axis.key: {"values": [axis.value(steps) for steps in range(low, high + 1)]}
        for axis, (low, high) in zip(study.axes, extent, strict=True)
    }
    variants = {"values": [variant.name for variant in study.variants]}
    return {
        "name": name,
        "method": "grid",
        "metric": {"name": study.metric, "goal": "maximize"},
        "parameters": {"variant": variants, "seed": {"values": list(study.seeds)}, **axes},
        "command": [*command, "${args}"],
    }


def cell_at(study: Study, variant: str, seed: int, values: Mapping[str, float]) -> Cell:
    """Return the run of a variant at hyperparameters on the grid or an extension of it.

    Raises:
        ValueError: If the study has no such variant or seed, or the values are not on its grid.
    """
    known = {each.name: each for each in study.variants}
    if variant not in known:
        raise ValueError(f"study cell: expected a variant of {', '.join(known)}, got {variant!r}.")
    if seed not in study.seeds:
        raise ValueError(f"study cell: expected a seed of {', '.join(map(str, study.seeds))}, got {seed}.")
    return run(study, known[variant], _point(study, values), seed)


def run_cell(study: Study, folder: Path, cell: Cell, train: Train) -> Result:
    """Run one cell and those it depends on in this process; return the result if it is finished already.

    Raises:
        ValueError: If the folder holds another study.
        RuntimeError: If the run, or one that it starts from, has failed.
    """
    store = Store(folder)
    store.claim(identity(study))
    for each in (*(first for need in cell.needs for first in need.needs), *cell.needs, cell):
        if store.failure(each) is None:
            work(Task(folder, each, train, study.metric))
        error = store.failure(each)
        if error is not None:
            raise RuntimeError(f"{each.label} has failed; `study run --retry` runs it again:\n{error}")
    result = store.result(cell)
    if result is None:
        raise RuntimeError(f"{cell.label} was run, and its result in {store.finished(cell)} cannot be read.")
    return result


def log_result(result: Result, cell: Cell, folder: Path) -> None:
    """Log a result to the run of a sweep's agent, or to a new run with files in ``folder``."""
    with _wandb_run(cell.label, folder, {"cell": cell.key}) as logged:
        logged.log({**result.metrics, "params": result.params, "macs": result.macs, "diverged": result.diverged})


def log_page(page: Page, tables: Mapping[str, Table], folder: Path) -> None:
    """Log a report, with W&B's files in ``folder``.

    Args:
        page: The report, logged as a whole and its pictures by name.
        tables: Its numbers (`numeric_tables`).
        folder: Where W&B writes.
    """
    wandb: Any = require("wandb", extra="wandb")
    with _wandb_run(page.title, folder, {}) as logged, TemporaryDirectory() as place:
        _, html = page.write(Path(place), "report")
        shown: dict[str, Any] = {f"study/{p.name}": wandb.Image(f"{place}/{p.name}.png") for p in page.pictures}
        for name, table in tables.items():
            shown[f"study/{name}"] = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        logged.log({**shown, "study/report": wandb.Html(html.read_text(encoding="utf-8"), inject=False)})


@contextmanager
def _wandb_run(name: str, folder: Path, config: dict[str, Any]) -> Iterator[Any]:
    """Open a W&B run: offline unless ``WANDB_MODE`` is set or a sweep's agent has started it."""
    wandb: Any = require("wandb", extra="wandb")
    mode = None if "WANDB_SWEEP_ID" in os.environ else os.environ.get("WANDB_MODE", "offline")
    project = os.environ.get("WANDB_PROJECT", "lightning-prune")
    where = {"dir": folder.absolute(), "project": project, "mode": mode}
    with wandb.init(name=name, config=config, settings={"quiet": True}, **where) as logged:
        yield logged


def _point(study: Study, values: Mapping[str, float]) -> Point:
    point = []
    for axis in study.axes:
        steps = round((axis.position(values[axis.key]) - axis.position(axis.prior)) / axis.step)
        if abs(axis.value(steps) - values[axis.key]) > 1e-6 * abs(values[axis.key]):
            raise ValueError(
                f"study cell: expected a value of {axis.key} on the grid, such as {axis.value(steps):g}, got "
                f"{values[axis.key]:g}."
            )
        point.append(steps)
    return tuple(point)
