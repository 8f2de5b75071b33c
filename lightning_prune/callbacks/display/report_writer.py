"""Report of a run: values for loggers, a table, and files."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn

from lightning_prune.callbacks.display.status import log_status
from lightning_prune.callbacks.display.wandb_run import log_checkpoints, log_report
from lightning_prune.extras import require
from lightning_prune.packages import both
from lightning_prune.reporting import Report, Scores, latencies, layer_parameters, size_on_disk, timed
from lightning_prune.reporting.grid import console_for
from lightning_prune.reporting.pages import Page
from lightning_prune.scoring import Statistic
from lightning_prune.structure import Size, TracedModel
from lightning_prune.structure.sharding import has_shards

__all__ = ["Pace", "ReportWriter", "log_now", "split_halves", "step_of"]


def log_now(trainer: Trainer, numbers: Mapping[str, float], scores: Mapping[str, Tensor] | None = None) -> None:
    """Send numbers to every logger immediately, on the step axis of Lightning's curves, and to other callbacks.

    ``self.log`` would drop values between two steps of ``log_every_n_steps``, and with them cuts.

    Args:
        trainer: The run.
        numbers: The values to log.
        scores: Scores of the units by group: histograms for W&B and TensorBoard, quantiles for other loggers.
    """
    scores, step = scores or {}, step_of(trainer)
    for logger in trainer.loggers:
        logger.log_metrics({**numbers, **_shown_scores(logger, scores)}, step=step)
        if isinstance(logger, both(TensorBoardLogger)):
            for name, values in scores.items():
                logger.experiment.add_histogram(f"pruning/scores/{name}", values, step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})


def _shown_scores(logger: Logger, scores: Mapping[str, Tensor]) -> dict[str, Any]:
    if isinstance(logger, both(TensorBoardLogger)) or not scores:
        return {}
    if isinstance(logger, both(WandbLogger)):
        Histogram = require("wandb", extra="wandb").Histogram  # noqa: N806
        return {f"pruning/scores/{name}": Histogram(values.numpy()) for name, values in scores.items()}
    quantiles = {name: asdict(Scores.of(values)) for name, values in scores.items()}
    return {
        f"pruning/scores/{name}/{label}": value
        for name, found in quantiles.items()
        for label, value in found.items()
        if value is not None
    }


def step_of(trainer: Trainer) -> int:
    """The step axis of Lightning's curves."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def split_halves(names: Iterable[str], statistic: Statistic | None) -> dict[str, float]:
    """Rank correlation of the scores from two halves of the batches, by group, for loggers."""
    found = {} if statistic is None else {f"pruning/split_half/{name}": statistic.split_half(name) for name in names}
    return {name: agreement for name, agreement in found.items() if not math.isnan(agreement)}


@dataclass
class Pace:
    """Duration of training steps with and without observation.

    Attributes:
        observed: Seconds of steps with observed activations in this epoch.
        plain: Seconds of the other steps.
    """

    observed: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    _began: float | None = None
    _is_observed: bool = False

    def start(self, *, observed: bool) -> None:
        """Start a step."""
        self._began, self._is_observed = perf_counter(), observed

    def stop(self) -> None:
        """End a step."""
        if self._began is not None:
            (self.observed if self._is_observed else self.plain).append(perf_counter() - self._began)

    def overhead(self) -> float | None:
        """Extra time of observed steps as a share of an epoch without them; None if it cannot be computed."""
        observed, plain = self.observed, self.plain
        self.observed, self.plain = [], []
        if not observed or not plain:
            return None if observed else 0.0
        usual = median(plain)
        extra = max(median(observed) - usual, 0.0) * len(observed)
        return extra / (usual * (len(observed) + len(plain)))


def _home(trainer: Trainer) -> Path:
    """The folder of this run, found as in ``ModelCheckpoint``; all processes must call this."""
    home, logger = Path(trainer.log_dir or trainer.default_root_dir), trainer.logger
    if logger is None or getattr(logger, "log_dir", None) is not None:
        return home
    name, version = trainer.strategy.broadcast((logger.name, logger.version))
    if name is None or version is None:
        return home
    return home / str(name) / (version if isinstance(version, str) else f"version_{version}")


class ReportWriter:
    """Writes the report of a run.

    Args:
        report: The report.
        trainer: The trainer of the run.
        dirpath: The user's folder, if any.
        runs: Ids of the run's pruning callbacks, to recognise files of other runs.
        place: Index of this report's callback among them; file names of later ones are numbered.
    """

    def __init__(self, report: Report, trainer: Trainer, dirpath: str | None, runs: Sequence[str], place: int) -> None:
        self.report, self.trainer, self.dirpath, self.runs, self.place = report, trainer, dirpath, runs, place
        self.name = _numbered(place + 1)

    def claim(self) -> None:
        """Refuse a folder with another run's report.

        Raises:
            FileExistsError: If the user's ``dirpath`` contains one.
        """
        if self.dirpath is not None and not _is_of(self.runs[self.place : self.place + 1], Path(self.dirpath)):
            raise FileExistsError(
                f"`dirpath`: expected a folder without a report or the folder of the run that is resumed, got "
                f"'{self.dirpath}', which contains another run's report. Choose another folder or remove it."
            )
        if self.dirpath is not None and not getattr(self.trainer, "fast_dev_run", False):
            Path(self.dirpath).mkdir(parents=True, exist_ok=True)  # fail now, not at the end of the run

    def folder(self) -> Path:
        """Folder of the files: ``dirpath``, else the logger's folder, numbered if that has another run's report.

        It is the same during the whole run, whichever report is written first.
        """
        if self.dirpath is not None:
            return Path(self.dirpath)
        home = _home(self.trainer)
        folders = chain([home], (home / _numbered(number) for number in count(2)))
        return next(islice((folder for folder in folders if _is_of(self.runs, folder)), self.place, None))

    def measure(self, traced: TracedModel, size: Size, dense: nn.Module | None = None) -> Size:
        """The size with parameters by layer, bytes on disk and latency (of a copy), measured by rank zero.

        Args:
            traced: The network.
            size: Its size as known so far.
            dense: The dense network on the meta device, which is timed at the same time, so that both latencies in the
                report are for the machine in its current state.
        """
        if not self.trainer.is_global_zero:
            return size
        if has_shards(traced.model):  # no process has room for a copy
            return replace(size, layers=layer_parameters(traced.model))
        networks = [traced.copy("real").module]
        try:
            if dense is not None:
                networks.append(_filled(dense, next(networks[0].parameters()).device))
            with self.trainer.precision_plugin.forward_context(), log_status(self.trainer, "Measuring the latency"):
                now, *before = latencies(traced.calls[0], networks)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            warnings.warn(
                f"the latency could not be measured ({type(error).__name__}: {error}): a copy of the network does not "
                "run at batch sizes 1 and 64",
                stacklevel=2,
            )
            now, before = {}, []
        if before and self.report.dense is not None:
            self.report.dense = timed(self.report.dense, before[0])
        model = traced.model
        return replace(timed(size, now), bytes=size_on_disk(model), layers=layer_parameters(model))

    def finish(self, numbers: Mapping[str, float]) -> None:
        """Print the table, write the files, and log the results.

        Args:
            numbers: The values to log.
        """
        log_now(self.trainer, numbers)
        folder = self.folder()  # called in all processes
        if getattr(self.trainer, "fast_dev_run", False) or not self.trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.report.to_json(folder / "report.json")
        with log_status(self.trainer, "Drawing the report"):
            markdown_page, html_page = self._pages()
        for picture in markdown_page.pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        (folder / "report.md").write_text(markdown_page.markdown(), encoding="utf-8")
        (folder / "report.html").write_text(html_page.html(), encoding="utf-8")
        console = console_for()
        console.print(self.report.table())
        console.print(f"Report: {folder}", soft_wrap=True)
        kept = [one for one in self.trainer.checkpoint_callbacks if isinstance(one, both(ModelCheckpoint))]
        for one in sorted((one for one in kept if one.best_model_path), key=lambda one: one.monitor is None)[:1]:
            which = "Last" if one.monitor is None else "Best"
            console.print(f"{which} checkpoint: {one.best_model_path}", soft_wrap=True)
        for logger in self.trainer.loggers:
            if isinstance(logger, both(WandbLogger)):
                pictures = [folder / f"{picture.name}.png" for picture in markdown_page.pictures]
                log_report(logger, self.name, self.report, pictures, step_of(self.trainer))
                if logger._log_model:
                    log_checkpoints(logger, self.trainer, self.report)
            elif isinstance(logger, both(TensorBoardLogger)):
                self._to_tensorboard(logger, markdown_page)

    def _to_tensorboard(self, logger: TensorBoardLogger, page: Page) -> None:
        """The tables as text, and the pictures."""
        tables = "\n\n".join(grid.markdown() for grid in self.report.grids())
        logger.experiment.add_text(f"{self.name}/report", tables, step_of(self.trainer))
        for picture in page.pictures:
            pixels = require("matplotlib.image", extra="plot").imread(BytesIO(picture.png))
            name = f"{self.name}/pictures/{picture.name}"
            logger.experiment.add_image(name, pixels, step_of(self.trainer), dataformats="HWC")

    def _pages(self) -> tuple[Page, Page]:
        try:
            return self.report.pages()
        except ModuleNotFoundError as error:
            warnings.warn(f"no pictures of the run: {error}", stacklevel=2)
            return self.report.pages(pictures=False)


def _filled(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a network on the meta device with zero weights, because its latency does not depend on them."""
    with torch.no_grad():
        for tensor in chain(network.to_empty(device=device).parameters(), network.buffers()):
            tensor.zero_()
    return network


def _numbered(number: int) -> str:
    return "pruning" if number == 1 else f"pruning-{number}"


def _is_of(runs: Sequence[str], folder: Path) -> bool:
    """Whether a folder has no report of another run."""
    file = folder / "report.json"
    if not file.is_file():
        return True
    try:
        return json.loads(file.read_text(encoding="utf-8"))["config"]["run"] in runs
    except (ValueError, KeyError, TypeError):
        return False  # another file of that name
