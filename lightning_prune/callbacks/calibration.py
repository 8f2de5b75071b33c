"""Batches of the training data for repairs, apart from the loop that trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric
from typing_extensions import override

from lightning_prune.callbacks.around import Around, Run
from lightning_prune.reporting import require
from lightning_prune.structure import Axes, Subject
from lightning_prune.structure.tracing import FakeCopy, forked_rng
from lightning_prune.surgery import Repair, Rewind, repaired, take
from lightning_prune.surgery.depth import stays
from lightning_prune.surgery.tensors import named

__all__ = ["Calibration", "Repairs"]


@final
class Repairs(Around):
    """Repairs of every cut, from training batches or from weights that were kept.

    Args:
        repairs: In the order in which they happen.
    """

    def __init__(self, repairs: tuple[Repair, ...]) -> None:
        self.repairs = repairs
        self._epochs = {repair.epoch for repair in repairs if isinstance(repair, Rewind)}
        self._kept: dict[int, dict[str, Tensor]] = {}  # weights by epoch, as narrow as the network is
        self._axes: Axes = {}
        self._drops: Mapping[str, str] = {}

    @property
    @override
    def restarts(self) -> bool:
        return any(repair.restarts for repair in self.repairs)

    @override
    def begin(self, run: Run) -> None:
        self._calibration(run)
        trainer = run.trainer
        first = next((point for point in run.timeline if point.unit == "epoch"), None)
        for epoch in sorted(self._epochs - self._kept.keys()):
            if first is not None and first.at < epoch:
                raise ValueError(
                    f"Rewind: expected `epoch` not after the first cut, which is in epoch {first.at}, got {epoch}. Let "
                    "the schedule start later, or rewind to an earlier epoch."
                )
            if (trainer.current_epoch, trainer.fit_loop.batch_idx) > (epoch, 0):
                raise ValueError(
                    f"Rewind: expected the weights of epoch {epoch} in the checkpoint, but they were not kept. Resume "
                    "from a whole checkpoint of a run with this `Rewind`, or start anew."
                )

    @override
    def epoch(self, run: Run) -> None:
        now = run.trainer.current_epoch
        if now in self._epochs and now not in self._kept:
            self._kept[now] = {name: tensor.detach().cpu().clone() for name, tensor in _saved(run.module).items()}

    @override
    def contents(self, run: Run, axes: Axes, drops: Mapping[str, str]) -> Mapping[str, Tensor]:
        batches, self._axes, self._drops = self._calibration(run), axes, drops
        return repaired(batches.copy(), axes, [self._ready(repair) for repair in self.repairs], batches.run, drops)

    @override
    def after(self) -> None:
        self._kept = {
            epoch: {
                name: take(tensor, self._axes.get(name, {}))
                for name, tensor in kept.items()
                if stays(name, self._drops)
            }
            for epoch, kept in self._kept.items()
        }

    @override
    def state(self) -> dict[str, Any]:
        return {"rewind": {epoch: dict(kept) for epoch, kept in self._kept.items()}} if self._epochs else {}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        saved = state.get("rewind") or {}
        require(saved, dict[int, dict[str, Tensor]], "rewind")
        self._kept = {epoch: kept for epoch, kept in saved.items() if epoch in self._epochs}

    def _ready(self, repair: Repair) -> Repair:
        if not isinstance(repair, Rewind):
            return repair
        if repair.epoch not in self._kept:
            raise ValueError(
                f"Rewind: expected the weights of epoch {repair.epoch}, which the run has not come to before its first "
                "cut. Let the schedule start later, or rewind to an earlier epoch."
            )
        return repair.to(self._kept[repair.epoch])

    def _calibration(self, run: Run) -> Calibration:
        is_read = any(repair.batches for repair in self.repairs)
        return Calibration(run.trainer, run.module, run.subject, is_read=is_read)


def _saved(module: LightningModule) -> dict[str, Tensor]:
    """Parameters and buffers of the network, without those of metrics."""
    metrics = {id(t) for part in module.modules() if isinstance(part, Metric) for t in part.buffers()}
    return {name: tensor for name, tensor in named(module).items() if id(tensor) not in metrics}


class Calibration:
    """Runs training batches through copies of a module, without a trace in module, loop and random states.

    The samples are spread evenly over the data set, so that a sorted one is seen whole, and are the same every time:
    a run that was interrupted repairs as one that never stopped. A fresh loader in this process reads them. The batches
    go through ``training_step``, on a copy whose logging, metrics and optimizers do nothing.

    Args:
        trainer: The run, whose training data and devices are used.
        module: The module that trains.
        subject: How copies of it are made.
        is_read: Whether batches are needed at all.

    Raises:
        ValueError: If the training data is needed and not one loader over a data set with a length.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, subject: Subject, *, is_read: bool = True) -> None:
        self.trainer, self.module, self.subject = trainer, module, subject
        self.loader = _loader_of(trainer) if is_read else None

    def copy(self) -> nn.Module:
        """A copy of the module without the user's hooks, ready to run."""
        return FakeCopy(self.module, self.subject.memo, self.subject.prepare, kind="real").module

    def run(self, copy: nn.Module, n: int) -> None:
        """Run the first ``n`` batches through a copy."""
        (step,) = self.subject.optional
        with forked_rng(), torch.no_grad():  # Lightning's own does not give back after an error
            torch.manual_seed(0)
            for batch in self._batches(n):
                with self.trainer.precision_plugin.forward_context():
                    getattr(copy, step.method)(batch, *step.args[1:])

    def _batches(self, n: int) -> Iterator[Any]:
        for batch in _like(self.loader, n) if self.loader is not None else ():
            batch = self.trainer.precision_plugin.convert_input(batch)
            batch = self.module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _like(loader: DataLoader[Any], n: int) -> DataLoader[Any]:
    """The same data in ``n`` batches of samples from everywhere, read without worker processes."""
    total = len(loader.dataset)  # type: ignore[arg-type]
    if loader.batch_size is None and loader.batch_sampler is None:  # the data set hands out batches
        chosen: list[Any] = np.linspace(0, total, min(n, total), endpoint=False).astype(int).tolist()
        return DataLoader(loader.dataset, batch_size=None, sampler=chosen, collate_fn=loader.collate_fn)
    size = _batch_size(loader)
    n = max(min(n, total // size), 1)
    spread = np.linspace(0, total, min(n * size, total), endpoint=False).astype(int)
    batches = [spread[first::n].tolist() for first in range(n)]  # each one spread over the whole set
    return DataLoader(loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn)


def _batch_size(loader: DataLoader[Any]) -> int:
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else len(next(iter(loader.batch_sampler or [[0]])))


def _loader_of(trainer: Trainer) -> DataLoader[Any]:
    loader = trainer.train_dataloader
    dataset = getattr(loader, "dataset", None)
    if isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
        return loader
    what = type(loader).__name__ + (f" over {type(dataset).__name__}" if dataset is not None else "")
    raise ValueError(
        "`repair` reads some training batches again: expected one DataLoader over a data set with a length as training "
        f"data, got {what}. Leave `repair` out, or train from such a loader."
    )
