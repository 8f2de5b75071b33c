"""Lightning callbacks, one per method, and functions for inspecting, pruning and loading networks."""

from lightning_prune.callbacks.checkpoints import load_from_checkpoint
from lightning_prune.callbacks.contribution import ContributionPruning
from lightning_prune.callbacks.extensions import CutExtension, ReestimateIfBetter, Rewind, Rollback, SaveEachSize
from lightning_prune.callbacks.functional import prune
from lightning_prune.callbacks.hybrid import HybridPruning
from lightning_prune.callbacks.magnitude import MagnitudePruning
from lightning_prune.callbacks.network_pruning import Decision, NetworkPruning
from lightning_prune.callbacks.scan import sensitivity
from lightning_prune.callbacks.slimming import NetworkSlimming
from lightning_prune.callbacks.spvr import SPvRPruning
from lightning_prune.callbacks.structured import StructuredPruning
from lightning_prune.callbacks.traced_models import inspect
from lightning_prune.callbacks.unfreezing import GradualUnfreezing
from lightning_prune.callbacks.xgb import XGBPruning

__all__ = [
    "ContributionPruning",
    "CutExtension",
    "Decision",
    "GradualUnfreezing",
    "HybridPruning",
    "MagnitudePruning",
    "NetworkPruning",
    "NetworkSlimming",
    "ReestimateIfBetter",
    "Rewind",
    "Rollback",
    "SPvRPruning",
    "SaveEachSize",
    "StructuredPruning",
    "XGBPruning",
    "inspect",
    "load_from_checkpoint",
    "prune",
    "sensitivity",
]
