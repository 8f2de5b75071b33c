"""Matrix products, attention, convolutions and embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_prune.structure.rules.elementwise import broadcast, zero_along
from lightning_prune.structure.rules.registry import argument, labelled, rule, unknown
from lightning_prune.structure.tracing import MEETS_FIXED, AxisLabel, Tracer, Value, flat_tensors

__all__: list[str] = []  # the rules register themselves


def _is_zero(value: Value, dim: int) -> bool:
    """Whether a tensor is zero for removed units of one of its axes."""
    return value.zero and isinstance(value.axes[dim], np.ndarray)


def _contract(t: Tracer, func: Any, a: Value, dim_a: int, b: Value, dim_b: int, length: int) -> None:
    """Sum over a common axis: exact if one side is zero for removed units."""
    label = t.meet(a.axes[dim_a], b.axes[dim_b], t.where(func))
    if t.of_features and isinstance(label, np.ndarray) and not (a.constant or b.constant):
        t.products.append((t.module, label))
    if isinstance(label, np.ndarray) and not (_is_zero(a, dim_a) or _is_zero(b, dim_b)):
        t.freeze([label], f"summed over in {t.where(func)} where removed units would not be zero")
    t.note_lengths([length], [label])
    for value, dim in ((a, dim_a), (b, dim_b)):
        t.role(value, dim, "in")


@rule("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv", "linear", "matmul")
def matrix_product(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """(…, n, k) @ (…, k, m), with or without an added bias."""
    name = str(func._schema.name).removeprefix("aten::")
    bias = args[0] if name.startswith("add") or name == "baddbmm" else None
    x, y = args[1:3] if bias is not None else args[:2]
    if name in ("linear", "matmul", "addbmm"):
        unknown(t, func, args, kwargs, out)  # composite: never seen below autograd
        return
    a, b = t.value(x), t.value(y)
    in_a, in_b = x.dim() - 1, max(y.dim() - 2, 0)
    _contract(t, func, a, in_a, b, in_b, x.shape[-1])
    axes: list[AxisLabel] = []
    zero = True
    if x.dim() == 3:  # batch
        axes.append(t.meet(a.axes[0], b.axes[0], t.where(func)))
        zero = not isinstance(axes[0], np.ndarray) or _is_zero(a, 0) or _is_zero(b, 0)
    if x.dim() >= 2:
        axes.append(a.axes[-2])
        t.role(a, x.dim() - 2, "out")
    if y.dim() >= 2:
        axes.append(b.axes[-1])
        t.role(b, y.dim() - 1, "out")
    rows = a.axes[-2] if x.dim() >= 2 else None
    rows_zero = not isinstance(rows, np.ndarray) or a.zero
    if t.of_features and isinstance(rows, np.ndarray) and not a.zero and t.atoms.are_frozen(rows):
        axes[-1 if y.dim() < 2 else -2], rows_zero = None, True  # positions, which no cut removes
    columns_zero = y.dim() < 2 or not isinstance(b.axes[-1], np.ndarray) or b.zero
    zero = zero and rows_zero and columns_zero
    if bias is not None:
        v = t.value(bias)
        axes = broadcast(t, func, [(bias, v), (out, Value(tuple(axes)))], out.dim())
        zero = zero and zero_along(bias, v, axes)
    contracted = a.axes[in_a] if isinstance(a.axes[in_a], np.ndarray) else b.axes[in_b]
    t.count(1.0, [*axes, contracted], [*out.shape, x.shape[-1]])
    t.label(out, axes, zero=zero)


@rule(
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def attention(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """softmax(q kᵀ · scale) v on (batch, heads, positions, features).

    The features of v are followed. Those of q and k are frozen, unless they are the units (`Tracer.of_features`) and a
    scale is given (`OwnScales`): it would be computed from their number.
    """
    q, k, v = (t.value(x) for x in args[:3])
    where = t.where(func)
    if t.of_features and argument(func, args, kwargs, "scale") is not None:
        _contract(t, func, q, 3, k, 3, args[0].shape[3])
    else:
        t.freeze([q.axes[3], k.axes[3]], f"the scale of {where}")
    t.freeze([q.axes[2], k.axes[2], v.axes[2]], f"the positions of {where}")
    for tensor in flat_tensors(args[3:], kwargs):
        t.freeze(t.value(tensor).axes, f"the mask of {where}")
    for tensor, value in zip(args[:2], (q, k), strict=True):
        t.note_lengths(tensor.shape[2:], value.axes[2:])
    samples, heads, rows, features = args[0].shape
    outer = list(q.axes[:2])
    for value in (k, v):  # with `enable_gqa`, one of their heads serves several of the queries
        outer = [t.meet(outer[0], value.axes[0], where), t.meet(outer[1], _repeated(value.axes[1], heads), where)]
    pairs = samples * rows * args[1].shape[2]
    t.count(pairs, [outer[1], q.axes[3]], [heads, features])
    t.count(pairs, [outer[1], v.axes[3]], [heads, args[2].shape[3]])
    for extra in flat_tensors(out[1:]):
        t.label(extra, [*outer, *([None] * (extra.dim() - 2))] if extra.dim() > 2 else [None] * extra.dim())
    axes = [*outer, None, v.axes[3]]
    t.label(out[0], axes, zero=zero_along(args[2], v, axes))


def _repeated(axis: AxisLabel, length: int) -> AxisLabel:
    """An axis whose indices are repeated, each in place, up to a length."""
    if not isinstance(axis, np.ndarray) or not len(axis) < length:
        return axis
    return np.repeat(axis, length // len(axis))


@rule("convolution", "cudnn_convolution", "mkldnn_convolution", "_convolution")
def convolution(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Convolution, transposed or not, grouped or not."""
    x, weight, bias = args[0], args[1], args[2]
    transposed, groups = bool(args[6]), int(args[8])
    v, w = t.value(x), t.value(weight)
    spatial = weight.dim() - 2
    channel = x.dim() - spatial - 1  # 0 for an unbatched input
    where = t.where(func)
    t.freeze(w.axes[2:], f"the kernel size of {where}")
    positions = _positions(t, v.axes[channel + 1 :], weight, args)
    mixed = [axis for axis, kept in zip(v.axes[channel + 1 :], positions, strict=True) if kept is None]
    t.freeze(mixed, f"neighbours are mixed by {where}")
    dim_in, dim_out = (0, 1) if transposed else (1, 0)
    t.role(w, dim_in, "in")
    t.role(w, dim_out, "out")
    if groups == 1:
        label = t.meet(v.axes[channel], w.axes[dim_in], where)
        if isinstance(label, np.ndarray) and not (_is_zero(v, channel) or _is_zero(w, dim_in)):
            t.freeze([label], f"summed over in {where} where removed units would not be zero")
        t.note_lengths([x.shape[channel]], [label])
        produced = w.axes[dim_out]
    else:
        produced = _grouped(t, v.axes[channel], w, groups, transposed, where, weight.shape[1])
    if bias is not None:
        produced = t.meet(produced, t.value(bias).axes[0], where)
    axes = [*v.axes[:channel], produced, *positions]
    lengths = x.shape[channel + 1 :] if transposed else out.shape[channel + 1 :]
    batch = math.prod(x.shape[:channel])
    if t.samples is None and not t.constant:
        t.samples = batch
    t.count(math.prod(weight.shape[2:]) * batch, [*w.axes[:2], *positions], [*weight.shape[:2], *lengths])
    # The bias is added to every sample and position.
    others_zero = not labelled([*axes[:channel], *positions]) or (v.zero and bias is None)
    t.label(out, axes, zero=w.zero and others_zero and (bias is None or t.value(bias).zero))


def _positions(t: Tracer, axes: Sequence[AxisLabel], weight: Any, args: Any) -> list[AxisLabel]:
    """Labels of the output's positions: those of the input along which a kernel of 1 takes each by itself."""
    kernel, spatial = weight.shape[2:], len(axes)
    stride, padding, added = (list(args[i]) * (spatial // len(args[i])) for i in (3, 4, 7))
    return [
        axis if tuple(sizes) == (1, 1, 0, 0) and isinstance(axis, np.ndarray) and not t.atoms.are_frozen(axis) else None
        for axis, *sizes in zip(axes, kernel, stride, padding, added, strict=True)
    ]


def _grouped(
    t: Tracer, given: AxisLabel, w: Value, groups: int, transposed: bool, where: str, per_inner: int
) -> AxisLabel:
    """Couple the channels of a grouped convolution and return the labels of its output channels.

    If a group has one input or one output channel (depthwise), whole groups are removed; else every group loses the
    same positions, so that all keep the same width.
    """
    rows, inner = w.axes[0], w.axes[1]
    if inner is None and per_inner == 1:  # a view of a weight with one channel per group
        inner = t.atoms.fresh(1, f"the channels inside a group of {where}")
    if not w.zero or not isinstance(rows, np.ndarray) or not isinstance(inner, np.ndarray):
        t.freeze([given, rows, inner], f"a grouped convolution with a computed weight in {where}")
        return None
    if given is None or isinstance(given, str):
        t.freeze([rows, inner], f"{MEETS_FIXED} in {where}")
        return None
    by_group = rows.reshape(groups, -1)
    given_by_group = given.reshape(groups, -1)
    per_row_group = by_group.shape[1]
    roots = t.atoms.find(by_group)
    # In a network that was cut before, the structure tells whether groups of one channel are removed as a whole.
    whole = (per_row_group == 1 or per_inner == 1) and not (roots == roots[0]).all()
    if w.source is not None:  # a trial cut makes groups as thin, too: there the first trace has decided
        whole = t.whole_groups.setdefault(w.source[0], whole)
    if whole:
        t.freeze([inner], f"the channels inside a group of {where}")
        t.atoms.unite(by_group[:, 1:].ravel(), np.repeat(by_group[:, 0], per_row_group - 1))
        t.atoms.unite(given_by_group.ravel(), np.repeat(by_group[:, 0], given_by_group.shape[1]))
        if not transposed:
            return rows
        return np.repeat(by_group[:, 0], per_inner)
    t.atoms.unite(by_group[1:].ravel(), np.tile(by_group[0], groups - 1))
    if transposed:  # weight (in, out / groups): rows are consumed, the inner axis is produced by every group
        t.atoms.unite(given_by_group.ravel(), by_group.ravel())
        return np.tile(inner, groups)
    t.atoms.unite(given_by_group.ravel(), np.tile(inner, groups))
    return rows


@rule("embedding")
def embedding(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Rows of a table."""
    w = t.value(args[0])
    t.freeze([w.axes[0]], "the vocabulary of an embedding")
    t.freeze(t.value(args[1]).axes, "indices of an embedding")
    t.role(w, 1, "out")
    t.label(out, [None] * (out.dim() - 1) + [w.axes[1]], zero=w.zero)
