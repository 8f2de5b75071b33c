"""Tensor store that spills to memory-mapped temporary files beyond a memory limit."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import final

import torch
from torch import Tensor

__all__ = ["Spool", "Stored"]


@final
class Spool:
    """A store that keeps at most ``limit`` bytes of tensors in memory and the rest in temporary files.

    The folder of the files is deleted with the spool, at the latest when the process ends.

    Args:
        limit: Bytes in memory, at least 0.
        folder: Parent of the temporary folder; by default the system's.

    Attributes:
        in_memory: Bytes of the tensors in memory.
        on_disk: Bytes of the tensors in files.

    Raises:
        ValueError: If the limit is negative.
    """

    def __init__(self, limit: int, folder: str | Path | None = None) -> None:
        if limit < 0:
            raise ValueError(f"expected a memory limit of at least 0 bytes, got {limit}")
        self.limit = limit
        self.in_memory = 0
        self.on_disk = 0
        self._parent = folder
        self._folder: Path | None = None
        self._files = 0

    def put(self, tensor: Tensor) -> Stored:
        """Store a copy of a tensor, preserving its memory format."""
        return Stored(self, tensor.detach())

    def next_file(self) -> Path:
        """A new path for a tensor."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="lightning_prune_", dir=self._parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._files += 1
        return self._folder / str(self._files)


@final
class Stored:
    """A tensor in a `Spool`, created by `Spool.put`.

    Attributes:
        size: Size in bytes.
    """

    def __init__(self, spool: Spool, tensor: Tensor) -> None:
        self.size = tensor.numel() * tensor.element_size()
        self._spool: Spool | None = spool
        self._tensor: Tensor | None = None
        self._path: Path | None = None
        if spool.in_memory + self.size <= spool.limit or not self.size:
            self._tensor = tensor.clone()
            spool.in_memory += self.size
            return
        self._device, self._dtype = tensor.device, tensor.dtype
        strides = tensor.stride()
        self._order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
        dense = tensor.permute(self._order).contiguous()
        self._shape = dense.shape
        self._path = spool.next_file()
        dense.cpu().reshape(-1).view(torch.uint8).numpy().tofile(self._path)
        spool.on_disk += self.size

    @property
    def is_on_disk(self) -> bool:
        """Whether the tensor is in a file."""
        return self._path is not None

    def get(self) -> Tensor:
        """The tensor; from a file as a private memory map, so that writes do not change the file.

        Raises:
            ValueError: If it was freed.
        """
        if self._spool is None:
            raise ValueError("expected a stored tensor, got one that was freed")
        if self._path is None:
            assert self._tensor is not None
            return self._tensor
        flat = torch.from_file(str(self._path), shared=False, size=self._shape.numel(), dtype=self._dtype)
        back = [self._order.index(dim) for dim in range(len(self._order))]
        return flat.view(self._shape).permute(back).to(self._device)

    def free(self) -> None:
        """Free the memory or file. Tensors returned by `get` stay valid."""
        if self._spool is None:
            return
        if self._path is None:
            self._spool.in_memory -= self.size
        else:
            self._spool.on_disk -= self.size
            self._path.unlink()
        self._spool = self._tensor = self._path = None
