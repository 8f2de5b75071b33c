"""History and masks as JSON, for files that hold text beside the weights."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.surgery import plain
from lightning_prune.surgery.edits import UPGRADE, Keep
from lightning_prune.surgery.history import KEY
from lightning_prune.surgery.masks import MASKS_KEY
from lightning_prune.surgery.plain import HistoryError

__all__ = ["from_json", "pairs_once", "to_json"]

_VERSION = 1
_LARGEST = 2**63 - 1
# JSON has no such numbers.
_NOT_FINITE = ("nan", "inf", "-inf")


def to_json(checkpoint: Mapping[str, Any], tied: Mapping[str, str]) -> str:
    """Write the history and masks of a checkpoint as JSON.

    Equal positions are stored once, in a list that the edits refer to by index; masks have one bit per weight, in
    Base64.

    Args:
        checkpoint: What `save_into` and `save_masks_into` wrote; the rest is left out.
        tied: Name of the stored tensor, by name of each tensor that is the same one.
    """
    top: dict[str, Any] = {"version": _VERSION, "tied": dict(tied)}
    if KEY in checkpoint:
        table: dict[bytes, tuple[int, list[int]]] = {}

        def number_of(positions: Tensor) -> int:
            return table.setdefault(positions.numpy().tobytes(), (len(table), positions.tolist()))[0]

        history = checkpoint[KEY]
        edits = [_edit(edit, number_of, str, _finite_or_text) for edit in history["edits"]]
        top["history"] = {**history, "edits": edits}
        top["positions"] = [positions for _, positions in table.values()]
    if MASKS_KEY in checkpoint:
        masks = checkpoint[MASKS_KEY]
        packed = {
            name: {"shape": mask["shape"], "bits": base64.b64encode(mask["bits"].numpy().tobytes()).decode()}
            for name, mask in masks["masks"].items()
        }
        top["masks"] = {**masks, "masks": packed}
    return json.dumps(top, allow_nan=False, separators=(",", ":"))


def from_json(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Read what `to_json` wrote: the entries of a checkpoint, and the names of tied tensors.

    What is inside of history and masks is checked when they are read from the checkpoint.

    Raises:
        HistoryError: If it is damaged or of a newer version.
    """
    try:
        top = plain.value(json.loads(text, object_pairs_hook=pairs_once), dict, "the metadata")
    except HistoryError:
        raise
    except (ValueError, RecursionError) as error:
        raise plain.damaged(f"it is no JSON that can be read ({type(error).__name__}: {error})") from error
    version = plain.count(top, "version", least=1)
    if version > _VERSION:
        raise HistoryError(f"The file has version {version}, {_VERSION} is the last known. {UPGRADE}")
    checkpoint = {}
    if "history" in top:
        history = plain.entry(top, "history", dict)
        table = [_positions(found) for found in plain.entry(top, "positions", list)]

        def positions_at(found: object) -> Tensor:
            number = plain.value(found, int, "an index of positions")
            if not 0 <= number < len(table):
                raise plain.damaged(f"it refers to positions {number}, there are {len(table)}")
            return table[number]

        edits = [_read_edit(edit, positions_at) for edit in plain.entry(history, "edits", list)]
        checkpoint[KEY] = {**history, "edits": edits}
    if "masks" in top:
        masks = plain.entry(top, "masks", dict)
        checkpoint[MASKS_KEY] = {**masks, "masks": dict(_bits(masks))}
    return checkpoint, dict(plain.items(top, "tied", str))


def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text, whose keys must differ.

    Raises:
        HistoryError: If a key is there twice, of which readers may take either.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise plain.damaged(f"it has {max(keys, key=keys.count)!r} twice")
    return found


def _edit(
    edit: dict[str, Any],
    position: Callable[[Any], Any],
    dim: Callable[[Any], Any],
    number: Callable[[Any], Any],
) -> dict[str, Any]:
    """An edit with other positions, dimensions and additional numbers."""
    if "info" in edit:
        edit = {**edit, "info": {name: number(value) for name, value in plain.items(edit, "info", object)}}
    if edit.get("kind") != Keep.kind:
        return edit
    axes = {
        name: {dim(key): position(kept) for key, kept in dims.items()} for name, dims in plain.items(edit, "axes", dict)
    }
    factors = {
        name: {**rows, "rows": position(plain.entry(rows, "rows", object))}
        for name, rows in (plain.items(edit, "factors", dict) if "factors" in edit else ())
    }
    kept = {name: position(kept) for name, kept in plain.items(edit, "kept", object)}
    return {**edit, "axes": axes, "kept": kept, **({"factors": factors} if factors else {})}


def _read_edit(found: object, positions_at: Callable[[object], Tensor]) -> dict[str, Any]:
    return _edit(plain.value(found, dict, "an edit"), positions_at, _dimension, _number)


def _dimension(text: str) -> int:
    if text not in map(str, range(64)):  # tensors have no more dimensions
        raise plain.damaged(f"expected the number of a dimension, got {text!r}")
    return int(text)


def _finite_or_text(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _number(value: object) -> object:
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value


def _positions(found: object) -> Tensor:
    positions = plain.value(found, list, "positions")
    if not all(type(position) is int and 0 <= position <= _LARGEST for position in positions):
        raise plain.damaged(f"expected positions to be integers in [0, {_LARGEST}]")
    return torch.tensor(positions, dtype=torch.int64)


def _bits(masks: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, mask in plain.items(masks, "masks", dict):
        try:
            bits = base64.b64decode(plain.entry(mask, "bits", str), validate=True)
        except HistoryError:
            raise
        except ValueError as error:
            raise plain.damaged(f"expected the mask of {name!r} in Base64 ({error})") from error
        yield name, {**mask, "bits": torch.from_numpy(np.frombuffer(bits, np.uint8).copy())}
