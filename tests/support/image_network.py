"""A small network for images, for tests and benchmarks that try every method on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

_SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Images(LightningModule):
    """Two convolutions and a head, on images of three channels and any size; ``loss`` is logged as ``train_loss``.

    Args:
        widths: Channels of the convolutions.
        classes: What the head tells apart.
        optimizer: Makes the optimizer of the parameters.
    """

    def __init__(
        self,
        widths: tuple[int, int] = (8, 8),
        classes: int = 3,
        optimizer: Callable[[Any], Optimizer] = _SGD,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = widths
        self.optimizer = optimizer
        self.body = nn.Sequential(
            *(nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Linear(second, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.parameters())
