"""Structured pruning while Lightning trains: add one callback and the network becomes small.

The names below are imported when they are first used, so that the rooms that need no Lightning (structure, scoring,
planning, surgery, reporting) and the command line's quick answers do not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.callbacks import (
        ContributionPruning,
        GradualUnfreezing,
        HybridPruning,
        MagnitudePruning,
        NetworkSlimming,
        Rollback,
        StructuredPruning,
        inspect,
        load_from_checkpoint,
        prune,
        sensitivity,
    )
    from lightning_prune.planning import (
        NM,
        Channel,
        Cubic,
        Element,
        Explicit,
        Geometric,
        Kernel,
        LinearSchedule,
        OneShot,
        Scope,
    )
    from lightning_prune.scoring import (
        FPGM,
        L1,
        L2,
        LAMP,
        LRP,
        NISP,
        SNIP,
        APoZ,
        BNScale,
        Contribution,
        Fisher,
        GraSP,
        HRank,
        KLDivergence,
        Misclassification,
        Random,
        SPvR,
        SynFlow,
        Taylor,
    )
    from lightning_prune.surgery import (
        FoldMean,
        GroupLasso,
        GrowingL2,
        HalfSpace,
        ReestimateBatchNorm,
        Reinitialise,
        Rewind,
        Ridge,
        ScaleL1,
    )

__all__ = [
    "FPGM",
    "L1",
    "L2",
    "LAMP",
    "LRP",
    "NISP",
    "NM",
    "SNIP",
    "APoZ",
    "BNScale",
    "Channel",
    "Contribution",
    "ContributionPruning",
    "Cubic",
    "Element",
    "Explicit",
    "Fisher",
    "FoldMean",
    "Geometric",
    "GraSP",
    "GradualUnfreezing",
    "GroupLasso",
    "GrowingL2",
    "HRank",
    "HalfSpace",
    "HybridPruning",
    "KLDivergence",
    "Kernel",
    "LinearSchedule",
    "MagnitudePruning",
    "Misclassification",
    "NetworkSlimming",
    "OneShot",
    "Random",
    "ReestimateBatchNorm",
    "Reinitialise",
    "Rewind",
    "Ridge",
    "Rollback",
    "SPvR",
    "ScaleL1",
    "Scope",
    "StructuredPruning",
    "SynFlow",
    "Taylor",
    "__version__",
    "inspect",
    "load_from_checkpoint",
    "prune",
    "sensitivity",
]

__version__ = "0.1.0"

_ROOM_OF = {
    "APoZ": "scoring",
    "BNScale": "scoring",
    "Contribution": "scoring",
    "ContributionPruning": "callbacks",
    "Cubic": "planning",
    "Element": "planning",
    "Explicit": "planning",
    "FPGM": "scoring",
    "Fisher": "scoring",
    "FoldMean": "surgery",
    "Geometric": "planning",
    "GraSP": "scoring",
    "GradualUnfreezing": "callbacks",
    "GroupLasso": "surgery",
    "GrowingL2": "surgery",
    "Rollback": "callbacks",
    "HRank": "scoring",
    "HalfSpace": "surgery",
    "HybridPruning": "callbacks",
    "KLDivergence": "scoring",
    "Kernel": "planning",
    "L1": "scoring",
    "L2": "scoring",
    "LAMP": "scoring",
    "LRP": "scoring",
    "LinearSchedule": "planning",
    "MagnitudePruning": "callbacks",
    "Misclassification": "scoring",
    "NISP": "scoring",
    "NM": "planning",
    "NetworkSlimming": "callbacks",
    "OneShot": "planning",
    "Random": "scoring",
    "ReestimateBatchNorm": "surgery",
    "Reinitialise": "surgery",
    "Rewind": "surgery",
    "Ridge": "surgery",
    "SPvR": "scoring",
    "SNIP": "scoring",
    "ScaleL1": "surgery",
    "Scope": "planning",
    "StructuredPruning": "callbacks",
    "SynFlow": "scoring",
    "Taylor": "scoring",
    "Channel": "planning",
    "inspect": "callbacks",
    "load_from_checkpoint": "callbacks",
    "prune": "callbacks",
    "sensitivity": "callbacks",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
