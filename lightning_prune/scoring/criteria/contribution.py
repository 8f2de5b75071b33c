"""Contribution pruning (Reddy et al., "Neural Importance-based Train-time Pruning")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lightning_prune.scoring.contributions import Ratio
from lightning_prune.scoring.criterion import Criterion
from lightning_prune.scoring.statistics import ContributionStatistic, Statistic
from lightning_prune.structure.graph import Group, Structure

__all__ = ["Contribution"]


@final
@dataclass(frozen=True)
class Contribution(Criterion):
    r"""Contribution of a unit to the outputs of the next layer, observed during training (Reddy et al.).

    .. math::
        s_k = \lambda_\text{avg} \frac{C_\text{avg}(k)}{\overline{C_\text{avg}}}
            + \lambda_\text{max} \frac{C_\text{max}(k)}{\overline{C_\text{max}}}

    with the mean and the maximum, over passes and next units :math:`j`, of the share
    :math:`|w_{kj} a_k| / \sum_i |w_{ij} a_i|`, where :math:`a` is the input of the next layer. Bars are means over the
    group, which make the weights :math:`\lambda` comparable.

    Unlike in the paper, shares are of absolute values by default (signed shares hardly agree between two halves of the
    data), all passes since the last cut count, and biases have no share.

    Args:
        lambda_avg: Weight of C_avg, at least 0.
        lambda_max: Weight of C_max, at least 0. Much slower than C_avg for convolutions.
        ratio: ``"absolute"``, or ``"signed"`` as printed in the paper.
        every_n_batches: Observe every n-th training batch.
        epsilon: Signed denominators become ``z + epsilon · sign(z)``; above 0.
        positions: Number of output positions of convolutions sampled per observed batch for C_max, which makes it
            faster; all by default. C_avg and Linear layers are always exact.

    Raises:
        ValueError: If a weight is negative, both are 0, another argument is out of range, or ``positions`` has no
            effect.
    """

    lambda_avg: float = 1.0
    lambda_max: float = 0.0
    ratio: Ratio = "absolute"
    every_n_batches: int = 10
    epsilon: float = 1e-6
    positions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_avg", "lambda_max"):
            if getattr(self, name) < 0:
                raise ValueError(f"Contribution: expected `{name}` to be at least 0, got {getattr(self, name)}.")
        if self.lambda_avg == self.lambda_max == 0:
            raise ValueError(
                "Contribution: expected `lambda_avg` or `lambda_max` above 0, got 0 for both: all units would score "
                "alike. Use the criterion Random to remove units at random."
            )
        if self.every_n_batches < 1:
            raise ValueError(
                f"Contribution: expected `every_n_batches` to be 1 (every batch) or more, got {self.every_n_batches}."
            )
        if self.epsilon <= 0:
            raise ValueError(f"Contribution: expected `epsilon` above 0, got {self.epsilon}.")
        if self.positions is not None and (self.positions < 1 or not self.lambda_max):
            raise ValueError(
                "Contribution: expected `positions` to be at least 1, beside a `lambda_max` above 0, got "
                f"{self.positions} and lambda_max={self.lambda_max}. Leave it out for the maximum over all positions."
            )

    @property
    def waived(self) -> Mapping[str, str]:
        """Signed means can be below that of a dead unit."""
        if self.ratio == "signed" and self.lambda_avg:
            return {"dead_is_lowest": "the mean of a living unit's signed shares can be negative"}
        return {}

    def statistic(self, structure: Structure) -> ContributionStatistic:
        """Shares in the outputs of the next layers."""
        return ContributionStatistic(
            structure, self.lambda_avg, self.lambda_max, self.ratio, self.epsilon, self.positions
        )

    def score(self, group: Group, tensors: Mapping[str, Tensor], statistic: Statistic | None) -> Tensor:  # noqa: ARG002
        """λ-weighted shares, each term divided by its mean over the group."""
        if statistic is None:
            raise ValueError("Contribution: expected the statistic that `statistic(structure)` returned, got None.")
        return statistic.value(group.name)
