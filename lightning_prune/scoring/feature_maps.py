"""Criteria of feature maps, each of which needs a matrix decomposition: observed on a few samples of a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.statistics import ActivationStatistic, Half, Target, per_unit
from lightning_prune.structure.graph import Structure

__all__ = ["FeatureMapCriterion", "FeatureMapStatistic"]


@final
class FeatureMapStatistic(ActivationStatistic):
    """A measure of the units' feature maps at the inputs of the next layers, averaged over consumers.

    Args:
        structure: The network's groups.
        samples: Use only this many samples of each batch.
        measure: From feature maps ``(passes, width, k, *positions)`` to numbers ``(passes, width)``.
    """

    def __init__(self, structure: Structure, samples: int, measure: Callable[[Tensor], Tensor]) -> None:
        super().__init__(structure)
        self.samples = samples
        self.measure = measure
        self.declare("score", "sum")

    def see(self, layer: nn.Module, activation: Tensor, output: Tensor, targets: Sequence[Target]) -> None:  # noqa: ARG002
        """Record the measure; NaN where a feature map is not finite."""
        for name, source, inputs in targets:
            maps = per_unit(layer, activation, inputs)[: self.samples]
            bad = ~maps.isfinite().all()
            measured = self.measure(torch.where(bad, 0, maps)).to(maps.dtype).sum(0)
            self.record(name, source, len(maps), score=torch.where(bad, torch.nan, measured))

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """Mean over passes and consumers."""
        return self.per_pass("score", name, half).mean(0)


@dataclass(frozen=True)
class FeatureMapCriterion(ObservingCriterion):
    """Base of criteria that measure feature maps.

    Args:
        every_n_batches: Observe every n-th training batch.
        samples: Samples per observed batch.

    Raises:
        ValueError: If an argument is below 1.
    """

    every_n_batches: int = 10
    samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"{type(self).__name__}: expected `samples` to be at least 1, got {self.samples}.")

    @staticmethod
    @abstractmethod
    def measure(maps: Tensor) -> Tensor:
        """From feature maps ``(passes, width, k, *positions)`` to numbers ``(passes, width)``."""

    def statistic(self, structure: Structure) -> FeatureMapStatistic:
        """The measure, averaged."""
        return FeatureMapStatistic(structure, self.samples, self.measure)
