"""What a network's outputs say about classes: the probabilities that masking a unit may change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_prune.scoring.drawing import NO_CLASS

__all__ = ["ClassScores", "Task", "class_scores", "score_tensor"]

#: One class of several per sample (or pixel); one yes or no; several independent ones.
Task = Literal["multiclass", "binary", "multilabel"]

_TOLERANCE = 1e-3  # bfloat16 sums of probabilities are this far from 1


@dataclass(frozen=True)
class ClassScores:
    """How the outputs of one network are read: the same way for the whole network and for every masked one.

    Attributes:
        task: What the outputs are scores of.
        normalized: Whether they are probabilities already.
    """

    task: Task
    normalized: bool

    def log_probabilities(self, outputs: Tensor) -> Tensor:
        """Logarithms of class probabilities.

        Args:
            outputs: Scores as `score_tensor` found them, samples first.

        Returns:
            Shape ``(samples, classes, decisions)``, at least float32: decisions are pixels or labels, one for plain
            classification; a yes or no has two classes, ``(1 - p, p)``.
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
    """Find out how outputs are to be read, or check what the user says they are.

    Without ``task``: labels with one number per output and sample, none but 0 and 1, are multi-label; a single output
    per sample is a yes or no; all else has its classes on dimension 1, as ``cross_entropy`` has it. Without
    ``normalized``: numbers that are not negative and sum to 1 over the classes (of a single output, that lie in [0, 1])
    are probabilities, all others go through softmax (sigmoid).

    Args:
        outputs: Of the unmasked network, for all samples.
        labels: Of the same samples, if there are any; pixels labelled 255 belong to no class.
        task: What the outputs are scores of.
        normalized: Whether they are probabilities already.

    Raises:
        ValueError: If the outputs are no scores of this task, or no numbers, or do not fit the labels.
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
    """The one tensor of scores that a network gave out.

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


def _task(outputs: Tensor, labels: Tensor | None) -> Task:
    if outputs.dim() == 1 or outputs.shape[1] == 1:
        return "binary"
    if labels is not None and labels.shape == outputs.shape and bool(((labels == 0) | (labels == 1)).all()):
        return "multilabel"
    return "multiclass"


def _require_fit(outputs: Tensor, labels: Tensor | None, task: Task) -> None:
    """Refuse labels that say that the outputs are no scores: regression, reconstruction, another number of classes."""
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
