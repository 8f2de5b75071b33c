"""Metrics of predictions; higher is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Metric", "Task", "accuracy", "balanced_accuracy", "metric_function", "metric_name", "r2"]

#: Kind of target: a class or a number.
Task = Literal["classification", "regression"]

#: Function of labels and predictions, both of shape ``(n,)``.
MetricFunction = Callable[[npt.NDArray[Any], npt.NDArray[Any]], float]

#: A metric by name, or a function of labels and predictions; higher is better.
Metric = Literal["accuracy", "balanced_accuracy", "r2"] | MetricFunction


def accuracy(labels: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> float:
    """Share of correct predictions, in [0, 1]."""
    return float(np.mean(labels == predictions))


def balanced_accuracy(labels: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> float:
    """Mean recall over classes, in [0, 1]."""
    right = labels == predictions
    return float(np.mean([np.mean(right[labels == label]) for label in np.unique(labels)]))


def r2(labels: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> float:
    r"""Coefficient of determination :math:`1 - \sum (y - \hat y)^2 / \sum (y - \bar y)^2`: 1 is perfect, 0 the mean."""
    left = np.sum((labels - predictions) ** 2, dtype=np.float64)
    return float(1 - left / np.sum((labels - labels.mean(dtype=np.float64)) ** 2, dtype=np.float64))


_OF_TASK: Mapping[Task, Mapping[str, MetricFunction]] = {
    "classification": {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy},
    "regression": {"r2": r2},
}


def metric_function(metric: Metric | None, task: Task) -> MetricFunction:
    """The function of a metric; by default accuracy for classes, R² for numbers.

    Raises:
        ValueError: If it is not a metric of this task.
    """
    known = _OF_TASK[task]
    if metric is None:
        return next(iter(known.values()))
    if callable(metric):
        return metric
    if metric not in known:
        names = ", ".join(f'"{name}"' for name in known)
        raise ValueError(
            f"expected a `metric` for {task} ({names}) or a function of labels and predictions, got {metric!r}"
        )
    return known[metric]


def metric_name(metric: Metric | None, task: Task) -> str:
    """Name of a metric for tables."""
    function = metric_function(metric, task)
    return str(getattr(function, "__name__", None) or type(function).__name__)
