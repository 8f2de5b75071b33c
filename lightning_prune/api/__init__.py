"""Functions that need no Trainer, and no Lightning."""

from lightning_prune.api.portable import load, save

__all__ = ["load", "save"]
