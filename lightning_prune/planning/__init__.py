"""Targets, schedules, scopes and plans: how much to remove, when and where."""

from lightning_prune.planning.amount import Amount, best_unit, dividing_threshold, plan_by_use, widths_at
from lightning_prune.planning.depth import Depth, best_depth, require_depth
from lightning_prune.planning.granularity import (
    NM,
    Channel,
    Element,
    Granularity,
    Kernel,
    Pool,
    Weight,
    choose_masks,
)
from lightning_prune.planning.plan import Limits, Plan, feasible, make_plan, notes_on_widths
from lightning_prune.planning.schedules import (
    AtStart,
    Cubic,
    CutPoint,
    Explicit,
    Geometric,
    LinearSchedule,
    OneShot,
    RunLength,
    Schedule,
    WhenStable,
    due,
    reaches,
)
from lightning_prune.planning.scope import Scope, ScopeKind, select
from lightning_prune.planning.target import NoEffectWarning, Quantity, Target

__all__ = [
    "NM",
    "Amount",
    "AtStart",
    "Channel",
    "Cubic",
    "CutPoint",
    "Depth",
    "Element",
    "Explicit",
    "Geometric",
    "Granularity",
    "Kernel",
    "Limits",
    "LinearSchedule",
    "NoEffectWarning",
    "OneShot",
    "Plan",
    "Pool",
    "Quantity",
    "RunLength",
    "Schedule",
    "Scope",
    "ScopeKind",
    "Target",
    "Weight",
    "WhenStable",
    "best_depth",
    "best_unit",
    "choose_masks",
    "dividing_threshold",
    "due",
    "feasible",
    "make_plan",
    "notes_on_widths",
    "plan_by_use",
    "reaches",
    "require_depth",
    "select",
    "widths_at",
]
