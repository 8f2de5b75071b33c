"""How much every unit matters: criteria, and the statistics they observe during training."""

from lightning_prune.scoring.contributions import Contributions, Ratio, contributions_of
from lightning_prune.scoring.criteria import (
    FPGM,
    KL,
    L1,
    L2,
    LAMP,
    LRP,
    NISP,
    SNIP,
    APoZ,
    BNScale,
    Contribution,
    Fisher,
    GraSP,
    HRank,
    Random,
    SynFlow,
    Taylor,
)
from lightning_prune.scoring.criteria.bn_scale import norm_scales
from lightning_prune.scoring.criterion import (
    Criterion,
    ObservingCriterion,
    score_groups,
    unit_rows,
    unit_weights,
)
from lightning_prune.scoring.gradients import GradientStatistic, MemberStatistic
from lightning_prune.scoring.statistics import (
    ActivationStatistic,
    ConsumerStatistic,
    ContributionStatistic,
    Statistic,
    Target,
    per_unit,
)
from lightning_prune.scoring.table import criteria_table

__all__ = [
    "FPGM",
    "KL",
    "L1",
    "L2",
    "LAMP",
    "LRP",
    "NISP",
    "SNIP",
    "APoZ",
    "ActivationStatistic",
    "BNScale",
    "ConsumerStatistic",
    "Contribution",
    "ContributionStatistic",
    "Contributions",
    "Criterion",
    "Fisher",
    "GraSP",
    "GradientStatistic",
    "HRank",
    "MemberStatistic",
    "ObservingCriterion",
    "Random",
    "Ratio",
    "Statistic",
    "SynFlow",
    "Target",
    "Taylor",
    "contributions_of",
    "criteria_table",
    "norm_scales",
    "per_unit",
    "score_groups",
    "unit_rows",
    "unit_weights",
]
