"""What surrogates have found, written down layer by layer: a run that is killed loses the layer it was at, no more."""

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

# Form of the file; a reader of older ones needs it.
_FORMAT = 1

# Where an object lies in memory, in a `repr`: another in every process.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@final
class ScoreFile:
    """Scores of layers in a file of JSON lines, one a layer, under a key of network, samples and options.

    The first line is the key. Every other line is complete when it ends; one that a kill has cut short is dropped when
    the file is opened again.

    Args:
        path: Where the file is, or will be.
        key: What the scores belong to: names and plain values, all of which have to be equal for scores to count.

    Raises:
        ValueError: If the file has other things in it, or scores of another format.
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
        self._begun = False

    @property
    def fits(self) -> bool:
        """Whether what was in the file belongs to this key; an empty one does."""
        return not self.difference

    def recall(self, station: Station) -> LayerScore | None:
        """What the file has of a layer."""
        return self._found.get(station)

    def take(self, other: ScoreFile) -> bool:
        """Know what another file of the same key knows, and write it down; whether that was more."""
        news = [found for station, found in other._found.items() if station not in self._found]
        for found in news:
            self.note(found)
        return bool(news)

    def note(self, found: LayerScore) -> None:
        """Add a layer; the file is begun anew if it held scores of another key."""
        self._begin()
        self._found[found.station] = found
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_to_plain(found)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _begin(self) -> None:
        """Write what is known, without a line that was cut short, whole or not at all."""
        if self._begun:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"format": _FORMAT, "key": self.key}),
            *(json.dumps(_to_plain(s)) for s in self._found.values()),
        ]
        draft = self.path.with_name(f"{self.path.name}.new")
        draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        draft.replace(self.path)
        self._begun = True


def read_scores(path: Path) -> tuple[dict[str, str], list[LayerScore]]:
    """The key and the scores of a file that `ScoreFile` wrote.

    Raises:
        ValueError: If it is another file.
        FileNotFoundError: If there is none.
    """
    return _read(path)


def network_fingerprint(model: nn.Module) -> str:
    """Hexadecimal digest of the names, shapes and contents of everything in a network's ``state_dict``."""
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
    """All lines that are whole."""
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
