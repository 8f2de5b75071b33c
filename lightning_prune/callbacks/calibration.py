"""Batches of the training data for repairs, apart from the loop that trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.structure import Subject
from lightning_prune.structure.tracing import FakeCopy, forked_rng

__all__ = ["Calibration"]


class Calibration:
    """Runs training batches through copies of a module, without a trace in module, loop and random states.

    The samples are spread evenly over the data set, so that a sorted one is seen whole, and are the same every time:
    a run that was interrupted repairs as one that never stopped. A fresh loader in this process reads them. The batches
    go through ``training_step``, on a copy whose logging, metrics and optimizers do nothing.

    Args:
        trainer: The run, whose training data and devices are used.
        module: The module that trains.
        subject: How copies of it are made.
        reader: Who reads batches, for texts; ``None`` if nobody does.

    Raises:
        ValueError: If the training data is needed and not one loader over a data set with a length.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, subject: Subject, *, reader: str | None) -> None:
        self.trainer, self.module, self.subject = trainer, module, subject
        self.loader = None if reader is None else _loader_of(trainer, reader)

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


def _loader_of(trainer: Trainer, reader: str) -> DataLoader[Any]:
    loader = trainer.train_dataloader
    dataset = getattr(loader, "dataset", None)
    if isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__"):
        return loader
    what = type(loader).__name__ + (f" over {type(dataset).__name__}" if dataset is not None else "")
    raise ValueError(
        f"{reader} reads some training batches again: expected one DataLoader over a data set with a length as "
        f"training data, got {what}. Leave it out of `extensions`, or train from such a loader."
    )
