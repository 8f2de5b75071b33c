"""CURL (Luo and Wu, "Neural Network Pruning with Residual-Connections and Limited-Data", 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_prune.scoring.spvr.criterion import MaskingCriterion, MaskingStatistic
from lightning_prune.structure.graph import Structure

__all__ = ["KLDivergence"]


@final
@dataclass(frozen=True)
class KLDivergence(MaskingCriterion):
    r"""Divergence of the outputs when a unit is masked, :math:`\mathrm{KL}(p \Vert p_{-k})` (CURL: Luo and Wu, 2020).

    In nats, summed over samples (and pixels or labels); comparable over the whole network.

    Args:
        group_size: Units that are masked together, grouped by the correlation of their activations.
        samples_per_class: Number of samples of each class.
        task: Kind of classification; inferred by default, see `class_scores`.
        normalized: Whether the outputs are probabilities; inferred by default.
    """

    def statistic(self, structure: Structure) -> MaskingStatistic:
        """Divergences per bundle."""
        return MaskingStatistic(structure, "kl_divergence", self)
