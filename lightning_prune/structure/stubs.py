"""Stubs that replace layers without inputs or outputs and only return tensors of the expected shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CONVOLUTIONS", "NORMS", "Constant", "Empty", "Kind", "make_stub"]

#: Kind of stub: for a layer without outputs, for one without inputs, and for a norm that passes its input on.
Kind = Literal["nothing", "constant", "identity"]

#: Layers (exact types, as a subclass may do more) that can lose all their outputs or inputs.
CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Layers that an identity can replace, as they keep the shape of their input.
NORMS: tuple[type[nn.Module], ...] = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU),
)


class Empty(nn.Module):
    """Stub for a linear layer or convolution without outputs: returns a tensor with 0 channels.

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
    """Stub for a linear layer or convolution without inputs: returns its bias, or zeros.

    Attributes:
        weight: Buffer of shape ``(outputs, 0)``.
        bias: The layer's bias, if it has one; it is still trained.

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
        # A product over 0 inputs instead of zeros, so that a trace finds this layer's units.
        outputs = self.weight @ x.new_empty(0)
        if self.bias is not None:
            outputs = outputs + self.bias
        shape = (*x.shape[: -dims - 1], len(outputs), *_positions(x.shape[-dims:], self.window))
        # Cloned, as the result may be modified in place.
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


def make_stub(kind: str, layer: nn.Module) -> nn.Module:
    """Create the stub of this kind for ``layer``, in the same mode.

    Raises:
        ValueError: If the kind is unknown, or the layer cannot lose its inputs or outputs.
    """
    if kind == "identity":
        module: nn.Module = nn.Identity()
    elif kind not in ("nothing", "constant"):
        raise ValueError(f'expected one of "nothing", "constant", "identity" for a layer that goes, got {kind!r}')
    elif type(layer) is not nn.Linear and type(layer) not in CONVOLUTIONS:
        raise ValueError(f"expected a Linear or a convolution to become {kind!r}, got {type(layer).__name__}")
    else:
        module = Empty(layer) if kind == "nothing" else Constant(layer)
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
