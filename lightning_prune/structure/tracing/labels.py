"""What is known of a tensor while a network runs: the indices along each of its axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from lightning_prune.structure.atoms import IndexArray

__all__ = ["WILD", "AxisLabel", "Blocks", "Decision", "Kind", "MacsRecord", "Picked", "SplitKey", "Value"]

#: Atoms along one dimension; None: an axis of fixed size; a string WILD: the same content at every index (expanded).
AxisLabel = IndexArray | None | str

WILD = "wild"

Kind = Literal["meta", "fake", "real"]

#: Runs of old and new dimensions with the same number of elements, in order.
Blocks = list[tuple[list[int], list[int]]]

#: Length of an axis and of the parts that a view splits it into.
SplitKey = tuple[int, tuple[int, ...]]

#: The part of a split that keeps the units apart, if any does, and the lengths of the others.
Decision = tuple[int | None, tuple[int, ...]]


class Value(NamedTuple):
    """What is known about a tensor.

    Attributes:
        axes: A label per dimension.
        zero: Whether the slices of removed units are exactly zero in the masked network.
        source: For a parameter seen directly or transposed: its name and its own dimension behind each dimension.
        constant: Whether it is computed from parameters and buffers alone, once for all samples.
    """

    axes: tuple[AxisLabel, ...]
    zero: bool = False
    source: tuple[str, tuple[int, ...]] | None = None
    constant: bool = False


@dataclass(frozen=True)
class MacsRecord:
    """MACs of one operator, or bytes of a tensor: ``factor`` × the product of the lengths of the labelled axes.

    Attributes:
        once: Whether that is for all samples of a batch together, since it does not depend on them.
    """

    factor: float
    axes: tuple[IndexArray, ...]
    layer: str
    once: bool


@dataclass(frozen=True, eq=False)
class Picked:
    """Indices of an axis that an operator took by their positions."""

    axis: IndexArray
    part: IndexArray

    def leaves(self, other: Picked) -> bool:
        """Whether the other pick, from what is left of the axis, is what is left of this one."""
        return np.array_equal(self.part[np.isin(self.part, other.axis)], other.part)
