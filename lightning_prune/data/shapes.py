"""Generated images with a class per pixel: a segmentation task that needs no download."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from lightning_prune.data.tensors import ImageData, ImageTensors

__all__ = ["Shapes"]


@final
class Shapes(ImageData):
    """Discs, squares and triangles with random positions, sizes and colours, on a noisy background.

    Labels are the class of every pixel, int64, ``(n, size, size)``: 0 background, 1 disc, 2 square, 3 triangle. Colours
    are independent of the class, and later shapes cover earlier ones. The images depend on ``count`` and ``size`` only;
    a fifth is the test set.

    Args:
        count: Number of images.
        size: Height and width in pixels.
        batch_size: Images per batch.
        val_share: Share of the training images that is held out for validation, in [0, 1); with 0 the test images are.
        train_limit: Train on this many images only; ``None`` for all.
        seed: Seed of the validation split and the order.

    Raises:
        ValueError: If there are fewer than 10 images, or they are smaller than 16 pixels.
    """

    def __init__(
        self,
        count: int = 1000,
        size: int = 32,
        batch_size: int = 32,
        val_share: float = 0.1,
        train_limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, val_share, train_limit, augment=False, seed=seed)
        if count < 10 or size < 16:
            raise ValueError(
                f"Shapes: expected a `count` of at least 10 and a `size` of at least 16, got {count}, {size}"
            )
        self.count, self.size = count, size

    def load(self) -> tuple[ImageTensors, ImageTensors]:
        """Four fifths for training, one fifth for the test."""
        return _drawn(self.count, self.size).split(0.2, seed=0)


def _drawn(count: int, size: int, shapes: int = 3) -> ImageTensors:
    draw = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draw)

    images = uniform(-0.5, 0.5, 3, 1, 1) + 0.15 * torch.randn(count, 3, size, size, generator=draw)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for _ in range(shapes):
        kind = torch.randint(1, 4, (count,), generator=draw)
        radius = uniform(0.12, 0.25, 1, 1) * size
        y, x = (uniform(0.15, 0.85, 1, 1) * size - axis for axis in (rows, columns))
        inside = torch.stack(
            [
                y**2 + x**2 <= radius**2,
                torch.maximum(y.abs(), x.abs()) <= 0.85 * radius,
                (y <= 0.8 * radius) & (2 * x.abs() <= 1.2 * radius - y),
            ]
        )[kind - 1, torch.arange(count)]
        labels = torch.where(inside, kind[:, None, None], labels)
        images = torch.where(inside[:, None], uniform(-2, 2, 3, 1, 1) + 0.15 * images, images)
    return ImageTensors(images, labels)
