"""What stands where a layer has lost all its outputs or inputs: the shape that is expected, nothing computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CONVOLUTIONS", "NORMS", "Constant", "Kind", "Nothing", "stand_in"]

#: What takes a layer's place: one without outputs, one without inputs, one that hands on what it gets.
Kind = Literal["nothing", "constant", "identity"]

#: Layers, by exact class, that can lose all their outputs or inputs: a subclass may do more than its base.
CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Layers that can go where everything they give is no longer looked at: they give the shape that they get.
NORMS: tuple[type[nn.Module], ...] = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU),
)


class Nothing(nn.Module):
    """In place of a linear layer or convolution without outputs: no channels, in the layer's shape otherwise.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.window = _window(layer)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, inputs, *positions)`` → ``(…, 0, *positions)``; the channels come last without positions."""
        if self.window is None:
            return x.new_empty((*x.shape[:-1], 0))
        dims = len(self.window)
        return x.new_empty((*x.shape[: -dims - 1], 0, *_positions(x.shape[-dims:], self.window)))


class Constant(nn.Module):
    """In place of a linear layer or convolution without inputs: what is left of it is its bias, or zero.

    Attributes:
        weight: ``(outputs, 0)``, a buffer: it only tells how many outputs there are.
        bias: The layer's own, if it had one; still trained.

    Args:
        layer: The layer.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.window = _window(layer)
        self.register_buffer("weight", weight.detach().new_empty(weight.shape[0], 0))
        self.register_parameter("bias", layer.bias)  # type: ignore[arg-type]  # a parameter or None

    def forward(self, x: Tensor) -> Tensor:
        """``(…, 0, *positions)`` → ``(…, outputs, *positions)``; the channels come last without positions."""
        if self.window is None:
            return F.linear(x, self.weight, self.bias)
        dims = len(self.window)
        # A product over no inputs rather than plain zeros: the outputs are this layer's units, whoever looks at it.
        outputs = self.weight @ x.new_empty(0)
        if self.bias is not None:
            outputs = outputs + self.bias
        shape = (*x.shape[: -dims - 1], len(outputs), *_positions(x.shape[-dims:], self.window))
        # A tensor of its own, as others may add to it in place.
        return outputs.view(-1, *[1] * dims).expand(shape).clone(memory_format=torch.contiguous_format)

    def reset_parameters(self) -> None:
        """Set the bias to zero."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Number of outputs."""
        return f"{len(self.weight)}, bias={self.bias is not None}"


#: Per dimension: kernel, stride, padding on both sides together, dilation.
Window = tuple[tuple[int, int, int, int], ...]


def stand_in(kind: str, layer: nn.Module) -> nn.Module:
    """What takes the place of ``layer``, in its mode.

    Raises:
        ValueError: If the kind is unknown, or the layer is none that can lose its inputs or outputs.
    """
    if kind == "identity":
        module: nn.Module = nn.Identity()
    elif kind not in ("nothing", "constant"):
        raise ValueError(f'expected one of "nothing", "constant", "identity" for a layer that goes, got {kind!r}')
    elif type(layer) is not nn.Linear and type(layer) not in CONVOLUTIONS:
        raise ValueError(f"expected a Linear or a convolution to become {kind!r}, got {type(layer).__name__}")
    else:
        module = Nothing(layer) if kind == "nothing" else Constant(layer)
    return module.train(layer.training)


def _window(layer: nn.Module) -> Window | None:
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return None
    if layer.padding == "same":
        padding = tuple(d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    elif layer.padding == "valid":
        padding = tuple(0 for _ in layer.kernel_size)
    else:
        padding = tuple(2 * int(p) for p in layer.padding)
    return tuple(zip(layer.kernel_size, layer.stride, padding, layer.dilation, strict=True))


def _positions(lengths: Sequence[int], window: Window) -> list[int]:
    return [(n + p - d * (k - 1) - 1) // s + 1 for n, (k, s, p, d) in zip(lengths, window, strict=True)]
