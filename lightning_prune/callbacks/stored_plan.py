"""Plans in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_prune.planning import Plan
from lightning_prune.reporting import require

__all__ = ["stored_plan"]


def stored_plan(plain: Mapping[str, Any]) -> Plan:
    """Read a plan of a checkpoint.

    Raises:
        TypeError: If a value is of another type.
        ValueError: If units and widths do not match.
    """
    require(plain["kept"], dict[str, list[int]], "units that a plan keeps")
    require(plain["before"], dict[str, int], "widths before a plan")
    return Plan.from_plain(plain)
