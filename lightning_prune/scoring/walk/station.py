"""Stations: points of a network at which a walk stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from lightning_prune.scoring.contributions import LINEAR_LAYERS

__all__ = ["Point", "Station", "channel_dim", "is_layer", "pooled", "scaled"]

Point = Literal["output", "activation", "input"]


@dataclass(frozen=True)
class Station:
    """A point at a layer.

    Attributes:
        layer: Name of a convolution or linear layer; for ``"output"``, of any module that returns a tensor (a block).
        point: ``"output"`` of the layer; ``"activation"``, the output after the following norms and activations, up to
            where anything else reads it; ``"input"`` of the layer, without other readers of the same tensor.
        call: Index of the call, for a layer that is called several times in a forward pass.

    Raises:
        ValueError: If the point is unknown.
    """

    layer: str
    point: Point = "activation"
    call: int = 0

    def __post_init__(self) -> None:
        if self.point not in get_args(Point):
            raise ValueError(
                f"Station '{self.layer}': expected `point` to be one of {', '.join(get_args(Point))}, got "
                f"{self.point!r}"
            )

    def __str__(self) -> str:
        call = f", call {self.call}" if self.call else ""
        return f"{self.layer} ({self.point}{call})"


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer."""
    return isinstance(module, LINEAR_LAYERS)


def channel_dim(layer: nn.Module, value: Tensor) -> int:
    """Channel dimension of a layer's inputs or outputs; dimension 1 for modules that are not layers."""
    return value.dim() - 1 if isinstance(layer, nn.Linear) else 1


def pooled(value: Tensor, dim: int, reduction: str, absolute: bool) -> Tensor:
    """Mean or maximum over all positions: shape ``(samples, channels)``.

    Raises:
        ValueError: If the reduction is neither ``"avg"`` nor ``"max"``.
    """
    if reduction not in ("avg", "max"):
        raise ValueError(f'expected `reduction` to be "avg" or "max", got {reduction!r}')
    value = value.abs() if absolute else value
    if value.dim() == 2:
        return value
    flat = value.movedim(dim, 1).flatten(2)
    return flat.mean(2) if reduction == "avg" else flat.amax(2)


def scaled(value: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Multiply a value by a mask per channel, or per sample and channel."""
    shape = [1] * value.dim()
    shape[dim] = mask.shape[-1]
    if mask.dim() == 2:
        shape[0] = len(mask)
    return value * mask.to(value).reshape(shape)
