"""Batch norms of empty batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["EmptyBatches"]


class EmptyBatches(TorchFunctionMode):
    """Gives the batch norm of an empty batch, as of a detector without detections, the weights of all channels.

    PyTorch multiplies it by the weight of the first channel, which would seem to be picked by number.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm or not args or args[0].numel():
            return func(*args, **kwargs)
        given: dict[str, Any] = dict(zip(("weight", "bias"), args[3:5], strict=False)) | dict(kwargs)
        out, shape = args[0].clone(), (-1, *[1] * (args[0].dim() - 2))
        for name, combine in (("weight", torch.mul), ("bias", torch.add)):
            if given.get(name) is not None:
                out = combine(out, given[name].view(shape))
        return out
