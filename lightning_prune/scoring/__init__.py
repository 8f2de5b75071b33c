"""How much every unit matters: criteria, and the statistics they observe during training."""

from lightning_prune.scoring.contributions import Contributions, Ratio, contributions_of
from lightning_prune.scoring.criteria import L1, L2, Contribution, Random
from lightning_prune.scoring.criterion import Criterion, score_groups, unit_rows, unit_weights
from lightning_prune.scoring.statistics import ContributionStatistic, Statistic

__all__ = [
    "L1",
    "L2",
    "Contribution",
    "ContributionStatistic",
    "Contributions",
    "Criterion",
    "Random",
    "Ratio",
    "Statistic",
    "contributions_of",
    "score_groups",
    "unit_rows",
    "unit_weights",
]
