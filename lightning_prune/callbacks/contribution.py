"""Contribution pruning: remove the units that add least to what the next layer computes."""

from __future__ import annotations

from typing import final

from lightning_prune.callbacks.structured import StructuredPruning
from lightning_prune.scoring import Contribution

__all__ = ["ContributionPruning"]


@final
class ContributionPruning(StructuredPruning):
    """`StructuredPruning` by contribution ratios (Reddy et al., "Neural Importance-based Train-time Pruning").

    While the network trains, every unit's share in what the next layer computes is observed; at each cut the units with
    the smallest share leave, and the training goes on with the narrower layers.

    Takes the arguments of `StructuredPruning`; ``criterion`` is `Contribution()` by default.

    Args:
        pruning_ratio: Share of the units to remove, in [0, 1): of every group, or of all with ``scope="global"``. Or a
            share per layer, ``{"layers.1": 0.5, "encoder.*": 0.2}``.
        budget: Instead of a ratio, what remains: ``{"params": 0.6}``, ``{"macs": 0.5}``, ``{"units": 40}`` (a float is
            a share of the dense network in (0, 1], an int a count; a bare number counts parameters).
        criterion: How contributions are weighed and how often batches are observed; by default `Contribution()`.
        schedule: When cuts happen; by default five, the first after 10 % and the last after 60 % of the run.
        scope: ``"local"`` (each layer loses the same share), ``"global"``, or a `Scope` with limits of the widths.
        layers: Only these layers: names, globs, or names of modules that contain them.
        ignore: Not these layers.
        reset_monitors: Let ``ModelCheckpoint`` and ``EarlyStopping`` start anew after each cut, so that "best" means
            best at the final size, and let early stopping wait for the last cut.
        dirpath: Folder for the report; by default the logger's folder.
        extensions: What goes with every cut, such as `Ridge`, `Rollback`, `SaveEachSize`; see `StructuredPruning`.

    Example:
        >>> from lightning_prune import ContributionPruning
        >>> callback = ContributionPruning(pruning_ratio=0.5)
    """

    default_criterion = Contribution
