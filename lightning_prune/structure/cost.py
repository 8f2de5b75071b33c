"""What a network costs as a function of its widths: parameters and MACs, on numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

__all__ = ["Axis", "CostModel", "Term"]


@dataclass(frozen=True)
class Axis:
    """Length of an axis as a function of the widths: ``fixed + Σ repeat[g] · width[g]``."""

    fixed: int
    repeat: tuple[tuple[str, int], ...] = ()

    def length(self, widths: Mapping[str, int]) -> int:
        """Number of positions when group ``g`` has ``widths[g]`` units."""
        return self.fixed + sum(k * widths[g] for g, k in self.repeat)


@dataclass(frozen=True)
class Term:
    """A product ``factor · Π length(axis)``: the elements of a tensor, or the MACs of one operator for one sample."""

    factor: float
    axes: tuple[Axis, ...]
    layer: str = ""

    def value(self, widths: Mapping[str, int]) -> float:
        """The product at these widths."""
        return self.factor * math.prod(axis.length(widths) for axis in self.axes)


@dataclass(frozen=True)
class CostModel:
    """Parameters and MACs (multiply-accumulates, one sample; 1 MAC = 2 FLOPs) of a network at any widths.

    Attributes:
        parameters: One term per parameter, tied parameters once.
        macs_terms: One term per convolution or matrix product of a forward pass in eval mode.
        shapes: Present shape of every parameter and buffer.
    """

    parameters: tuple[Term, ...]
    macs_terms: tuple[Term, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def params(self, widths: Mapping[str, int]) -> int:
        """Number of parameters, trainable or not, buffers left out."""
        return round(sum(term.value(widths) for term in self.parameters))

    def macs(self, widths: Mapping[str, int]) -> int:
        """Multiply-accumulates of one sample's forward pass."""
        return round(sum(term.value(widths) for term in self.macs_terms))

    def take(self, axes: Mapping[str, Mapping[int, npt.NDArray[np.int64]]]) -> CostModel:
        """The same terms for a network whose tensors were cut along ``axes``."""
        shapes = {
            name: tuple(len(axes.get(name, {}).get(dim, range(n))) for dim, n in enumerate(shape))
            for name, shape in self.shapes.items()
        }
        return replace(self, shapes=shapes)
