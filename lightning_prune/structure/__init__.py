"""Structure of a network: groups of coupled units, axes that cannot shrink, and costs."""

from lightning_prune.structure.cost import Axis, CostModel, LatencyTable, Term
from lightning_prune.structure.discovery import Tracing, trace, verify_shapes
from lightning_prune.structure.graph import Axes, Frozen, Group, Member, Role, Structure
from lightning_prune.structure.layers import refresh, relax_unflatten
from lightning_prune.structure.size import Size
from lightning_prune.structure.traced_model import StructureError, TracedModel
from lightning_prune.structure.tracing import Call

__all__ = [
    "Axes",
    "Axis",
    "Call",
    "CostModel",
    "Frozen",
    "Group",
    "LatencyTable",
    "Member",
    "Role",
    "Size",
    "Structure",
    "StructureError",
    "Term",
    "TracedModel",
    "Tracing",
    "refresh",
    "relax_unflatten",
    "trace",
    "verify_shapes",
]
