"""What a run shows while it prunes and at its end: numbers for loggers, a table, files."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_prune.callbacks.telling import telling
from lightning_prune.extras import require
from lightning_prune.reporting import Report, latencies, layer_parameters, size_on_disk, timed
from lightning_prune.reporting.grid import console_for
from lightning_prune.reporting.pages import Page
from lightning_prune.scoring import Statistic
from lightning_prune.structure import Size, TracedModel

__all__ = ["Pace", "Showing", "log_now", "log_scores", "score_summary", "wandb_run"]


def log_now(trainer: Trainer, numbers: Mapping[str, float]) -> None:
    """Send numbers to every logger at once, on the step axis of Lightning's own curves, and to other callbacks.

    ``self.log`` would drop what falls between two steps of ``log_every_n_steps``; cuts must not be lost.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(numbers), step=_step(trainer))
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})


def log_scores(trainer: Trainer, scores: Mapping[str, Tensor]) -> None:
    """Send a histogram of every group's scores to W&B and TensorBoard, which can draw it."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            Histogram = require("wandb", extra="wandb").Histogram  # noqa: N806
            drawn = {f"pruning/scores/{name}": Histogram(values.numpy()) for name, values in scores.items()}
            logger.log_metrics(drawn, step=_step(trainer))
        elif isinstance(logger, TensorBoardLogger):
            for name, values in scores.items():
                logger.experiment.add_histogram(f"pruning/scores/{name}", values, _step(trainer))


def wandb_run(trainer: Trainer, before: str | None) -> str | None:
    """Id of the W&B run that the curves go to.

    W&B begins its run before any callback sees the checkpoint, so that all there is to do about another one is to
    say so.

    Args:
        trainer: The run.
        before: The W&B run of the checkpoint that is resumed, if any.

    Returns:
        The id; without a W&B logger the one from before, so that a later resume still knows it.
    """
    now = next((logger.version for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
    if now is not None and before is not None and now != before:
        rank_zero_info(
            f"The curves of this checkpoint are in the W&B run '{before}', these go to another, '{now}'. To continue "
            f"the former, give `WandbLogger(id='{before}')`."
        )
    return before if now is None else str(now)


def _step(trainer: Trainer) -> int:
    """Where Lightning's own curves are."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def score_summary(scores: Mapping[str, Tensor], statistic: Statistic | None) -> dict[str, float]:
    """Quantiles of the scores of every group and the agreement of two halves of the batches, for loggers."""
    numbers: dict[str, float] = {}
    for name, values in scores.items():
        quantiles = torch.quantile(values, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=values.dtype)).tolist()
        for label, value in zip(("min", "q25", "median", "q75", "max"), quantiles, strict=True):
            numbers[f"pruning/score/{name}/{label}"] = value
        if statistic is not None:
            agreement = statistic.split_half(name)
            if not math.isnan(agreement):
                numbers[f"pruning/split_half/{name}"] = agreement
    return numbers


@dataclass
class Pace:
    """How long training steps take with and without observation.

    Attributes:
        observed: Seconds of steps whose activations were observed, this epoch.
        plain: Seconds of the others.
    """

    observed: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    _began: float | None = None
    _is_observed: bool = False

    def start(self, *, observed: bool) -> None:
        """A step begins."""
        self._began, self._is_observed = perf_counter(), observed

    def stop(self) -> None:
        """The step has ended."""
        if self._began is not None:
            (self.observed if self._is_observed else self.plain).append(perf_counter() - self._began)

    def overhead(self) -> float | None:
        """Extra time of observed steps as a share of an epoch without them; None where there is nothing to compare."""
        observed, plain = self.observed, self.plain
        self.observed, self.plain = [], []
        if not observed or not plain:
            return None if observed else 0.0
        usual = median(plain)
        extra = max(median(observed) - usual, 0.0) * len(observed)
        return extra / (usual * (len(observed) + len(plain)))


def _home(trainer: Trainer) -> Path:
    """The folder of this run, as ``ModelCheckpoint`` finds it where a logger has none of its own; all processes ask."""
    home, logger = Path(trainer.log_dir or trainer.default_root_dir), trainer.logger
    if logger is None or getattr(logger, "log_dir", None) is not None:
        return home
    name, version = trainer.strategy.broadcast((logger.name, logger.version))
    if name is None or version is None:
        return home
    return home / str(name) / (version if isinstance(version, str) else f"version_{version}")


class Showing:
    """The report of one run and where it goes.

    Args:
        report: What was collected.
        trainer: The run.
        dirpath: The user's folder, if any.
        runs: Tell this run's files from another's: an id of each pruning callback in it.
        place: Which of these it is whose report this is; the later ones have a number in their name.
    """

    def __init__(self, report: Report, trainer: Trainer, dirpath: str | None, runs: Sequence[str], place: int) -> None:
        self.report, self.trainer, self.dirpath, self.runs, self.place = report, trainer, dirpath, runs, place
        self.name = _numbered(place + 1)

    def claim(self) -> None:
        """Refuse a folder with another run's report.

        Raises:
            FileExistsError: If the user's ``dirpath`` holds one.
        """
        if self.dirpath is not None and not _is_of(self.runs[self.place : self.place + 1], Path(self.dirpath)):
            raise FileExistsError(
                f"`dirpath`: expected a folder without a report or the folder of the run that is resumed, got "
                f"'{self.dirpath}', which holds another run's report. Give another folder or remove it."
            )
        if self.dirpath is not None and not getattr(self.trainer, "fast_dev_run", False):
            Path(self.dirpath).mkdir(parents=True, exist_ok=True)  # better now than when the results are there

    def folder(self) -> Path:
        """Where the files go: ``dirpath``, else the logger's folder, numbered if that holds another run's report.

        The same from the first to the last of the run, whichever report is written before.
        """
        if self.dirpath is not None:
            return Path(self.dirpath)
        home = _home(self.trainer)
        folders = chain([home], (home / _numbered(number) for number in count(2)))
        return next(islice((folder for folder in folders if _is_of(self.runs, folder)), self.place, None))

    def measure(self, traced: TracedModel, size: Size, dense: nn.Module | None = None) -> Size:
        """The size with parameters layer by layer, bytes on disk and latency (of a copy), of the first process.

        Args:
            traced: The network.
            size: What is known of it.
            dense: The dense network on the meta device, to be timed at the same time: the report's dense latency is
                then that of the machine as it is now.
        """
        if not self.trainer.is_global_zero:
            return size
        networks = [traced.copy("real").module]
        try:
            if dense is not None:
                networks.append(_filled(dense, next(networks[0].parameters()).device))
            with self.trainer.precision_plugin.forward_context(), telling(self.trainer, "Measuring the latency"):
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
        """Print the table, write the files, hand the results to the loggers.

        Args:
            numbers: What the loggers are told.
        """
        log_now(self.trainer, numbers)
        folder = self.folder()  # asks all processes
        if getattr(self.trainer, "fast_dev_run", False) or not self.trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.report.to_json(folder / "report.json")
        with telling(self.trainer, "Drawing the report"):
            beside, inside = self._pages()
        for picture in beside.pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        (folder / "report.md").write_text(beside.markdown(), encoding="utf-8")
        (folder / "report.html").write_text(inside.html(), encoding="utf-8")
        console = console_for()
        console.print(self.report.table())
        console.print(f"Report: {folder}", soft_wrap=True)
        kept = [one for one in self.trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        for one in sorted((one for one in kept if one.best_model_path), key=lambda one: one.monitor is None)[:1]:
            which = "Last" if one.monitor is None else "Best"
            console.print(f"{which} checkpoint: {one.best_model_path}", soft_wrap=True)
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                pictures = [folder / f"{picture.name}.png" for picture in beside.pictures]
                _to_wandb(logger, self.name, self.report, numbers, pictures)

    def _pages(self) -> tuple[Page, Page]:
        try:
            return self.report.pages()
        except ModuleNotFoundError as error:
            warnings.warn(f"no pictures of the run: {error}", stacklevel=2)
            return self.report.pages(pictures=False)


def _filled(network: nn.Module, device: torch.device) -> nn.Module:
    """A network from the meta device with zeros for weights: how long it takes does not depend on them."""
    with torch.no_grad():
        for tensor in chain(network.to_empty(device=device).parameters(), network.buffers()):
            tensor.zero_()
    return network


def _numbered(number: int) -> str:
    return "pruning" if number == 1 else f"pruning-{number}"


def _is_of(runs: Sequence[str], folder: Path) -> bool:
    """Whether no other run's report is in a folder."""
    file = folder / "report.json"
    if not file.is_file():
        return True
    try:
        return json.loads(file.read_text(encoding="utf-8"))["config"]["run"] in runs
    except (ValueError, KeyError, TypeError):
        return False  # somebody else's file of that name


def _to_wandb(
    logger: WandbLogger, name: str, report: Report, numbers: Mapping[str, float], pictures: Sequence[Path]
) -> None:
    """The recipe and final widths in the run's config, the results in its summary, the pictures and the tables."""
    run: Any = logger.experiment
    run.config.update({name: {**report.to_plain()["config"], "final_widths": report.widths}}, allow_val_change=True)
    run.summary.update(numbers)
    for grid in report.grids():
        if grid.title:
            logger.log_table(f"{name}/{grid.title}", columns=list(grid.columns), data=[list(row) for row in grid.rows])
    for path in pictures:
        logger.log_image(f"{name}/{path.stem}", [str(path)])
