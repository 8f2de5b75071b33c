"""Pooling, resampling, padding and reductions."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_prune.structure.rules.elementwise import broadcast, pointwise
from lightning_prune.structure.rules.registry import argument, dimensions, rigid, rule
from lightning_prune.structure.tracing import STATISTICS, Tracer, flat_tensors

__all__ = ["spatial"]


@rule(
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "adaptive_max_pool1d",
    "max_pool1d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "upsample_linear1d",
    "_upsample_nearest_exact2d",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "max_unpool2d",
    "max_unpool3d",
    "_upsample_bilinear2d_aa",
    "mkldnn_max_pool2d",
)
def spatial(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Operators on the spatial dimensions, per channel."""
    name = str(func._schema.name)
    rank = next(int(n) for n in "123" if f"{n}d" in name)
    inputs = [x for x in flat_tensors(args) if x.dim() == args[0].dim()]
    value = t.value(args[0])
    axes = broadcast(t, func, [(x, t.value(x)) for x in inputs], args[0].dim()) if len(inputs) > 1 else list(value.axes)
    t.freeze(axes[-rank:], f"the positions of {t.where(func)}")
    for result in flat_tensors(out):
        t.label(result, [*axes[: result.dim() - rank], *([None] * rank)], zero=value.zero)


@rule("torchvision::roi_align", "torchvision::roi_pool")
def region(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Region pooling, per channel: (regions, channels, height, width)."""
    value = t.value(args[0])
    t.freeze(value.axes[2:], f"the positions of {t.where(func)}")
    t.freeze(t.value(args[1]).axes, f"the regions of {t.where(func)}")
    results = flat_tensors(out)
    t.label(results[0], [None, value.axes[1], None, None], zero=value.zero)
    rigid(t, results[1:])


@rule("constant_pad_nd")
def pad(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Padding: padded channels are frozen."""
    value, amounts = t.value(args[0]), args[1]
    axes = list(value.axes)
    fill = argument(func, args, kwargs, "value", 0)
    for i in range(len(amounts) // 2):
        dim = out.dim() - 1 - i
        axis, before, after = axes[dim], amounts[2 * i], amounts[2 * i + 1]
        if axis is None or (before == 0 and after == 0):
            continue
        if isinstance(axis, str):  # no longer the same at every index
            axes[dim] = None
            continue
        if before < 0 or after < 0:
            t.freeze([axis], f"cropped in {t.where(func)}")
            axes[dim] = None
            continue
        why = f"padded in {t.where(func)}"
        axes[dim] = np.concatenate([t.atoms.fresh(before, why), axis, t.atoms.fresh(after, why)])
    t.label(out, axes, zero=value.zero and fill in (0, 0.0, None))


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "max",
    "min",
    "argmax",
    "argmin",
    "prod",
    "any",
    "all",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "median",
    "nansum",
    "count_nonzero",
    "_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "sort",
    "topk",
    "_safe_softmax",
    "kthvalue",
    "cummax",
    "cummin",
    "logcumsumexp",
)
def reduction(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Reduce or normalise over dimensions, which are frozen unless removed units do not change the result.

    Mean and variance in a norm that the network writes itself are those of a narrower norm after a cut, like a layer
    norm's.
    """
    name = str(func._schema.name).removeprefix("aten::")
    if name in ("max", "min") and len(flat_tensors(args)) == 2:
        pointwise(t, func, args, kwargs, out)
        return
    x = args[0]
    value = t.value(x)
    dims = dimensions(argument(func, args, kwargs, "dim"), x.dim())
    touched = [value.axes[d] for d in dims]
    t.note_lengths([x.shape[d] for d in dims], touched)
    is_norm = name in STATISTICS and dims in ([x.dim() - 1], [1]) and t.is_own_norm
    if not is_norm and not (value.zero and _ignores_zeros(func, args, kwargs)):
        t.freeze(touched, f"reduced over in {t.where(func)}")
    for result in flat_tensors(out):
        if result.dim() == x.dim():
            axes = [None if d in dims else axis for d, axis in enumerate(value.axes)]
        else:
            axes = [axis for d, axis in enumerate(value.axes) if d not in dims]
        t.label(result, axes, zero=name in ("sum", "mean", "norm", "linalg_vector_norm") and value.zero)


def _ignores_zeros(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether zero elements do not change a reduction: a sum, a norm of positive order."""
    name = str(func._schema.name).removeprefix("aten::")
    if name in ("norm", "linalg_vector_norm"):
        order = argument(func, args, kwargs, "ord" if name == "linalg_vector_norm" else "p", 2)
        return order is None or order > 0
    return name == "sum"
