"""Compensation for removed inputs: by their mean (FoldMean), or by a linear fit of the remaining inputs (Ridge)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.errors import listed
from lightning_prune.structure.graph import Axes
from lightning_prune.surgery.repairs.linear import Consumer, consumers
from lightning_prune.surgery.repairs.observed import InputMean, InputMoments, Observation, observed_contents
from lightning_prune.surgery.repairs.repair import Repair, Run, require_positive

__all__ = ["FoldMean", "Ridge"]


@final
@dataclass(frozen=True)
class FoldMean(Repair):
    r"""Adds the mean contribution of the removed units :math:`R` to the next layer's bias, :math:`W_R \mu_R`.

    This is exact for constant units. A layer that loses all its inputs returns its mean output. Means are those of the
    next layer's inputs, after activation and normalisation. With zero padding, the mean is taken over all positions
    including the border, where even a constant channel leaves an error. If a layer has no bias, the contribution is
    added to the batch norm directly after it; without such a norm, the layer is left unchanged, with a warning.

    Supports Linear, Conv and ConvTranspose layers that are called as modules, including grouped convolutions.

    Args:
        batches: Batches of training data for the means.
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
    r"""Refits the next layer's weights to reproduce its previous outputs from the remaining inputs.

    With :math:`\Sigma` the covariance of the inputs, :math:`S` the remaining and :math:`R` the removed ones,
    :math:`W_S \leftarrow W_S + W_R \Sigma_{RS} (\Sigma_{SS} + \lambda I)^{-1}`, and the difference of the means is
    added to the bias: least squares with a penalty :math:`\lambda \lVert W_S' - W_S \rVert^2`. If inputs are
    uncorrelated, the weights do not change, as with `FoldMean`. :math:`\lambda` is relative to the mean variance of the
    remaining inputs. The statistics of all layers are those of the network before the cut.

    A convolution is treated as a linear layer on its patches (channels times kernel elements), a grouped one as one
    such layer per group, and a transposed one as a convolution of its inputs with zeros inserted. Layers with more than
    ``max_inputs`` inputs (per group), which a warning names, and those that lose all inputs get `FoldMean` instead. A
    layer without a bias and without a following batch norm is fitted without a constant, on second moments instead of
    covariances.

    Args:
        batches: Batches of training data for the covariances; together with ``rows`` at least as many rows as inputs,
            else a warning names the layers.
        strength: λ, above 0.
        rows: Patches (tokens, samples) per batch and layer, spread evenly if there are more.
        max_inputs: Largest number of inputs of a layer (per group); the matrices take its square in memory.
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
        contents = observed_contents(model, observed, partial(run, model, self.batches), "Ridge")
        few = [
            f"{one.consumer.name} ({one.count} rows for {one.consumer.inputs} inputs)"
            for one in observed
            if isinstance(one, _Regression) and 0 < one.count < one.consumer.inputs
        ]
        if few:
            warnings.warn(
                f"Ridge fits weights to fewer rows than inputs, which λ alone determines then: {listed(few)}. Give "
                "more `batches` or `rows`.",
                stacklevel=4,
            )
        large = [
            f"{one.consumer.name} ({one.consumer.inputs} inputs)"
            for one in observed
            if isinstance(one, InputMean) and len(one.consumer.kept)
        ]
        if large:
            warnings.warn(
                f"Ridge folds only the mean of {listed(large)}: more inputs than max_inputs={self.max_inputs}.",
                stacklevel=4,
            )
        return contents

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
        # Constant inputs carry no information: with any strength above 0, the weights do not change.
        strength = torch.where(scale > 0, self.strength * scale, 1.0)[:, None, None]
        penalized = inner + strength * torch.eye(inner.shape[1], dtype=inner.dtype)
        solved: Tensor = torch.linalg.solve(penalized, cross.mT @ removed.mT)
        return solved.mT
