"""Images that fit into memory: one gather per batch; splits and augmentation depend on the seed only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_prune.scoring.sampling import NO_CLASS

__all__ = ["Batch", "ImageData", "ImageTensors", "ShuffledByEpoch", "crop_and_mirror"]

#: Images ``(batch, channels, height, width)`` and labels ``(batch,)``.
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ImageTensors:
    """Images and their labels.

    Attributes:
        images: Normalised, float32, ``(n, channels, height, width)``.
        labels: Class indices, int64, ``(n,)``.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> ImageTensors:
        """The images at ``indices``."""
        return ImageTensors(self.images[indices], self.labels[indices])

    def split(self, share: float, seed: int) -> tuple[ImageTensors, ImageTensors]:
        """Two parts of a random permutation drawn from ``seed``; the second has ``share`` of the images, in [0, 1)."""
        order = torch.randperm(len(self), generator=_generator(seed))
        held_out = round(share * len(self))
        return self.take(order[held_out:]), self.take(order[:held_out])


class ImageData(LightningDataModule):
    """Base class of the data modules: subclasses implement ``load``, which returns training and test images.

    The order of an epoch and its augmentation are functions of seed and epoch, so that a resumed run sees the same
    batches as an uninterrupted one.

    Args:
        batch_size: Images per batch.
        val_share: Share of the training images that is held out for validation, in [0, 1). With 0, all of them are used
            for training and the test images for validation, as in papers that select on the test set; report this with
            such results.
        train_limit: Train on this many images only (drawn after the validation images); ``None`` for all.
        augment: Crop and mirror training images at random. Not for digits and letters, which mirroring changes.
        seed: Seed of the validation split, the order and the augmentation.
        split_seed: Seed of the validation split alone, so that runs with different seeds share one; by default
            ``seed``.
    """

    def __init__(
        self,
        batch_size: int = 128,
        val_share: float = 0.1,
        train_limit: int | None = None,
        augment: bool = False,
        seed: int = 0,
        split_seed: int | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not 0 <= val_share < 1:
            raise ValueError(f"{name}: expected `val_share` in [0, 1), got {val_share}. Use 0.1 for a tenth.")
        if batch_size < 1:
            raise ValueError(f"{name}: expected `batch_size` of at least 1, got {batch_size}.")
        if train_limit is not None and train_limit < 1:
            raise ValueError(f"{name}: expected `train_limit` of at least 1, got {train_limit}. Omit it for all.")
        for which, number in (("seed", seed), ("split_seed", split_seed)):
            if number is not None and number < 0:
                raise ValueError(f"{name}: expected `{which}` of at least 0, got {number}.")
        self.batch_size = batch_size
        self.val_share = val_share
        self.train_limit = train_limit
        self.augment = augment
        self.seed = seed
        self.split_seed = seed if split_seed is None else split_seed
        self._splits: dict[str, ImageTensors] = {}

    @abstractmethod
    def load(self) -> tuple[ImageTensors, ImageTensors]:
        """Training and test images, in their original order."""

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Load and split once, for any stage.

        Raises:
            ValueError: If there are too few images for the three parts.
        """
        if self._splits:
            return
        train, test = self.load()
        train, val = train.split(self.val_share, self.split_seed) if self.val_share else (train, test)
        if self.train_limit is not None:
            # A split shuffles. Without one, images of a folder are in the order of their classes.
            drawn = train if self.val_share else train.split(0.0, self.split_seed)[0]
            train = drawn.take(torch.arange(min(self.train_limit, len(train))))
        for part, images in (("training", train), ("validation", val), ("the test", test)):
            if not len(images):
                raise ValueError(
                    f"{type(self).__name__}: expected images in every part, got none for {part} "
                    f"({len(train)} for training, {len(val)} for validation, {len(test)} for the test). "
                    "Use more images, or hold out another share."
                )
        self._splits = {"train": train, "val": val, "test": test}

    @property
    def num_classes(self) -> int:
        """Number of classes: the largest label plus one, without 255 for pixels. Available after `setup`."""
        labels = [part.labels for part in self._splits.values()]
        return 1 + max(int(one[one != NO_CLASS].max() if one.ndim > 1 else one.max()) for one in labels)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training images, shuffled, and augmented if asked for."""
        train = self._splits["train"]
        batches = _Batches(train, self._augmented if self.augment else None)
        return self._loader(batches, ShuffledByEpoch(len(train), self.seed))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation images in a fixed order."""
        return self._loader(_Batches(self._splits["val"]))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test images in a fixed order."""
        return self._loader(_Batches(self._splits["test"]))

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test images again."""
        return self.test_dataloader()

    def _loader(self, batches: _Batches, sampler: ShuffledByEpoch | None = None) -> DataLoader[Batch]:
        # No worker processes: a batch is one gather, much cheaper than sending it between processes.
        # By keyword, because Lightning recreates the loader with its own arguments.
        return DataLoader(batches, batch_size=self.batch_size, sampler=sampler, collate_fn=_as_it_is)

    def _augmented(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        epoch = self.trainer.current_epoch if self.trainer else 0
        # The first index identifies a batch within an epoch, on every rank.
        return crop_and_mirror(images, _generator(self.seed, epoch, indices[0]), fill=self._black)

    @property
    def _black(self) -> Tensor | float:
        """The value of a zero pixel after normalisation, one value or one per channel."""
        return 0.0


def crop_and_mirror(images: Tensor, generator: torch.Generator, padding: int = 4, fill: Tensor | float = 0.0) -> Tensor:
    """CIFAR's usual augmentation: a random crop of the padded image, mirrored with probability one half.

    Args:
        images: ``(batch, channels, height, width)``.
        generator: Source of all random numbers.
        padding: Pixels added on each side before the crop.
        fill: Their value, one or one per channel. 0 is the mean colour of normalised images.
    """
    count, channels, height, width = images.shape
    padded = images.new_empty(count, channels, height + 2 * padding, width + 2 * padding)
    padded[:] = torch.as_tensor(fill, dtype=images.dtype).view(-1, 1, 1)
    padded[:, :, padding : padding + height, padding : padding + width] = images
    down, right = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    mirror = torch.rand(count, 1, generator=generator) < 0.5
    rows = down + torch.arange(height)
    columns = right + torch.where(mirror, torch.arange(width).flip(0), torch.arange(width))
    return padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


class _Batches(Dataset[Batch]):
    """Returns whole batches: DataLoader prefers ``__getitems__`` to one call per sample."""

    def __init__(self, data: ImageTensors, augmented: Callable[[Tensor, Sequence[int]], Tensor] | None = None) -> None:
        self.data = data
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        batch = self.data.take(torch.tensor(indices))
        images = self.augmented(batch.images, indices) if self.augmented else batch.images
        return images, batch.labels


class ShuffledByEpoch(Sampler[int]):
    """A permutation drawn from seed and epoch, so that a resumed run sees the batches of an uninterrupted one."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=_generator(self.seed, self.epoch)).tolist())


def _as_it_is(batch: Any) -> Any:
    return batch


def _generator(*seeds: int) -> torch.Generator:
    # SeedSequence, unlike a sum, distinguishes (1, 2) from (2, 1), and is the same on every platform.
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
