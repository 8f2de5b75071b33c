"""Table of all criteria for `docs/criteria.md`."""

from __future__ import annotations

import inspect
import re

from lightning_prune.scoring import criteria
from lightning_prune.scoring.criterion import Criterion
from lightning_prune.structure.cost import CostModel
from lightning_prune.structure.graph import Structure

__all__ = ["criteria_table"]


def criteria_table() -> str:
    """Markdown table of all criteria: name, meaning with reference, and what they observe."""
    nothing = Structure((), (), CostModel((), (), {}))
    rows = ["| Criterion | Meaning | Observes |", "|---|---|---|"]
    for name in sorted(criteria.__all__, key=str.lower):
        criterion: Criterion = getattr(criteria, name)()
        statistic = criterion.statistic(nothing)
        meaning = (inspect.getdoc(criterion) or "").partition("\n\n")[0].replace("\n", " ")
        meaning = re.sub(r":math:`([^`]*)`", r"$\1$", meaning).replace("|", r"\vert{}")  # a bar would end the cell
        rows.append(f"| `{name}` | {meaning} | {'–' if statistic is None else statistic.evidence} |")
    return "\n".join(rows) + "\n"
