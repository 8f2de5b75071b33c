"""Latency tables from measured times: of layers alone, and of the network at several widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_prune.structure.cost import LatencyTable, LayerTimes
from lightning_prune.structure.time_layers import middle_of, probes_of

__all__ = ["MULTIPLES", "fit_table"]

FloatArray = npt.NDArray[np.float64]

#: Numbers of which the widths of a network are odd multiples, to see whether such widths are slow.
MULTIPLES = (1, 4, 8)
# How much longer than expected a network with such widths may take.
_SLOW = 1.08
# Candidates for the step in which times rise with a length.
_STEPS = (1, 4, 8, 16, 32)
# How strongly the time of a layer alone is believed where networks hardly tell it.
_PRIOR = 0.05


def fit_table(
    kinds: Sequence[Mapping[str, Any]],
    layers: Sequence[tuple[LayerTimes, int]],
    networks: Sequence[tuple[Mapping[str, int], int, int]],
    measured: Mapping[str, Any],
    about: Mapping[str, Any],
) -> LatencyTable:
    """Fit a table to the measured times.

    A layer among others takes another time than alone: its input is in the cache or not, its output is allocated, an
    activation is fused. So the times of layers are scaled, by a factor for each of depthwise, pointwise and other
    convolutions and matrix products, so that they, a time per byte of activations and a constant fit best (least
    squares of the relative errors, nothing negative) to the times of the network at several widths.

    Args:
        kinds: Descriptions of the layers that were timed.
        layers: Axes of each call of a layer, without times, and its kind.
        networks: Widths and bytes of activations of each network that was timed, and the number of which all widths
            are odd multiples, or 0. The latter are not fitted, but tell whether such widths are slow.
        measured: The times, see `time_layers.measure`.
        about: Device, runtime and versions.
    """
    times = [_times(kind["grid"], points) for kind, points in zip(kinds, measured["kinds"], strict=True)]
    classes = [_class(kind) for kind in kinds]
    names = sorted(set(classes))
    alone = [LayerTimes(layer.axes, *times[kind]) for layer, kind in layers]
    columns = np.zeros((len(networks), 2 + len(names)))
    for row, (widths, memory, _) in zip(columns, networks, strict=True):
        row[:2] = 1, memory
        for layer, (_, kind) in zip(alone, layers, strict=True):
            row[2 + names.index(classes[kind])] += layer.value(widths)
    ms, odd = np.array(measured["networks"]), np.array([multiple for *_, multiple in networks])
    factors = _fit(columns[odd == 0], ms[odd == 0])
    slow = ms / np.maximum(columns @ factors, 1e-12) > _SLOW
    multiple = next((each for each in MULTIPLES if not slow[odd == each].any()), 2 * MULTIPLES[-1])
    error = float(np.abs(columns[odd == 0] @ factors / ms[odd == 0] - 1).max())
    fixed, per_byte, *scales = factors.tolist()
    scale = dict(zip(names, scales, strict=True))
    scaled = (layer.scaled(scale[classes[kind]]) for layer, (_, kind) in zip(alone, layers, strict=True))
    return LatencyTable(fixed, per_byte, tuple(scaled), dict(about), multiple, error)


def _class(kind: Mapping[str, Any]) -> str:
    if kind["op"] == "linear":
        return "linear"
    if kind["depthwise"]:
        return "depthwise"
    return "pointwise" if max(kind["kernel"]) == 1 else "convolution"


def _times(
    grid: Sequence[Sequence[int]], points: Sequence[tuple[int, int, float]]
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[float, ...], ...], tuple[int, int]]:
    """Grid, monotone times and steps of a layer."""
    rows, columns = (tuple(lengths) for lengths in grid)
    found = {(a, b): ms for a, b, ms in points}
    ms = _monotone(np.array([[found[a, b] for b in columns] for a in rows]))
    middle = len(rows) // 2, len(columns) // 2
    steps = (
        _step(rows, ms[:, middle[1]], {a: found[a, columns[middle[1]]] for a in probes_of(rows)}),
        _step(columns, ms[middle[0]], {b: found[rows[middle[0]], b] for b in probes_of(columns)}),
    )
    return (rows, columns), tuple(tuple(row) for row in ms.tolist()), steps


def _monotone(ms: FloatArray) -> FloatArray:
    """Times that rise with both lengths, so that a budget has one solution: between the bounds above and below."""
    above = np.maximum.accumulate(np.maximum.accumulate(ms, axis=0), axis=1)
    below = np.minimum.accumulate(np.minimum.accumulate(ms[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
    return np.asarray((above + below) / 2)


def _step(lengths: Sequence[int], known: FloatArray, probes: Mapping[int, float]) -> int:
    """The step in which times rise with a length: that which explains the times between two points of the grid best."""
    if not probes:
        return 1
    start, end = middle_of(lengths)
    low, high = (float(known[lengths.index(length)]) for length in (start, end))

    def error(step: int) -> float:
        charged = [min(-(-length // step) * step, end) for length in probes]
        return float(np.sum((np.interp(charged, [start, end], [low, high]) - np.array([*probes.values()])) ** 2))

    return min((step for step in _STEPS if step <= end - start), key=lambda step: (error(step), step))


def _fit(columns: FloatArray, times: FloatArray) -> FloatArray:
    """Non-negative factors of the columns (a constant, memory, classes of layers) with the least relative errors."""
    dense = int(times.argmax())
    rows, wanted = columns / times[:, None], np.ones(len(times))
    prior = np.diag(_PRIOR * rows[dense])[2:]
    rows, wanted = np.vstack([rows, prior]), np.concatenate([wanted, prior.sum(1)])
    size = np.linalg.norm(rows, axis=0)
    used = [number for number in range(rows.shape[1]) if size[number] > 0]
    factors = np.zeros(rows.shape[1])
    while used:
        best, *_ = np.linalg.lstsq(rows[:, used] / size[used], wanted, rcond=None)
        if (best >= 0).all():
            factors[used] = best / size[used]
            break
        used.pop(int(best.argmin()))
    return factors
