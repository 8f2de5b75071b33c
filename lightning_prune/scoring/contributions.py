r"""Contributions of the inputs of a linear layer to its outputs.

Input :math:`k` contributes the share :math:`w_{kj} a_k / z_j` of an output :math:`z_j = \sum_i w_{ij} a_i` (without
bias). "Absolute" shares use :math:`|w|` and :math:`|a|`, so that they lie in [0, 1]. Over samples :math:`f`, outputs
:math:`j` and, in convolutions, positions :math:`p` and taps of the kernel,

.. math::
    C_\text{avg}(k) = \operatorname{mean}_{f,j,p} \sum_\text{taps} \frac{w_{kj} a_{kf}}{z_{jf}}, \qquad
    C_\text{max}(k) = \max_{f,j,p,\text{taps}} \frac{w_{kj} a_{kf}}{z_{jf}}

("Neural Importance-based Train-time Pruning"). Summed over the outputs the shares are :math:`a \odot J^\top (1/z)` with
the layer's own Jacobian :math:`J`: one backward pass, and no tensor of batch × outputs × inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LINEAR_LAYERS", "Contributions", "Ratio", "contributions_of", "per_pass"]

Ratio = Literal["absolute", "signed"]

#: Layers whose outputs are sums over inputs, for which contributions are defined.
LINEAR_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

#: Elements per block of products in the maximum: the size of the L2 cache on a CPU; enough for a kernel launch
#: elsewhere.
_BLOCK_CPU, _BLOCK_DEVICE = 2**18, 2**24


class Contributions(NamedTuple):
    """Contributions in one call of a layer.

    Attributes:
        mass: Shares of each input, summed over passes, outputs and positions; shape ``(inputs,)``.
        outputs: Number of outputs (over passes and positions) with ``z`` ≠ 0; a scalar. ``mass / outputs`` sums to 1
            over the inputs (signed: up to ``epsilon``).
        maximum: Largest share of each input in any output, at least 0; shape ``(inputs,)``.
        passes: Number of samples.
    """

    mass: Tensor
    outputs: Tensor
    maximum: Tensor
    passes: int


def contributions_of(
    layer: nn.Module,
    activation: Tensor,
    output: Tensor,
    *,
    ratio: Ratio = "absolute",
    epsilon: float = 1e-6,
    average: bool = True,
    maximum: bool = False,
    positions: int | None = None,
    seed: int = 0,
) -> Contributions:
    """Compute the contributions of a layer's inputs to its outputs, in float32 (float64 for float64 activations).

    Zero padding counts as an activation of 0; padding with copies counts for the channel that is copied.

    Args:
        layer: One of ``LINEAR_LAYERS``; its inputs are features or channels.
        activation: Input of the layer, batched or not.
        output: Output of the layer.
        ratio: ``"absolute"`` or ``"signed"`` shares.
        epsilon: Signed denominators become ``z + epsilon · sign(z)``, as in LRP-ε.
        average: Compute ``mass``; zeros otherwise.
        maximum: Compute ``maximum``; zeros otherwise. It takes as many multiplications as the layer itself, but is not
            a matrix product and therefore slower.
        positions: Sample this many positions of a convolution's output (input if transposed) for the maximum, the same
            for all passes; all by default.
        seed: Seed of the sampled positions.
    """
    dtype = torch.float64 if activation.dtype == torch.float64 else torch.float32
    with torch.no_grad(), torch.autocast(activation.device.type, enabled=False):
        arithmetic = _arithmetic(layer, activation, output)
        a, z = arithmetic.batched(activation.detach().to(dtype), output.detach())
        weight = layer.get_parameter("weight").detach().to(dtype)
        if ratio == "absolute":
            a, weight = a.abs(), weight.abs()
            z = arithmetic.forward(a, weight)
        else:
            # Half-precision outputs are poor denominators where terms cancel.
            z = arithmetic.without_bias(z, layer) if z.dtype == dtype else arithmetic.forward(a, weight)
            z = z + epsilon * z.sign()
        # Outputs of 0 contribute nothing; NaN is kept, to be detected.
        inverse = z.reciprocal().nan_to_num_(nan=math.nan, posinf=0.0, neginf=0.0)
        zeros = a.new_zeros(a.shape[arithmetic.channel])
        return Contributions(
            mass=arithmetic.per_input(a * arithmetic.backward(inverse, a, weight)) if average else zeros,
            outputs=torch.count_nonzero(inverse),
            maximum=_maximum(arithmetic.matrices(a, inverse, weight, positions, seed), zeros, ratio)
            if maximum
            else zeros,
            passes=a.shape[0],
        )


def per_pass(layer: nn.Module, activation: Tensor, gradient: Tensor) -> Tensor:
    """Activation times gradient of every input of a linear layer, summed over positions: shape ``(passes, inputs)``.

    The gradient is the one that flows through this layer, not through other consumers of the activation.

    Args:
        layer: One of ``LINEAR_LAYERS``; its inputs are features or channels.
        activation: What entered the layer, batched or not.
        gradient: Gradient of a scalar with respect to the layer's output.
    """
    dtype = torch.promote_types(activation.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(activation.device.type, enabled=False):
        arithmetic = _arithmetic(layer, activation, gradient)
        a, g = arithmetic.batched(activation.to(dtype), gradient.to(dtype))
        product = a * arithmetic.backward(g, a, layer.get_parameter("weight").detach().to(dtype))
        return product.movedim(arithmetic.channel, 1).flatten(2).sum(2) if product.dim() > 2 else product


class _Matrix(NamedTuple):
    """A layer as a matrix ``(j, c)`` between activations ``(n, c)`` and inverse outputs ``(n, j)``."""

    activation: Tensor
    inverse: Tensor
    weight: Tensor
    inputs: slice


def _maximum(matrices: Iterator[_Matrix], zeros: Tensor, ratio: Ratio) -> Tensor:
    """Largest ``a · w / z`` of each input, in blocks of bounded size."""
    best = zeros.clone()
    block = _BLOCK_CPU if zeros.device.type == "cpu" else _BLOCK_DEVICE
    for a, inverse, weight, inputs in matrices:
        outputs = max(min(block // weight.shape[1], weight.shape[0]), 1)
        rows = max(min(block // (outputs * weight.shape[1]), len(a)), 1)
        # Allocated once: allocation per block would cost more than the products.
        space = a.new_empty(rows, outputs, weight.shape[1])
        largest, least = torch.empty_like(a), torch.empty_like(a)
        for j in range(0, weight.shape[0], outputs):
            weights = weight[j : j + outputs]
            for n in range(0, len(a), rows):
                factors = inverse[n : n + rows, j : j + outputs, None]
                products = torch.mul(factors, weights, out=space[: len(factors), : len(weights)])
                torch.amax(products, 1, out=largest[n : n + rows])
                if ratio == "signed":
                    torch.amin(products, 1, out=least[n : n + rows])
            found = (a * largest).amax(0)
            if ratio == "signed":  # for a negative activation the smallest product is the largest share
                found = torch.maximum(found, (a * least).amax(0))
            best[inputs] = torch.maximum(best[inputs], found)
    return best


@dataclass(frozen=True)
class _Dense:
    """Arithmetic of Linear; features are the last dimension."""

    channel = -1

    def batched(self, a: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output with a batch dimension."""
        return (a, z) if a.dim() > 1 else (a[None], z[None])

    def without_bias(self, z: Tensor, layer: Any) -> Tensor:
        """The layer's output minus its bias."""
        return z if layer.bias is None else z - layer.bias

    def forward(self, a: Tensor, weight: Tensor) -> Tensor:
        """The layer without its bias."""
        return a @ weight.T

    def backward(self, g: Tensor, a: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG002
        """The vector–Jacobian product of ``forward`` at ``a``."""
        return g @ weight

    def per_input(self, x: Tensor) -> Tensor:
        """Sum over all dimensions but inputs."""
        return x.flatten(0, -2).sum(0)

    def matrices(
        self,
        a: Tensor,
        inverse: Tensor,
        weight: Tensor,
        positions: int | None,  # noqa: ARG002
        seed: int,  # noqa: ARG002
    ) -> Iterator[_Matrix]:
        """The layer as matrices; for a convolution, at sampled ``positions``."""
        yield _Matrix(a.flatten(0, -2), inverse.flatten(0, -2), weight, slice(None))


@dataclass(frozen=True)
class _Convolution:
    """Arithmetic of convolutions, transposed or not, with the methods of ``_Dense``.

    Attributes:
        outside: Padding to apply by ``F.pad`` (for ``padding_mode`` and ``padding="same"``).
        mode: Mode of that padding.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    outside: tuple[int, ...]
    mode: str

    channel = 1

    @classmethod
    def of(cls, layer: Any, a: Tensor, z: Tensor) -> _Convolution:
        reach = tuple(d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        spatial = len(reach)
        padding: tuple[int, ...] = (0,) * spatial if isinstance(layer.padding, str) else layer.padding
        outside: tuple[int, ...] = ()
        if layer.padding == "same":
            outside = tuple(side for r in reversed(reach) for side in (r // 2, r - r // 2))
        elif layer.padding_mode != "zeros":
            outside, padding = _both_sides(padding), (0,) * spatial
        extra = (0,) * spatial
        if layer.transposed:  # from the shapes, since a call may pass `output_size`
            sizes = zip(z.shape[-spatial:], a.shape[-spatial:], layer.stride, padding, reach, strict=True)
            extra = tuple(out - ((n - 1) * s - 2 * p + r + 1) for out, n, s, p, r in sizes)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return cls(layer.stride, padding, layer.dilation, layer.transposed, extra, layer.groups, outside, mode)

    def batched(self, a: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if a.dim() == len(self.stride) + 1:
            a, z = a[None], z[None]
        return F.pad(a, self.outside, self.mode) if any(self.outside) else a, z

    def without_bias(self, z: Tensor, layer: Any) -> Tensor:
        return z if layer.bias is None else z - layer.bias.view(-1, *[1] * len(self.stride))

    def forward(self, a: Tensor, weight: Tensor) -> Tensor:
        return torch.convolution(a, weight, None, *self._geometry)

    def backward(self, g: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        only_input = [True, False, False]
        gradient: Tensor = torch.ops.aten.convolution_backward(g, a, weight, None, *self._geometry, only_input)[0]
        return gradient

    def per_input(self, x: Tensor) -> Tensor:
        return x.flatten(2).sum((0, 2))

    def matrices(
        self, a: Tensor, inverse: Tensor, weight: Tensor, positions: int | None, seed: int
    ) -> Iterator[_Matrix]:
        """One matrix per kernel tap and group, which pairs positions of one side with shifted ones of the other."""
        still, moving = (a, inverse) if self.transposed else (inverse, a)
        moving = F.pad(moving, _both_sides(self.padding))
        at = _sample_positions(math.prod(still.shape[2:]), positions, seed).to(a.device)
        places = torch.unravel_index(at, still.shape[2:])
        still, rows = _rows(still)[:, at], _rows(moving)
        for tap in itertools.product(*map(range, weight.shape[2:])):
            shifted_at, kernel = torch.zeros_like(at), weight
            steps = zip(places, tap, self.dilation, self.stride, moving.shape[2:], strict=True)
            for place, t, dilation, stride, size in steps:
                shifted_at = shifted_at * size + place * stride + t * dilation
                kernel = kernel.select(2, t)
            shifted = rows[:, shifted_at]
            outer, inner = (still, shifted) if self.transposed else (shifted, still)
            for group in range(self.groups):
                part = kernel.chunk(self.groups)[group]
                part = part.T if self.transposed else part
                width = part.shape[1]
                x, y = (side.chunk(self.groups, -1)[group].flatten(0, 1) for side in (outer, inner))
                yield _Matrix(x, y, part, slice(group * width, (group + 1) * width))

    @property
    def _geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups


def _sample_positions(size: int, count: int | None, seed: int) -> Tensor:
    """Sample ``count`` positions below ``size`` in ascending order; all if None."""
    if count is None or count >= size:
        return torch.arange(size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count].sort().values


def _rows(x: Tensor) -> Tensor:
    """Flatten positions and move channels last: shape ``(passes, positions, channels)``."""
    return x.flatten(2).movedim(1, -1).contiguous()


def _both_sides(padding: tuple[int, ...]) -> tuple[int, ...]:
    """Padding in the format of ``F.pad``: last dimension first, before and after."""
    return tuple(p for p in reversed(padding) for _ in range(2))


def _arithmetic(layer: nn.Module, a: Tensor, z: Tensor) -> _Dense | _Convolution:
    if not isinstance(layer, LINEAR_LAYERS):
        names = ", ".join(kind.__name__ for kind in LINEAR_LAYERS)
        raise TypeError(f"contributions are defined on {names}; got {type(layer).__name__}")
    return _Dense() if isinstance(layer, nn.Linear) else _Convolution.of(layer, a, z)
