"""What the names of logged metrics say: which quantity, measured on which data."""

from __future__ import annotations

__all__ = ["data_of_metric", "family", "kind_of_metric", "words_of_metric"]

# Words in a metric's name that say on which data it was measured, or how it was averaged, but not what it is.
_DATA_WORDS = frozenset({"train", "training", "val", "valid", "validation", "test", "epoch"})


def family(name: str) -> tuple[str, ...]:
    """What a metric is, without the data it was measured on: the same for ``val_acc`` and ``train_acc_epoch``."""
    return tuple(word for word in words_of_metric(name) if word not in _DATA_WORDS)


def words_of_metric(name: str) -> list[str]:
    """Words of a metric's name, in lower case."""
    return [word for word in name.lower().replace("/", "_").replace(".", "_").replace("-", "_").split("_") if word]


def kind_of_metric(name: str) -> int | None:
    """0 for an accuracy, 1 for a loss, ``None`` for anything else."""
    lowered = name.lower()
    return 0 if "acc" in lowered else 1 if "loss" in lowered else None


def data_of_metric(name: str) -> int:
    """0 for a metric of the validation, 1 where the name does not say (often the training's), 2 of the training."""
    words = set(words_of_metric(name))
    return 0 if words & {"val", "valid", "validation"} else 2 if words & {"train", "training"} else 1
