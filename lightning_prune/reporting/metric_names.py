"""What the names of logged metrics say: which quantity, measured on which data."""

from __future__ import annotations

from typing import Literal

__all__ = ["data_of_metric", "family", "kind_of_metric", "mode_of_metric", "words_of_metric"]

# Words in a metric's name that say on which data it was measured, or how it was averaged, but not what it is.
_DATA_WORDS = frozenset({"train", "training", "val", "valid", "validation", "test", "epoch"})

# Words in a metric's name that say what is better.
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
    """What a metric is, without the data it was measured on: the same for ``val_acc`` and ``train_acc_epoch``."""
    return tuple(word for word in words_of_metric(name) if word not in _DATA_WORDS)


def words_of_metric(name: str) -> list[str]:
    """Words of a metric's name, in lower case."""
    return [word for word in name.lower().replace("/", "_").replace(".", "_").replace("-", "_").split("_") if word]


def kind_of_metric(name: str) -> int | None:
    """0 for an accuracy, 1 for a loss of the validation, 2 for others of it that say what is better, 3 for any loss.

    The lowest counts most; ``None`` for what does not count.
    """
    lowered = name.lower()
    if "acc" in lowered:
        return 0
    of_validation = data_of_metric(name) == 0
    if "loss" in lowered:
        return 1 if of_validation else 3
    return 2 if of_validation and mode_of_metric(name) else None


def mode_of_metric(name: str) -> Literal["max", "min"] | None:
    """Whether more or less of a metric is better, as its name says; ``None`` where it does not."""
    words = set(words_of_metric(name))
    if words & _LOWER_IS_BETTER or "loss" in name.lower():
        return "min"
    return "max" if words & _HIGHER_IS_BETTER or "acc" in name.lower() else None


def data_of_metric(name: str) -> int:
    """0 for a metric of the validation, 1 where the name does not say (often the training's), 2 of the training."""
    words = set(words_of_metric(name))
    return 0 if words & {"val", "valid", "validation"} else 2 if words & {"train", "training"} else 1
