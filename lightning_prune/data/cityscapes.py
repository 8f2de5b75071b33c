"""Cityscapes, read by torchvision: street scenes with the class of every pixel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from lightning_prune.data.streamed import StreamedImages
from lightning_prune.extras import require

__all__ = ["Cityscapes"]

#: Label of pixels without a class.
_IGNORED = 255
# Of ImageNet, as pretrained encoders expect.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@final
class Cityscapes(StreamedImages):
    """2,975 training and 500 validation street scenes with fine annotations of 19 classes (Cordts et al., 2016).

    Images are resized and normalised. Labels ``(height, width)`` are the benchmark's 19 training classes, and 255 for
    other pixels. The official validation images are used for validation and test, because the labels of the test set
    are not public. The order of an epoch is a function of seed and epoch, so that a resumed run sees the same batches.

    The data set is not downloaded, because it needs an account. The message of `FileNotFoundError` describes the
    expected files.

    Args:
        root: Folder that contains ``leftImg8bit`` and ``gtFine``; by default the folder in the environment variable
            ``LIGHTNING_PRUNE_DATA``, else the working folder.
        height: Height of the resized images in pixels; the originals are 1024×2048.
        width: Width of the resized images in pixels.
        batch_size: Images per batch.
        train_limit: Train on this many of the first training images only; ``None`` for all.
        workers: Processes that read and resize images.
        seed: Seed of the order.

    Raises:
        ValueError: For a number below 1.
    """

    num_classes = 19

    def __init__(
        self,
        root: str | None = None,
        height: int = 256,
        width: int = 512,
        batch_size: int = 8,
        train_limit: int | None = None,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed)
        counts = {"height": height, "width": width, "batch_size": batch_size, "train_limit": train_limit}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"Cityscapes: expected `{name}` of at least 1, got {value}.")
        self.root = Path(root or os.environ.get("LIGHTNING_PRUNE_DATA") or ".")
        self.height, self.width = height, width
        self.train_limit = train_limit

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """List the images, for any stage; they are read when needed.

        Raises:
            FileNotFoundError: If the data set is missing or incomplete.
        """
        if not self._parts:
            self._parts = {"train": self._open("train", self.train_limit), "val": self._open("val", None)}

    def val_dataloader(self) -> DataLoader[Any]:
        """The official validation images in the order of their names."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The same images."""
        return self._loader("val")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The same images."""
        return self._loader("val")

    def _open(self, part: str, limit: int | None) -> Subset[Any]:
        dataset = require("torchvision.datasets", extra="vision").Cityscapes
        table = torch.full((256,), _IGNORED)
        for kind in dataset.classes:
            if 0 <= kind.train_id < _IGNORED:
                table[kind.id] = kind.train_id
        try:
            found = dataset(
                str(self.root),
                split=part,
                target_type="semantic",
                transforms=_Prepared(self.height, self.width, tuple(table.tolist())),
            )
        except RuntimeError as error:
            raise self._missing(part) from error
        if not len(found):
            raise self._missing(part)
        order = sorted(range(len(found)), key=found.images.__getitem__)  # folders are listed in any order
        return Subset(found, order[:limit])

    def _missing(self, part: str) -> FileNotFoundError:
        return FileNotFoundError(
            f"Cityscapes: expected the folders leftImg8bit/{part} and gtFine/{part}, with a sub-folder for each city, "
            f"under {self.root}, but they are missing or empty. Get leftImg8bit_trainvaltest.zip and "
            "gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com, unpack them there, and give the folder "
            "as `root` or in the environment variable LIGHTNING_PRUNE_DATA."
        )


class _Prepared(NamedTuple):
    """Converts an image and its annotation to tensors."""

    height: int
    width: int
    classes: tuple[int, ...]

    def __call__(self, image: Any, target: Any) -> tuple[Tensor, Tensor]:
        tensor = require("torchvision.transforms.functional", extra="vision").pil_to_tensor
        size, (mean, std) = (self.height, self.width), (torch.tensor(fact).view(3, 1, 1) for fact in (_MEAN, _STD))
        pixels = F.interpolate(tensor(image)[None] / 255, size, mode="bilinear", antialias=True)[0]
        labels = F.interpolate(tensor(target)[None].float(), size, mode="nearest-exact")[0, 0].long()
        return (pixels - mean) / std, torch.tensor(self.classes)[labels]
