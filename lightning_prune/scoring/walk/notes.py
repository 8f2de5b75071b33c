"""What a walk has decided, written down so that a killed one need not decide it again."""

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

__all__ = ["Notes", "key_of"]


@final
class Notes:
    """One file per finished station in a folder.

    Args:
        folder: The folder, made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, index: int) -> dict[str, Any] | None:
        """What was decided at a station, None if it is not finished."""
        path = self._path(index)
        if not path.exists():
            return None
        found: dict[str, Any] = torch.load(path, weights_only=True)
        return found

    def write(self, index: int, decided: Mapping[str, Any]) -> None:
        """Write it down, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._path(index).with_suffix(f".{os.getpid()}.part")
        torch.save(dict(decided), part)
        part.replace(self._path(index))

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.pt"


def key_of(model: nn.Module, data: DataPass, stations: Sequence[Station], options: Any) -> str:
    """A name for everything that decides: weights and buffers, samples, stations and options.

    Args:
        model: The network.
        data: The samples.
        stations: Where the walk stops.
        options: Whatever else decides, in plain data; other objects count by their ``repr``.
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
