"""Layers that take removed units as input."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_prune.scoring.contributions import LINEAR_LAYERS
from lightning_prune.scoring.linear_maps import double
from lightning_prune.structure.graph import Axes, IndexArray
from lightning_prune.surgery.tensors import canonical

__all__ = ["Consumer", "consumers", "input_dim", "joined", "tied_layers"]

# -- layers that take removed units as input --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Consumer:
    """A Linear, Conv or ConvTranspose layer and the inputs that it keeps.

    Attributes:
        name: Canonical name of the layer.
        layer: The layer.
        dim: Input dimension of its weight.
        kept: Kept positions along this dimension.
    """

    name: str
    layer: nn.Module
    dim: int
    kept: IndexArray

    @property
    def inputs(self) -> int:
        """Number of inputs per output; for a convolution, channels per group times kernel elements."""
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
    """Layers that lose inputs; a warning names those that share parameters and are skipped."""
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
        warnings.warn(f"not repaired, because they share their weight or bias: {', '.join(tied)}", stacklevel=2)
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
    """Input dimension of the weight; None if calling the layer does not compute a plain linear map."""
    if not isinstance(layer, LINEAR_LAYERS) or type(layer).forward not in [kind.forward for kind in LINEAR_LAYERS]:
        return None
    if "weight" not in layer._parameters:
        return None  # computed by a parametrization
    if isinstance(layer, nn.Linear) or not layer.transposed:
        return 1
    return 0 if layer.groups == 1 else None


def joined(module: str, tensor: str) -> str:
    """Qualified name of a module's tensor."""
    return f"{module}.{tensor}" if module else tensor
