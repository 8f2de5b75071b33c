"""Magnitude pruning: mask the smallest weights."""

from __future__ import annotations

from typing import Literal, final

from lightning_prune.callbacks.masking import MaskPruning
from lightning_prune.planning import Granularity, Schedule

__all__ = ["MagnitudePruning"]


@final
class MagnitudePruning(MaskPruning):
    """Sets the smallest weights to zero and keeps them zero (Han et al., 2015).

    The method of "Learning both Weights and Connections for Efficient Neural Networks". Weights of linear and
    convolutional layers are masked, but not biases, norms, embeddings, and the packed parameters of recurrent layers
    and ``nn.MultiheadAttention``. After every optimizer step, masked weights and their optimizer state are set to zero;
    this is checked at the end of every epoch. Checkpoints contain the masks. At the end of the training, dead units are
    removed physically. ``ModelCheckpoint`` and ``EarlyStopping`` are reset at each cut.

    Args:
        sparsity: Share of the weights to mask, in [0, 1); 0.5 by default, or as implied by `NM`.
        granularity: Weights that are masked together: `Element()` (default), `NM(2, 4)`, `Kernel()` or `Channel()`.
        scope: ``"global"``: one threshold for all weights; ``"local"``: one per layer. Ignored for `NM`.
        schedule: When weights are masked; by default `Cubic()`: five steps from 10 % to 60 % of the run, the largest
            first.
        layers: Layers to mask: names, globs, or names of parent modules; all by default.
        ignore: Layers not to mask.
        rewind: Rewind to the weights after this many epochs (0 = initialization) at each step, with the new masks and
            cleared optimizer state: the lottery ticket (Frankle & Carbin, 2019). Learning rates continue as scheduled.
        dirpath: Folder for ``report.html``, ``.md``, ``.json`` and pictures; by default the logger's folder.

    Raises:
            ValueError: If an amount is out of range; before the first training step, if the network or trainer is not
                supported (a tied or frozen weight, inputs that m does not divide, a rewind to weights that were not
                saved).

    Example:
        >>> from lightning_prune import NM, MagnitudePruning, OneShot
        >>> MagnitudePruning(sparsity=0.9).sparsity
        0.9
        >>> MagnitudePruning(granularity=NM(1, 4), schedule=OneShot()).sparsity
        0.75
    """

    def __init__(
        self,
        sparsity: float | None = None,
        granularity: Granularity | None = None,
        scope: Literal["global", "local"] = "global",
        schedule: Schedule | None = None,
        layers: str | list[str] | None = None,
        ignore: str | list[str] | None = None,
        rewind: int | None = None,
        dirpath: str | None = None,
    ) -> None:
        if scope not in ("global", "local"):
            raise ValueError(
                f'MagnitudePruning: expected `scope` "global" (one threshold) or "local" (one per layer), got '
                f"{scope!r}. For a threshold per filter use HybridPruning."
            )
        self.scope = scope
        super().__init__(sparsity, granularity, scope, schedule, layers, ignore, rewind, dirpath)
