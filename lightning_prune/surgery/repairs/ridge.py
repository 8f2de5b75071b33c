"""Making up for removed inputs: by their mean (FoldMean), or by what those that stay tell of them (Ridge)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.structure.graph import Axes
from lightning_prune.surgery.repairs.linear import Consumer, consumers
from lightning_prune.surgery.repairs.observed import InputMean, InputMoments, Observation, observed_contents
from lightning_prune.surgery.repairs.repair import Repair, Run, require_positive

__all__ = ["FoldMean", "Ridge"]


@final
@dataclass(frozen=True)
class FoldMean(Repair):
    r"""Adds to the next layer's bias what the removed units :math:`R` gave on average, :math:`W_R \mu_R`.

    Exact for units that are constant. A layer that loses all its inputs becomes the mean of what it gave. What counts
    is what enters the next layer, after activation and normalisation.
    Under zero padding the mean is taken over all positions, those at the border included, so that even a constant
    channel leaves an error there. A layer without a bias that is followed directly by a batch norm has its mean moved
    there; without either nothing is done, with a warning.

    It covers Linear, Conv and ConvTranspose layers that are called as modules, and also grouped convolutions.

    Args:
        batches: Batches of training data that the means are taken over.
    """

    batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:
        """The shifted biases."""
        observed = [InputMean(consumer) for consumer in consumers(model, axes)]
        return observed_contents(model, observed, partial(run, model, self.batches), "FoldMean")


@final
@dataclass(frozen=True)
class Ridge(Repair):
    r"""Refits the next layer's weights, so that from the inputs that stay it computes what it did from all of them.

    With :math:`\Sigma` the covariance of the inputs, :math:`S` those that stay and :math:`R` those that go,
    :math:`W_S \leftarrow W_S + W_R \Sigma_{RS} (\Sigma_{SS} + \lambda I)^{-1}`, and the bias takes the difference of
    the means: least squares with a penalty :math:`\lambda \lVert W_S' - W_S \rVert^2`. Inputs that say nothing of each
    other leave the weights as they are, which is `FoldMean`. :math:`\lambda` is relative to the mean variance of the
    inputs that stay. The statistics of all layers are those of the network before the cut.

    A convolution is a linear layer on its patches, of channels times kernel elements; a grouped one is one such layer
    for each group, and a transposed one a convolution of inputs with zeros in between. Layers with more than
    ``max_inputs`` inputs (of a group) and those that lose all of them get `FoldMean` instead. A layer without a bias
    that no batch norm follows is fitted without one, on second moments in place of covariances.

    Args:
        batches: Batches of training data that covariances are taken over; more than inputs divided by ``rows`` at
            least.
        strength: λ, above 0.
        rows: Patches (tokens, samples) per batch and layer, spread evenly where there are more.
        max_inputs: Largest number of inputs of a layer (of a group); the matrices take its square in memory.
    """

    batches: int = 32
    strength: float = 0.01
    rows: int = 1024
    max_inputs: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:
        """The refitted weights and shifted biases."""
        observed = [self._observation(consumer) for consumer in consumers(model, axes)]
        return observed_contents(model, observed, partial(run, model, self.batches), "Ridge")

    def _observation(self, consumer: Consumer) -> Observation:
        fits = consumer.inputs <= self.max_inputs and len(consumer.kept) > 0
        return _Regression(consumer, self.rows, self.strength) if fits else InputMean(consumer)


@dataclass(eq=False)
class _Regression(InputMoments):
    strength: float

    @override
    def added(self, removed: Tensor, covariance: Tensor, stays: Tensor) -> Tensor:
        inner, cross = covariance[:, stays][:, :, stays], covariance[:, ~stays][:, :, stays]
        scale = inner.diagonal(dim1=1, dim2=2).mean(1)
        # Inputs that never change tell nothing: any strength above 0 leaves the weights as they are.
        strength = torch.where(scale > 0, self.strength * scale, 1.0)[:, None, None]
        penalized = inner + strength * torch.eye(inner.shape[1], dtype=inner.dtype)
        solved: Tensor = torch.linalg.solve(penalized, cross.mT @ removed.mT)
        return solved.mT
