"""Batch, layer, group and weight norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lightning_prune.structure.rules.registry import argument, labelled, rule
from lightning_prune.structure.tracing import AxisLabel, Tracer, flat_tensors

__all__: list[str] = []  # the rules register themselves


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "miopen_batch_norm",
    "_native_batch_norm_legit_functional",
)
def batch_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Batch norm: parameters and statistics are removed with their channel.

    Of weights that are standardised by it, a cut equals a narrower layer, not a masked one, as of a layer norm.
    """
    x = t.value(args[0])
    over = x.axes[:1] if t.constant else (x.axes[0], *x.axes[2:])
    t.freeze(over, f"normalised over in {t.where(func)}")
    channel: AxisLabel = x.axes[1]
    zeros = {}
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = argument(func, args, kwargs, name)
        if isinstance(tensor, torch.Tensor):
            channel = t.meet(channel, t.value(tensor).axes[0], t.where(func))
            zeros[name] = t.value(tensor).zero
    centred = x.zero and zeros.get("running_mean", True)
    results = flat_tensors(out)
    zero = zeros.get("bias", True) and (zeros.get("weight", False) or centred)
    t.label(results[0], [x.axes[0], channel, *x.axes[2:]], zero=zero)
    for extra in results[1:]:
        t.label(extra, [channel] if extra.dim() == 1 and extra.shape[0] == args[0].shape[1] else [None] * extra.dim())


@rule("native_layer_norm")
def layer_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Layer norm: its statistics change with the width, so a cut equals a narrower layer, not a masked one."""
    x, shape, weight, bias = args[0], args[1], args[2], args[3]
    value, first = t.value(x), x.dim() - len(shape)
    axes = list(value.axes)
    for tensor in (weight, bias):
        if tensor is not None:
            for d, axis in enumerate(t.value(tensor).axes):
                axes[first + d] = t.meet(axes[first + d], axis, t.where(func))
    t.label(out[0], axes, zero=_scaled_to_zero(t, weight, bias, axes[:first]))
    for extra in out[1:]:
        t.label(extra, [*axes[:first], *([None] * (extra.dim() - first))])


def _scaled_to_zero(t: Tracer, weight: torch.Tensor | None, bias: torch.Tensor | None, outer: list[AxisLabel]) -> bool:
    """Whether weight and bias of a norm are zero for all removed units."""
    zeros = [tensor is None or t.value(tensor).zero for tensor in (weight, bias)]
    return weight is not None and all(zeros) and not labelled(outer)


@rule("_weight_norm_interface")
def weight_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Weight norm, g · v / ‖v‖ with one norm per index of `dim`; zero entries do not change a norm."""
    v, g = t.value(args[0]), t.value(args[1])
    dim = argument(func, args, kwargs, "dim", 0)
    axes = list(v.axes)
    axes[dim] = t.meet(axes[dim], g.axes[dim], t.where(func))
    zero = v.zero or (g.zero and labelled(axes) == [dim])
    t.label(out[0], axes, zero=zero, source=v.source)
    t.label(out[1], [axes[d] if d == dim else None for d in range(len(axes))])


@rule("native_group_norm")
def group_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Group norm: every group loses the same positions; a group of one channel is removed as a whole."""
    x, weight, bias, groups = args[0], args[1], args[2], int(args[6])
    axes = list(t.value(x).axes)
    t.freeze(axes[2:], f"normalised over in {t.where(func)}")
    for tensor in (weight, bias):
        if tensor is not None:
            axes[1] = t.meet(axes[1], t.value(tensor).axes[0], t.where(func))
    channel = axes[1]
    if isinstance(channel, np.ndarray):
        by_group = channel.reshape(groups, -1)
        t.note(groups if by_group.shape[1] > 1 else None)  # only groups of one channel can be removed
        if by_group.shape[1] > 1:
            t.atoms.unite(by_group[1:].ravel(), np.tile(by_group[0], groups - 1))
        elif weight is None:
            t.freeze([channel], f"a group norm without weights in {t.where(func)}: its size is written as a number")
    t.label(out[0], axes, zero=_scaled_to_zero(t, weight, bias, axes[:1]))
    for extra in out[1:]:
        t.label(extra, [axes[0], channel if groups == x.shape[1] else None])
