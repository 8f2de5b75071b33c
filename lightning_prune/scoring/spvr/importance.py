"""Measures of the change of outputs per sample: misclassification, change of probability, divergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

__all__ = ["MEASURES", "Measure", "kl_divergence", "misclassification", "misclassified", "prediction_change"]

#: Names of the measures.
Measure = Literal["prediction_change", "kl_divergence", "misclassification"]


def prediction_change(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Misclassification plus the change of the predicted class's probability (SPvR, eq. 2).

    .. math:: L = [\arg\max p \neq \arg\max q] + \lvert p_c - q_c \rvert, \quad c = \arg\max p

    A sample is misclassified if its class differs from the one that the unmasked network predicts; labels are not used.

    Args:
        log_p: Log-probabilities of the unmasked network, shape ``(samples, classes, decisions)``.
        log_q: Log-probabilities of a masked network, of the same shape, or of several, ``(variants, ...)``.

    Returns:
        Sums over decisions, shape ``(samples,)`` or ``(variants, samples)``, each in [0, 2 · decisions].
    """
    predicted = log_p.argmax(-2, keepdim=True)
    p = log_p.gather(-2, predicted).exp()
    q = log_q.gather(-2, predicted.expand(*log_q.shape[:-2], 1, log_q.shape[-1])).exp()
    return (misclassified(log_p, log_q) + (p - q).abs().squeeze(-2)).sum(-1)


def misclassification(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Number of changed decisions: the first term of `prediction_change`, with the same arguments."""
    return misclassified(log_p, log_q).sum(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Divergence :math:`\mathrm{KL}(p \Vert q) = \sum_c p_c \log (p_c / q_c)` in nats (CURL: Luo and Wu, 2020).

    Same arguments and shapes as `prediction_change`; summed over decisions, non-negative.
    """
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def misclassified(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 where the class of a decision changes, else 0: shape ``(..., samples, decisions)``."""
    return (log_p.argmax(-2) != log_q.argmax(-2)).to(log_p.dtype)


#: Measures by name.
MEASURES: dict[Measure, Callable[[Tensor, Tensor], Tensor]] = {
    "prediction_change": prediction_change,
    "kl_divergence": kl_divergence,
    "misclassification": misclassification,
}
