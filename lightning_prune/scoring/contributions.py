r"""How much of every output of a linear layer comes from each of its inputs.

An output :math:`z_j = \sum_i w_{ij} a_i` (bias left out) owes the share :math:`w_{kj} a_k / z_j` to input :math:`k`;
"absolute" shares take :math:`|w|` and :math:`|a|` throughout, so that they lie in [0, 1]. Over passes :math:`f`,
outputs :math:`j` and, in convolutions, positions :math:`p` and taps of the kernel,

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

#: Layers whose outputs are sums over inputs, which is what shares are defined on.
LINEAR_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

#: Elements of a block of products in the maximum: about the second-level cache on a CPU; elsewhere a block has to be
#: worth a kernel launch.
_BLOCK_CPU, _BLOCK_DEVICE = 2**18, 2**24


class Contributions(NamedTuple):
    """What one call of a layer tells.

    Attributes:
        mass: Shares of each input, summed over passes, outputs and positions; shape ``(inputs,)``.
        outputs: Number of outputs (over passes and positions) that shares were taken of; a scalar. Outputs without
            anything to share (``z`` = 0) are not among them, so that ``mass / outputs`` sums to 1 over the inputs
            (signed: up to ``epsilon``).
        maximum: Largest share of each input in any one output, never below 0; shape ``(inputs,)``.
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
    """Shares of a layer's inputs in its outputs.

    Computed in float32 (float64 if the activation is), whatever the layer itself computes in. Padding with zeros is an
    activation of 0; padding with copies counts for the channel it copies.

    Args:
        layer: One of ``LINEAR_LAYERS``; its inputs are features or channels.
        activation: What entered the layer, batched or not.
        output: What came out. Signed shares need no second forward pass, since it holds ``z`` plus the bias.
        ratio: ``"absolute"`` or ``"signed"`` shares.
        epsilon: Signed denominators become ``z + epsilon · sign(z)``, as in LRP-ε.
        average: Compute ``mass``; zeros otherwise.
        maximum: Compute ``maximum``; zeros otherwise. A max-product is no matrix product: it takes as many
            multiplications as the layer itself, without the speed of one.
        positions: Take the maximum over this many positions of a convolution's output (of a transposed one's input),
            the same for all passes, drawn without repetition. All positions by default, or where there are no more.
        seed: Of the draw.

    Raises:
        TypeError: If the layer is none of ``LINEAR_LAYERS``.
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
            # An output rounded to half precision would be a poor denominator where terms cancel.
            z = arithmetic.without_bias(z, layer) if z.dtype == dtype else arithmetic.forward(a, weight)
            z = z + epsilon * z.sign()
        # Outputs of 0 have nothing to share; NaN stays, since it has to be noticed.
        inverse = z.reciprocal().nan_to_num_(nan=math.nan, posinf=0.0, neginf=0.0)
        nothing = a.new_zeros(a.shape[arithmetic.channel])
        return Contributions(
            mass=arithmetic.per_input(a * arithmetic.backward(inverse, a, weight)) if average else nothing,
            outputs=torch.count_nonzero(inverse),
            maximum=_maximum(arithmetic.matrices(a, inverse, weight, positions, seed), nothing, ratio)
            if maximum
            else nothing,
            passes=a.shape[0],
        )


def per_pass(layer: nn.Module, activation: Tensor, gradient: Tensor) -> Tensor:
    """Activation times gradient of every input of a linear layer, summed over positions: shape ``(passes, inputs)``.

    Only the gradient that comes back through this layer counts, whatever else takes the same activation.

    Args:
        layer: One of ``LINEAR_LAYERS``; its inputs are features or channels.
        activation: What entered the layer, batched or not.
        gradient: Of some scalar, with respect to what came out.
    """
    dtype = torch.promote_types(activation.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(activation.device.type, enabled=False):
        arithmetic = _arithmetic(layer, activation, gradient)
        a, g = arithmetic.batched(activation.to(dtype), gradient.to(dtype))
        product = a * arithmetic.backward(g, a, layer.get_parameter("weight").detach().to(dtype))
        return product.movedim(arithmetic.channel, 1).flatten(2).sum(2) if product.dim() > 2 else product


class _Matrix(NamedTuple):
    """A layer's plain matrix ``(j, c)`` between activations ``(n, c)`` and inverse outputs ``(n, j)``."""

    activation: Tensor
    inverse: Tensor
    weight: Tensor
    inputs: slice


def _maximum(matrices: Iterator[_Matrix], nothing: Tensor, ratio: Ratio) -> Tensor:
    """Largest ``a · w / z`` of each input, in blocks of bounded size."""
    best = nothing.clone()
    block = _BLOCK_CPU if nothing.device.type == "cpu" else _BLOCK_DEVICE
    for a, inverse, weight, inputs in matrices:
        outputs = max(min(block // weight.shape[1], weight.shape[0]), 1)
        rows = max(min(block // (outputs * weight.shape[1]), len(a)), 1)
        # Made once: memory that is new in every block costs more than the products.
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
            if ratio == "signed":  # under a negative activation the least product is the largest share
                found = torch.maximum(found, (a * least).amax(0))
            best[inputs] = torch.maximum(best[inputs], found)
    return best


@dataclass(frozen=True)
class _Dense:
    """Linear as arithmetic on tensors whose last dimension is the features."""

    channel = -1

    def batched(self, a: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output with a batch dimension."""
        return (a, z) if a.dim() > 1 else (a[None], z[None])

    def without_bias(self, z: Tensor, layer: Any) -> Tensor:
        """The layer's output less its bias."""
        return z if layer.bias is None else z - layer.bias

    def forward(self, a: Tensor, weight: Tensor) -> Tensor:
        """The layer without its bias."""
        return a @ weight.T

    def backward(self, g: Tensor, a: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG002
        """The vector–Jacobian product of ``forward`` at ``a``."""
        return g @ weight

    def per_input(self, x: Tensor) -> Tensor:
        """The sum over everything but inputs."""
        return x.flatten(0, -2).sum(0)

    def matrices(
        self,
        a: Tensor,
        inverse: Tensor,
        weight: Tensor,
        positions: int | None,  # noqa: ARG002
        seed: int,  # noqa: ARG002
    ) -> Iterator[_Matrix]:
        """The layer as plain matrices; of a convolution, at a draw of ``positions``."""
        yield _Matrix(a.flatten(0, -2), inverse.flatten(0, -2), weight, slice(None))


@dataclass(frozen=True)
class _Convolution:
    """Convolution, transposed or not, as arithmetic; the methods mean the same as those of ``_Dense``.

    Attributes:
        outside: Padding that the convolution cannot do itself (``padding_mode``, ``padding="same"``), for ``F.pad``.
        mode: How ``outside`` is filled.
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
        if layer.transposed:  # from the shapes, since a call may ask for another `output_size`
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
        """One matrix per tap and group: a tap pairs every position of one side with a shifted one of the other."""
        still, moving = (a, inverse) if self.transposed else (inverse, a)
        moving = F.pad(moving, _both_sides(self.padding))
        at = _drawn(math.prod(still.shape[2:]), positions, seed).to(a.device)
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


def _drawn(size: int, count: int | None, seed: int) -> Tensor:
    """``count`` of the positions below ``size`` in ascending order, all if there are no more; the same everywhere."""
    if count is None or count >= size:
        return torch.arange(size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:count].sort().values


def _rows(x: Tensor) -> Tensor:
    """Channels last: shape ``(passes, positions, channels)``."""
    return x.flatten(2).movedim(1, -1).contiguous()


def _both_sides(padding: tuple[int, ...]) -> tuple[int, ...]:
    """Padding as ``F.pad`` wants it: last dimension first, before and after."""
    return tuple(p for p in reversed(padding) for _ in range(2))


def _arithmetic(layer: nn.Module, a: Tensor, z: Tensor) -> _Dense | _Convolution:
    if not isinstance(layer, LINEAR_LAYERS):
        names = ", ".join(kind.__name__ for kind in LINEAR_LAYERS)
        raise TypeError(f"contributions are defined on {names}; got {type(layer).__name__}")
    return _Dense() if isinstance(layer, nn.Linear) else _Convolution.of(layer, a, z)
