"""Runs a pruning fit with its controls: tried out before any training, then stored one by one."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_prune.reporting import Report
from lightning_prune.study.configurations import resumable
from lightning_prune.study.controls import (
    Checked,
    ControlRun,
    Controls,
    cells_of,
    of_length,
    seed_keys,
    without_pruning,
)
from lightning_prune.study.launchers import Launcher
from lightning_prune.study.progress import Progress
from lightning_prune.study.recipe import Config
from lightning_prune.study.runner import Failure
from lightning_prune.study.store import Store
from lightning_prune.study.training import Task, Train, quieten
from lightning_prune.study.training_macs import TrainingMacs

__all__ = ["check", "finished", "resolve", "retry", "run_controls"]

# Shares of a run at which the learning rates of two lengths are compared, and how far they may differ, as a share of
# the highest one.
_MOMENTS, _TOLERANCE = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0), 0.1


def resolve(words: Sequence[str], train: Train) -> Config:
    """The complete configuration of ``fit`` that command-line arguments describe.

    Args:
        words: Arguments of ``fit``, such as ``--config=FILE``.
        train: The command line, as in `Task`.
    """
    printed = io.StringIO()
    # It exits after printing.
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        train(["fit", *words, "--print_config"], [])
    found: Config = yaml.safe_load(printed.getvalue())
    return {key: value for key, value in found.items() if value is not None and key not in ("name", "checkpoint")}


def check(controls: Controls, train: Train) -> Checked:
    """Try the runs out before any training: one batch each of the pruned and the dense network, without cuts.

    Raises:
        ValueError: If a configuration is refused, the metric is not logged, or a learning rate would not end with a
            control of another length.
    """
    seed = controls.seeds[0]
    lengths = [
        of_length(without_pruning(controls.recipe), controls, epochs, None)
        for epochs in (controls.epochs, 2 * controls.epochs)
    ]
    found: list[_Rehearsal] = []
    for config in (controls.recipe, without_pruning(controls.recipe)):
        found.append(_Rehearsal())
        _try(resumable(config, seed, seed_keys(config)), train, [found[-1].counted, found[-1]], fast=True)
    report = Report()
    report.log(0, 0, {name: torch.tensor(value) for name, value in found[1].metrics.items()})
    metric = controls.metric or report.main_metric
    if metric not in found[1].metrics:
        logged = ", ".join(sorted(found[1].metrics)) or "nothing"
        raise ValueError(
            f"controls: expected validation to log {metric or 'an accuracy or a loss'!r}, got {logged}. Name one of "
            "these by --metric, or log it in `validation_step`."
        )
    once, twice = _RateProbe(), _RateProbe()
    for probe, config in zip((once, twice), lengths, strict=True):
        _try(resumable(config, seed, seed_keys(config)), train, [probe])
    _require_same_shape(once.rates, twice.rates)
    return Checked(metric, Report(metric=metric).mode, found[1].counted.steps)


def run_controls(
    controls: Controls, folder: Path, train: Train, launcher: Launcher, progress: Progress
) -> tuple[Checked, list[Failure]]:
    """Run whatever is not finished. If interrupted, call it again to continue.

    Args:
        controls: What to run.
        folder: Where the runs are.
        train: The command line, as in `Task`.
        launcher: Who runs them.
        progress: Told of every run that ends.

    Returns:
        What was found before training, and the runs that failed.

    Raises:
        ValueError: If the folder holds anything else, or the runs are refused, see `check`.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "study.json").is_file():
        raise ValueError(
            f"controls: expected an empty folder, or one with these controls, got {folder}, which holds other files. "
            "Give another --folder."
        )
    checked = check(controls, train)
    store = Store(folder)
    store.claim({"controls": controls.recipe, "start": controls.start, "stretch": list(controls.stretch)})
    failed: list[Failure] = []
    done: set[str] = set()
    while todo := {cell.key: cell for _, _, cell in cells_of(controls, checked, store) if cell.key not in done}:
        cells = list(todo.values())
        waiting = [cell for cell in cells if store.result(cell) is None and store.failure(cell) is None]
        progress.stage(len(cells), len(cells) - len(waiting))
        tasks = [Task(folder.absolute(), cell, train, checked.metric, counts=True) for cell in waiting]
        for index, death in launcher.run(tasks):
            cell = waiting[index]
            if death is not None:
                with store.lock(cell):
                    if not store.finished(cell).is_dir():
                        store.fail(cell, death)
            progress.ended(cell.label, store.result(cell), checked.metric)
        failed += [Failure(cell, error) for cell in cells if (error := store.failure(cell)) is not None]
        done |= todo.keys()
    return checked, failed


def retry(controls: Controls, checked: Checked, folder: Path) -> int:
    """Mark every failed run to be run again, and return how many there are."""
    store = Store(folder)
    failed = [cell for _, _, cell in cells_of(controls, checked, store) if store.failure(cell) is not None]
    for cell in failed:
        store.retry(cell)
    return len(failed)


def finished(controls: Controls, checked: Checked, folder: Path) -> list[ControlRun]:
    """The finished runs, those of each name by seed."""
    store = Store(folder)
    found = [
        ControlRun(name, seed, result)
        for name, seed, cell in cells_of(controls, checked, store)
        if (result := store.result(cell)) is not None
    ]
    return sorted(found, key=lambda run: (controls.names.index(run.name), run.seed))


class _Rehearsal(Callback):
    """One batch: what validation logs, and the MACs of a training step."""

    def __init__(self) -> None:
        self.counted = TrainingMacs()
        self.metrics: dict[str, float] = {}

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


class _RateProbe(Callback):
    """Learning rates of every scheduler over a run that is not made."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for place, found in enumerate(trainer.lr_scheduler_configs):
            if found.reduce_on_plateau:
                continue
            by_step = found.interval == "step"
            steps = int(trainer.estimated_stepping_batches) if by_step else int(trainer.max_epochs or 1)
            steps //= found.frequency
            kind = type(found.scheduler).__name__
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no optimizer has taken a step
                self.rates[f"{place + 1}, {kind}"] = _run_out(cast(Any, found.scheduler), steps)
        trainer.fit_loop.max_epochs = 0  # nothing is trained


def _run_out(scheduler: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.step()
    return rates


def _require_same_shape(once: Mapping[str, Sequence[float]], twice: Mapping[str, Sequence[float]]) -> None:
    for name, rates in once.items():
        longer, highest = twice.get(name) or [0.0], max(rates, default=0.0)
        for step in sorted({min(round(moment * len(rates)), len(rates) - 1) for moment in _MOMENTS}):
            moment = step / len(rates)
            rate, late = rates[step], longer[int(moment * len(longer))]
            if abs(rate - late) > _TOLERANCE * highest:
                raise ValueError(
                    f"controls: expected a learning rate that ends with its run, got scheduler {name}, whose rate "
                    f"after {moment:.0%} of the run is {rate:.3g}, and {late:.3g} if the run is twice as long. Take "
                    "the length from the trainer (`trainer.max_epochs`, `trainer.estimated_stepping_batches`), or name "
                    "the keys with its length by --stretch, such as --stretch model.warmup_epochs."
                )


def _try(config: Config, train: Train, callbacks: Sequence[Callback], fast: bool = False) -> None:
    """A fit in a temporary folder, without output."""
    quieten()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        words = [
            "fit",
            f"--config={file}",
            f"--trainer.default_root_dir={folder}",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.num_sanity_val_steps=0",
            *(["--trainer.fast_dev_run=true"] if fast else []),
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            train(words, callbacks)
