"""The backbone of a run's network."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch import nn

from lightning_prune.reporting import backbone_modules

__all__ = ["NamesHead", "backbone_in"]


class NamesHead:
    """Mixin of callbacks with an argument ``head``.

    Attributes:
        head: Names or globs of the modules that form the head; None to detect it.
    """

    head: str | list[str] | None


def backbone_in(trainer: Trainer, module: nn.Module) -> frozenset[str] | None:
    """Modules of the backbone, by the first callback with a ``head``, else as detected by `backbone_modules`."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    named = (one.head for one in callbacks if isinstance(one, NamesHead) and one.head is not None)
    return backbone_modules(module, next(named, None))
