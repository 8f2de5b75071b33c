"""What the name of a logged metric says: which quantity, on which data, and what is better."""

from __future__ import annotations

from typing import Literal

__all__ = ["data_of_metric", "family", "kind_of_metric", "mode_of_metric", "words_of_metric"]

# Words in a metric's name for the data it was measured on or how it was averaged.
_DATA_WORDS = frozenset({"train", "training", "val", "valid", "validation", "test", "epoch"})

# Words in a metric's name that show what is better.
_LOWER_IS_BETTER = frozenset(
    {
        "loss",
        "error",
        "err",
        "mse",
        "mae",
        "rmse",
        "mape",
        "perplexity",
        "ppl",
        "nll",
        "bce",
        "kld",
        "fid",
        "wer",
        "cer",
    }
)
_HIGHER_IS_BETTER = frozenset(
    {"f1", "iou", "miou", "dice", "auc", "auroc", "ap", "map", "precision", "recall", "r2", "psnr", "ssim", "bleu"}
)


def family(name: str) -> tuple[str, ...]:
    """The quantity, without the data it was measured on: the same for ``val_acc`` and ``train_acc_epoch``."""
    return tuple(word for word in words_of_metric(name) if word not in _DATA_WORDS)


def words_of_metric(name: str) -> list[str]:
    """Words of a metric's name, in lower case."""
    return [word for word in name.lower().replace("/", "_").replace(".", "_").replace("-", "_").split("_") if word]


def kind_of_metric(name: str) -> int | None:
    """How well a metric suits as the main one; the lowest rank is best, and ``None`` excludes it.

    0 for an accuracy, 1 for a validation loss, 2 for another validation metric whose name shows what is better, 3 for
    any other loss.
    """
    lowered = name.lower()
    if "acc" in lowered:
        return 0
    of_validation = data_of_metric(name) == 0
    if "loss" in lowered:
        return 1 if of_validation else 3
    return 2 if of_validation and mode_of_metric(name) else None


def mode_of_metric(name: str) -> Literal["max", "min"] | None:
    """Whether higher or lower is better, judging by a metric's name; ``None`` if the name does not show it."""
    words = set(words_of_metric(name))
    if words & _LOWER_IS_BETTER or "loss" in name.lower():
        return "min"
    return "max" if words & _HIGHER_IS_BETTER or "acc" in name.lower() else None


def data_of_metric(name: str) -> int:
    """0 for a validation metric, 1 if the name does not say (often a training metric), 2 for a training metric."""
    words = set(words_of_metric(name))
    return 0 if words & {"val", "valid", "validation"} else 2 if words & {"train", "training"} else 1
