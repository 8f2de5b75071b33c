"""Modules for runs of the command line."""

from __future__ import annotations

from typing import Any

import torch

from lightning_prune.models.classifier import Classifier


class FixedSchedule(Classifier):
    """A linear classifier whose learning rate ends after a fixed number of epochs."""

    def __init__(self, length: int = 2) -> None:
        super().__init__((1, 8, 8), 10)
        self.length = length
        self.hidden = torch.nn.Linear(64, 8)
        self.out = torch.nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        out: torch.Tensor = self.out(self.hidden(images.flatten(1)).relu())
        return out

    def configure_optimizers(self) -> Any:
        """A cosine of the fixed length."""
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.length)]
