"""Image data sets that are too large for memory: images are read when needed."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_prune.data.tensors import ShuffledByEpoch

__all__ = ["StreamedImages"]


class StreamedImages(LightningDataModule):
    """Base class of data modules whose parts are data sets on disk.

    The order of an epoch is a function of seed and epoch, so that a resumed run sees the same batches.

    Args:
        batch_size: Images per batch.
        workers: Processes that read images; they live as long as the loader.
        seed: Seed of the order.
    """

    def __init__(self, batch_size: int, workers: int, seed: int) -> None:
        super().__init__()
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        #: Data sets by part, such as ``"train"``; filled by ``setup``.
        self._parts: dict[str, Any] = {}

    def train_dataloader(self) -> DataLoader[Any]:
        """Training images with their labels, shuffled."""
        return self._loader("train", ShuffledByEpoch(len(self._parts["train"]), self.seed))

    def _loader(self, part: str, sampler: ShuffledByEpoch | None = None) -> DataLoader[Any]:
        return DataLoader(
            self._parts[part],
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
