"""Rules that propagate the atoms of an ATen operator's inputs to its outputs, one per kind of operator."""

# Importing a file registers its rules.
from lightning_prune.structure.rules import contractions, elementwise, indexing, normalization, reductions, views
from lightning_prune.structure.rules.registry import RULES, rule, unknown

__all__ = [
    "RULES",
    "contractions",
    "elementwise",
    "indexing",
    "normalization",
    "reductions",
    "rule",
    "unknown",
    "views",
]
