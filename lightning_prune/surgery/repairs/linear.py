"""Layers as linear maps: which take removed units as input, their weights as matrices, and the rows these apply to."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_prune.scoring.contributions import LINEAR_LAYERS
from lightning_prune.structure.graph import Axes, IndexArray
from lightning_prune.surgery.tensors import canonical

__all__ = [
    *("Consumer", "as_matrices", "consumers", "double", "from_matrices", "input_dim", "is_transposed", "joined"),
    *("positions_of", "rows_of", "spread", "tied_layers"),
]

# (√5 − 1) / 2: multiples of it spread evenly over [0, 1), whatever the period of what is sampled.
_GOLDEN = 0.6180339887498949


# -- layers that take removed units as input --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Consumer:
    """A Linear, Conv or ConvTranspose and what it keeps of its inputs.

    Attributes:
        name: Canonical name of the layer.
        layer: The layer.
        dim: Dimension of its weight that the inputs lie on.
        kept: Positions kept there.
    """

    name: str
    layer: nn.Module
    dim: int
    kept: IndexArray

    @property
    def inputs(self) -> int:
        """Number of inputs that an output is computed from; of a convolution, channels of a group times taps."""
        weight: Any = self.layer.weight
        return int(weight.numel() // weight.shape[1 - self.dim])

    @property
    def weight(self) -> Tensor:
        """In float64, on the CPU."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return double(weight.detach()).cpu()

    def tensor(self, name: str) -> str:
        """Qualified name of one of the layer's tensors."""
        return joined(self.name, name)

    def batched(self, x: Tensor) -> Tensor:
        """Inputs with exactly one batch dimension."""
        if isinstance(self.layer, nn.Linear):
            return x.reshape(-1, x.shape[-1])
        return x if x.ndim == self.layer.weight.ndim else x[None]


def consumers(model: nn.Module, axes: Axes) -> list[Consumer]:
    """Layers that lose inputs; those that cannot be told apart from others are named in a warning."""
    shared, found, tied = tied_layers(model), [], []
    for name, layer in model.named_modules():
        dim = input_dim(layer)
        own = canonical(name)
        kept = axes.get(joined(own, "weight"), {}).get(-1 if dim is None else dim)
        if dim is None or kept is None:
            continue
        if own in shared:
            tied.append(own)
        else:
            found.append(Consumer(own, layer, dim, kept))
    if tied:
        warnings.warn(f"not repaired, because their weight or bias is another's too: {', '.join(tied)}", stacklevel=2)
    return found


def tied_layers(model: nn.Module) -> set[str]:
    """Canonical names of modules that share a parameter with another one."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {
        canonical(name)
        for name, module in model.named_modules()
        if any(p is not None and owners[id(p)] > 1 for p in module._parameters.values())
    }


def input_dim(layer: Any) -> int | None:
    """Dimension of the weight that inputs lie on; None if calling the layer does not compute a plain linear map."""
    known = isinstance(layer, LINEAR_LAYERS) and not isinstance(layer, NonDynamicallyQuantizableLinear)
    if not known or type(layer).forward not in [kind.forward for kind in LINEAR_LAYERS]:
        return None
    if "weight" not in layer._parameters:
        return None  # computed by a parametrization
    if isinstance(layer, nn.Linear) or not layer.transposed:
        return 1
    return 0 if layer.groups == 1 else None


# -- weights as matrices, inputs as rows ------------------------------------------------------------------------------


def joined(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


def is_transposed(layer: Any) -> bool:
    return not isinstance(layer, nn.Linear) and layer.transposed


def as_matrices(layer: Any) -> Tensor:
    """The weight as ``(groups, outputs, inputs · taps)``, in float64 on the CPU."""
    weight = double(layer.weight.detach()).cpu()
    if isinstance(layer, nn.Linear):
        return weight[None]
    if layer.transposed:  # a convolution with the taps in the other order
        weight = weight.transpose(0, 1).flip(*range(2, weight.ndim))
    return weight.reshape(layer.groups, len(weight) // layer.groups, -1)


def from_matrices(layer: Any, matrices: Tensor) -> Tensor:
    """What `as_matrices` has been given."""
    shape = layer.weight.shape
    if not is_transposed(layer):
        return matrices.reshape(shape)
    return matrices.reshape(shape[1], shape[0], *shape[2:]).flip(*range(2, len(shape))).transpose(0, 1)


def positions_of(layer: Any, y: Tensor) -> int:
    """Number of positions of a layer's outputs, of all samples: each is a linear map of one row of inputs."""
    channels = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim
    return y.numel() // max(y.shape[channels], 1)


def rows_of(layer: Any, x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
    """What a layer is applied to at some positions of its outputs: shape ``(rows, groups · inputs · taps)``.

    Args:
        layer: A Linear, convolution or transposed convolution.
        x: Its inputs.
        y: Its outputs; only their shape counts.
        chosen: Numbers of the positions, of all samples (`positions_of`).
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
    """The inputs of a transposed convolution with zeros in between: what a convolution with stride 1 is applied to."""
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
    """What a convolution's kernel covers of padded inputs at some positions: ``(rows, channels · kernel elements)``.

    Args:
        layer: Kernel size and dilation.
        x: The padded inputs.
        sizes: Of the outputs.
        stride: Step from one position to the next.
        chosen: Numbers of the positions, of all samples.
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
    """``wanted`` of the numbers below ``total``, evenly spread and without a period; all where there are no more."""
    if total <= wanted:
        return torch.arange(total)
    places = np.arange(wanted) * _GOLDEN % 1
    return torch.from_numpy(np.floor(places * total).astype(np.int64))


def double(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)  # MPS has no float64
