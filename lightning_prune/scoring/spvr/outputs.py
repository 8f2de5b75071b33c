"""Interpretation of a network's outputs as class probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_prune.scoring.data import Batch
from lightning_prune.scoring.sampling import NO_CLASS

__all__ = ["ClassScores", "Task", "class_scores", "labels_of", "score_tensor"]

#: One of several classes per sample (or pixel); one binary decision; several independent binary decisions.
Task = Literal["multiclass", "binary", "multilabel"]

_TOLERANCE = 1e-3  # for sums of bfloat16 probabilities


@dataclass(frozen=True)
class ClassScores:
    """Interpretation of the outputs of a network.

    Attributes:
        task: Kind of classification.
        normalized: Whether the outputs are probabilities.
    """

    task: Task
    normalized: bool

    def log_probabilities(self, outputs: Tensor) -> Tensor:
        """Log-probabilities of classes.

        Args:
            outputs: Class scores, see `score_tensor`; samples first.

        Returns:
            Shape ``(samples, classes, decisions)``, at least float32. Decisions are pixels or labels, one for plain
            classification; binary decisions have two classes, ``(1 - p, p)``.
        """
        x = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.task == "multiclass":
            x = x.flatten(2) if x.dim() > 2 else x[..., None]
            return _log(x) if self.normalized else x.log_softmax(1)
        x = x.reshape(len(x), -1)
        if self.normalized:
            return torch.stack([_log(1 - x), _log(x)], 1)
        return torch.stack([F.logsigmoid(-x), F.logsigmoid(x)], 1)


def class_scores(
    outputs: Tensor, labels: Tensor | None = None, task: Task | None = None, normalized: bool | None = None
) -> ClassScores:
    """Infer the interpretation of outputs, or check the given one.

    Without ``task``: a single output per sample is binary; labels of 0 and 1 in the shape of the outputs are
        multi-label; otherwise classes are on dimension 1, as for ``cross_entropy``. Without ``normalized``:
        non-negative outputs that sum to 1 over the classes (for binary decisions, outputs in [0, 1]) are probabilities;
        others are logits.

    Args:
        outputs: Outputs of the unmasked network for all samples.
        labels: Labels of the samples, if available; pixels labelled 255 are ignored.
        task: Kind of classification; inferred if None.
        normalized: Whether the outputs are probabilities; inferred if None.

    Raises:
        ValueError: If the outputs are not scores of this task, are not finite, or do not match the labels.
    """
    if task is not None and task not in get_args(Task):
        raise ValueError(f"expected `task` to be one of {get_args(Task)} or None, got {task!r}")
    if outputs.dim() == 0 or len(outputs) == 0:
        raise ValueError(
            f"expected one or more scores per sample, got outputs of shape {tuple(outputs.shape)}. Does `forward` "
            "return a loss? It has to return what the classes are chosen by."
        )
    if not bool((outputs < torch.inf).all()):  # NaN included; -inf is a class that cannot be
        raise ValueError(
            "expected scores that are numbers, got NaN or infinity in the outputs of the network as it is. Has its "
            "training diverged?"
        )
    found = task or _task(outputs, labels)
    if found == "multiclass" and (outputs.dim() < 2 or outputs.shape[1] < 2):
        raise ValueError(f"expected outputs (samples, classes, ...) of two classes or more, got {tuple(outputs.shape)}")
    _require_fit(outputs, labels, found)
    if normalized is None:
        normalized = _is_normalized(outputs, found)
    return ClassScores(found, normalized)


def score_tensor(result: Any) -> Tensor:
    """The tensor of class scores in the output of a network.

    Raises:
        TypeError: If there is none, or more than one and none is called ``"logits"`` or ``"out"``.
    """
    if isinstance(result, dict):  # torchvision's segmentation networks, Hugging Face's outputs
        result = next((result[name] for name in ("logits", "out") if name in result), result)
    found = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]
    if len(found) == 1:
        return found[0]
    shapes = ", ".join(str(tuple(x.shape)) for x in found) or type(result).__name__
    raise TypeError(
        f"expected `forward` to return one tensor of class scores, got {len(found)} floating-point tensors ({shapes}). "
        "Return the scores alone, or a dict with them under 'logits'."
    )


def labels_of(batches: Iterable[Batch]) -> Tensor | None:
    """Labels of all samples; None if a batch has none."""
    labels = [batch.labels for batch in batches]
    known = [found for found in labels if found is not None]
    return torch.cat(known) if known and len(known) == len(labels) else None


def _task(outputs: Tensor, labels: Tensor | None) -> Task:
    if outputs.dim() == 1 or outputs.shape[1] == 1:
        return "binary"
    if labels is not None and labels.shape == outputs.shape and bool(((labels == 0) | (labels == 1)).all()):
        return "multilabel"
    return "multiclass"


def _require_fit(outputs: Tensor, labels: Tensor | None, task: Task) -> None:
    """Raise an error if labels do not match: regression, reconstruction, another number of classes."""
    if labels is None:
        return
    classes = outputs.shape[1] if task == "multiclass" else 2
    decisions = (len(outputs), *outputs.shape[2:]) if task == "multiclass" else outputs.shape
    if labels.numel() != torch.Size(decisions).numel() and labels.shape != outputs.shape:
        raise ValueError(
            f"expected one label for each of the {tuple(decisions)} decisions that outputs of shape "
            f"{tuple(outputs.shape)} are scores of, got labels of shape {tuple(labels.shape)}. Importance by "
            "misclassification needs a network whose `forward` returns class scores."
        )
    if labels.is_floating_point() and bool((labels != labels.round()).any()) and labels.shape != outputs.shape:
        raise ValueError(
            "expected labels that name classes, got numbers with fractions. Importance by misclassification is not "
            "defined for regression: choose another criterion."
        )
    if task == "multiclass" and labels.shape != outputs.shape:
        named = labels if outputs.dim() == 2 else labels[labels != NO_CLASS]
        highest = int(named.max()) if named.numel() else 0
        if highest >= classes:
            raise ValueError(f"expected labels below the {classes} classes of the outputs, got {highest}")


def _is_normalized(outputs: Tensor, task: Task) -> bool:
    x = outputs.float()
    if task != "multiclass":
        return bool(((x >= 0) & (x <= 1)).all())
    return bool((x >= 0).all()) and bool(((x.sum(1) - 1).abs() <= _TOLERANCE).all())


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
