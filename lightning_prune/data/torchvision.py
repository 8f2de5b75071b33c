"""MNIST, Fashion-MNIST and CIFAR, read by torchvision."""

from __future__ import annotations

import os
from abc import ABC
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_prune.data.tensors import ImageData, ImageTensors
from lightning_prune.extras import require

__all__ = ["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"]


class _Torchvision(ImageData, ABC):
    """A data set that torchvision has under the same class name.

    Args:
        root: Folder that contains the data set in torchvision's layout; by default the folder in the environment
            variable ``LIGHTNING_PRUNE_DATA``. Without either, it is downloaded once to the user's cache folder.
        batch_size: Images per batch.
        val_share: Share of the training images that is held out for validation, in [0, 1); with 0 the test images are.
        train_limit: Train on this many images only (drawn after the validation images); ``None`` for all.
        augment: Crop training images at random, with 4 black pixels added on each side, and mirror them. Not suitable
            for digits and letters, which mirroring changes.
        seed: Seed of the validation split, the order and the augmentation.
        normalize: Subtract the mean and divide by the standard deviation of each channel; otherwise pixels are in
            [0, 1].
        size: Resize the images to this height and width; by default they are not resized.
        rgb: Repeat grey images to three channels, as networks for photographs expect.
        split_seed: Seed of the validation split alone, so that runs with different seeds share one; by default
            ``seed``.
    """

    #: Mean and standard deviation of each channel over the training images, pixels in [0, 1].
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        val_share: float = 0.1,
        train_limit: int | None = None,
        augment: bool = False,
        seed: int = 0,
        normalize: bool = True,
        size: int | None = None,
        rgb: bool = False,
        split_seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, val_share, train_limit, augment, seed, split_seed)
        if size is not None and size < 1:
            raise ValueError(f"{type(self).__name__}: expected `size` of at least 1 pixel, got {size}.")
        self.normalize = normalize
        self.size, self.rgb = size, rgb
        self.root = root or os.environ.get("LIGHTNING_PRUNE_DATA")

    def prepare_data(self) -> None:
        """Download to the cache folder if no folder was given."""
        if not self.root:
            self._open(train=True, download=True)

    def load(self) -> tuple[ImageTensors, ImageTensors]:
        """The official training and test images.

        Raises:
            FileNotFoundError: If the data set is missing or incomplete.
        """
        return self._read(train=True), self._read(train=False)

    def _open(self, train: bool, download: bool) -> Any:
        dataset = getattr(require("torchvision.datasets", extra="vision"), type(self).__name__)
        return dataset(str(self._folder), train=train, download=download)

    def _read(self, train: bool) -> ImageTensors:
        try:
            source = self._open(train, download=False)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{type(self).__name__}: expected its files under {self._folder} in torchvision's layout, found no "
                "complete set. Give their folder as `root` or in the environment variable LIGHTNING_PRUNE_DATA, or "
                "omit both to download them."
            ) from error
        pixels = torch.as_tensor(source.data)
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        mean, std = (fact.view(1, -1, 1, 1) for fact in self._normalisation)
        images = (pixels / 255 - mean) / std if self.normalize else pixels / 255
        if self.size is not None and self.size != images.shape[-1]:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        if self.rgb and images.shape[1] == 1:
            images = images.repeat(1, 3, 1, 1)
        return ImageTensors(images, torch.as_tensor(source.targets).long())

    @property
    @override
    def _black(self) -> Tensor | float:
        mean, std = self._normalisation
        return -mean / std if self.normalize else 0.0

    @property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean), torch.tensor(self.std)

    @property
    def _folder(self) -> Path:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(self.root) if self.root else Path(cache) / "lightning_prune"


@final
class MNIST(_Torchvision):
    """70,000 handwritten digits, 28×28 grey, 10,000 of them for testing (LeCun et al., 1998)."""

    mean = (0.1307,)
    std = (0.3081,)


@final
class FashionMNIST(_Torchvision):
    """70,000 pieces of clothing in ten classes, 28×28 grey, 10,000 of them for testing (Xiao et al., 2017)."""

    mean = (0.2860,)
    std = (0.3530,)


@final
class CIFAR10(_Torchvision):
    """60,000 photographs in ten classes, 32×32 colour, 10,000 of them for testing (Krizhevsky, 2009)."""

    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)


@final
class CIFAR100(_Torchvision):
    """60,000 photographs in a hundred classes, 32×32 colour, 10,000 of them for testing (Krizhevsky, 2009)."""

    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
