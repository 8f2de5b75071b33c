"""Handwritten digits that need no download."""

from __future__ import annotations

from typing import final

import torch

from lightning_prune.data.tensors import ImageData, ImageTensors
from lightning_prune.extras import require

__all__ = ["Digits"]


@final
class Digits(ImageData):
    """The 1797 digits of 8×8 pixels in scikit-learn (UCI "Optical Recognition of Handwritten Digits").

    A fifth is the test set. It does not depend on ``seed``, so that runs with different seeds share it. Pixel values
    are scaled from [0, 16] to [-1, 1].
    """

    def load(self) -> tuple[ImageTensors, ImageTensors]:
        """Four fifths for training, one fifth for the test."""
        digits = require("sklearn.datasets", extra="digits").load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
        return ImageTensors(images, torch.from_numpy(digits.target).long()).split(0.2, seed=0)
