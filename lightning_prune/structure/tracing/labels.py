"""Labels of traced tensors: the atoms along each axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from lightning_prune.structure.atoms import IndexArray

__all__ = ["WILD", "AxisLabel", "Blocks", "Decision", "Kind", "MacsRecord", "Picked", "SplitKey", "Value"]

#: Atoms along one dimension; None for an axis of fixed size; WILD for one with the same content at every index.
AxisLabel = IndexArray | None | str

WILD = "wild"

Kind = Literal["meta", "fake", "real"]

#: Runs of old and new dimensions with the same number of elements, in order.
Blocks = list[tuple[list[int], list[int]]]

#: Length of an axis and of the parts that a view splits it into, or of the one part that a slice takes.
SplitKey = tuple[int, tuple[int, ...]]

#: The part of a split that carries the units, if any, and the lengths of the other parts.
Decision = tuple[int | None, tuple[int, ...]]


class Value(NamedTuple):
    """Label of a traced tensor.

    Attributes:
        axes: A label per dimension.
        zero: Whether the slices of removed units are exactly zero in the masked network.
        source: For a parameter or a transpose of one: its name, and the parameter's dimension for each dimension.
        constant: Whether it is computed from parameters and buffers alone, independent of the batch.
    """

    axes: tuple[AxisLabel, ...]
    zero: bool = False
    source: tuple[str, tuple[int, ...]] | None = None
    constant: bool = False


@dataclass(frozen=True)
class MacsRecord:
    """MACs of one operator, or bytes of a tensor: ``factor`` × the product of the lengths of the labelled axes.

    Attributes:
        once: Whether the cost is per batch rather than per sample.
    """

    factor: float
    axes: tuple[IndexArray, ...]
    layer: str
    once: bool


@dataclass(frozen=True, eq=False)
class Picked:
    """Indices of an axis that an operator selected by position."""

    axis: IndexArray
    part: IndexArray

    def leaves(self, other: Picked) -> bool:
        """Whether the other pick, made on the cut axis, equals this one after the cut."""
        return np.array_equal(self.part[np.isin(self.part, other.axis)], other.part)
