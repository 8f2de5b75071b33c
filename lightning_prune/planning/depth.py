"""Choice of a network's depth by the scores of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

__all__ = ["Depth", "best_depth", "require_depth"]

#: The depth with the best score, or a tolerance below it.
Depth = Literal["argmax"] | float


def require_depth(depth: object) -> None:
    """Validate the argument ``depth``.

    Raises:
        ValueError: If it is neither None, ``"argmax"`` nor a number of at least 0.
    """
    if depth is None or depth == "argmax":
        return
    if isinstance(depth, bool) or not isinstance(depth, (int, float)) or not depth >= 0:
        raise ValueError(
            f'expected `depth` to be None, "argmax" or a tolerance of at least 0 (0.02: the smallest depth whose score '
            f"is at most 0.02 below the best), got {depth!r}"
        )


def best_depth(scores: Sequence[float], depth: Depth) -> int:
    """Index of the chosen depth; ties in favour of the shallower one.

    Args:
        scores: μ of every depth, the shallowest first.
        depth: ``"argmax"``: the best score. A tolerance: the smallest depth whose score is within it of the best.
    """
    values = np.asarray(scores, dtype=np.float64)
    tolerance = 0.0 if depth == "argmax" else float(depth)
    return int(np.flatnonzero(values >= values.max() - tolerance)[0])
