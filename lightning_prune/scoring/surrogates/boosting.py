"""Gradient-boosted trees (Chen and Guestrin, 2016), the surrogate of XGB pruning."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from lightning_prune.extras import require
from lightning_prune.scoring.surrogates.metrics import Task
from lightning_prune.scoring.surrogates.surrogate import Surrogate, Trained

__all__ = ["XGBoost"]


@final
@dataclass(frozen=True)
class XGBoost(Surrogate):
    """Gradient-boosted trees of XGBoost (``tree_method="hist"``); requires the extra ``xgb``.

    The paper does not state its parameters. With the defaults here, shallow trees are as accurate on pooled features as
        deep ones in half of the time, and 64 bins lose no accuracy. The number of unused features depends on rounds and
        depth: of the 1,152 channels of a late layer of EfficientNet-Lite0 on five kinds of flowers, 13 % were unused
        with 100 rounds at depth 6, 31 % at depth 3, and 63 % with 30 rounds at depth 3.

    Attributes:
        task: ``"classification"`` (softmax, or logistic for two classes) or ``"regression"`` (squared error).
        rounds: Maximum number of boosting rounds; with k > 2 classes, a round has k trees.
        max_depth: Maximum depth of a tree.
        learning_rate: Learning rate η.
        max_bin: Number of bins of a feature's histogram.
        colsample_bynode: Share of the features sampled for each split, in (0, 1].
        early_stopping: Number of rounds without a lower loss on the stopping samples after which fitting ends; trees
            after the best round are dropped. None disables early stopping.
        class_weight: ``"balanced"`` weights samples inversely to class frequency; None weights all equally.
        importance: ``"gain"``: mean gain of a feature's splits, normalised to sum 1 (scikit-learn's
            ``feature_importances_``); ``"weight"``: number of its splits, normalised; ``"permutation"``: see
            `Surrogate`. Unused features have 0.
        threads: Number of threads; all cores if None.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        seed: Random seed.
        memory_limit: Size of a feature table in bytes (float32) above which XGBoost uses external memory in temporary
            files (requires XGBoost 3). None for no limit.
        params: Other parameters of ``xgboost.train``, which override those above.

    Raises:
        ValueError: If a setting is out of range.
        ModuleNotFoundError: When fitting, if XGBoost is not installed.

    Example:
        >>> from lightning_prune.scoring import XGBoost
        >>> XGBoost(task="regression", rounds=30).max_depth
        3
    """

    task: Task = "classification"
    rounds: int = 100
    max_depth: int = 3
    learning_rate: float = 0.3
    max_bin: int = 64
    colsample_bynode: float = 1.0
    early_stopping: int | None = 10
    class_weight: Literal["balanced"] | None = None
    importance: Literal["gain", "weight", "permutation"] = "gain"
    threads: int | None = None
    device: str = "cpu"
    seed: int = 0
    memory_limit: int | None = None
    params: Mapping[str, Any] | None = None

    importances: ClassVar[tuple[str, ...]] = ("gain", "weight", "permutation")
    packages: ClassVar[tuple[str, ...]] = ("xgboost",)
    incidental: ClassVar[tuple[str, ...]] = ("threads", "device", "nthread", "n_jobs", "verbosity")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "max_depth", "max_bin", "early_stopping", "threads", "memory_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"XGBoost: expected `{name}` of at least 1, got {value}")
        if not 0 < self.colsample_bynode <= 1:
            raise ValueError(f"XGBoost: expected `colsample_bynode` in (0, 1], got {self.colsample_bynode}")
        if self.class_weight and self.task == "regression":
            raise ValueError("XGBoost: expected no `class_weight` for regression, which has no classes")

    @override
    def train(
        self,
        features: npt.NDArray[np.float32],
        labels: npt.NDArray[Any],
        stop_features: npt.NDArray[np.float32],
        stop_labels: npt.NDArray[Any],
    ) -> Trained:
        """Fit with early stopping."""
        xgboost = require("xgboost", extra="xgb")
        with tempfile.TemporaryDirectory(prefix="lightning_prune_") as folder:
            train = self._matrix(xgboost, features, labels, None, Path(folder) / "train")
            stop = self._matrix(xgboost, stop_features, stop_labels, train, Path(folder) / "stop")
            booster = xgboost.train(
                self._params(int(labels.max()) + 1),
                train,
                self.rounds,
                evals=[(stop, "stop")],
                early_stopping_rounds=self.early_stopping,
                verbose_eval=False,
            )
            del train, stop  # before their files are deleted
        if self.early_stopping is not None:
            booster = booster[: booster.best_iteration + 1]

        def predict(rows: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
            out = booster.inplace_predict(rows)
            if self.task == "regression":
                return np.asarray(out)
            return np.asarray(out.argmax(1) if out.ndim == 2 else (out > 0.5).astype(np.int64))

        width = features.shape[1]
        if self.importance == "weight":
            return Trained(predict, _scores(booster, "weight", width))
        return Trained(predict, _scores(booster, "gain", width), _scores(booster, "total_gain", width))

    def _matrix(
        self, xgboost: Any, features: npt.NDArray[np.float32], labels: npt.NDArray[Any], ref: Any, cache: Path
    ) -> Any:
        """Quantile matrix of a table, in memory or in external memory."""
        weights = self._weights(labels)
        table: dict[str, Any] = {"max_bin": self.max_bin, "nthread": self.threads or 0, "ref": ref}
        if self.memory_limit is None or features.nbytes <= self.memory_limit:
            return xgboost.QuantileDMatrix(features, labels, weight=weights, **table)
        rows = max(self.memory_limit // (4 * features.shape[1]), 1)
        parts = [slice(start, start + rows) for start in range(0, len(features), rows)]

        class Parts(xgboost.DataIter):  # type: ignore[misc]
            """Iterates over parts of a table."""

            def __init__(self) -> None:
                self.place = 0
                super().__init__(cache_prefix=str(cache))

            def next(self, input_data: Any) -> bool:
                """Pass on the next part; returns whether there was one."""
                if self.place == len(parts):
                    return False
                part = parts[self.place]
                weight = None if weights is None else weights[part]
                input_data(data=features[part], label=labels[part], weight=weight)
                self.place += 1
                return True

            def reset(self) -> None:
                """Reset to the first part."""
                self.place = 0

        return xgboost.ExtMemQuantileDMatrix(Parts(), **table)

    def _params(self, classes: int) -> dict[str, Any]:
        objective: dict[str, Any] = {"objective": "reg:squarederror"}
        if self.task == "classification":
            softmax = {"objective": "multi:softprob", "num_class": classes}
            objective = softmax if classes > 2 else {"objective": "binary:logistic"}
        return {
            **objective,
            "tree_method": "hist",
            "max_depth": self.max_depth,
            "learning_rate": self.learning_rate,
            "max_bin": self.max_bin,
            "colsample_bynode": self.colsample_bynode,
            "nthread": self.threads or 0,
            "device": self.device,
            "seed": self.seed,
            "verbosity": 1,
            **(self.params or {}),
        }

    def _weights(self, labels: npt.NDArray[Any]) -> npt.NDArray[np.float64] | None:
        """Sample weights with mean 1 that balance the classes."""
        if self.class_weight is None:
            return None
        counts = np.bincount(labels)
        return np.asarray(len(labels) / (len(counts) * counts[labels]))


def _scores(booster: Any, kind: str, width: int) -> npt.NDArray[np.float64]:
    """XGBoost's scores of features, 0 for unused ones."""
    scores = np.zeros(width)
    for name, value in booster.get_score(importance_type=kind).items():
        scores[int(name[1:])] = value
    return scores
