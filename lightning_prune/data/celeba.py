"""CelebA, read by torchvision from disk, because it does not fit into memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, final

from torch.utils.data import DataLoader, Subset

from lightning_prune.data.streamed import StreamedImages
from lightning_prune.extras import require

__all__ = ["CelebA"]

# Side of the square that is cropped from the aligned images (178×218): the face without its surroundings.
_FACE = 148


@final
class CelebA(StreamedImages):
    """202,599 faces of celebrities with 40 attributes (Liu et al., 2015), with the official three-way split.

    Images are cropped to their centre and resized; pixels are in [0, 1], as an autoencoder's loss expects. The order
    of an epoch is a function of seed and epoch, so that a resumed run sees the same batches.

    The data set is not downloaded: its licence is for research only, and the server that torchvision uses refuses many
    requests. The message of `FileNotFoundError` describes the expected files.

    Args:
        root: Folder that contains ``celeba`` in torchvision's layout; by default the folder in the environment
            variable ``LIGHTNING_PRUNE_DATA``, else the working folder.
        size: Height and width of the images.
        batch_size: Images per batch.
        train_limit: Train on this many of the first training images only; ``None`` for all.
        workers: Processes that read and resize images.
        seed: Seed of the order.
    """

    def __init__(
        self,
        root: str | None = None,
        size: int = 64,
        batch_size: int = 128,
        train_limit: int | None = None,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed)
        for name, value, least in (("size", size, 1), ("batch_size", batch_size, 1), ("train_limit", train_limit, 1)):
            if value is not None and value < least:
                raise ValueError(f"CelebA: expected `{name}` of at least {least}, got {value}.")
        self.root = Path(root or os.environ.get("LIGHTNING_PRUNE_DATA") or ".")
        self.size, self.train_limit = size, train_limit

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Read the lists of the three parts, for any stage; images are read when needed.

        Raises:
            FileNotFoundError: If the data set is missing or incomplete.
        """
        if not self._parts:
            self._parts = {part: self._open(part) for part in ("train", "valid", "test")}
            if self.train_limit is not None:
                train = self._parts["train"]
                self._parts["train"] = Subset(train, range(min(self.train_limit, len(train))))

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation images in the order of their numbers."""
        return self._loader("valid")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test images in the order of their numbers."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test images again."""
        return self.test_dataloader()

    def _open(self, part: str) -> Any:
        transforms = require("torchvision.transforms", extra="vision")
        prepare = transforms.Compose(
            [transforms.CenterCrop(_FACE), transforms.Resize((self.size, self.size)), transforms.ToTensor()]
        )
        dataset = require("torchvision.datasets", extra="vision").CelebA
        try:
            return dataset(str(self.root), split=part, transform=prepare)
        except RuntimeError as error:
            files = [name for *_, name in dataset.file_list if name.endswith(".txt")]
            raise FileNotFoundError(
                f"CelebA: expected {', '.join(files)} and the folder img_align_celeba with the images under "
                f"{self.root / 'celeba'}, but they are missing or incomplete. Get img_align_celeba.zip and "
                "the lists from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, unpack them there, and give the "
                "folder above as `root` or in the environment variable LIGHTNING_PRUNE_DATA."
            ) from error
