"""Granularities of masks (weights, n:m blocks, kernels, channels), and the choice of masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.arguments import Settings
from lightning_prune.scoring import unit_weights
from lightning_prune.structure.graph import Group

__all__ = [
    "NM",
    "Channel",
    "Element",
    "Granularity",
    "Kernel",
    "Part",
    "Pool",
    "Weight",
    "WeightGranularity",
    "choose_masks",
]

#: Scores are compared over all layers, within each layer, or within each filter.
Pool = Literal["global", "local", "filter"]

# So that 0.7 * 50 weights count as 35.
_EPSILON = 1e-6


@dataclass(frozen=True, eq=False)
class Weight:
    """The weight of a linear or convolutional layer, seen as filters × inputs × kernel.

    Attributes:
        name: Its qualified name.
        tensor: The weight itself.
        transposed: For a transposed convolution, whose weight is (inputs, filters of a group, ...), its groups; else 0.
    """

    name: str
    tensor: Tensor
    transposed: int = 0

    def filters(self, values: Tensor) -> Tensor:
        """Values on the weight as (filters, inputs of a filter, *kernel)."""
        if not self.transposed:
            return values
        return values.reshape(self.transposed, -1, *values.shape[1:]).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Part:
    """Cells of one layer, or one group of coupled layers, that are masked as a whole.

    Attributes:
        scores: Shape (rows, cells), non-negative, lowest first; a row is a filter, or an n:m block.
        places: Positions of each cell's weights in the flattened tensor, by name: (rows, cells, n).
        shapes: Shapes of these tensors.
        never_empty: Whether the best cell is always kept.
    """

    scores: Tensor
    places: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    never_empty: bool = False

    @property
    def size(self) -> int:
        """Weights of one cell."""
        return sum(place.shape[2] for place in self.places.values())

    def masked(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Cells that are fully masked already, shape (rows, cells)."""
        found = torch.ones_like(self.scores, dtype=torch.bool)
        for name, place in self.places.items():
            found &= masks[name].flatten()[place].all(2) if name in masks else torch.zeros_like(found)
        return found

    def to_masks(self, gone: Tensor) -> dict[str, Tensor]:
        """Convert a mask of cells (rows, cells) to masks by tensor, True where a weight is masked."""
        masks = {}
        for name, place in self.places.items():
            mask = torch.zeros(self.shapes[name].numel(), dtype=torch.bool, device=place.device)
            mask[place[gone].flatten()] = True
            masks[name] = mask.view(self.shapes[name])
        return masks


class Granularity(Settings, ABC):
    """Base class of granularities, the sets of weights that are masked together.

    Attributes:
        of_units: Whether it masks units of the network's structure rather than parts of single weights.
        pool: The only possible comparison of scores, if any.
    """

    of_units: ClassVar[bool] = False
    pool: ClassVar[Pool | None] = None

    @property
    def sparsity(self) -> float | None:
        """The only possible sparsity, if any."""
        return None

    def problem_with(self, shape: Sequence[int]) -> str | None:  # noqa: ARG002
        """Reason why a weight of this shape (filters, inputs, *kernel) cannot be masked; None if it can."""
        return None

    def is_for(self, shape: Sequence[int]) -> bool:  # noqa: ARG002
        """Whether a weight of this shape is masked by default."""
        return True

    @abstractmethod
    def parts(self, weights: Sequence[Weight], groups: Sequence[Group], tensors: Mapping[str, Tensor]) -> list[Part]:
        """Cells that can be masked, with scores.

        Args:
            weights: The selected weights.
            groups: The selected groups of units, for granularities of units.
            tensors: Parameters and buffers of the network by name.
        """


class WeightGranularity(Granularity):
    """Base class of granularities that split single weights into cells, scored by their L2 norm."""

    @abstractmethod
    def cells(self, filters: Tensor) -> Tensor:
        """Reshape values on a weight, (filters, inputs, *kernel), to (rows, cells, weights of a cell)."""

    @override
    def parts(self, weights: Sequence[Weight], groups: Sequence[Group], tensors: Mapping[str, Tensor]) -> list[Part]:
        found = []
        for weight in weights:
            values = self.cells(weight.filters(weight.tensor.detach()))
            scores = values.abs()[..., 0] if values.shape[2] == 1 else values.norm(dim=2)
            place = self.cells(weight.filters(_positions(weight.tensor)))
            found.append(Part(scores, {weight.name: place}, {weight.name: weight.tensor.shape}))
        return found


@final
@dataclass(frozen=True)
class Element(WeightGranularity):
    """Single weights, scored by their absolute value."""

    @override
    def cells(self, filters: Tensor) -> Tensor:
        return filters.flatten(1).unsqueeze(2)


@final
@dataclass(frozen=True)
class NM(WeightGranularity):
    """n:m sparsity: n of m consecutive weights along the inputs are kept; sparse tensor cores support 2:4.

    Weights are compared within blocks, so there is no scope, and the sparsity is 1 - n/m. Before the last step of a
    schedule, blocks keep more.

    Args:
        n: Weights to keep per block.
        m: Weights per block.

    Raises:
        ValueError: Unless 0 < n < m.
    """

    n: int = 2
    m: int = 4

    pool: ClassVar[Pool | None] = "filter"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.n < self.m:
            raise ValueError(f"NM: expected 0 < n < m, got n={self.n}, m={self.m}. NM(2, 4) keeps two of each four.")

    @property
    @override
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @override
    def problem_with(self, shape: Sequence[int]) -> str | None:
        return f"{shape[1]} inputs are not a multiple of {self.m}" if shape[1] % self.m else None

    @override
    def cells(self, filters: Tensor) -> Tensor:
        return filters.reshape(len(filters), -1, self.m, *filters.shape[2:]).movedim(2, -1).flatten(0, -2).unsqueeze(2)


@final
@dataclass(frozen=True)
class Kernel(WeightGranularity):
    """Kernels of convolutions, one per filter and input channel, scored by their L2 norm."""

    @override
    def problem_with(self, shape: Sequence[int]) -> str | None:
        return None if self.is_for(shape) else "a linear layer has no kernels"

    @override
    def is_for(self, shape: Sequence[int]) -> bool:
        return len(shape) > 2

    @override
    def cells(self, filters: Tensor) -> Tensor:
        return filters.flatten(2)


@final
@dataclass(frozen=True)
class Channel(Granularity):
    """Units (neurons, channels), scored by the L2 norm of the weights that produce them in all coupled layers.

    Weights, biases and norms of a unit are masked, but not the weights that consume it. Each group keeps its best unit.
    """

    of_units: ClassVar[bool] = True

    @override
    def parts(self, weights: Sequence[Weight], groups: Sequence[Group], tensors: Mapping[str, Tensor]) -> list[Part]:
        found = []
        for group in groups:
            places: dict[str, Tensor] = {}
            for member in group.members:
                tensor = tensors[member.tensor]
                if member.role == "in" or not isinstance(tensor, torch.nn.Parameter):
                    continue
                index = torch.as_tensor(member.index, device=tensor.device)
                place = _positions(tensor).movedim(member.dim, 0)[index].flatten(1)
                known = places.get(member.tensor)
                places[member.tensor] = place if known is None else torch.cat([known, place], 1)
            scores = unit_weights(group, tensors).norm(dim=1)
            shapes = {name: tensors[name].shape for name in places}
            found.append(Part(scores[None], {name: p[None] for name, p in places.items()}, shapes, never_empty=True))
        return found


def choose_masks(parts: Sequence[Part], masks: Mapping[str, Tensor], sparsity: float, pool: Pool) -> dict[str, Tensor]:
    """Choose masks by tensor, True where a weight is masked.

    In each pool, the cells with the lowest scores (ties by position) are masked until ``sparsity`` of the pool's
    weights are, rounded to the nearest cell, half up. Masked weights stay masked and count first.

    Args:
        parts: Cells that can be masked.
        masks: Current masks.
        sparsity: Share of the weights to mask, in [0, 1].
        pool: Scores that are compared with each other.

    Raises:
        FloatingPointError: If a weight is NaN or infinite.
    """
    scores = []
    for part in parts:
        if not part.scores.isfinite().all():
            raise FloatingPointError(
                f"expected finite weights, got NaN or infinity in {', '.join(part.places)}. Has the training diverged? "
                "A lower learning rate or gradient clipping may help."
            )
        values = part.scores.masked_fill(part.masked(masks), -1)
        if part.never_empty:
            values.view(-1)[values.argmax()] = torch.inf
        scores.append(values)
    if pool == "global":
        row = torch.cat([values.flatten() for values in scores])
        sizes = torch.cat(
            [torch.full_like(v.flatten(), p.size, dtype=torch.float64) for v, p in zip(scores, parts, strict=True)]
        )
        ends = [values.numel() for values in scores]
        gone = [
            g.view_as(v) for g, v in zip(torch.split(_lowest(row[None], sizes, sparsity)[0], ends), scores, strict=True)
        ]
    elif pool == "local":
        gone = [_lowest(values.view(1, -1), _ones(values.view(-1)), sparsity).view_as(values) for values in scores]
    else:
        gone = [_lowest(values, _ones(values[0]), sparsity) for values in scores]
    chosen = dict(masks)
    for part, cells in zip(parts, gone, strict=True):
        for name, mask in part.to_masks(cells).items():
            chosen[name] = mask | chosen[name] if name in chosen else mask
    return chosen


def _lowest(scores: Tensor, sizes: Tensor, sparsity: float) -> Tensor:
    """Mask the lowest scores of each row up to a share ``sparsity`` of its size; shapes (rows, cells), (cells,)."""
    order = scores.argsort(dim=1, stable=True)
    sorted_sizes = sizes.expand_as(scores).gather(1, order)
    middles = sorted_sizes.cumsum(1) - sorted_sizes / 2
    goes = middles <= sparsity * sizes.sum() + _EPSILON
    return torch.zeros_like(goes).scatter(1, order, goes) & (scores < torch.inf)


def _ones(row: Tensor) -> Tensor:
    return torch.ones_like(row, dtype=torch.float64)


def _positions(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
