"""Removing what a plan removes: from the network, its optimizers and its checkpoints, whole or not at all."""

from lightning_prune.surgery.history import (
    Drop,
    History,
    HistoryError,
    Keep,
    attach,
    begun,
    conform,
    edits_of,
    history_of,
    latency_table,
    load_from,
    original_of,
    replay,
    save_into,
)
from lightning_prune.surgery.optimizers import OptimizerRefusedError, refuse
from lightning_prune.surgery.penalties import GroupLasso, GrowingL2, HalfSpace, Penalty, ScaleL1
from lightning_prune.surgery.repair import (
    FoldMean,
    ReestimateBatchNorm,
    Repair,
    Ridge,
    install,
    install_and_check,
    repaired,
)
from lightning_prune.surgery.restart import Reinitialise, Rewind
from lightning_prune.surgery.shrink import Change, CutError, check, cut, cut_and_check, forget, mask
from lightning_prune.surgery.tensors import take

__all__ = [
    "Change",
    "CutError",
    "Drop",
    "FoldMean",
    "GroupLasso",
    "GrowingL2",
    "HalfSpace",
    "History",
    "HistoryError",
    "Keep",
    "OptimizerRefusedError",
    "Penalty",
    "ReestimateBatchNorm",
    "Reinitialise",
    "Repair",
    "Rewind",
    "Ridge",
    "ScaleL1",
    "attach",
    "begun",
    "check",
    "conform",
    "cut",
    "cut_and_check",
    "edits_of",
    "forget",
    "history_of",
    "install",
    "install_and_check",
    "latency_table",
    "load_from",
    "mask",
    "original_of",
    "refuse",
    "repaired",
    "replay",
    "save_into",
    "take",
]
