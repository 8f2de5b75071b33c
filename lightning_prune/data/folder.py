"""A folder of images, one sub-folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch

from lightning_prune.data.tensors import ImageData, ImageTensors
from lightning_prune.extras import require

__all__ = ["ImageFolder"]


@final
class ImageFolder(ImageData):
    """Images of ``root/<class>/<file>``, resized, cropped to a square and held in memory.

    A fifth is the test set, drawn independently of ``seed``. Colours are normalised by ImageNet's mean and standard
    deviation, as pretrained networks expect. Memory: 12·size² bytes an image, 0.2 MB at 128 pixels.

    Args:
        root: The folder.
        size: Height and width of the images after resizing the shorter side and cropping the centre.
        batch_size: Images in a batch.
        val_share: Share of the training images that is held out for validation, in (0, 1).
        train_limit: Train on this many images only (drawn after the validation images); ``None`` for all.
        augment: Crop and mirror training images at random.
        seed: Seed of the validation split, the order and the augmentation.
    """

    def __init__(
        self,
        root: str,
        size: int = 128,
        batch_size: int = 128,
        val_share: float = 0.1,
        train_limit: int | None = None,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, val_share, train_limit, augment, seed)
        if size < 1:
            raise ValueError(f"ImageFolder: expected `size` of at least 1 pixel, got {size}.")
        self.root = root
        self.size = size

    def load(self) -> tuple[ImageTensors, ImageTensors]:
        """Four fifths for training, one fifth for the test.

        Raises:
            FileNotFoundError: If the folder does not exist, or has no sub-folder with images.
        """
        if not Path(self.root).is_dir():
            raise FileNotFoundError(
                f"ImageFolder: expected a folder with one sub-folder of images per class, got {self.root!r}, which is "
                "none. Name it by `root`."
            )
        transforms = require("torchvision.transforms", extra="vision")
        prepare = transforms.Compose(
            [
                transforms.Resize(self.size),
                transforms.CenterCrop(self.size),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        source = require("torchvision.datasets", extra="vision").ImageFolder(self.root, prepare)
        images = torch.stack([image for image, _ in source])
        return ImageTensors(images, torch.tensor(source.targets)).split(0.2, seed=0)
