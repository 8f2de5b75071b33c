"""Base class of surrogates, which are fitted to the features of one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lightning_prune.arguments import Settings
from lightning_prune.extras import require
from lightning_prune.scoring.surrogates.metrics import Metric, MetricFunction, Task, metric_function
from lightning_prune.scoring.surrogates.parts import Parts, class_indices

__all__ = ["Fitted", "FloatArray", "Surrogate", "Trained", "normalised"]

FloatArray = npt.NDArray[np.float64]

# Shuffles of each feature for permutation importance, as in scikit-learn.
_REPEATS = 5


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained surrogate.

    Attributes:
        predict: Predicts class indices or numbers, shape ``(n,)``, from features ``(n, width)``.
        importance: Importance of each feature, non-negative, shape ``(width,)``; None if not available.
        total: Total gain of each feature; None if equal to the importance.
    """

    predict: Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]
    importance: FloatArray | None
    total: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class Fitted:
    """Score and importances of one layer's features.

    Attributes:
        score: μ, the metric on held-out samples.
        importance: I, importance of each feature, shape ``(width,)``, with sum 1; all 0 if none is used.
        share: Each feature's share of the total gain, shape ``(width,)``, with sum 1; all 0 if none is used.
        predictions: Predictions for held-out samples: classes or numbers, shape ``(n,)``.
    """

    score: float
    importance: FloatArray
    share: FloatArray
    predictions: npt.NDArray[Any]


class Surrogate(Settings, ABC):
    """Base class of small models that predict the labels from the features of one layer.

    Concrete surrogates are final frozen dataclasses that hold settings only.

    Attributes:
        task: ``"classification"`` or ``"regression"``.
        packages: Required optional packages.
        importance: Kind of feature importance. All surrogates support ``"permutation"``: the decrease of the metric on
            held-out samples when the feature is shuffled, averaged over five shuffles, at least 0.
        incidental: Settings, also among ``params``, that do not affect the result.
    """

    task: Task
    importance: str
    seed: int
    importances: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]] = ()
    incidental: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.importance not in self.importances:
            known = ", ".join(f'"{one}"' for one in self.importances)
            raise ValueError(f"{name}: expected `importance` of {known}, got {self.importance!r}")

    @property
    def key(self) -> str:
        """Text of all settings that affect the scores."""
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.repr}  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._relevant(settings))})"

    def _relevant(self, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in settings.items():
            if name == "params" and value is not None:
                yield name, dict(self._relevant(value)) or None
            elif name not in self.incidental:
                yield name, value

    def require_packages(self) -> None:
        """Import the required optional packages.

        Raises:
            ModuleNotFoundError: If one is not installed; the message says how to install it.
        """
        for package in self.packages:
            require(package, extra="xgb")

    @abstractmethod
    def train(
        self,
        features: npt.NDArray[np.float32],
        labels: npt.NDArray[Any],
        stop_features: npt.NDArray[np.float32],
        stop_labels: npt.NDArray[Any],
    ) -> Trained:
        """Fit the model.

        Args:
            features: Finite features for fitting, shape ``(n, width)``.
            labels: Class indices (int64) or numbers (float64), shape ``(n,)``.
            stop_features: Features for early stopping.
            stop_labels: Labels for early stopping.
        """

    def fit(
        self, features: npt.NDArray[np.float32], labels: npt.NDArray[Any], parts: Parts, metric: Metric | None = None
    ) -> Fitted:
        """Fit the model and evaluate it on held-out samples.

        Args:
            features: One row per sample, shape ``(n, width)``.
            labels: Shape ``(n,)``: whole numbers for classes, any for regression.
            parts: Split of the samples, see `split_samples`.
            metric: Metric; by default accuracy, or R².

        Raises:
            FloatingPointError: If features or regression targets are NaN or infinite.
            ValueError: If features and labels do not match, labels are not classes, or a part lacks a class.
        """
        measure = metric_function(metric, self.task)
        _check_features(features, len(labels))
        classes, codes = self._encoded(labels, parts)
        fit, stop, held_back = (np.asarray(features[rows]) for rows in (parts.fit, parts.stop, parts.held_back))
        trained = self.train(fit, codes[parts.fit], stop, codes[parts.stop])
        truth = codes[parts.held_back]

        def score_of(predictions: npt.NDArray[Any]) -> float:
            return _score(measure, classes, truth, predictions)

        predicted = trained.predict(held_back)
        score, predictions = score_of(predicted), predicted if classes is None else classes[predicted]
        if self.importance == "permutation" or trained.importance is None:
            importance = _permuted(trained, held_back, score_of, score, self.seed)
            return Fitted(score, importance, importance, predictions)
        importance = normalised(trained.importance)
        share = importance if trained.total is None else normalised(trained.total)
        return Fitted(score, importance, share, predictions)

    def _encoded(self, labels: npt.NDArray[Any], parts: Parts) -> tuple[npt.NDArray[Any] | None, npt.NDArray[Any]]:
        """The classes, if any, and the targets."""
        if self.task == "regression":
            numbers = np.asarray(labels, dtype=np.float64)
            if not np.isfinite(numbers).all():
                raise FloatingPointError("expected finite labels, got NaN or infinity among them")
            if any(np.ptp(numbers[rows]) == 0 for rows in (parts.fit, parts.held_back)):
                raise ValueError(
                    "expected different numbers to predict, got one and the same for all samples of a part"
                )
            return None, numbers
        classes, codes = class_indices(labels)
        if len(classes) < 2:
            raise ValueError(f"expected samples of at least two classes, got {len(classes)}")
        for name, rows in (("fitted", parts.fit), ("stopped", parts.stop), ("measured", parts.held_back)):
            lacking = sorted(set(range(len(classes))) - set(codes[rows].tolist()))
            if lacking:
                raise ValueError(
                    f"expected samples of every class in the part that is {name} on, got none of class "
                    f"{', '.join(str(classes[code]) for code in lacking[:5])}. Take more samples, or split them class "
                    "by class (`split_samples`)."
                )
        return classes, codes


def normalised(values: npt.NDArray[Any]) -> FloatArray:
    """Divide by the sum; all 0 if it is 0."""
    numbers = np.asarray(values, dtype=np.float64)
    total = numbers.sum()
    return numbers / total if total > 0 else np.zeros_like(numbers)


def _check_features(features: npt.NDArray[Any], samples: int) -> None:
    if features.ndim != 2 or len(features) != samples or not features.shape[1]:
        raise ValueError(
            f"expected features of shape ({samples}, width), one row per label, got {tuple(features.shape)}"
        )
    bad = ~np.isfinite(features)
    if bad.any():
        rows, columns = np.nonzero(bad)
        raise FloatingPointError(
            f"expected finite features, got NaN or infinity for {len(np.unique(rows))} of {samples} samples in "
            f"{len(np.unique(columns))} of {features.shape[1]} channels (the first: channel {columns[0]}). Look for "
            "NaN or infinite weights, statistics of norms, and inputs (few samples, many channels)."
        )


def _score(
    measure: MetricFunction,
    classes: npt.NDArray[Any] | None,
    truth: npt.NDArray[Any],
    predictions: npt.NDArray[Any],
) -> float:
    if classes is not None:
        truth, predictions = classes[truth], classes[predictions]
    score = measure(truth, predictions)
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected `metric` to return a number, got {score!r}") from error


def _permuted(
    trained: Trained,
    features: npt.NDArray[np.float32],
    score_of: Callable[[npt.NDArray[Any]], float],
    score: float,
    seed: int,
) -> FloatArray:
    """Permutation importances, normalised."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(features)) for _ in range(_REPEATS)]
    falls = np.zeros(features.shape[1])
    shuffled = features.copy()
    for column in range(features.shape[1]):
        for order in orders:
            shuffled[:, column] = features[order, column]
            falls[column] += score - score_of(trained.predict(shuffled))
        shuffled[:, column] = features[:, column]
    return normalised(falls.clip(min=0))
