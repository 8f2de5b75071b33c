"""What can be removed together, what must stay and why, and what it all costs."""

from lightning_prune.structure.cost import Axis, CostModel, LatencyTable, Term
from lightning_prune.structure.discovery import Tracing, trace, verify_shapes
from lightning_prune.structure.graph import Axes, Frozen, Group, Member, Role, Structure
from lightning_prune.structure.layers import loosen, refresh
from lightning_prune.structure.subject import StructureError, Subject
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
    "Structure",
    "StructureError",
    "Subject",
    "Term",
    "Tracing",
    "loosen",
    "refresh",
    "trace",
    "verify_shapes",
]
