"""Hybrid pruning: mask the smallest weights of each filter."""

from __future__ import annotations

from typing import final

from lightning_prune.callbacks.masking import MaskPruning
from lightning_prune.planning import Granularity, Schedule

__all__ = ["HybridPruning"]


@final
class HybridPruning(MaskPruning):
    """Sets the smallest weights of each filter to zero, with a threshold per filter instead of per network.

    All filters keep the same share of their weights, so that none is emptied. Otherwise like `MagnitudePruning`.

    Args:
        sparsity: Share of each filter's weights that become zero, in [0, 1); 0.5 by default.
        granularity: Weights that are masked together: `Element()` (default) or `Kernel()`.
        schedule: When weights are masked; by default `Cubic()`.
        layers: Layers to mask: names, globs, or names of parent modules; all by default.
        ignore: Layers not to mask.
        rewind: Rewind to the weights after this many epochs at each step, see `MagnitudePruning`.
        dirpath: Folder for the report; by default the logger's folder.

    Example:
        >>> from lightning_prune import HybridPruning, Kernel
        >>> callback = HybridPruning(sparsity=0.5, granularity=Kernel())
    """

    def __init__(
        self,
        sparsity: float | None = None,
        granularity: Granularity | None = None,
        schedule: Schedule | None = None,
        layers: str | list[str] | None = None,
        ignore: str | list[str] | None = None,
        rewind: int | None = None,
        dirpath: str | None = None,
    ) -> None:
        if granularity is not None and (granularity.of_units or granularity.pool is not None):
            raise ValueError(
                f"HybridPruning: expected a granularity within a filter, Element() or Kernel(), got {granularity!r}. "
                "Use MagnitudePruning for it."
            )
        super().__init__(sparsity, granularity, "filter", schedule, layers, ignore, rewind, dirpath)
