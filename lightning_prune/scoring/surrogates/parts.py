"""Split of the samples for a surrogate: fitting, early stopping and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_prune.scoring.surrogates.metrics import Task

__all__ = ["Parts", "class_indices", "require_labels", "split_samples"]

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Parts:
    """Disjoint positions of samples, ascending.

    Attributes:
        fit: Samples for fitting.
        stop: Samples for early stopping.
        held_back: Samples for evaluation.
    """

    fit: IndexArray
    stop: IndexArray
    held_back: IndexArray


def split_samples(
    labels: npt.NDArray[Any], task: Task, *, held_back: float = 0.2, stop: float = 0.1, seed: int = 0
) -> Parts:
    """Split samples at random, stratified by class; every part gets at least one sample of each class.

    Args:
        labels: One label per sample, shape ``(n,)``.
        task: Whether the labels are classes.
        held_back: Share of the samples for evaluation, in (0, 1).
        stop: Share of the samples for early stopping, in (0, 1).
        seed: Seed of the split.

    Raises:
        ValueError: If no samples are left to fit, there is only one class, or a class has less than three samples.
    """
    if not (0 < held_back < 1 and 0 < stop < 1 and held_back + stop < 1):
        raise ValueError(
            f"expected shares above 0 that leave samples to fit, got held_back={held_back} and stop={stop}. Give 0.2 "
            "and 0.1."
        )
    rng = np.random.default_rng(seed)
    strata = _strata(labels, task)
    drawn = [_draw(rng.permutation(stratum), held_back, stop) for stratum in strata]
    fit, stopping, measuring = (np.sort(np.concatenate(part)) for part in zip(*drawn, strict=True))
    return Parts(fit, stopping, measuring)


def class_indices(labels: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], IndexArray]:
    """The classes, ascending, and the index of each sample's class.

    Raises:
        ValueError: If labels are not whole numbers.
    """
    whole = np.asarray(labels)
    if not np.issubdtype(whole.dtype, np.integer):
        rounded = np.rint(whole.astype(np.float64))
        wrong = whole[~(rounded == whole)]  # NaN as well
        if wrong.size:
            raise ValueError(
                f"expected whole numbers as classes, got labels such as {float(wrong[0]):g}. To predict numbers give a "
                'surrogate with `task="regression"`.'
            )
        whole = rounded
    classes, indices = np.unique(whole.astype(np.int64), return_inverse=True)
    return classes, indices.reshape(-1).astype(np.int64)


def require_labels(labels: npt.NDArray[Any], task: Task) -> None:
    """Check the labels of samples.

    Raises:
        ValueError: If there is not one per sample, or, for classification, if they are not whole numbers.
    """
    if labels.ndim != 1:
        raise ValueError(
            f"expected one label per sample, shape (n,), got {labels.shape}. Give a function that takes them out of a "
            "batch as `labels`."
        )
    if task == "classification":
        class_indices(labels)


def _strata(labels: npt.NDArray[Any], task: Task) -> list[IndexArray]:
    require_labels(labels, task)
    if task == "regression":
        if len(labels) < 3:
            raise ValueError(f"expected at least 3 samples, got {len(labels)}")
        return [np.arange(len(labels), dtype=np.int64)]
    classes, indices = class_indices(labels)
    if len(classes) < 2:
        raise ValueError(
            f"expected samples of at least two classes, got {len(labels)} of class {', '.join(map(str, classes))}. Are "
            "the samples sorted by class, and too few of them taken? Take more, or give `per_class`."
        )
    counts = np.bincount(indices)
    rare = [f"{label} ({count})" for label, count in zip(classes, counts, strict=True) if count < 3]
    if rare:
        raise ValueError(
            "expected at least three samples of each class, one for each part (to fit, to stop, to measure), got fewer "
            f"of class {', '.join(rare[:5])}. Take more samples, or leave these classes out."
        )
    return [np.flatnonzero(indices == index) for index in range(len(classes))]


def _draw(order: IndexArray, held_back: float, stop: float) -> tuple[IndexArray, IndexArray, IndexArray]:
    """Split shuffled samples: for fitting, stopping and evaluation."""
    measured = min(max(round(held_back * len(order)), 1), len(order) - 2)
    stopping = min(max(round(stop * len(order)), 1), len(order) - measured - 1)
    return order[measured + stopping :], order[measured : measured + stopping], order[:measured]
