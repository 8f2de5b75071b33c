"""Contribution pruning: remove the units that contribute least to the next layer."""

from __future__ import annotations

from typing import final

from lightning_prune.callbacks.methods.structured import StructuredPruning
from lightning_prune.scoring import Contribution

__all__ = ["ContributionPruning"]


@final
class ContributionPruning(StructuredPruning):
    """`StructuredPruning` by contribution ratios (Reddy et al., "Neural Importance-based Train-time Pruning").

    During training, the contribution of every unit to the outputs of the next layer is observed; at each cut, the units
    with the smallest contributions are removed, and training continues with narrower layers.

    Args:
        pruning_ratio: Share of the units to remove, in [0, 1): of every group, or of all with ``scope="global"``. Or a
            share per layer, ``{"layers.1": 0.5, "encoder.*": 0.2}``.
        budget: What remains, instead of a ratio: ``{"params": 0.6}``, ``{"macs": 0.5}``, ``{"units": 40}`` (a float is
            a share of the dense network in (0, 1], an int a count; a bare number counts parameters).
        criterion: Weights of the contributions and interval of observed batches; `Contribution()` by default.
        schedule: When cuts are made; by default five, the first after 10 % and the last after 60 % of the run.
        scope: ``"local"`` (each layer loses the same share), ``"global"``, or a `Scope` with limits of the widths.
        layers: Layers to prune: names, globs, or names of parent modules; all by default.
        ignore: Layers not to prune.
        reset_monitors: Reset ``ModelCheckpoint`` and ``EarlyStopping`` after each cut, so that "best" means best at the
            final size, and delay early stopping until the last cut.
        dirpath: Folder for the report; by default the logger's folder.
        extensions: Repairs and cut extensions, such as `Ridge`, `Rollback`, `SaveEachSize`; see `StructuredPruning`.
        latency_table: File of a script of `latency_script`, for a budget of latency on another device.

    Example:
        >>> from lightning_prune import ContributionPruning
        >>> callback = ContributionPruning(pruning_ratio=0.5)
    """

    default_criterion = Contribution
