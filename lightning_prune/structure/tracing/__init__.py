"""Tracing a network on fake tensors, following every index of every axis."""

from lightning_prune.structure.tracing.calls import Call, forked_rng, output_tensors
from lightning_prune.structure.tracing.labels import (
    WILD,
    AxisLabel,
    Blocks,
    Decision,
    Kind,
    MacsRecord,
    Picked,
    SplitKey,
    Value,
)
from lightning_prune.structure.tracing.network_copy import FakeCopy
from lightning_prune.structure.tracing.operators import flat_tensors, memory_of
from lightning_prune.structure.tracing.real_runs import STATISTICS, DiscreteResults
from lightning_prune.structure.tracing.recurrent import is_recurrent
from lightning_prune.structure.tracing.tracer import MEETS_FIXED, Tracer

__all__ = [
    "MEETS_FIXED",
    "STATISTICS",
    "WILD",
    "AxisLabel",
    "Blocks",
    "Call",
    "Decision",
    "DiscreteResults",
    "FakeCopy",
    "Kind",
    "MacsRecord",
    "Picked",
    "SplitKey",
    "Tracer",
    "Value",
    "flat_tensors",
    "forked_rng",
    "is_recurrent",
    "memory_of",
    "output_tensors",
]
