"""Scikit-learn estimators as surrogates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from lightning_prune.extras import require
from lightning_prune.scoring.surrogates.metrics import Task
from lightning_prune.scoring.surrogates.surrogate import FloatArray, Surrogate, Trained

__all__ = ["SklearnEstimator"]


@final
@dataclass(frozen=True)
class SklearnEstimator(Surrogate):
    """An estimator of scikit-learn; requires the extra ``xgb``, which installs scikit-learn.

    It is fitted to the fitting and stopping samples together, since it does not use external early stopping.

    Attributes:
        estimator: An estimator, which is cloned for each layer, or the path of its class, such as
            ``"sklearn.ensemble.RandomForestClassifier"``.
        task: ``"classification"`` or ``"regression"``.
        importance: ``"own"``: ``feature_importances_``, else the mean over outputs of ``|coef_|`` times the standard
            deviation of the feature, else permutation importance; of a pipeline, that of its last step.
            ``"permutation"``: see `Surrogate`.

    Raises:
        ValueError: If a setting is out of range.
        TypeError: If it is not an estimator.
        ModuleNotFoundError: If scikit-learn is not installed.

    Example:
        >>> from lightning_prune.scoring import SklearnEstimator
        >>> surrogate = SklearnEstimator("sklearn.ensemble.ExtraTreesClassifier", {"n_estimators": 50})
    """

    estimator: Any
    params: Mapping[str, Any] | None = None
    task: Task = "classification"
    importance: Literal["own", "permutation"] = "own"
    seed: int = 0

    importances: ClassVar[tuple[str, ...]] = ("own", "permutation")
    incidental: ClassVar[tuple[str, ...]] = ("n_jobs", "verbose")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.params is not None and not isinstance(self.estimator, str):
            raise ValueError(
                f"SklearnEstimator: expected `params` with the name of a class only, got {dict(self.params)} with a "
                f"{type(self.estimator).__name__}. Set them on the estimator."
            )
        self._new_estimator()

    @override
    def train(
        self,
        features: npt.NDArray[np.float32],
        labels: npt.NDArray[Any],
        stop_features: npt.NDArray[np.float32],
        stop_labels: npt.NDArray[Any],
    ) -> Trained:
        """Fit a clone to the fitting and stopping samples."""
        rows, truth = np.concatenate([features, stop_features]), np.concatenate([labels, stop_labels])
        fitted = self._new_estimator().fit(rows, truth)
        return Trained(fitted.predict, _native_importance(fitted, rows) if self.importance == "own" else None)

    def _new_estimator(self) -> Any:
        """Create an unfitted estimator."""
        if not isinstance(self.estimator, str):
            _require_estimator(self.estimator)
            return require("sklearn.base", extra="xgb").clone(self.estimator)
        module, _, name = self.estimator.rpartition(".")
        if not module:
            raise ValueError(
                f"SklearnEstimator: expected the path of a class, such as 'sklearn.ensemble.{self.estimator}', got "
                f"{self.estimator!r}"
            )
        kind = getattr(require(module, extra="xgb"), name, None)
        if kind is None:
            raise ValueError(f"SklearnEstimator: {module} has no {name!r}")
        made = kind(**(self.params or {}))
        _require_estimator(made)
        if "random_state" in made.get_params() and "random_state" not in (self.params or {}):
            made.set_params(random_state=self.seed)
        return made


def _require_estimator(estimator: Any) -> None:
    lacking = [name for name in ("fit", "predict", "get_params") if not hasattr(estimator, name)]
    if lacking:
        raise TypeError(
            f"SklearnEstimator: expected an estimator of scikit-learn, got {estimator!r}, which has no "
            f"{', '.join(lacking)}"
        )


def _native_importance(fitted: Any, rows: npt.NDArray[np.float32]) -> FloatArray | None:
    """The estimator's own feature importances, or None."""
    steps = getattr(fitted, "steps", None)
    last, plain = (steps[-1][1], len(steps) == 1) if steps else (fitted, True)
    own: FloatArray | None = None
    if hasattr(last, "feature_importances_"):
        own = np.asarray(last.feature_importances_, dtype=np.float64)
    elif hasattr(last, "coef_"):
        # After a scaler, features have equal spread.
        spread = rows.std(0, dtype=np.float64) if plain else 1.0
        own = np.abs(np.atleast_2d(np.asarray(last.coef_, dtype=np.float64))).mean(0) * spread
    return own if own is not None and own.shape == (rows.shape[1],) else None
