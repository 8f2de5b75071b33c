"""File of layer scores, appended layer by layer, so that a killed run loses only the current layer."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import nn

from lightning_prune.scoring.walk import Station
from lightning_prune.scoring.xgb import LayerScore

__all__ = ["ScoreFile", "network_fingerprint", "read_scores"]

# Version of the file format.
_FORMAT = 1

# Memory address in a `repr`, which differs between processes.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@final
class ScoreFile:
    """Scores of layers in a JSON lines file: a key of network, samples and options, then one line per layer.

    An incomplete last line, left by a killed run, is dropped when the file is opened again.

    Args:
        path: Path of the file.
        key: Names and plain values that identify what the scores belong to; scores under another key are not used.

    Raises:
        ValueError: If the file is of another kind or format version.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.key = {name: _ADDRESS.sub("", str(value)) for name, value in key.items()}
        self._found: dict[Station, LayerScore] = {}
        if path.is_file():
            known, found = _read(path)
            self.difference = {n: (known.get(n), v) for n, v in self.key.items() if known.get(n) != v}
            if not self.difference:
                self._found = {score.station: score for score in found}
        else:
            self.difference = {}
        self._is_open = False

    @property
    def fits(self) -> bool:
        """Whether the file has the same key, or did not exist."""
        return not self.difference

    def get(self, station: Station) -> LayerScore | None:
        """The score of a layer, or None."""
        return self._found.get(station)

    def merge(self, other: ScoreFile) -> bool:
        """Add the scores of another file of the same key; returns whether there were new ones."""
        news = [found for station, found in other._found.items() if station not in self._found]
        for found in news:
            self.put(found)
        return bool(news)

    def put(self, found: LayerScore) -> None:
        """Add the score of a layer; a file with another key is overwritten."""
        self._rewrite()
        self._found[found.station] = found
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_to_plain(found)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _rewrite(self) -> None:
        """Atomically rewrite the file with the known scores."""
        if self._is_open:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"format": _FORMAT, "key": self.key}),
            *(json.dumps(_to_plain(s)) for s in self._found.values()),
        ]
        draft = self.path.with_name(f"{self.path.name}.new")
        draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        draft.replace(self.path)
        self._is_open = True


def read_scores(path: Path) -> tuple[dict[str, str], list[LayerScore]]:
    """Read the key and the scores of a file written by `ScoreFile`.

    Raises:
        ValueError: If the file is of another kind or format version.
        FileNotFoundError: If there is none.
    """
    return _read(path)


def network_fingerprint(model: nn.Module) -> str:
    """Hexadecimal digest of the names, shapes and contents of a network's ``state_dict``."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, str], list[LayerScore]]:
    lines = list(_lines(path))
    head = lines[0] if lines else None
    if not isinstance(head, dict) or "format" not in head or not isinstance(head.get("key"), dict):
        raise ValueError(f"expected a file with scores of layers, got {path}, which holds something else")
    if head["format"] != _FORMAT:
        raise ValueError(
            f"expected scores of format {_FORMAT}, got {head['format']} in {path}. Another version of lightning-prune "
            "wrote them: score again."
        )
    return head["key"], [_from_plain(line) for line in lines[1:]]


def _lines(path: Path) -> Iterator[Any]:
    """Parse all complete lines."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"expected a file with scores of layers, got {path}, which is damaged: {error}") from error


def _to_plain(found: LayerScore) -> dict[str, Any]:
    station = found.station
    return {
        "layer": station.layer,
        "point": station.point,
        "call": station.call,
        "score": found.score,
        "importance": found.importance.tolist(),
        "share": found.share.tolist(),
        "seconds": found.seconds,
    }


def _from_plain(line: Mapping[str, Any]) -> LayerScore:
    return LayerScore(
        Station(line["layer"], line["point"], line["call"]),
        line["score"],
        np.asarray(line["importance"], dtype=np.float64),
        np.asarray(line["share"], dtype=np.float64),
        line["seconds"],
    )
