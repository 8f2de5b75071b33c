"""Elementwise operators, copies and constants."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_prune.structure.rules.registry import argument, labelled, rigid, rule
from lightning_prune.structure.tracing import WILD, AxisLabel, Tracer, Value, flat_tensors, memory_of

__all__ = ["broadcast", "pointwise", "same", "zero_along"]

#: Operators with f(0) = 0 for every tensor input, so that slices of removed units stay zero.
_ZERO_KEEPING = frozenset(
    [
        "relu",
        "leaky_relu",
        "gelu",
        "silu",
        "elu",
        "celu",
        "selu",
        "tanh",
        "hardtanh",
        "hardswish",
        "relu6",
        "mish",
        "abs",
        "neg",
        "sin",
        "asin",
        "atan",
        "sqrt",
        "square",
        "sign",
        "clone",
        "detach",
        "alias",
        "_to_copy",
        "add",
        "sub",
        "mul",
        "div",
        "softsign",
        "prelu",
        "_prelu_kernel",
        "rrelu_with_noise",
        "native_dropout",
        "dropout",
        "expm1",
        "log1p",
        "erf",
        "tan",
        "sinh",
        "round",
        "floor",
        "ceil",
        "trunc",
    ]
)


def broadcast(t: Tracer, func: Any, values: Sequence[tuple[torch.Tensor, Value]], ndim: int) -> list[AxisLabel]:
    """Labels of a broadcast result: aligned dimensions of equal length are united, those of length 1 ignored.

    Where a trial leaves a single unit, an axis of length 1 without units is one that is broadcast over many.
    """
    axes: list[AxisLabel] = [None] * ndim
    where = t.where(func)
    for back in range(1, ndim + 1):
        present = [(x.shape[-back], v.axes[-back]) for x, v in values if x.dim() >= back]
        longest = max((n for n, _ in present), default=1)
        if longest == 1 and t.first_decisions is not None:
            units = [one for one in present if isinstance(one[1], np.ndarray) and not t.atoms.are_frozen(one[1])]
            present = units or present
        label: AxisLabel = WILD
        for n, axis in present:
            if n == longest:
                label = t.meet(label, axis, where)
        axes[-back] = label
    return axes


@rule(
    "pointwise",
    "complex",
    "hardswish",
    "masked_fill",
    "mish",
    "polar",
    "rsub",
    "log_sigmoid",
    "hardshrink",
    "softshrink",
)
def pointwise(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Any elementwise operator, with broadcasting."""
    inputs = [(x, t.value(x)) for x in flat_tensors(args, kwargs)]
    if len(inputs) == 1 and isinstance(out, torch.Tensor):
        t.label(out, inputs[0][1].axes, zero=_keeps_zero(func, args) and inputs[0][1].zero)
        return
    for result in flat_tensors(out):
        axes = broadcast(t, func, inputs, result.dim())
        for x, value in inputs:
            if any(isinstance(axis, str) for axis in value.axes):
                t.settle(x, axes)
        t.label(result, axes, zero=_stays_zero(func, args, inputs, axes))


def zero_along(x: torch.Tensor, value: Value, axes: Sequence[AxisLabel]) -> bool:
    """Whether a tensor is zero for removed units of any of ``axes``, with which its own are aligned from the right."""
    along = (d - len(axes) for d in labelled(axes))
    return value.zero and all(x.dim() >= -d and x.shape[d] > 1 and isinstance(value.axes[d], np.ndarray) for d in along)


def _stays_zero(func: Any, args: Any, inputs: Sequence[tuple[torch.Tensor, Value]], axes: Sequence[AxisLabel]) -> bool:
    """Whether the slices of removed units are zero after an elementwise operator."""
    name = _out_of_place(func)
    covers = [zero_along(x, v, axes) for x, v in inputs]
    if name == "mul":
        return any(covers)
    if name == "div":
        return bool(covers) and covers[0]
    return _keeps_zero(func, args) and all(covers)


def _keeps_zero(func: Any, args: Any) -> bool:
    """Whether an elementwise operator maps zero to zero."""
    name = _out_of_place(func)
    if name in ("add", "sub"):
        return not any(isinstance(a, (int, float)) and a != 0 for a in args[1:2])
    if name == "hardtanh":
        return bool(argument(func, args, {}, "min_val", -1) <= 0 <= argument(func, args, {}, "max_val", 1))
    return name in _ZERO_KEEPING


@functools.cache
def _out_of_place(func: Any) -> str:
    """Name of the out-of-place variant of an operator."""
    return str(func._schema.name).removeprefix("aten::").rstrip("_")


@rule("clone", "detach", "detach_", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "lift")
def same(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Copy the elements."""
    value = t.value(args[0])
    t.label(out, value.axes, zero=value.zero, source=value.source)


@rule(
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "randn_like",
    "bernoulli",
    "bernoulli_",
    "uniform_",
    "normal_",
    "random_",
    "fill_",
    "zero_",
    "exponential_",
)
def like(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """A tensor of the size of its input."""
    zero = str(func._schema.name) in ("aten::zeros_like", "aten::zero_")
    t.label(out, t.value(args[0]).axes, zero=zero)


@rule(
    "zeros",
    "new_zeros",
    "scalar_tensor",
    "empty",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "rand",
    "randn",
)
def uniform_content(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Zeros or noise, the same at every index; the trial checks whether their size depends on a width."""
    t.repeated(out.shape[:-1])
    t.label(out, (WILD,) * out.dim())
    if _out_of_place(func) in ("zeros", "new_zeros", "full", "new_full"):
        t.zeros.add(memory_of(out))


@rule(
    "ones",
    "full",
    "new_ones",
    "new_full",
    "arange",
    "linspace",
    "eye",
    "tensor",
    "randint",
    "randperm",
    "rand.generator",
    "_local_scalar_dense",
    "item",
)
def constant(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """A constant: axes of fixed size, unless it is zero."""
    if str(func._schema.name) in ("aten::full", "aten::new_full") and argument(func, args, kwargs, "fill_value") == 0:
        uniform_content(t, func, args, kwargs, out)
        return
    t.repeated(x for tensor in flat_tensors(out) for x in tensor.shape[:-1])
    rigid(t, out)


@rule("copy_")
def copy_(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Copy into a tensor."""
    target, source = args[0], args[1]
    inputs = [(target, t.value(target)), (source, t.value(source))]
    axes = broadcast(t, func, inputs, target.dim())
    t.label(out, axes, zero=False)


@rule("native_dropout")
def native_dropout(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Dropout: result and mask have the input's axes."""
    value = t.value(args[0])
    t.label(out[0], value.axes, zero=value.zero)
    t.label(out[1], value.axes)


@rule("_prelu_kernel", "prelu")
def prelu(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """PReLU after its weight was viewed to the input's rank."""
    pointwise(t, func, args, kwargs, out)
