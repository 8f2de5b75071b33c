"""Lightning callbacks, one per method, and the loading of checkpoints."""

from lightning_prune.callbacks.extensions import (
    CutExtension,
    Distill,
    GrowPenalty,
    ReestimateIfBetter,
    Rewind,
    Rollback,
    SaveEachSize,
)
from lightning_prune.callbacks.lightning.checkpoints import load_from_checkpoint
from lightning_prune.callbacks.lightning.processes import broadcast_plan
from lightning_prune.callbacks.methods import (
    ContributionPruning,
    GradualUnfreezing,
    HybridPruning,
    MagnitudePruning,
    NetworkSlimming,
    SPvRPruning,
    StructuredPruning,
    XGBPruning,
)
from lightning_prune.callbacks.network_pruning import Decision, NetworkPruning
from lightning_prune.callbacks.quantisation_aware import QuantisationAware

__all__ = [
    "ContributionPruning",
    "CutExtension",
    "Decision",
    "Distill",
    "GradualUnfreezing",
    "GrowPenalty",
    "HybridPruning",
    "MagnitudePruning",
    "NetworkPruning",
    "NetworkSlimming",
    "QuantisationAware",
    "ReestimateIfBetter",
    "Rewind",
    "Rollback",
    "SPvRPruning",
    "SaveEachSize",
    "StructuredPruning",
    "XGBPruning",
    "broadcast_plan",
    "load_from_checkpoint",
]
