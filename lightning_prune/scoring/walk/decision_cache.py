"""Persistent decisions of a walk, from which an interrupted walk is resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from lightning_prune.scoring.data import DataPass
from lightning_prune.scoring.walk.station import Station
from lightning_prune.structure.layers import named

__all__ = ["DecisionCache", "key_of"]


@final
class DecisionCache:
    """Decisions in a folder, one file per finished station.

    Args:
        folder: The folder, created on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, index: int) -> dict[str, Any] | None:
        """The decision at a station, or None."""
        path = self._path(index)
        if not path.exists():
            return None
        found: dict[str, Any] = torch.load(path, weights_only=True)
        return found

    def write(self, index: int, decided: Mapping[str, Any]) -> None:
        """Write a decision atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._path(index).with_suffix(f".{os.getpid()}.part")
        torch.save(dict(decided), part)
        part.replace(self._path(index))

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.pt"


def key_of(model: nn.Module, data: DataPass, stations: Sequence[Station], options: Any) -> str:
    """Digest of everything that decisions depend on: weights and buffers, samples, stations and options.

    Args:
        model: The network.
        data: The samples.
        stations: Stations of the walk.
        options: Other settings; objects that are not plain data count by their ``repr``.
    """
    digest = hashlib.sha256()
    for name, tensor in named(model).items():
        content = tensor.detach().cpu().contiguous()
        digest.update(repr((name, content.dtype, tuple(content.shape))).encode())
        digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(data.fingerprint().encode())
    digest.update(repr([str(station) for station in stations]).encode())
    digest.update(json.dumps(options, sort_keys=True, default=repr).encode())
    return digest.hexdigest()[:32]
