"""What a network costs on this machine: bytes on disk and milliseconds."""

from __future__ import annotations

import io
import math
import platform
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from typing import IO, Any, cast

import torch
from torch import nn

from lightning_prune.structure import Subject
from lightning_prune.structure.latency import median_seconds, resize

__all__ = ["latency", "size_on_disk", "versions"]

_PACKAGES = ("lightning-prune", "lightning", "torch", "torchmetrics", "numpy")


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the file that ``torch.save(model.state_dict(), ...)`` would write; nothing is stored."""
    counter, checksums = _Counter(), torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # they take most of the time, and always the same four bytes
    try:
        torch.save(model.state_dict(), cast(IO[bytes], counter))
    finally:
        torch.serialization.set_crc32_options(checksums)
    return counter.size


def latency(subject: Subject, batch_sizes: Sequence[int] = (1, 64), seconds: float = 0.2) -> dict[int, float]:
    """Median milliseconds of a forward pass in eval mode without gradients, on the network's device.

    A copy of the network is timed, so that the network itself (buffers that `forward` writes, hooks, modes) and the
    random state stay as they are. The first sample of the example is repeated to each batch size.

    Args:
        subject: The network and its first call; mode and method of that call are not used.
        batch_sizes: Samples per pass.
        seconds: Time to spend per batch size; a pass that takes longer is timed once, after one to warm up.

    Returns:
        Milliseconds per pass by batch size; NaN where the device's memory does not suffice.
    """
    call, copy = subject.calls[0], subject.copy("real").module.eval()
    devices = {p.device for p in copy.parameters() if p.device.type == "cuda"}
    medians: dict[int, float] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        for batch_size in batch_sizes:
            args, kwargs = (resize(part, call, batch_size) for part in (call.args, dict(call.kwargs)))
            try:
                medians[batch_size] = 1e3 * median_seconds(partial(copy, *args, **kwargs), seconds)
            except torch.cuda.OutOfMemoryError:
                medians[batch_size] = math.nan
    return medians


def versions() -> dict[str, str]:
    """Versions of what a run's figures depend on, as far as it is installed."""
    installed = {
        name: version for name in _PACKAGES for version in {dist.version for dist in metadata.distributions(name=name)}
    }
    return {"python": platform.python_version(), **installed}


class _Counter(io.RawIOBase):
    """A file that only counts what is written to it."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        written = memoryview(data).nbytes
        self.size += written
        return written
