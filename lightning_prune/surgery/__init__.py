"""Applying plans to networks, optimizers and checkpoints, atomically."""

from lightning_prune.surgery.change import Change, CutError
from lightning_prune.surgery.dead import dead_units, without_dead
from lightning_prune.surgery.edits import Drop, Edit, Keep, Replace, transform_stored
from lightning_prune.surgery.fake_quantisation import FakeQuantisation
from lightning_prune.surgery.history import (
    History,
    HistoryError,
    attach,
    edits_of,
    history_of,
    history_or_new,
    original_of,
    save_into,
    table_of,
)
from lightning_prune.surgery.masks import (
    Masks,
    apply_masks,
    attach_masks,
    maskable,
    masks_of,
    revived,
    save_masks_into,
    zero_gradients,
    zero_moments,
)
from lightning_prune.surgery.optimizers import OptimizerRefusedError, refuse
from lightning_prune.surgery.penalties import GroupLasso, GrowingL2, HalfSpace, Penalty, ScaleL1, shrink_units
from lightning_prune.surgery.plan_losses import losses_of_plans
from lightning_prune.surgery.repairs import (
    Fold,
    FoldMean,
    ReestimateBatchNorm,
    RefitLayerNorm,
    Reinitialise,
    Repair,
    Ridge,
    SequentialRidge,
    StoredWeights,
    install,
    repaired,
    require_one_restart,
)
from lightning_prune.surgery.restore import load_from, load_weights, match_checkpoint_shapes, replay, with_history
from lightning_prune.surgery.shrink import cut, forget, mask
from lightning_prune.surgery.specs import LayerSpec, spec_of
from lightning_prune.surgery.tensors import take
from lightning_prune.surgery.transaction import Transaction, transaction
from lightning_prune.surgery.verify import check

__all__ = [
    "Change",
    "CutError",
    "Drop",
    "Edit",
    "FakeQuantisation",
    "Fold",
    "FoldMean",
    "GroupLasso",
    "GrowingL2",
    "HalfSpace",
    "History",
    "HistoryError",
    "Keep",
    "LayerSpec",
    "Masks",
    "OptimizerRefusedError",
    "Penalty",
    "ReestimateBatchNorm",
    "RefitLayerNorm",
    "Reinitialise",
    "Repair",
    "Replace",
    "Ridge",
    "ScaleL1",
    "SequentialRidge",
    "StoredWeights",
    "Transaction",
    "apply_masks",
    "attach",
    "attach_masks",
    "check",
    "cut",
    "dead_units",
    "edits_of",
    "forget",
    "history_of",
    "history_or_new",
    "install",
    "load_from",
    "load_weights",
    "losses_of_plans",
    "mask",
    "maskable",
    "masks_of",
    "match_checkpoint_shapes",
    "original_of",
    "refuse",
    "repaired",
    "replay",
    "require_one_restart",
    "revived",
    "save_into",
    "save_masks_into",
    "shrink_units",
    "spec_of",
    "table_of",
    "take",
    "transaction",
    "transform_stored",
    "with_history",
    "without_dead",
    "zero_gradients",
    "zero_moments",
]
