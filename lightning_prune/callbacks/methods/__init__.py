"""The pruning callbacks, one file a method."""

from lightning_prune.callbacks.methods.contribution import ContributionPruning
from lightning_prune.callbacks.methods.hybrid import HybridPruning
from lightning_prune.callbacks.methods.magnitude import MagnitudePruning
from lightning_prune.callbacks.methods.slimming import NetworkSlimming
from lightning_prune.callbacks.methods.spvr import SPvRPruning
from lightning_prune.callbacks.methods.structured import StructuredPruning
from lightning_prune.callbacks.methods.unfreezing import GradualUnfreezing
from lightning_prune.callbacks.methods.xgb import XGBPruning

__all__ = [
    "ContributionPruning",
    "GradualUnfreezing",
    "HybridPruning",
    "MagnitudePruning",
    "NetworkSlimming",
    "SPvRPruning",
    "StructuredPruning",
    "XGBPruning",
]
