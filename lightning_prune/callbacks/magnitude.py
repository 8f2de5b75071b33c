"""Magnitude pruning: mask the smallest weights."""

from __future__ import annotations

from typing import Literal, final

from lightning_prune.callbacks.masking import MaskPruning
from lightning_prune.planning import Granularity, Schedule

__all__ = ["MagnitudePruning"]


@final
class MagnitudePruning(MaskPruning):
    """Sets the smallest weights to zero and keeps them zero (Han et al., 2015).

    The method of "Learning both Weights and Connections for Efficient Neural Networks". Masked are the weights of
    linear and convolutional layers; biases, normalisations, embeddings and what recurrent layers and
    ``nn.MultiheadAttention`` pack into one parameter stay. After every step of an optimizer masked
    weights are zero again, with all that the optimizer remembers of them; at the end of every epoch this is checked.
    Checkpoints hold the masks, so that every ``ckpt_path`` keeps them. At the end units that have no effect any more
    are removed physically. The best so far of ``ModelCheckpoint`` and ``EarlyStopping`` starts anew with each cut.

    Args:
        sparsity: Share of the weights that become zero, in [0, 1); 0.5 by default, with `NM` what it implies.
        granularity: What goes together: `Element()` (default), `NM(2, 4)`, `Kernel()` or `Channel()`.
        scope: ``"global"``: one threshold for all weights; ``"local"``: one per layer. Without meaning for `NM`.
        schedule: When weights are masked; by default `Cubic()`: five steps from 10 % to 60 % of the run, the
            largest first.
        layers: Only these layers: names, globs, or names of modules that contain them.
        ignore: Not these layers.
        rewind: After each step go back to the weights as they were after so many epochs (0 = as the run began), with
            the new masks and optimizers that begin anew: the lottery ticket (Frankle & Carbin, 2019). Learning rates go
            on as scheduled.
        dirpath: Folder for ``report.html``, ``.md``, ``.json`` and pictures; by default the logger's folder.

    Raises:
        ValueError: At once for amounts out of range; before the first training step for everything that depends on
            network and trainer (a tied or frozen weight, inputs that n:m does not divide, a rewind to weights that were
            not kept).

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
