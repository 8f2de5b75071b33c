"""What `export` has written: size, latency and agreement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_prune.reporting.grid import Grid, Shown, kib, number, plural, share

__all__ = ["Exported"]


@dataclass(frozen=True)
class Exported(Shown):
    """A file for another runtime, as it was verified.

    Attributes:
        file: The file.
        bytes: Its size, with that of the files beside it that belong to it.
        runtime: The program that ran it, with its version.
        threads: Number of threads it ran on.
        batch_size: Number of samples that the file takes; None for any number.
        samples: Number of samples on which it was compared with the network.
        difference: Largest difference of an output from the network's, as a share of that output's largest magnitude.
        latency_ms: Median time of one sample in milliseconds, or of a batch if the file takes only that.
        dense: The same of the dense network, if it was given.
    """

    file: Path
    bytes: int
    runtime: str
    threads: int
    batch_size: int | None
    samples: int
    difference: float
    latency_ms: float
    dense: Exported | None = None

    def grids(self) -> tuple[Grid, ...]:
        """The table: size, latency and largest difference, beside the dense network's."""
        rows = [("network", *self._cells())]
        if self.dense is not None:
            rows.append(("dense", *self.dense._cells()))
            rows.append(
                ("share", share(self.bytes, self.dense.bytes), share(self.latency_ms, self.dense.latency_ms), "")
            )
        takes = "batches of any size" if self.batch_size is None else f"{plural(self.batch_size, 'sample')} at a time"
        timed = "one sample" if self.batch_size is None else plural(self.batch_size, "sample")
        note = (
            f"It takes {takes}. Time of {timed} in {self.runtime} on {plural(self.threads, 'thread')}. Difference from "
            f"the network on {plural(self.samples, 'sample')}, as a share of the largest output."
        )
        return (Grid(str(self.file), ("", "KiB", "ms", "largest difference"), tuple(rows), note=note),)

    def _cells(self) -> tuple[str, str, str]:
        return kib(self.bytes), number(self.latency_ms, 3), f"{self.difference:.1e}"
