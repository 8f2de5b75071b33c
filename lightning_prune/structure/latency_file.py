"""Latency tables that were measured elsewhere, by the script of `latency_script`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_prune.structure.cost import LatencyTable, LayerTimes
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.latency import LatencyTimes, latency_times
from lightning_prune.structure.latency_fit import fit_table
from lightning_prune.structure.time_layers import FORMAT, points_of
from lightning_prune.structure.traced_model import TracedModel

__all__ = ["plain_times", "read_table"]


def plain_times(name: str, times: LatencyTimes, widths: Mapping[str, int]) -> dict[str, Any]:
    """What the script times, in dicts, lists, numbers and strings.

    Args:
        name: Name of the network.
        times: What is timed.
        widths: Units by group of the dense network.
    """
    return {
        "model": name,
        "widths": dict(widths),
        "kinds": [dict(kind) for kind in times.kinds],
        "layers": [{"axes": layer.to_plain()["axes"], "kind": kind} for layer, kind in times.layers],
        "networks": [
            {"widths": dict(widths), "memory": memory, "multiple": multiple}
            for widths, memory, multiple in times.networks
        ],
    }


def read_table(
    file: str, traced: TracedModel, structure: Structure, dense: Mapping[str, int] | None = None
) -> LatencyTable:
    """Read a table, and check that it is of this network.

    Args:
        file: The file.
        traced: The network and its calls.
        structure: Structure of the network.
        dense: Units by group of the dense network, if the network was cut before.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no table, written for a newer version, or of another network.
    """
    stored = _stored(file)
    widths, kinds = dict(dense or structure.widths), stored["kinds"]
    if stored["widths"] != widths:
        other = sorted({*stored["widths"].items()} ^ {*widths.items()})
        names = ", ".join(dict.fromkeys(name for name, _ in other[:6]))
        raise ValueError(
            f"{file} is a latency table of another network, {stored['model']}: its layers or widths differ in {names}. "
            "Write a script for this network by `latency_script`, and run it on the device."
        )
    if dense is None:
        _require_same_layers(file, stored, plain_times("", latency_times(traced, structure), widths))
    try:
        layers = [(LayerTimes.from_plain(_EMPTY | {"axes": each["axes"]}), each["kind"]) for each in stored["layers"]]
        networks = [(each["widths"], each["memory"], each["multiple"]) for each in stored["networks"]]
        _require_times(stored)
        return fit_table(kinds, layers, networks, stored["measured"], stored["about"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}). Run the script again.") from error


_EMPTY: dict[str, Any] = {"grid": [[1], [1]], "ms": [[0.0]]}


def _stored(file: str) -> dict[str, Any]:
    """The content of a file, which has the parts of a table."""
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"expected `latency_table` to be a file that a script of `latency_script` has written, got {file!r}, where "
            "there is none"
        )
    try:
        stored = json.loads(Path(file).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no latency table: expected JSON ({error})") from error
    parts = {"format": int, "about": dict, "model": str, "widths": dict, "kinds": list, "layers": list}
    parts |= {"networks": list, "measured": dict}
    if not isinstance(stored, dict) or not isinstance(stored.get("format"), int):
        raise ValueError(f"{file} is no latency table: expected what a script of `latency_script` has written")
    if stored["format"] > FORMAT:
        raise ValueError(
            f"{file} is a latency table of format {stored['format']}, {FORMAT} is the last known. Update this package."
        )
    if missing := [name for name, kind in parts.items() if not isinstance(stored.get(name), kind)]:
        raise ValueError(f"{file} is damaged: it has no {', '.join(missing)}. Run the script again.")
    return stored


def _require_same_layers(file: str, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Require that the dense network has the layers of the table, with inputs of the same sizes."""

    def calls(plain: Mapping[str, Any]) -> list[Any]:
        return [[layer["axes"], {**plain["kinds"][layer["kind"]], "grid": None}] for layer in plain["layers"]]

    theirs, ours = json.loads(json.dumps(calls(stored))), json.loads(json.dumps(calls(expected)))
    if theirs == ours:
        return
    differ = next((pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]), None)
    what = f"it has {len(theirs)} layers, this one {len(ours)}"
    if differ is not None:
        a, b = (kind for _, kind in differ)
        names = [name for name in {**a, **b} if a.get(name) != b.get(name)] or ["axes"]
        what = "; ".join(f"{name} {a.get(name)} there, {b.get(name)} here" for name in names)
    raise ValueError(
        f"{file} is a latency table of another network or of inputs of another size: {what}. Give the same example "
        "input to `latency_script`, and run the script again."
    )


def _require_times(stored: Mapping[str, Any]) -> None:
    """Require a positive time for every point and every network."""
    measured = stored["measured"]
    if [len(measured["kinds"]), len(measured["networks"])] != [len(stored["kinds"]), len(stored["networks"])]:
        raise ValueError("expected times of all layers and networks")
    points = [[[a, b] for a, b, _ in points] for points in measured["kinds"]]
    if points != [[list(point) for point in points_of(kind["grid"])] for kind in stored["kinds"]]:
        raise ValueError("expected times of all widths of each layer")
    times = [*measured["networks"], *(ms for points in measured["kinds"] for *_, ms in points)]
    if not all(isinstance(ms, float | int) and 0 < ms < math.inf for ms in times):
        raise ValueError("expected positive times")
