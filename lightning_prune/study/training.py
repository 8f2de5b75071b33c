"""Training of one cell: an ordinary fit, resumed if it was interrupted."""

from __future__ import annotations

import logging
import math
import os
import shutil
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_prune.callbacks.scheduled import ScheduledPruning
from lightning_prune.callbacks.traced_models import traced_model_of
from lightning_prune.reporting import versions
from lightning_prune.structure import trace
from lightning_prune.study.configurations import Cell
from lightning_prune.study.store import ARCHITECTURE, DamagedWarning, Result, Store, checkpoints
from lightning_prune.study.training_macs import TrainingMacs
from lightning_prune.surgery import history_of

__all__ = ["Task", "Train", "quieten", "work"]

#: The command line as a function: its words, and callbacks that are not part of the configuration.
Train = Callable[[Sequence[str], Sequence[Callback]], object]


@dataclass(frozen=True)
class Task:
    """A cell to run, as sent to a worker by launchers.

    Attributes:
        folder: The study's folder.
        cell: What to run.
        train: The command line, a function that can be imported by its name.
        metric: What has to be logged.
        counts: Whether the MACs of the training are counted.
    """

    folder: Path
    cell: Cell
    train: Train
    metric: str
    counts: bool = False

    def __call__(self) -> None:
        """Run it, see :func:`work`."""
        work(self)


def quieten() -> None:
    """Leave out Lightning's messages of every run, which would hide those of the study."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def work(task: Task) -> None:
    """Run a cell, or resume it if it was interrupted; errors are recorded, not raised.

    Another process that works on the same cell is waited for.
    """
    quieten()
    store, cell = Store(task.folder), task.cell
    with store.lock(cell):
        if store.finished(cell).is_dir():
            return
        recorder = _Recorder(task.metric, TrainingMacs() if task.counts else None, cell.keep == "architecture")
        try:
            _fit(store, task, recorder)
            # A cut alone does not validate.
            result = recorder.result(judged=cell.config["trainer"].get("limit_val_batches") != 0)
        except SIGTERMException:
            raise  # asked to stop: the run goes on later
        except (Exception, SystemExit) as error:
            if not recorder.diverged or task.metric not in recorder.metrics:
                store.fail(cell, "".join(traceback.format_exception(error)))
                return
            result = recorder.result()
        if cell.keep == "architecture" and recorder.architecture is None:
            store.fail(cell, "expected a run that removes units, got one that ended as wide as it began.")
            return
        if cell.keep == "architecture":
            torch.save(recorder.architecture, store.running(cell) / ARCHITECTURE)
        store.finish(cell, result, {"versions": versions(), "cores": os.cpu_count()})


def _fit(store: Store, task: Task, recorder: _Recorder) -> None:
    """Run the fit; files of an earlier attempt that cannot be resumed are deleted."""
    place = store.begin(task.cell)
    resumed = bool(checkpoints(place))
    if not resumed:
        shutil.rmtree(place / "fit", ignore_errors=True)
    try:
        task.train(_words(place, resumed), recorder.callbacks)
    except SIGTERMException:
        raise
    except (Exception, SystemExit) as error:
        if not resumed or recorder.diverged:
            raise
        warnings.warn(
            f"{task.cell.label} cannot be resumed ({error}): it is run again from its beginning",
            DamagedWarning,
            stacklevel=2,
        )
        shutil.rmtree(place / "fit")
        recorder.forget()
        task.train(_words(place, resumed=False), recorder.callbacks)


def _words(place: Path, resumed: bool) -> list[str]:
    return [
        "fit",
        f"--config={place / 'config.yaml'}",
        "--name=fit",
        f"--trainer.default_root_dir={place}",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        *(["--ckpt_path=last"] if resumed else []),
    ]


class _Recorder(Callback):
    """Records the result of a run, as part of its checkpoints, so that a resumed run knows earlier metrics."""

    def __init__(self, metric: str, counted: TrainingMacs | None = None, cuts: bool = False) -> None:
        self.metric = metric
        self.counted = counted
        self.cuts = cuts
        self.forget()

    @property
    def callbacks(self) -> list[Callback]:
        """This one, and the counter if there is one."""
        return [self] if self.counted is None else [self.counted, self]

    def forget(self) -> None:
        """Reset the record."""
        if self.counted is not None:
            self.counted.forget()
        self.curve: list[dict[str, float]] = []
        self.sizes: list[int] = []
        self.spent: list[int] = []
        self.seconds = 0.0
        self.diverged = False
        self.architecture: dict[str, Any] | None = None
        self.size = (0, 0)
        self._batch: Any = None
        self._names: set[str] | None = None
        self._began = perf_counter()

    @property
    def metrics(self) -> dict[str, float]:
        """Last logged finite metrics, by name."""
        return {name: value for row in self.curve for name, value in row.items()}

    def result(self, judged: bool = True) -> Result:
        """Return the result of the finished run.

        Args:
            judged: Whether the metric counts.

        Raises:
            ValueError: If it does and was not logged, or was never a number.
        """
        if judged and self.diverged and self.metric not in self.metrics:
            raise ValueError(f"{self.metric!r} was never a number: the run diverged in its first epoch.")
        if judged and self.metric not in self.metrics:
            raise ValueError(
                f"expected the run to log {self.metric!r}, got {', '.join(sorted(self.metrics)) or 'nothing'}. Name "
                "one of these by `metric`, or log it in `validation_step`."
            )
        batches = 0 if self.counted is None else self.counted.batches
        params, macs = self.size
        return Result(
            self.metrics,
            self.curve,
            params,
            macs,
            round(self.seconds, 3),
            self.diverged,
            self.sizes,
            self.spent,
            batches,
        )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = perf_counter()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.cuts or history_of(pl_module) is not None:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(one.pending for one in callbacks if isinstance(one, ScheduledPruning)):
            raise ValueError(
                f"expected a run that removes units, got one without any cut in its {trainer.max_epochs} epochs. Look "
                "at `schedule` and at the amount of the pruning callback."
            )

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._note(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_clock()
        history = history_of(pl_module)
        self.architecture = None if history is None else history.to_plain()
        self._measure(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_clock()
        self.diverged = self.diverged or not _is_finite(pl_module)
        if self.diverged:
            self._measure(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "curve": self.curve,
            "sizes": self.sizes,
            "spent": self.spent,
            "seconds": self.seconds + perf_counter() - self._began,
            "diverged": self.diverged,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = list(state_dict["curve"])
        self.sizes, self.spent = list(state_dict.get("sizes", [])), list(state_dict.get("spent", []))
        self.seconds = float(state_dict["seconds"])
        self.diverged = bool(state_dict["diverged"])

    def _note(self, trainer: Trainer, module: LightningModule) -> None:
        if self._names is None:
            # What the first validation finds is its own; later ones also find what the last epoch's training left.
            self._names = set(trainer.callback_metrics)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name in self._names}
        self.diverged = self.diverged or not _is_finite(module) or any(map(math.isnan, logged.values()))
        # NaN and infinity have no place in JSON; a metric that is not a number is left out.
        self.curve.append({name: value for name, value in logged.items() if math.isfinite(value)})
        self.sizes.append(sum(parameter.numel() for parameter in module.parameters()))
        if self.counted is not None:
            self.spent.append(self.counted.macs)

    def _stop_clock(self) -> None:
        self.seconds += perf_counter() - self._began

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        batch = None
        if module.example_input_array is None:
            # A run that was interrupted right before its end has seen no batch since.
            batch = self._batch if self._batch is not None else next(iter(_loader(trainer)))
        structure = trace(traced_model_of(module, batch, step=False))
        self.size = structure.cost.params(structure.widths), structure.cost.macs(structure.widths)


def _loader(trainer: Trainer) -> Any:
    return trainer.train_dataloader or trainer.fit_loop._data_source.dataloader()


def _is_finite(module: LightningModule) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())
