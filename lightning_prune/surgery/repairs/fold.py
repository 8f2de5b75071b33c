"""Merging each removed unit into the most similar remaining one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.structure.graph import Axes
from lightning_prune.surgery.repairs.linear import consumers
from lightning_prune.surgery.repairs.observed import InputMean, InputMoments, observed_contents
from lightning_prune.surgery.repairs.repair import Repair, Run, require_positive

__all__ = ["Fold"]


@final
@dataclass(frozen=True)
class Fold(Repair):
    r"""Merges each removed unit into the most similar remaining unit.

    With :math:`\Sigma` the covariance of the inputs of the next layer, the removed unit :math:`r` is approximated by
    the remaining unit that explains most of its variance:

    .. math:: k = \arg\max_s \Sigma_{rs}^2 / \Sigma_{ss}, \qquad
              W_k \leftarrow W_k + \frac{\Sigma_{rk}}{\Sigma_{kk}} W_r

    and the difference of the means is added to the bias. Duplicates and multiples of a remaining unit are removed
    without loss. `Ridge` uses all remaining units instead, which is never worse on the data it was fitted to; a single
    number per removed unit can be estimated from few samples and needs no λ.

    For a convolution, the covariance of two channels is summed over the kernel elements, and all elements of the
    removed channel are merged with the same factor (per group in grouped convolutions). As with `Ridge`, a layer that
    loses all inputs gets `FoldMean`, and a layer without a bias and without a following batch norm is fitted on second
    moments. Neuron merging (Kim et al., 2020) also merges units instead of dropping them, but compares weights; this
    repair compares the inputs of the next layer.

    Args:
        batches: Batches of training data for the covariances.
        rows: Patches (tokens, samples) per batch and layer, spread evenly if there are more.
    """

    batches: int = 8
    rows: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:
        """The merged weights and shifted biases."""
        observed = [
            _Merge(consumer, self.rows) if len(consumer.kept) else InputMean(consumer)
            for consumer in consumers(model, axes)
        ]
        return observed_contents(model, observed, partial(run, model, self.batches), "Fold")


@dataclass(eq=False)
class _Merge(InputMoments):
    @override
    def added(self, removed: Tensor, covariance: Tensor, stays: Tensor) -> Tensor:
        channels = self.consumer.weight.shape[self.consumer.dim]
        taps = len(stays) // channels
        blocks = covariance.reshape(len(covariance), channels, taps, channels, taps)
        alike = blocks.diagonal(dim1=2, dim2=4).sum(-1)  # of channels, over the elements of the kernel
        stay = stays.reshape(channels, taps)[:, 0]
        between, variance = alike[:, ~stay][:, :, stay], alike.diagonal(dim1=1, dim2=2)[:, None, stay]
        # A unit that never changes explains nothing.
        explained = torch.where(variance > 0, between.square() / variance, -1.0)
        best = explained.argmax(2, keepdim=True)
        factor = torch.where(variance > 0, between / variance, 0.0).gather(2, best)
        shares = torch.zeros_like(between).scatter(2, best, factor)
        given = removed.reshape(*removed.shape[:2], -1, taps)
        return torch.einsum("gort,grs->gost", given, shares).flatten(2)
