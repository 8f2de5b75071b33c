"""Linear layers and convolutions as linear maps: weights as matrices, and the rows of inputs that these apply to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "as_matrices",
    "by_position",
    "covariance_of",
    "double",
    "from_matrices",
    "is_transposed",
    "positions_of",
    "rows_of",
    "scale_and_shift",
    "spread",
]

# (√5 − 1) / 2: its multiples are evenly spread over [0, 1), whatever the period of the sampled data.
_GOLDEN = 0.6180339887498949
# A variance below this share of the second moment is rounding of float32 activations.
_ROUNDING = 1e-12


def is_transposed(layer: Any) -> bool:
    """Whether a layer is a transposed convolution."""
    return not isinstance(layer, nn.Linear) and layer.transposed


def as_matrices(layer: Any) -> Tensor:
    """The weight as ``(groups, outputs, inputs · taps)``, in float64 on the CPU."""
    weight = double(layer.weight.detach()).cpu()
    if isinstance(layer, nn.Linear):
        return weight[None]
    weight = weight.reshape(layer.groups, len(weight) // layer.groups, *weight.shape[1:])
    if layer.transposed:  # a convolution with the taps in the other order
        weight = weight.transpose(1, 2).flip(*range(3, weight.ndim))
    return weight.flatten(2)


def from_matrices(layer: Any, matrices: Tensor) -> Tensor:
    """The inverse of `as_matrices`."""
    shape = layer.weight.shape
    if not is_transposed(layer):
        return matrices.reshape(shape)
    weight = matrices.reshape(layer.groups, shape[1], shape[0] // layer.groups, *shape[2:])
    return weight.flip(*range(3, weight.ndim)).transpose(1, 2).reshape(shape)


def positions_of(layer: Any, y: Tensor) -> int:
    """Number of output positions over all samples: each is a linear map of one row of inputs."""
    channels = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim
    return y.numel() // max(y.shape[channels], 1)


def by_position(layer: Any, value: Tensor) -> Tensor:
    """Outputs of a layer, or a value of their shape, as ``(samples · positions, channels)``."""
    if isinstance(layer, nn.Linear):
        return value.flatten(0, -2) if value.ndim > 1 else value[None]
    return (value if value.ndim == layer.weight.ndim else value[None]).movedim(1, -1).flatten(0, -2)


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies its inputs by in eval mode, γ/σ, and then adds; 1 and 0 without a norm."""
    if norm is None:
        return torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    deviation = (double(norm.running_var) + norm.eps).sqrt()
    scale = 1 / deviation if norm.weight is None else double(norm.weight.detach()) / deviation
    shift = -scale * double(norm.running_mean)
    return scale, shift if norm.bias is None else shift + double(norm.bias.detach())


def covariance_of(moments: Tensor, mean: Tensor) -> Tensor:
    """The covariance; exactly zero for inputs that are constant but for rounding.

    Args:
        moments: Second moments, ``(groups, inputs, inputs)``.
        mean: Means, ``(groups, inputs)``.
    """
    covariance = moments - mean[:, :, None] * mean[:, None]
    diagonal, moment = (square.diagonal(dim1=1, dim2=2) for square in (covariance, moments))
    is_constant = diagonal <= _ROUNDING * moment  # not of NaN
    return covariance.masked_fill(is_constant[:, :, None] | is_constant[:, None], 0)


def rows_of(layer: Any, x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
    """The inputs of a layer at some output positions, as rows: shape ``(rows, groups · inputs · taps)``.

    Args:
        layer: A Linear, convolution or transposed convolution.
        x: Its inputs.
        y: Its outputs; only their shape is used.
        chosen: Indices of the positions over all samples (`positions_of`).
    """
    if isinstance(layer, nn.Linear):
        return (x.flatten(0, -2) if x.ndim > 1 else x[None])[chosen]
    x, y = (value if value.ndim == layer.weight.ndim else value[None] for value in (x, y))
    sizes, dims = y.shape[2:], y.ndim - 2
    stride = layer.stride
    if layer.transposed:
        x, stride = _with_zeros_between(layer, x, sizes), (1,) * dims
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    return _windows(layer, x, sizes, stride, chosen)


def _with_zeros_between(layer: Any, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The inputs of a transposed convolution with zeros inserted: the inputs of an equal convolution with stride 1."""
    lengths = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], layer.stride, strict=True)]
    apart = x.new_zeros(*x.shape[:2], *lengths)
    every: tuple[Any, ...] = (..., *(slice(None, None, step) for step in layer.stride))
    apart[every] = x
    padding: list[int] = []
    for dim in reversed(range(len(sizes))):
        reach = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
        before = reach - layer.padding[dim]
        padding += [before, sizes[dim] + reach - lengths[dim] - before]
    return F.pad(apart, padding)


def _windows(layer: Any, x: Tensor, sizes: Sequence[int], stride: Sequence[int], chosen: Tensor) -> Tensor:
    """Patches of padded inputs at some positions: ``(rows, channels · kernel elements)``.

    Args:
        layer: Layer with kernel size and dilation.
        x: The padded inputs.
        sizes: Sizes of the outputs.
        stride: Step between positions.
        chosen: Indices of the positions over all samples.
    """
    sample, *places = torch.unravel_index(chosen.to(x.device), (len(x), *sizes))
    dims = len(sizes)
    index: list[Any] = [sample.reshape(-1, *[1] * dims), slice(None)]
    for dim, place in enumerate(places):
        taps = torch.arange(layer.kernel_size[dim], device=x.device) * layer.dilation[dim]
        shape = [-1 if d == dim else 1 for d in range(dims)]
        index.append((place[:, None] * stride[dim] + taps).reshape(len(place), *shape))
    # Indices around a slice put their dimensions first: rows × kernel × channels.
    return x[tuple(index)].movedim(-1, 1).flatten(1)


def spread(total: int, wanted: int) -> Tensor:
    """``wanted`` of the indices below ``total``, evenly spread and without a period; all if there are not more."""
    if total <= wanted:
        return torch.arange(total)
    places = np.arange(wanted) * _GOLDEN % 1
    return torch.from_numpy(np.floor(places * total).astype(np.int64))


def double(x: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has none."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)  # MPS has no float64
