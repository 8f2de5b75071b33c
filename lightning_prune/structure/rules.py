"""How each ATen operator hands on the indices of its inputs. One small rule per kind of operator.

A rule sees the operator's inputs and outputs and does three things: unite indices that can only be removed together,
freeze those for which removing is not the same as setting to zero, and label the outputs. An operator without a rule
freezes what flows into it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lightning_prune.structure.atoms import MismatchError
from lightning_prune.structure.tracing import WILD, AxisLabel, Blocks, IndexArray, Tracer, Value, flat_tensors

__all__ = ["RULES", "rule", "unknown"]

Rule = Callable[[Tracer, Any, tuple[Any, ...], dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the ATen operators ``names``, in-place twins included."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def _argument(func: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str, default: Any = None) -> Any:
    """An operator's argument by its name in the schema, wherever it was passed."""
    position, without = _places(func).get(name, (None, None))
    if position is None:
        return default
    if position < len(args):
        return args[position]
    return kwargs.get(name, default if without is None else without)


@functools.cache
def _places(func: Any) -> dict[str, tuple[int, Any]]:
    """Position and default of each of an operator's arguments."""
    return {
        argument.name: (position, argument.default_value if argument.has_default_value() else None)
        for position, argument in enumerate(func._schema.arguments)
    }


def _dims(dims: Any, ndim: int) -> list[int]:
    """Normalised list of dimensions; None or empty means all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(ndim))
    return [d % ndim if ndim else 0 for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _labelled(axes: Sequence[AxisLabel]) -> list[int]:
    return [d for d, axis in enumerate(axes) if isinstance(axis, np.ndarray)]


def unknown(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """No rule: nothing that flows in may change its width."""
    for tensor in flat_tensors(args, kwargs):
        t.freeze(t.value(tensor).axes, f"no rule for the operator {t.where(func)}")
    _rigid(t, out)


def _rigid(t: Tracer, out: Any) -> None:
    for tensor in flat_tensors(out):
        t.label(tensor, (None,) * tensor.dim())


# -- elementwise ------------------------------------------------------------------------------------------------------

#: f(0) = 0 in every input that is a tensor: the slices of removed units stay zero.
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


def _broadcast(t: Tracer, func: Any, values: Sequence[tuple[torch.Tensor, Value]], ndim: int) -> list[AxisLabel]:
    """Labels of a broadcast result: aligned dimensions of equal length unite, those of length 1 give way."""
    axes: list[AxisLabel] = [None] * ndim
    where = t.where(func)
    for back in range(1, ndim + 1):
        present = [(x.shape[-back], v.axes[-back]) for x, v in values if x.dim() >= back]
        longest = max((n for n, _ in present), default=1)
        label: AxisLabel = WILD
        for n, axis in present:
            if n == longest:
                label = t.meet(label, axis, where)
        axes[-back] = label
    return axes


@rule("pointwise", "hardswish", "masked_fill", "mish", "rsub", "log_sigmoid", "hardshrink", "softshrink")
def pointwise(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Any elementwise operator, with broadcasting."""
    inputs = [(x, t.value(x)) for x in flat_tensors(args, kwargs)]
    if len(inputs) == 1 and isinstance(out, torch.Tensor):
        t.label(out, inputs[0][1].axes, zero=_keeps_zero(func, args) and inputs[0][1].zero)
        return
    for result in flat_tensors(out):
        axes = _broadcast(t, func, inputs, result.dim())
        t.label(result, axes, zero=_stays_zero(func, args, inputs, axes))


def _zero_along(x: torch.Tensor, value: Value, axes: Sequence[AxisLabel]) -> bool:
    """Whether a tensor is zero where units left any of the ``axes``, to which its own are aligned from the last on."""
    along = (d - len(axes) for d in _labelled(axes))
    return value.zero and all(x.dim() >= -d and x.shape[d] > 1 and isinstance(value.axes[d], np.ndarray) for d in along)


def _stays_zero(func: Any, args: Any, inputs: Sequence[tuple[torch.Tensor, Value]], axes: Sequence[AxisLabel]) -> bool:
    """Whether the slices of removed units are zero after an elementwise operator."""
    name = _twin(func)
    covers = [_zero_along(x, v, axes) for x, v in inputs]
    if name == "mul":
        return any(covers)
    if name == "div":
        return bool(covers) and covers[0]
    return _keeps_zero(func, args) and all(covers)


def _keeps_zero(func: Any, args: Any) -> bool:
    """Whether an elementwise operator makes zero of zeros."""
    name = _twin(func)
    if name in ("add", "sub"):
        return not any(isinstance(a, (int, float)) and a != 0 for a in args[1:2])
    if name == "hardtanh":
        return bool(_argument(func, args, {}, "min_val", -1) <= 0 <= _argument(func, args, {}, "max_val", 1))
    return name in _ZERO_KEEPING


@functools.cache
def _twin(func: Any) -> str:
    """Name of an operator, or of the one that does not work in place."""
    return str(func._schema.name).removeprefix("aten::").rstrip("_")


@rule("clone", "detach", "detach_", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "lift")
def same(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """The same elements again."""
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
    """Zeros or noise, the same at every index; whether the size follows is settled by the trial."""
    t.repeated(out.shape[:-1])
    t.label(out, (WILD,) * out.dim())


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
    """A constant: axes of fixed size."""
    t.repeated(x for tensor in flat_tensors(out) for x in tensor.shape[:-1])
    _rigid(t, out)


@rule("copy_")
def copy_(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Write into a tensor."""
    target, source = args[0], args[1]
    inputs = [(target, t.value(target)), (source, t.value(source))]
    axes = _broadcast(t, func, inputs, target.dim())
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


# -- contractions -----------------------------------------------------------------------------------------------------


def _is_zero(value: Value, dim: int) -> bool:
    """Whether a tensor is zero where units left one of its axes."""
    return value.zero and isinstance(value.axes[dim], np.ndarray)


def _contract(t: Tracer, func: Any, a: Value, dim_a: int, b: Value, dim_b: int, length: int) -> None:
    """Sum over a common axis: exact if one side is zero where units are removed."""
    label = t.meet(a.axes[dim_a], b.axes[dim_b], t.where(func))
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
    rows_zero = x.dim() < 2 or not isinstance(a.axes[-2], np.ndarray) or a.zero
    columns_zero = y.dim() < 2 or not isinstance(b.axes[-1], np.ndarray) or b.zero
    zero = zero and rows_zero and columns_zero
    if bias is not None:
        v = t.value(bias)
        axes = _broadcast(t, func, [(bias, v), (out, Value(tuple(axes)))], out.dim())
        zero = zero and _zero_along(bias, v, axes)
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

    The features of v are followed. Those of q and k stay, since the scale is computed from their number.
    """
    q, k, v = (t.value(x) for x in args[:3])
    where = t.where(func)
    t.freeze([q.axes[3], k.axes[3]], f"the scale of {where}")
    t.freeze([q.axes[2], k.axes[2], v.axes[2]], f"the positions of {where}")
    for tensor in flat_tensors(args[3:], kwargs):
        t.freeze(t.value(tensor).axes, f"the mask of {where}")
    for tensor, value in zip(args[:2], (q, k), strict=True):
        t.note_lengths(tensor.shape[2:], value.axes[2:])
    outer = [t.meet(t.meet(q.axes[d], k.axes[d], where), v.axes[d], where) for d in (0, 1)]
    samples, heads, rows, features = args[0].shape
    pairs = samples * rows * args[1].shape[2]
    t.count(pairs * features, [outer[1]], [heads])
    t.count(pairs, [outer[1], v.axes[3]], [heads, args[2].shape[3]])
    for extra in flat_tensors(out[1:]):
        t.label(extra, [*outer, *([None] * (extra.dim() - 2))] if extra.dim() > 2 else [None] * extra.dim())
    axes = [*outer, None, v.axes[3]]
    t.label(out[0], axes, zero=_zero_along(args[2], v, axes))


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
    t.freeze(v.axes[channel + 1 :], f"the positions of {where}")
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
        produced = _grouped(t, v.axes[channel], w, groups, transposed, where)
    if bias is not None:
        produced = t.meet(produced, t.value(bias).axes[0], where)
    axes = [*v.axes[:channel], produced, *([None] * spatial)]
    positions = x.shape[channel + 1 :] if transposed else out.shape[channel + 1 :]
    batch = math.prod(x.shape[:channel])
    if t.samples is None and not t.constant:
        t.samples = batch
    t.count(math.prod(positions) * math.prod(weight.shape[2:]) * batch, w.axes[:2], weight.shape[:2])
    # A bias is there for every sample.
    samples_zero = not _labelled(axes[:channel]) or (v.zero and bias is None)
    t.label(out, axes, zero=w.zero and samples_zero and (bias is None or t.value(bias).zero))


def _grouped(t: Tracer, given: AxisLabel, w: Value, groups: int, transposed: bool, where: str) -> AxisLabel:
    """Couple the channels of a grouped convolution; the labels of what it produces.

    Where a group has one input or one output channel (depthwise), whole groups go; elsewhere every group loses the
    same positions, so that all stay equally wide.
    """
    rows, inner = w.axes[0], w.axes[1]
    if not w.zero or not isinstance(rows, np.ndarray) or not isinstance(inner, np.ndarray):
        t.freeze([given, rows, inner], f"a grouped convolution with a computed weight in {where}")
        return None
    if given is None or isinstance(given, str):
        t.freeze([rows, inner], f"meets an axis of fixed size in {where}")
        return None
    by_group = rows.reshape(groups, -1)
    given_by_group = given.reshape(groups, -1)
    per_row_group, per_inner = by_group.shape[1], len(inner)
    roots = t.atoms.find(by_group)
    # Of a network that was cut before, groups as thin as one channel are known by what its structure unites.
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


# -- normalisation ----------------------------------------------------------------------------------------------------


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
    """Batch norm: everything of one channel goes with it."""
    x = t.value(args[0])
    # Statistics over units, where a weight is standardised: a cut leaves others, and scales that are not known.
    t.freeze([x.axes[0], *x.axes[2:]], f"normalised over in {t.where(func)}")
    channel: AxisLabel = x.axes[1]
    zeros = {}
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = _argument(func, args, kwargs, name)
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
    """Layer norm. Its statistics change when units leave: exact as a narrower layer, not as a masked one."""
    x, shape, weight, bias = args[0], args[1], args[2], args[3]
    value, first = t.value(x), x.dim() - len(shape)
    axes = list(value.axes)
    if weight is None:
        t.freeze(axes[first:], f"a layer norm without weights in {t.where(func)}: its size is written as a number")
    for tensor in (weight, bias):
        if tensor is not None:
            for d, axis in enumerate(t.value(tensor).axes):
                axes[first + d] = t.meet(axes[first + d], axis, t.where(func))
    t.label(out[0], axes, zero=_scaled_to_zero(t, weight, bias, axes[:first]))
    for extra in out[1:]:
        t.label(extra, [*axes[:first], *([None] * (extra.dim() - first))])


def _scaled_to_zero(t: Tracer, weight: torch.Tensor | None, bias: torch.Tensor | None, outer: list[AxisLabel]) -> bool:
    """Whether weight and bias of a norm make zero of removed units; those of ``outer`` axes do not have their own."""
    zeros = [tensor is None or t.value(tensor).zero for tensor in (weight, bias)]
    return weight is not None and all(zeros) and not _labelled(outer)


@rule("_weight_norm_interface")
def weight_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Weight = g · v / ‖v‖ with one norm per index of `dim`; entries that are zero do not count in a norm."""
    v, g = t.value(args[0]), t.value(args[1])
    dim = _argument(func, args, kwargs, "dim", 0)
    axes = list(v.axes)
    axes[dim] = t.meet(axes[dim], g.axes[dim], t.where(func))
    zero = v.zero or (g.zero and _labelled(axes) == [dim])
    t.label(out[0], axes, zero=zero, source=v.source)
    t.label(out[1], [axes[d] if d == dim else None for d in range(len(axes))])


@rule("native_group_norm")
def group_norm(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Group norm: every group loses the same positions; a group of one channel goes as a whole."""
    x, weight, bias, groups = args[0], args[1], args[2], int(args[6])
    axes = list(t.value(x).axes)
    t.freeze(axes[2:], f"normalised over in {t.where(func)}")
    for tensor in (weight, bias):
        if tensor is not None:
            axes[1] = t.meet(axes[1], t.value(tensor).axes[0], t.where(func))
    channel = axes[1]
    if isinstance(channel, np.ndarray):
        by_group = channel.reshape(groups, -1)
        t.note(groups if by_group.shape[1] > 1 else None)  # groups of one channel go with it, of others none goes
        if by_group.shape[1] > 1:
            t.atoms.unite(by_group[1:].ravel(), np.tile(by_group[0], groups - 1))
        elif weight is None:
            t.freeze([channel], f"a group norm without weights in {t.where(func)}: its size is written as a number")
    t.label(out[0], axes, zero=_scaled_to_zero(t, weight, bias, axes[:1]))
    for extra in out[1:]:
        t.label(extra, [axes[0], channel if groups == x.shape[1] else None])


# -- pooling and resampling -------------------------------------------------------------------------------------------


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
    """Work on the trailing positions, channel by channel."""
    name = str(func._schema.name)
    rank = next(int(n) for n in "123" if f"{n}d" in name)
    inputs = [x for x in flat_tensors(args) if x.dim() == args[0].dim()]
    value = t.value(args[0])
    axes = (
        _broadcast(t, func, [(x, t.value(x)) for x in inputs], args[0].dim()) if len(inputs) > 1 else list(value.axes)
    )
    t.freeze(axes[-rank:], f"the positions of {t.where(func)}")
    for result in flat_tensors(out):
        t.label(result, [*axes[: result.dim() - rank], *([None] * rank)], zero=value.zero)


@rule("torchvision::roi_align", "torchvision::roi_pool")
def region(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Regions cut out of the positions, channel by channel: (regions, channels, height, width)."""
    value = t.value(args[0])
    t.freeze(value.axes[2:], f"the positions of {t.where(func)}")
    t.freeze(t.value(args[1]).axes, f"the regions of {t.where(func)}")
    results = flat_tensors(out)
    t.label(results[0], [None, value.axes[1], None, None], zero=value.zero)
    _rigid(t, results[1:])


@rule("constant_pad_nd")
def pad(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Padding; a padded channel has no unit behind it and stays."""
    value, amounts = t.value(args[0]), args[1]
    axes = list(value.axes)
    fill = _argument(func, args, kwargs, "value", 0)
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


# -- reductions -------------------------------------------------------------------------------------------------------


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
    """Reduce or normalise over some dimensions; only a sum of zeros is the same without them."""
    name = str(func._schema.name).removeprefix("aten::")
    if name in ("max", "min") and len(flat_tensors(args)) == 2:
        pointwise(t, func, args, kwargs, out)
        return
    x = args[0]
    value = t.value(x)
    dims = _dims(_argument(func, args, kwargs, "dim"), x.dim())
    touched = [value.axes[d] for d in dims]
    t.note_lengths([x.shape[d] for d in dims], touched)
    if not (value.zero and _ignores_zeros(func, args, kwargs)):
        t.freeze(touched, f"reduced over in {t.where(func)}")
    for result in flat_tensors(out):
        if result.dim() == x.dim():
            axes = [None if d in dims else axis for d, axis in enumerate(value.axes)]
        else:
            axes = [axis for d, axis in enumerate(value.axes) if d not in dims]
        t.label(result, axes, zero=name in ("sum", "mean", "norm", "linalg_vector_norm") and value.zero)


def _ignores_zeros(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a reduction is the same without elements that are zero: a sum, a norm of positive order."""
    name = str(func._schema.name).removeprefix("aten::")
    if name in ("norm", "linalg_vector_norm"):
        order = _argument(func, args, kwargs, "ord" if name == "linalg_vector_norm" else "p", 2)
        return order is None or order > 0
    return name == "sum"


# -- layout -----------------------------------------------------------------------------------------------------------


def _moved(t: Tracer, out: torch.Tensor, value: Value, dims: Sequence[int]) -> None:
    source = value.source and (value.source[0], tuple(value.source[1][d] for d in dims))
    t.label(out, [value.axes[d] for d in dims], zero=value.zero, source=source)


@rule("t", "transpose", "permute", "transpose_", "t_", "swapaxes", "movedim", "numpy_T")
def permute(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Exchange dimensions."""
    value, ndim = t.value(args[0]), out.dim()
    dims = list(range(ndim))
    if len(args) == 3:
        i, j = args[1] % ndim, args[2] % ndim
        dims[i], dims[j] = dims[j], dims[i]
    elif len(args) == 2:
        dims = [d % ndim for d in args[1]]
    elif ndim == 2:
        dims = [1, 0]
    _moved(t, out, value, dims)


@rule(
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "unflatten",
    "flatten",
    "unsqueeze",
    "unsqueeze_",
    "view_as",
    "_reshape_copy",
    "view_copy",
    "unsqueeze_copy",
)
def view(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Merge and split dimensions (an added or dropped dimension of length 1 is a case of it)."""
    x = args[0]
    value = t.value(x)
    if x.dtype != out.dtype or x.numel() != out.numel():
        unknown(t, func, args, kwargs, out)
        return
    blocks = _blocks_of_view(t, tuple(x.shape), tuple(out.shape), _labelled(value.axes))
    if blocks is None:
        t.label(out, value.axes, zero=value.zero, source=value.source)
        return
    axes: list[AxisLabel] = []
    for old, new in blocks:
        axes += _regroup(t, func, [(x.shape[d], value.axes[d]) for d in old], [out.shape[d] for d in new])
    t.label(out, axes, zero=value.zero)


@rule("squeeze", "squeeze_copy")
def squeeze(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Drop dimensions of length 1."""
    value = t.value(args[0])
    dropped = [d for d in _dims(args[1] if len(args) > 1 else None, args[0].dim()) if args[0].shape[d] == 1]
    t.freeze([value.axes[d] for d in dropped], f"a single unit, dropped in {t.where(func)}")
    _moved(t, out, value, [d for d in range(args[0].dim()) if d not in dropped])


def _blocks_of_view(t: Tracer, old: tuple[int, ...], new: tuple[int, ...], labelled: list[int]) -> Blocks | None:
    """Which old dimensions become which new ones; None if they stay.

    A trial follows the first trace: where a cut leaves a single unit, its lengths alone would tell another story.
    """
    if t.decided is None:
        blocks = None if old == new else _blocks(old, new, labelled)
    elif len(t.views) < len(t.decided_views):
        blocks = t.decided_views[len(t.views)]
        if not (_fits(blocks, old, new) if blocks is not None else old == new):
            raise MismatchError("a view regroups other axes than before")
    else:
        raise MismatchError("an axis is viewed that was not viewed before")
    t.views.append(blocks)
    return blocks


def _fits(blocks: Blocks, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether dimensions of these lengths can be grouped so."""
    counts = sum(len(a) for a, _ in blocks), sum(len(b) for _, b in blocks)
    alike = (math.prod(old[d] for d in a) == math.prod(new[d] for d in b) for a, b in blocks)
    return counts == (len(old), len(new)) and all(alike)


def _blocks(old: tuple[int, ...], new: tuple[int, ...], labelled: list[int]) -> Blocks:
    """Smallest runs of old and new dimensions with the same number of elements, in order.

    A labelled dimension of length 1 that has no counterpart was merged into what follows it.
    """
    blocks: Blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        a = b = 1
        if i < len(old):
            left.append(i)
            a, i = old[i], i + 1
        if j < len(new) and (a == new[j] or a != 1 or not left):
            right.append(j)
            b, j = new[j], j + 1
        while a != b:
            if a < b:
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                right.append(j)
                b, j = b * new[j], j + 1
        if blocks and not blocks[-1][1] and set(blocks[-1][0]) & set(labelled):
            left = blocks.pop()[0] + left
        blocks.append((left, right))
    return blocks


def _regroup(t: Tracer, func: Any, old: list[tuple[int, AxisLabel]], new: list[int]) -> list[AxisLabel]:
    """Labels of new dimensions made of old ones, all elements in row-major order."""
    if len(new) == 1 and len(old) == 1:
        return [old[0][1]]
    labelled = [d for d, (_, axis) in enumerate(old) if isinstance(axis, np.ndarray)]
    if not labelled:
        wild = any(n > 1 for n, _ in old) and all(isinstance(axis, str) for n, axis in old if n > 1)
        return [WILD if wild else None for _ in new]
    if len(labelled) > 1:
        t.freeze([old[d][1] for d in labelled], f"two axes that could shrink are merged in {t.where(func)}")
        return [None] * len(new)
    sizes, d = [n for n, _ in old], labelled[0]
    shape = [1] * len(old)
    shape[d] = sizes[d]
    label = old[d][1]
    assert isinstance(label, np.ndarray)
    t.note_lengths(sizes, [axis for _, axis in old])  # how often each unit is repeated
    grid = np.broadcast_to(label.reshape(shape), sizes).reshape(new)
    if len(new) == 1:
        return [grid]
    varying = [k for k, n in enumerate(new) if n > 1 and not (grid == grid.take([0], axis=k)).all()]
    keep = t.choose(label, new, varying)
    if keep is None:
        t.freeze([label], f"the same unit at every index in {t.where(func)}")
        return [None] * len(new)
    # One axis keeps its indices; those it is crossed with share them: every block loses alike.
    line = _line(grid, keep)
    if varying != [keep]:
        spread = np.moveaxis(grid, keep, -1).reshape(-1, new[keep])
        t.atoms.unite(spread[1:].ravel(), np.tile(spread[0], len(spread) - 1))
    return [line if k == keep else None for k in range(len(new))]


def _line(grid: IndexArray, axis: int) -> IndexArray:
    return np.ascontiguousarray(grid[tuple(slice(None) if k == axis else 0 for k in range(grid.ndim))])


def _times(x: torch.Tensor, out: torch.Tensor) -> list[int]:
    """How often each dimension of a repeated tensor holds the original."""
    before = [1] * (out.dim() - x.dim()) + list(x.shape)
    return [now // max(old, 1) for now, old in zip(out.shape, before, strict=True)]


@rule("expand", "expand_copy", "broadcast_to")
def expand(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Repeat along dimensions of length 1: the same content at every index."""
    x, value = args[0], t.value(args[0])
    t.repeated(_times(x, out))
    added = out.dim() - x.dim()
    axes: list[AxisLabel] = [WILD] * added
    for d, axis in enumerate(value.axes):
        axes.append(axis if x.shape[d] == out.shape[added + d] else WILD)
    t.label(out, axes, zero=value.zero)


@rule("repeat", "tile")
def repeat(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Repeat whole axes."""
    x, value = args[0], t.value(args[0])
    t.repeated(_times(x, out))
    added = out.dim() - x.dim()
    axes: list[AxisLabel] = [WILD] * added
    for d, axis in enumerate(value.axes):
        times = out.shape[added + d] // max(x.shape[d], 1)
        if x.shape[d] == 1 and times > 1:
            axes.append(WILD)
        elif isinstance(axis, np.ndarray):
            t.note(times)
            axes.append(np.tile(axis, times))
        else:
            axes.append(axis)
    t.label(out, axes, zero=value.zero)


@rule("cat", "concat", "stack")
def cat(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Concatenate: indices stand one after another."""
    stacked = str(func._schema.name) == "aten::stack"
    parts = [p for p in args[0] if stacked or p.dim() > 1 or p.numel()]  # `cat` skips empty vectors
    dim = _argument(func, args, kwargs, "dim", 0) % out.dim()
    values = [t.value(p) for p in parts]
    where = t.where(func)
    if stacked:
        rest = _broadcast(t, func, list(zip(parts, values, strict=True)), parts[0].dim())
        zero = all(_zero_along(x, v, rest) for x, v in zip(parts, values, strict=True))
        t.label(out, [*rest[:dim], None, *rest[dim:]], zero=zero)
        return
    axes: list[AxisLabel] = []
    for d in range(out.dim()):
        if d != dim:
            label: AxisLabel = WILD
            for v in values:
                label = t.meet(label, v.axes[d], where)
            axes.append(label)
            continue
        pieces = [v.axes[d] for v in values]
        if not any(isinstance(p, np.ndarray) for p in pieces):
            axes.append(None)
            continue
        axes.append(
            np.concatenate(
                [
                    p if isinstance(p, np.ndarray) else t.atoms.fresh(x.shape[d], f"a part of fixed size in {where}")
                    for x, p in zip(parts, pieces, strict=True)
                ]
            )
        )
    others = [axis for d, axis in enumerate(axes) if d != dim]
    alike = all(_labelled(others) == _labelled([a for d, a in enumerate(v.axes) if d != dim]) for v in values)
    t.label(out, axes, zero=alike and all(v.zero for v in values))


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "split_copy", "split_with_sizes_copy")
def split(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Equal parts lose the same indices; the bounds of unequal parts are numbers and stay."""
    x, value = args[0], t.value(args[0])
    dim = _argument(func, args, kwargs, "dim", 0) % x.dim()
    parts = list(out)
    axis = value.axes[dim]
    sizes = [p.shape[dim] for p in parts]
    if isinstance(axis, np.ndarray) and len(parts) > 1:
        if len(set(sizes)) == 1:
            by_part = axis.reshape(len(parts), -1)
            t.atoms.unite(by_part[1:].ravel(), np.tile(by_part[0], len(parts) - 1))
        else:
            t.freeze([axis], f"split into unequal parts in {t.where(func)}")
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        piece = axis[start : start + size] if isinstance(axis, np.ndarray) else axis
        start += size
        t.label(part, [*value.axes[:dim], piece, *value.axes[dim + 1 :]], zero=value.zero)


@rule("slice", "slice_copy", "narrow")
def slice_(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """A slice. Its bounds are numbers: they point at the same place if what lies before them stays.

    A bound that is counted from the end moves with what lies behind it; whether one was computed from a width shows in
    the trial, by what the slice holds.
    """
    x, value = args[0], t.value(args[0])
    dim = _argument(func, args, kwargs, "dim", 0) % x.dim()
    start = _argument(func, args, kwargs, "start") or 0
    end = _argument(func, args, kwargs, "end")
    step = _argument(func, args, kwargs, "step") or 1
    n, axis = x.shape[dim], value.axes[dim]
    if isinstance(axis, np.ndarray):
        for bound in (start, end):
            if bound is not None and -n < bound < n and bound:
                held = slice(bound) if bound > 0 else slice(bound, None)
                t.freeze([axis[held]], f"lies on the far side of a bound of {t.where(func)}")
        part = axis[start:end:step]
        if step != 1:
            t.freeze([axis], f"picked at regular intervals in {t.where(func)}")
        t.picked(axis, part)
        axis = part
    elif axis is None:
        t.note(start)
    t.label(out, [*value.axes[:dim], axis, *value.axes[dim + 1 :]], zero=value.zero)


@rule("select", "select_copy")
def select(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """One index of an axis: the axis must keep what lies before it."""
    x, value = args[0], t.value(args[0])
    dim = args[1] % x.dim()
    t.freeze([value.axes[dim]], f"picked from by number in {t.where(func)}")
    t.label(out, [*value.axes[:dim], *value.axes[dim + 1 :]], zero=value.zero)


@rule("unbind", "unbind_copy")
def unbind(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Every index of an axis on its own."""
    x, value = args[0], t.value(args[0])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.dim()
    t.freeze([value.axes[dim]], f"taken apart in {t.where(func)}")
    for part in out:
        t.label(part, [*value.axes[:dim], *value.axes[dim + 1 :]], zero=value.zero)


@rule("index_select", "gather", "index", "take_along_dim", "_unsafe_index")
def index(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Pick by an index tensor: exact along the axes that are not indexed."""
    name = str(func._schema.name).removeprefix("aten::")
    x, value = args[0], t.value(args[0])
    if name == "index_select":
        dim = args[1] % x.dim()
        t.freeze([value.axes[dim]], f"picked from by number in {t.where(func)}")
        t.label(out, [*value.axes[:dim], None, *value.axes[dim + 1 :]], zero=value.zero)
        return
    indices = args[1] if name in ("index", "_unsafe_index") else None
    if indices is None or sum(i is not None for i in indices) != 1:
        unknown(t, func, args, kwargs, out)
        return
    dim = next(d for d, i in enumerate(indices) if i is not None)
    if indices[dim].dtype in (torch.bool, torch.uint8):
        unknown(t, func, args, kwargs, out)
        return
    t.freeze([value.axes[dim]], f"picked from by number in {t.where(func)}")
    t.freeze(t.value(indices[dim]).axes, f"used as an index in {t.where(func)}")
    t.label(out, [*value.axes[:dim], *([None] * indices[dim].dim()), *value.axes[dim + 1 :]], zero=value.zero)


@rule("as_strided")
def as_strided(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """New strides: followed where they only change the memory format of the same shape, in place."""
    x = args[0]
    if str(func._schema.name) == "aten::as_strided_" and tuple(x.shape) == tuple(args[1]) == tuple(out.shape):
        same(t, func, args, kwargs, out)
    else:
        unknown(t, func, args, kwargs, out)


@rule("glu")
def glu(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Gated halves: both lose the same indices."""
    x, value = args[0], t.value(args[0])
    dim = _argument(func, args, kwargs, "dim", -1) % x.dim()
    axis = value.axes[dim]
    if isinstance(axis, np.ndarray):
        first, second = axis.reshape(2, -1)
        t.atoms.unite(first, second)
        axis = first
    t.label(out, [*value.axes[:dim], axis, *value.axes[dim + 1 :]], zero=value.zero)


@rule("flip", "roll")
def rearranged(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Reorder along dimensions; labels follow for a flip, a roll's shift is a number."""
    x, value = args[0], t.value(args[0])
    axes = list(value.axes)
    if str(func._schema.name) == "aten::flip":
        for d in _dims(args[1], x.dim()):
            axis = axes[d]
            axes[d] = axis[::-1].copy() if isinstance(axis, np.ndarray) else axis
    else:
        moved = _dims(_argument(func, args, kwargs, "dims"), x.dim())
        t.freeze([axes[d] for d in moved], f"rolled in {t.where(func)}")
    t.label(out, axes, zero=value.zero)


@rule(
    "sym_size",
    "sym_numel",
    "sym_stride",
    "is_same_size",
    "_assert_async",
    "_assert_tensor_metadata",
    "_is_all_true",
)
def nothing(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Reads sizes only."""
    _rigid(t, out)
