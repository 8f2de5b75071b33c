"""Bundles of units with correlated activations (Hassan et al., "SPvR", Algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["correlation", "group_units"]

# Rounded so that ties are broken by index on every machine.
_DECIMALS = 9


def correlation(features: Tensor) -> Tensor:
    r"""Correlation between the columns of a matrix of activations (eq. 3).

    .. math:: C = \hat S^\top \hat S, \quad \hat s_q = \frac{s_q - \bar s_q}{\lVert s_q - \bar s_q \rVert}

    Rounded to nine decimals, so that equal columns give equal numbers. The row and column of a constant column are 0.
    The paper's factor :math:`1/\sqrt n` scales all of C equally and is omitted.

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
    # Bound on the rounding error of a constant column.
    noise = 8 * math.sqrt(len(s)) * torch.finfo(s.dtype).eps * s.abs().amax(0)
    constant = norms <= noise
    scaled = torch.where(constant, 0.0, centred / norms.masked_fill(constant, 1.0))
    return (scaled.T @ scaled).clamp(-1, 1).round(decimals=_DECIMALS)


def group_units(correlations: Tensor, group_size: int) -> list[tuple[int, ...]]:
    """Partition units greedily into bundles of correlated units (Algorithm 1).

    The first free unit is bundled with the ``group_size - 1`` free units that correlate most with it (ties by index),
    and so on. A unit is always in its own bundle, which the paper's "top d values of its row" leaves open for a
    constant unit. The last bundle may be smaller.

    Args:
        correlations: Signed correlations, shape ``(units, units)``.
        group_size: Units per bundle, d.

    Returns:
        Bundles in the order in which they were formed, with units ascending.

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
