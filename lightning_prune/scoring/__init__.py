"""How much every unit matters: criteria, and the statistics they observe during training."""

from lightning_prune.scoring.contributions import Contributions, Ratio, contributions_of
from lightning_prune.scoring.criteria import (
    FPGM,
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
    KLDivergence,
    Random,
    SynFlow,
    Taylor,
)
from lightning_prune.scoring.criteria.bn_scale import norm_scales
from lightning_prune.scoring.criterion import (
    Criterion,
    ObservingCriterion,
    crossings,
    score_groups,
    unit_rows,
    unit_weights,
)
from lightning_prune.scoring.data import Batch, DataPass
from lightning_prune.scoring.gradients import GradientStatistic, MemberStatistic
from lightning_prune.scoring.statistics import (
    ActivationStatistic,
    ConsumerStatistic,
    ContributionStatistic,
    Statistic,
    Target,
    per_unit,
)
from lightning_prune.scoring.surrogates import NeuralProbe, SklearnEstimator, Surrogate, XGBoost
from lightning_prune.scoring.table import criteria_table

__all__ = [
    "FPGM",
    "L1",
    "L2",
    "LAMP",
    "LRP",
    "NISP",
    "SNIP",
    "APoZ",
    "ActivationStatistic",
    "BNScale",
    "Batch",
    "ConsumerStatistic",
    "Contribution",
    "ContributionStatistic",
    "Contributions",
    "Criterion",
    "DataPass",
    "Fisher",
    "GraSP",
    "GradientStatistic",
    "HRank",
    "KLDivergence",
    "MemberStatistic",
    "NeuralProbe",
    "ObservingCriterion",
    "Random",
    "Ratio",
    "SklearnEstimator",
    "Statistic",
    "Surrogate",
    "SynFlow",
    "Target",
    "Taylor",
    "XGBoost",
    "contributions_of",
    "criteria_table",
    "crossings",
    "norm_scales",
    "per_unit",
    "score_groups",
    "unit_rows",
    "unit_weights",
]
