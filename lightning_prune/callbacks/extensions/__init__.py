"""Extensions of a run's cuts: checkpoints, rollback, rewinding; repairs of weights are in ``surgery``."""

from lightning_prune.callbacks.extensions.applied import Extensions
from lightning_prune.callbacks.extensions.distill import Distill
from lightning_prune.callbacks.extensions.extension import CutExtension, RunContext
from lightning_prune.callbacks.extensions.grow_penalty import GrowPenalty
from lightning_prune.callbacks.extensions.reestimate_if_better import ReestimateIfBetter
from lightning_prune.callbacks.extensions.rewind import Rewind
from lightning_prune.callbacks.extensions.rollback import Rollback
from lightning_prune.callbacks.extensions.save_each_size import SaveEachSize

__all__ = [
    "CutExtension",
    "Distill",
    "Extensions",
    "GrowPenalty",
    "ReestimateIfBetter",
    "Rewind",
    "Rollback",
    "RunContext",
    "SaveEachSize",
]
