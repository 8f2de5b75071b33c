"""What `quantise` has written: size, latency, accuracy and agreement with the float network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lightning_prune.reporting.grid import MISSING, Grid, Shown, count, kib, number, plural

__all__ = ["Quantised", "QuantisedRow", "wilson"]

# Quantile of the standard normal distribution for a 95 % interval.
_Z = 1.959964


@dataclass(frozen=True)
class QuantisedRow:
    """One network, in float32 or in 8-bit integers.

    Attributes:
        name: ``"dense"``, ``"pruned"``, ``"dense, quantised"`` or ``"pruned, quantised"``; ``"network"`` and
            ``"network, quantised"`` where nothing was pruned.
        bytes: Size of its ONNX file.
        latency_ms: Median time of one sample in milliseconds.
        accuracy: Share of test samples that it classifies right, in [0, 1]; None without labels.
        agreed: Number of test samples for which it predicts the class that the same network predicts in float32, or
            after quantisation-aware training, with the rounding of training in PyTorch; None for the float32 network.
    """

    name: str
    bytes: int
    latency_ms: float
    accuracy: float | None
    agreed: int | None = None


@dataclass(frozen=True)
class Quantised(Shown):
    """A quantised file beside the networks it came from.

    Attributes:
        file: The file.
        runtime: The program that ran it, with its version.
        threads: Number of threads it ran on.
        samples: Number of test samples.
        rows: The networks; the last is the file's.
        calibration: Number of samples that gave the ranges; 0 for the ranges of quantisation-aware training.
    """

    file: Path
    runtime: str
    threads: int
    samples: int
    rows: tuple[QuantisedRow, ...]
    calibration: int

    @property
    def agreement(self) -> float:
        """Share of test samples with the same prediction, in [0, 1]; see `QuantisedRow.agreed`."""
        return (self.rows[-1].agreed or 0) / self.samples

    def grids(self) -> tuple[Grid, ...]:
        """The table: a row per network."""
        reference = "float32" if self.calibration else "training"
        columns = ("", "accuracy, %", "KiB", "ms", f"same prediction as in {reference}, %")
        rows = tuple(
            (
                row.name,
                MISSING if row.accuracy is None else f"{100 * row.accuracy:.2f}",
                kib(row.bytes),
                number(row.latency_ms, 3),
                MISSING if row.agreed is None else _interval(row.agreed, self.samples),
            )
            for row in self.rows
        )
        ranges = plural(self.calibration, "sample") if self.calibration else "quantisation-aware training"
        note = (
            f"{count(self.samples)} test samples; in brackets, Wilson's 95 % interval. Ranges of the integers from "
            f"{ranges}. Time of one sample in {self.runtime} on {plural(self.threads, 'thread')}."
        )
        return (Grid(str(self.file), columns, rows, note=note),)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in [0, 1]."""
    share, correction = successes / trials, _Z**2 / trials
    middle = (share + correction / 2) / (1 + correction)
    half = math.sqrt(share * (1 - share) * correction + correction**2 / 4) / (1 + correction)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _interval(successes: int, trials: int) -> str:
    low, high = wilson(successes, trials)
    return f"{100 * successes / trials:.2f} ({100 * low:.2f} to {100 * high:.2f})"
