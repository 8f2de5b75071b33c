"""Repairs, which change the remaining layers after a cut."""

from lightning_prune.surgery.repairs.batch_norms import ReestimateBatchNorm
from lightning_prune.surgery.repairs.fold import Fold
from lightning_prune.surgery.repairs.layer_norms import RefitLayerNorm
from lightning_prune.surgery.repairs.repair import Repair, install, repaired, require_one_restart
from lightning_prune.surgery.repairs.restart import Reinitialise, StoredWeights
from lightning_prune.surgery.repairs.ridge import FoldMean, Ridge
from lightning_prune.surgery.repairs.sequential_ridge import SequentialRidge

__all__ = [
    "Fold",
    "FoldMean",
    "ReestimateBatchNorm",
    "RefitLayerNorm",
    "Reinitialise",
    "Repair",
    "Ridge",
    "SequentialRidge",
    "StoredWeights",
    "install",
    "repaired",
    "require_one_restart",
]
