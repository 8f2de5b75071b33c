"""Fast shape inference on the meta device for the most common operators.

A shortcut handles contiguous tensors of one floating dtype only, checks shapes as strictly as the operator, and returns
`NotImplemented` in all other cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SHORTCUTS"]


def _plain(*tensors: Tensor) -> bool:
    """Whether all are contiguous meta tensors of the same floating dtype."""
    dtype = tensors[0].dtype
    return dtype.is_floating_point and all(t.is_meta and t.dtype is dtype and t.is_contiguous() for t in tensors)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether both are meta tensors of the same floating dtype."""
    return a.is_meta and b.is_meta and a.dtype.is_floating_point and a.dtype is b.dtype


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _unary(x: Tensor, *_: Any, **__: Any) -> Any:
    return x.clone() if _plain(x) else NotImplemented


def _unary_in_place(x: Tensor, *_: Any, **__: Any) -> Any:
    return x if x.is_meta else NotImplemented


def _binary(a: Tensor, b: Any, *_: Any, **__: Any) -> Any:
    if not isinstance(b, Tensor):
        return a.clone() if _plain(a) and isinstance(b, (int, float)) else NotImplemented
    if not _plain(a, b):
        return NotImplemented
    return a.clone() if a.shape == b.shape else _empty(torch.broadcast_shapes(a.shape, b.shape), a)  # type: ignore[no-untyped-call]


def _binary_in_place(a: Tensor, b: Any, *_: Any, **__: Any) -> Any:
    fits = a.is_meta and (isinstance(b, (int, float)) or (isinstance(b, Tensor) and b.is_meta and b.shape == a.shape))
    return a if fits else NotImplemented


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    rank = weight.dim() - 2
    if not _plain(x, weight) or x.dim() != rank + 2 or not len(stride) == len(padding) == len(dilation) == rank:
        return NotImplemented
    given, produced = weight.shape[1] * groups, weight.shape[0]
    if transposed:
        given, produced = produced, given
    if x.shape[1] != given or weight.shape[0] % groups or (bias is not None and bias.shape != (produced,)):
        raise ValueError(f"a convolution of {list(weight.shape)}, groups {groups}, met an input of {list(x.shape)}")
    shape = [x.shape[0], produced]
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding or [0] * rank, strict=True)
    for n, kernel, step, pad, dilate, extra in sizes:
        reach = dilate * (kernel - 1)
        shape.append(
            (n - 1) * step - 2 * pad + reach + extra + 1 if transposed else (n + 2 * pad - reach - 1) // step + 1
        )
    if min(shape) <= 0:
        return NotImplemented
    return _empty(shape, x)


def _batch_norm(x: Tensor, *rest: Any) -> Any:
    if not _plain(x):
        return NotImplemented
    channels = x.shape[1]
    for tensor in rest[:4]:
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(f"a batch norm of {list(tensor.shape)} met an input of {list(x.shape)}")
    statistics = channels if rest[4] else 0  # of the batch, in training
    return x.clone(), _empty((statistics,), x), _empty((statistics,), x)


def _layer_norm(x: Tensor, shape: Sequence[int], *_: Any) -> Any:
    if not _plain(x):
        return NotImplemented
    outer = x.dim() - len(shape)
    if tuple(x.shape[outer:]) != tuple(shape):
        raise ValueError(f"a layer norm of {list(shape)} met an input of {list(x.shape)}")
    statistics = [*x.shape[:outer], *([1] * len(shape))]
    return x.clone(), _empty(statistics, x), _empty(statistics, x)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> Any:
    product = _mm(a, b)
    if product is NotImplemented or not _alike(bias, a) or bias.shape not in (b.shape[1:], product.shape):
        return NotImplemented
    return product


def _mm(a: Tensor, b: Tensor) -> Any:
    if not (_alike(a, b) and a.dim() == b.dim() == 2):
        return NotImplemented
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"a product of {list(a.shape)} and {list(b.shape)}")
    return _empty((a.shape[0], b.shape[1]), a)


def _bmm(a: Tensor, b: Tensor) -> Any:
    if not (_alike(a, b) and a.dim() == b.dim() == 3):
        return NotImplemented
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise ValueError(f"a product of {list(a.shape)} and {list(b.shape)}")
    return _empty((a.shape[0], a.shape[1], b.shape[2]), a)


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Any:
    first = parts[0]
    if not _plain(*parts) or any(part.dim() != first.dim() for part in parts) or not first.dim():
        return NotImplemented
    dim %= first.dim()
    rest = first.shape[:dim] + first.shape[dim + 1 :]
    if any(part.shape[:dim] + part.shape[dim + 1 :] != rest for part in parts):
        raise ValueError(f"a concatenation of {[list(part.shape) for part in parts]} along {dim}")
    return _empty([*first.shape[:dim], sum(part.shape[dim] for part in parts), *first.shape[dim + 1 :]], first)


def _named(function: Callable[..., Any], *names: str) -> dict[str, Callable[..., Any]]:
    return dict.fromkeys(names, function)


#: By name and overload of the operator.
SHORTCUTS: dict[str, Callable[..., Any]] = {
    "convolution.default": _convolution,
    "native_batch_norm.default": _batch_norm,
    "native_layer_norm.default": _layer_norm,
    "addmm.default": _addmm,
    "mm.default": _mm,
    "bmm.default": _bmm,
    "cat.default": _cat,
    **_named(_binary, "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"),
    **_named(_binary_in_place, "add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor"),
    **{
        f"{name}.default": _unary
        for name in (
            "relu",
            "gelu",
            "silu",
            "sigmoid",
            "tanh",
            "hardswish",
            "hardsigmoid",
            "hardtanh",
            "elu",
            "leaky_relu",
        )
    },
    **{
        f"{name}.default": _unary_in_place
        for name in ("relu_", "silu_", "sigmoid_", "hardtanh_", "hardswish_", "hardsigmoid_", "elu_", "leaky_relu_")
    },
}
