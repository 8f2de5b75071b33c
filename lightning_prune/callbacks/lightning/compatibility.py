"""Refuse trainers, strategies, callbacks and modules that pruning does not support."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch.optim.swa_utils import AveragedModel

from lightning_prune.callbacks.lightning.checkpoints import StatefulCallback
from lightning_prune.callbacks.lightning.processes import refuse_strategy
from lightning_prune.callbacks.lightning.sharding import is_sharding
from lightning_prune.packages import both

__all__ = ["require_compatible"]


def require_compatible(callback: StatefulCallback, trainer: Trainer, module: LightningModule) -> None:
    """Check that trainer, strategy, callbacks and module support a cut.

    Args:
        callback: The pruning callback.
        trainer: The trainer of the run.
        module: The network.

    Raises:
        ValueError: If one does not.
    """
    name = type(callback).__name__
    refuse_strategy(name, trainer)
    if is_sharding(trainer) and (reason := callback.needs_whole_network) is not None:
        raise ValueError(
            f"{name}: expected settings that work with a sharded network, got {reason}. With `ModelParallelStrategy`, "
            "`StructuredPruning` and `ContributionPruning` can be used with criteria of weights (`L1`) and activations "
            "(`Contribution`)."
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(other, both(ModelPruning)) for other in callbacks):
        raise ValueError(
            f"{name}: expected no `ModelPruning` of Lightning beside it, which puts other parameters in place of the "
            "weights. Mask with `MagnitudePruning(layers=...)` of this package instead, which goes with cuts of other "
            "layers."
        )
    inside = [path for path, part in module.named_modules() if isinstance(part, AveragedModel)]
    if inside:
        raise ValueError(
            f"{name}: expected no averaged copy inside the module, got `{inside[0]}`: it would stay wide. Average with "
            "the callback `EMAWeightAveraging` of Lightning instead, whose copy is cut too."
        )
