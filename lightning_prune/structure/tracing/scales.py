"""The scale that PyTorch's attention computes from the width of its heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lightning_prune.structure.atoms import MismatchError
from lightning_prune.structure.tracing.tracer import Tracer

__all__ = ["OwnScales"]


class OwnScales(TorchFunctionMode):
    """Gives `scaled_dot_product_attention` the scale 1/√width that it would compute.

    Where features of heads are cut, it is that of the first trace, since queries are rescaled in a cut
    (`Group.queries`).

    Args:
        tracer: Follows the indices; it gets the widths, and which features they count.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and kwargs.get("scale") is None:
            kwargs = {**kwargs, "scale": 1.0 / math.sqrt(self._width(args[0] if args else kwargs["query"]))}
        return func(*args, **kwargs)

    def _width(self, query: Tensor) -> int:
        tracer, width = self.tracer, query.shape[-1]
        label = tracer.value(query).axes[-1]
        if tracer.of_features and isinstance(label, np.ndarray):
            tracer.own_scales.setdefault(tracer.stack[-1] if tracer.stack else "", []).append(label)
        number = len(tracer.query_widths)
        tracer.query_widths.append(width)
        if tracer.first_query_widths is None or not (tracer.of_features or tracer.crossed):
            return width
        if number >= len(tracer.first_query_widths):
            raise MismatchError("an attention is computed that was not computed before")
        return tracer.first_query_widths[number]
