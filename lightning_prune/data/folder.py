"""A folder of images, one sub-folder per class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_prune.data.tensors import ImageData, ImageTensors
from lightning_prune.extras import require

__all__ = ["ImageFolder"]


@final
class ImageFolder(ImageData):
    """Images ``root/<class>/<file>``, resized, cropped to a square and kept in memory.

    If ``root`` contains ``train`` and ``val`` (or ``test``), each with one sub-folder per class, ``train`` is used for
    training and the other one as the test set. Otherwise a fifth is the test set, drawn independently of ``seed``.
    Memory: 12·size² bytes per image, 0.2 MB at 128 pixels.

    Args:
        root: The folder; required.
        size: Height and width of the images after resizing the shorter side and cropping the centre.
        batch_size: Images per batch.
        val_share: Share of the training images that is held out for validation, in [0, 1); with 0 the test images are.
        train_limit: Train on this many images only (drawn after the validation images); ``None`` for all.
        augment: Crop and mirror training images at random.
        seed: Seed of the validation split, the order and the augmentation.
        classes: Use only these classes, such as ``["roses", "tulips"]``, numbered in alphabetical order. Default: all.
        mean: Mean of each colour channel, for pixels in [0, 1]; the default is ImageNet's, as most pretrained networks
            expect.
        std: Standard deviation of each colour channel.
        cache: Folder for the decoded images, one byte per colour, which later runs read in a second. Default: none.
    """

    def __init__(
        self,
        root: str | None = None,
        size: int = 128,
        batch_size: int = 128,
        val_share: float = 0.1,
        train_limit: int | None = None,
        augment: bool = False,
        seed: int = 0,
        classes: list[str] | None = None,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        cache: str | None = None,
    ) -> None:
        super().__init__(batch_size, val_share, train_limit, augment, seed)
        if root is None:
            raise ValueError(
                "ImageFolder: expected `root`, a folder with one sub-folder of images per class, got none. Give "
                "`--data.root FOLDER`."
            )
        if size < 1:
            raise ValueError(f"ImageFolder: expected `size` of at least 1 pixel, got {size}.")
        if min(std) <= 0:
            raise ValueError(f"ImageFolder: expected `std` above 0, got {std}.")
        if classes is not None and len(set(classes)) < 2:
            raise ValueError(f"ImageFolder: expected at least two `classes`, got {classes}. Omit it for all.")
        self.root = root
        self.size = size
        self.classes = None if classes is None else sorted(set(classes))
        self.mean, self.std = mean, std
        self.cache = cache

    def load(self) -> tuple[ImageTensors, ImageTensors]:
        """Training and test images.

        Raises:
            FileNotFoundError: If the folder does not exist, or has no sub-folder with images.
            ValueError: If one of the ``classes`` does not exist.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise FileNotFoundError(
                f"ImageFolder: expected a folder with one sub-folder of images per class, got {self.root!r}, which is "
                "not one. Give it as `root`."
            )
        test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
        if (root / "train").is_dir() and test is not None:
            return self._read(root / "train"), self._read(test)
        return self._read(root).split(0.2, seed=0)

    def _read(self, folder: Path) -> ImageTensors:
        source = require("torchvision.datasets", extra="vision").ImageFolder(str(folder))
        wanted = source.classes if self.classes is None else self.classes
        missing = sorted(set(wanted) - set(source.classes))
        if missing:
            raise ValueError(
                f"ImageFolder: expected `classes` among {source.classes} of {str(folder)!r}, got {', '.join(missing)}."
            )
        files = [(path, wanted.index(name)) for path, i in source.samples if (name := source.classes[i]) in wanted]
        pixels = self._pixels(source, [path for path, _ in files], folder)
        mean, std = (torch.tensor(fact).view(1, -1, 1, 1) for fact in (self.mean, self.std))
        return ImageTensors((pixels / 255).sub_(mean).div_(std), torch.tensor([label for _, label in files]))

    def _pixels(self, source: Any, paths: Sequence[str], folder: Path) -> Tensor:
        """The images as bytes ``(n, 3, size, size)``, from the cache if possible."""
        if self.cache is None:
            return self._decoded(source, paths)
        sizes = [(str(Path(path).relative_to(folder)), Path(path).stat().st_size) for path in paths]
        key = hashlib.sha256(repr((self.size, sizes)).encode()).hexdigest()[:16]
        file = Path(self.cache) / f"images-{self.size}-{key}.pt"
        if file.is_file():
            stored: Tensor = torch.load(file, weights_only=True)
            return stored
        pixels = self._decoded(source, paths)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        torch.save(pixels, part)
        part.replace(file)  # the final name never refers to a partial file
        return pixels

    def _decoded(self, source: Any, paths: Sequence[str]) -> Tensor:
        transforms = require("torchvision.transforms", extra="vision")
        prepare = transforms.Compose(
            [transforms.Resize(self.size), transforms.CenterCrop(self.size), transforms.PILToTensor()]
        )
        return torch.stack([prepare(source.loader(path)) for path in paths])
