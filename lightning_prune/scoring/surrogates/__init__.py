"""Surrogates, which predict labels from the features of one layer and rank the features."""

from lightning_prune.scoring.surrogates.boosting import XGBoost
from lightning_prune.scoring.surrogates.estimator import SklearnEstimator
from lightning_prune.scoring.surrogates.metrics import Metric, metric_function, metric_name
from lightning_prune.scoring.surrogates.parts import Parts, require_labels, split_samples
from lightning_prune.scoring.surrogates.probe import NeuralProbe
from lightning_prune.scoring.surrogates.surrogate import Fitted, Surrogate, Trained

__all__ = [
    "Fitted",
    "Metric",
    "NeuralProbe",
    "Parts",
    "SklearnEstimator",
    "Surrogate",
    "Trained",
    "XGBoost",
    "metric_function",
    "metric_name",
    "require_labels",
    "split_samples",
]
