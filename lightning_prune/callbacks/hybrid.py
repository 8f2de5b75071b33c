"""Hybrid pruning: every filter loses its own smallest weights."""

from __future__ import annotations

from typing import final

from lightning_prune.callbacks.masking import MaskPruning
from lightning_prune.planning import Granularity, Schedule

__all__ = ["HybridPruning"]


@final
class HybridPruning(MaskPruning):
    """Sets the smallest weights of each filter to zero: a threshold per filter, not one per network.

    Between unstructured and filter pruning: all filters stay, each with the same share of its weights, so none dies
    before the others. Otherwise as `MagnitudePruning`.

    Args:
        sparsity: Share of each filter's weights that become zero, in [0, 1); 0.5 by default.
        granularity: What goes together: `Element()` (default) or `Kernel()`.
        schedule: When weights are masked; by default `Cubic()`.
        layers: Only these layers: names, globs, or names of modules that contain them.
        ignore: Not these layers.
        rewind: After each step go back to the weights as they were after so many epochs, see `MagnitudePruning`.
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
