"""What a LightningModule needs beyond other networks; Lightning itself is not imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from torch import nn
    from typing_extensions import TypeIs

__all__ = ["is_cut_extension", "is_lightning_module", "keep_history"]


def is_lightning_module(model: nn.Module) -> TypeIs[LightningModule]:
    """Whether a network is a LightningModule, of which there is none before Lightning is imported."""
    packages = [sys.modules.get(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    return any(package is not None and isinstance(model, package.LightningModule) for package in packages)


def keep_history(model: nn.Module) -> None:
    """Save the history in the checkpoints of a LightningModule; other networks have none."""
    if is_lightning_module(model):
        from lightning_prune.callbacks.lightning import checkpoints

        checkpoints.keep_history(model)


def is_cut_extension(extension: object) -> bool:
    """Whether an extension goes with the cuts of a run."""
    if "lightning_prune.callbacks" not in sys.modules:
        return False
    from lightning_prune.callbacks.extensions.extension import CutExtension

    return isinstance(extension, CutExtension)
