"""Which part of a run's network is its backbone, as far as a callback or the network itself tells."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch import nn

from lightning_prune.reporting import backbone_modules

__all__ = ["NamesHead", "backbone_in"]


class NamesHead:
    """What a callback has in common that can be told which modules are the head.

    Attributes:
        head: Names or globs of the modules that are the head; None if that is left to be found.
    """

    head: str | list[str] | None


def backbone_in(trainer: Trainer, module: nn.Module) -> frozenset[str] | None:
    """The modules of the backbone, by the first callback that names a head, else as `backbone_modules` finds it."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    named = (one.head for one in callbacks if isinstance(one, NamesHead) and one.head is not None)
    return backbone_modules(module, next(named, None))
