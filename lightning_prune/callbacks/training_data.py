"""Samples of the training data, read without touching the training loop's loader."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_prune.callbacks.traced_models import inputs_of
from lightning_prune.scoring import Batch, DataPass
from lightning_prune.scoring.sampling import batch_size_of
from lightning_prune.structure import TracedModel

__all__ = ["data_at_cut", "held_out_data", "is_readable", "require_readable", "step_loss", "training_data"]


def training_data(
    trainer: Trainer,
    module: LightningModule,
    *,
    batches: int | None = None,
    samples: int | None = None,
    per_class: int | None = None,
    seed: int = 0,
    labels: Callable[[Any], Any] | None = None,
    memory_limit: int = 2**30,
    is_shared: bool = True,
) -> DataPass:
    """Return samples of the training data, read lazily by a separate loader in this process.

    They are the same in every run, and the training loop is not affected. Batches have the dtype and device of
    training. With ``overfit_batches`` the samples are among those that the run trains on.

    Args:
        trainer: The trainer of the run.
        module: The network, whose batch transfer hooks are called.
        batches: Number of full batches of the loader's size.
        samples: Instead, maximum number of samples; all by default.
        per_class: Instead, number of samples per class.
        seed: Seed of the choice and the order.
        labels: Labels of a batch, see `DataPass`.
        memory_limit: Bytes of samples in memory.
        is_shared: Split the samples over the processes; otherwise each process reads all of them.

    Raises:
        ValueError: If the training data is not one loader over a data set with a length.
    """
    loader = require_readable(trainer, "this run", "Train from such a loader.")
    limit = loader.dataset.__len__()  # type: ignore[attr-defined]
    size = batch_size_of(loader) or 1
    overfits = bool(getattr(trainer, "overfit_batches", 0))
    if overfits:
        limit = min(limit, int(trainer.num_training_batches) * size)
    if loader.batch_sampler is None:  # the data set returns batches
        count = limit if batches is None else min(batches, limit)
        chosen: Any = np.linspace(0, limit, count, endpoint=False).astype(int).tolist()
        source = DataLoader(loader.dataset, batch_size=None, sampler=chosen, collate_fn=loader.collate_fn)
        batches = None
    elif overfits:
        source = DataLoader(Subset(loader.dataset, range(limit)), batch_size=size, collate_fn=loader.collate_fn)
    else:
        source = loader
    if samples is not None and loader.batch_sampler is not None:
        samples = min(samples, limit)
    if batches is not None:
        samples = min(max(min(batches, limit // size), 1) * size, limit)

    return DataPass(
        source,
        samples=samples,
        per_class=per_class,
        seed=seed,
        labels=labels,
        transfer=partial(_transferred, trainer, module),
        memory_limit=memory_limit,
        rank=trainer.global_rank if is_shared else 0,
        world_size=trainer.world_size if is_shared else 1,
    )


def held_out_data(asker: str, trainer: Trainer, module: LightningModule, traced: TracedModel, samples: int) -> DataPass:
    """Return samples of the validation data with the loss of a training step, split over the processes.

    Args:
        asker: What needs them, for messages.
        trainer: The trainer of the run.
        module: The network, whose batch transfer hooks are called.
        traced: How it is run.
        samples: Maximum number of samples; of several loaders, the first one's.

    Raises:
        ValueError: If there is no validation data that can be read by position.
    """
    loaders: Any = trainer.val_dataloaders
    loader: Any = next(iter(loaders), None) if isinstance(loaders, (list, tuple)) else loaders
    dataset: Any = getattr(loader, "dataset", None)
    if not trainer.num_val_batches or not _has_positions(loader):
        got = "none" if loader is None or not trainer.num_val_batches else type(loader).__name__
        what = f" over {type(dataset).__name__}" if dataset is not None and got != "none" else ""
        raise ValueError(
            f"{asker} measures the loss on validation data: expected a DataLoader over a data set with a length, got "
            f"{got}{what}. Give the fit `val_dataloaders`, and no `limit_val_batches=0`."
        )
    source = loader
    if loader.batch_sampler is None:  # the data set returns batches
        order: Any = range(len(dataset))
        source = DataLoader(dataset, batch_size=None, sampler=order, collate_fn=loader.collate_fn)
    else:
        samples = min(samples, len(dataset))
    remedy = f"{asker} cannot measure without one."
    return DataPass(
        source,
        samples=samples,
        loss=step_loss(traced, remedy),
        transfer=partial(_transferred, trainer, module),
        rank=trainer.global_rank,
        world_size=trainer.world_size,
    )


def _transferred(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def data_at_cut(
    trainer: Trainer, module: LightningModule, traced: TracedModel, batch: Any, amount: Mapping[str, int]
) -> DataPass:
    """Return the data of a criterion at a cut: samples of the training data, or one batch if it cannot be read.

    Args:
        trainer: The trainer of the run.
        module: The network.
        traced: How it is run.
        batch: The current training batch.
        amount: How much data, see `Criterion.amount`.
    """
    loss = step_loss(traced) if traced.optional else None
    inputs = inputs_of(module, batch, traced)
    at_hand = DataPass([batch]).using(loss=loss, inputs=inputs)
    if not is_readable(trainer):
        return at_hand
    counts: Any = {**amount}
    if "batches" in counts:  # per process
        counts["batches"] *= trainer.world_size
    data = training_data(trainer, module, **counts).using(loss=loss, inputs=inputs)
    try:
        with warnings.catch_warnings():  # the amounts of a criterion are upper limits
            warnings.filterwarnings("ignore", "expected .* samples")
            len(data)
    except ValueError as error:
        if "per_class" not in amount:
            raise
        warnings.warn(f"scores are taken on a single batch: {error}", stacklevel=2)
        return at_hand
    return data


def step_loss(
    traced: TracedModel,
    remedy: str = "Choose another criterion (SNIP or Taylor observe any training, manual optimization too).",
) -> Callable[[nn.Module, Batch], Tensor]:
    """Return a function that computes the loss of a training step on a prepared copy of the module.

    Args:
        traced: How the module is run.
        remedy: What to do if it returns no loss, for the message.
    """
    (step,) = traced.optional

    def loss(copy: nn.Module, batch: Batch) -> Tensor:
        result = getattr(copy, step.method)(batch.raw, *step.args[1:])
        found = result.get("loss") if isinstance(result, Mapping) else result
        if isinstance(found, Tensor):
            return found
        raise ValueError(f"expected a `training_step` that returns a loss, got {type(result).__name__}. {remedy}")

    return loss


def is_readable(trainer: Trainer) -> bool:
    """Whether samples of the training data can be read by their position."""
    return _has_positions(trainer.train_dataloader)


def _has_positions(loader: object) -> bool:
    dataset = getattr(loader, "dataset", None)
    return isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")


def require_readable(
    trainer: Trainer, reader: str, remedy: str = "Leave it out of `extensions`, or train from such a loader."
) -> DataLoader[Any]:
    """Return the training loader.

    Args:
        trainer: The trainer of the run.
        reader: What reads the samples, for the message.
        remedy: What to do, for the message.

    Raises:
        ValueError: If samples cannot be read by their position.
    """
    loader: Any = trainer.train_dataloader
    if is_readable(trainer):
        return loader  # type: ignore[no-any-return]
    dataset = getattr(loader, "dataset", None)
    what = type(loader).__name__ + (f" over {type(dataset).__name__}" if dataset is not None else "")
    raise ValueError(
        f"{reader} reads some training batches again: expected one DataLoader over a data set with a length as "
        f"training data, got {what}. {remedy}"
    )
