"""Costs of a network on this machine: bytes on disk and milliseconds."""

from __future__ import annotations

import io
import math
import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from lightning_prune.structure import Call, TracedModel
from lightning_prune.structure.latency import median_seconds, resize

__all__ = ["Timing", "latencies", "latency", "size_on_disk", "versions"]

_PACKAGES = ("lightning-prune", "lightning", "torch", "torchmetrics", "numpy")

# Rounds of timing, because a machine may be busy for seconds.
_ROUNDS = 5


class Timing(NamedTuple):
    """The time of a forward pass.

    Attributes:
        ms: Median, in milliseconds.
        spread: Half of the interquartile range, in milliseconds; ``None`` if it was timed once.
    """

    ms: float
    spread: float | None = None


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the file that ``torch.save(model.state_dict(), ...)`` would write; nothing is stored."""
    counter, checksums = _Counter(), torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # they take most of the time and always have four bytes
    try:
        torch.save(model.state_dict(), cast(IO[bytes], counter))
    finally:
        torch.serialization.set_crc32_options(checksums)
    return counter.size


def latency(traced: TracedModel, batch_sizes: Sequence[int] = (1, 64), seconds: float = 0.2) -> dict[int, Timing]:
    """Time of a forward pass in eval mode without gradients, on the network's device.

    A copy of the network is timed, so that the network (buffers written by `forward`, hooks, modes) and the random
    state are unchanged. The first sample of the example is repeated to each batch size.

    Args:
        traced: The network and its first call; mode and method of that call are not used.
        batch_sizes: Samples per pass.
        seconds: Time to spend per batch size, in five rounds; a pass that takes longer is timed once, after one
            warm-up.

    Returns:
        Milliseconds per pass with their spread, by batch size; NaN if the device runs out of memory.
    """
    return latencies(traced.calls[0], [traced.copy("real").module], batch_sizes, seconds)[0]


def latencies(
    call: Call, networks: Sequence[nn.Module], batch_sizes: Sequence[int] = (1, 64), seconds: float = 0.2
) -> list[dict[int, Timing]]:
    """Time several networks in turn, so that other load on the machine affects all of them equally.

    Args:
        call: How they are called, see `latency`.
        networks: Copies that are not used elsewhere; they are left in eval mode.
        batch_sizes: Samples per pass.
        seconds: Time to spend per network and batch size.

    Returns:
        The result of `latency` for each network.
    """
    devices = {p.device for network in networks for p in network.eval().parameters() if p.device.type == "cuda"}
    found: list[dict[int, Timing]] = [{} for _ in networks]
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        for batch_size in batch_sizes:
            args, kwargs = (resize(part, call, batch_size) for part in (call.args, dict(call.kwargs)))
            runs = [partial(network, *args, **kwargs) for network in networks]
            for timings, timing in zip(found, _in_turns(runs, seconds), strict=True):
                timings[batch_size] = timing
    return found


def _in_turns(runs: Sequence[Callable[[], Any]], seconds: float) -> list[Timing]:
    rounds: list[list[float]] = []
    try:
        while len(rounds) < _ROUNDS and not (rounds and max(rounds[0]) > seconds):
            rounds.append([median_seconds(run, seconds / _ROUNDS) for run in runs])
    except torch.cuda.OutOfMemoryError:
        return [Timing(math.nan)] * len(runs)
    found = []
    for each in zip(*rounds, strict=True):
        low, middle, high = (1e3 * float(q) for q in np.quantile(each, (0.25, 0.5, 0.75)))
        found.append(Timing(middle, (high - low) / 2 if len(each) > 1 else None))
    return found


def versions() -> dict[str, str]:
    """Versions of the installed packages that a run's results depend on."""
    installed = {
        name: version for name in _PACKAGES for version in {dist.version for dist in metadata.distributions(name=name)}
    }
    return {"python": platform.python_version(), **installed}


class _Counter(io.RawIOBase):
    """A file object that only counts the bytes written to it."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        written = memoryview(data).nbytes
        self.size += written
        return written
