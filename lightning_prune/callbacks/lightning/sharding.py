"""FSDP2 in Lightning: what cannot be pruned yet, and checkpoints of narrower networks.

Lightning loads weights and optimizers of sharded networks before any hook of module or callbacks runs, so the network
is cut in the strategy's own `load_checkpoint`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_prune.callbacks.lightning.checkpoints import check_states
from lightning_prune.packages import both
from lightning_prune.structure.sharding import fit_groups, has_shards, require_supported
from lightning_prune.surgery import load_from
from lightning_prune.surgery.compiled import is_compiled

__all__ = ["is_sharding", "narrow_before_loading", "refuse_sharded"]

_WEIGHTS = "state_dict"


def is_sharding(trainer: Trainer) -> bool:
    """Whether the run shards its network by FSDP2."""
    return isinstance(trainer.strategy, both(ModelParallelStrategy))


def refuse_sharded(name: str, trainer: Trainer, module: LightningModule) -> None:
    """Raise an error for a sharded network that cannot be cut, once it is set up.

    Args:
        name: Name of the callback, for the message.
        trainer: The run.
        module: The network.

    Raises:
        ValueError: If it is not sharded by ``fully_shard`` along first dimensions only, compiled or averaged.
    """
    if not is_sharding(trainer):
        return
    if not has_shards(module):
        raise ValueError(
            f"{name}: expected a network that is sharded with `ModelParallelStrategy`, got one without a sharded "
            'parameter. Call `fully_shard` in `configure_model`, or use `strategy="ddp"`.'
        )
    averaging = (*both(WeightAveraging), *both(StochasticWeightAveraging))
    averages = [type(one).__name__ for one in trainer.callbacks if isinstance(one, averaging)]  # type: ignore[attr-defined]
    if averages or is_compiled(module):
        other = f"`{averages[0]}`" if averages else "`torch.compile`"
        raise ValueError(
            f"{name}: expected a sharded network without {other}, which cannot be cut with it yet. Leave it out, or "
            'use `strategy="ddp"`.'
        )
    try:
        require_supported(module)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def narrow_before_loading(trainer: Trainer) -> None:
    """Set the widths of a sharded network to those of a checkpoint before Lightning loads it; idempotent."""
    if is_sharding(trainer):
        vars(trainer.strategy)["load_checkpoint"] = partial(_load_checkpoint, trainer)


def _load_checkpoint(trainer: Trainer, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
    strategy, module = trainer.strategy, trainer.lightning_module
    checkpoint = _read(Path(strategy.broadcast(checkpoint_path)), weights_only)
    check_states(trainer, checkpoint)
    for optimizer in strategy.optimizers:  # those of a fit before, of other shapes; Lightning loads them too
        optimizer.zero_grad()
        optimizer.state.clear()
    try:
        load_from(checkpoint, module, strict=module.strict_loading)
    finally:
        fit_groups(module)
    loaded: dict[str, Any] = type(strategy).load_checkpoint(strategy, checkpoint_path, weights_only)
    return loaded


def _read(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint, of whose weights only the shapes are read into memory."""
    if not path.is_dir():
        whole: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        return whole
    checkpoint: dict[str, Any] = torch.load(path / _METADATA_FILENAME, map_location="cpu", weights_only=weights_only)
    entries = FileSystemReader(path).read_metadata().state_dict_metadata.items()
    weights = {
        name.removeprefix(f"{_WEIGHTS}."): torch.empty(entry.size, device="meta")
        for name, entry in entries
        if name.startswith(f"{_WEIGHTS}.") and isinstance(entry, TensorStorageMetadata)
    }
    return {**checkpoint, _WEIGHTS: weights}
