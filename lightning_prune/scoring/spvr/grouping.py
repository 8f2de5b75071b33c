"""Groups of units whose activations go together (Hassan et al., "SPvR", Algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["correlation", "group_units"]

# Correlations this close are ties, which are broken by index: the last bits differ between machines.
_DECIMALS = 9


def correlation(features: Tensor) -> Tensor:
    r"""Correlation between the columns of a matrix of activations (eq. 3).

    .. math:: C = \hat S^\top \hat S, \quad \hat s_q = \frac{s_q - \bar s_q}{\lVert s_q - \bar s_q \rVert}

    Rounded to nine decimals, so that equal columns are equal in the last bit too. A column that is constant correlates
    with nothing: its row and column are 0. The paper's factor :math:`1/\sqrt n` scales all of C alike and is left out.

    Args:
        features: One number per sample and unit, shape ``(samples, units)``.

    Returns:
        Shape ``(units, units)``, in [-1, 1], on the CPU in float64.

    Raises:
        ValueError: If ``features`` is not a matrix with at least one row.
        FloatingPointError: If a feature is NaN or infinite.
    """
    if features.dim() != 2 or len(features) == 0:
        raise ValueError(f"expected features of shape (samples, units), got {tuple(features.shape)}")
    s = features.detach().to("cpu", torch.float64)
    if not s.isfinite().all():
        raise FloatingPointError("expected finite activations, got NaN or infinity. Has the training diverged?")
    centred = s - s.mean(0)
    norms = centred.norm(dim=0)
    # What rounding leaves of a constant column: n numbers, each within some units in the last place of their mean.
    noise = 8 * math.sqrt(len(s)) * torch.finfo(s.dtype).eps * s.abs().amax(0)
    constant = norms <= noise
    scaled = torch.where(constant, 0.0, centred / norms.masked_fill(constant, 1.0))
    return (scaled.T @ scaled).clamp(-1, 1).round(decimals=_DECIMALS)


def group_units(correlations: Tensor, group_size: int) -> list[tuple[int, ...]]:
    """Partition units greedily into groups that go together (Algorithm 1).

    The first unit without a group takes the ``group_size - 1`` units without a group that correlate most with it, the
    lower index where correlations are equal, and so on. It is always in its own group, which the paper's "top d values
    of its row" leaves open for a constant unit. The last group may be smaller; fewer units than ``group_size`` are one
    group.

    Args:
        correlations: Shape ``(units, units)``, signed: units that move against each other are far apart.
        group_size: Units of a group, d.

    Returns:
        Groups in the order in which they were formed, the units of each ascending.

    Raises:
        ValueError: If ``group_size`` is below 1.
    """
    if group_size < 1:
        raise ValueError(f"expected `group_size` to be at least 1, got {group_size}")
    free = torch.ones(len(correlations), dtype=torch.bool)
    groups: list[tuple[int, ...]] = []
    for unit in range(len(correlations)):
        if not free[unit]:
            continue
        free[unit] = False
        nearest = correlations[unit].masked_fill(~free, -math.inf).argsort(descending=True, stable=True)
        taken = nearest[: min(group_size - 1, int(free.sum()))]
        free[taken] = False
        groups.append(tuple(sorted((unit, *taken.tolist()))))
    return groups
