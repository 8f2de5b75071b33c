"""The criteria at a glance, generated: `docs/criteria.md` holds this table, and a test that they agree."""

from __future__ import annotations

import inspect

from lightning_prune.scoring import criteria
from lightning_prune.scoring.criterion import Criterion
from lightning_prune.structure.cost import CostModel
from lightning_prune.structure.graph import Structure

__all__ = ["criteria_table"]


def criteria_table() -> str:
    """A Markdown table of all criteria: name, meaning with its source, and what it looks at."""
    nothing = Structure((), (), CostModel((), (), {}))
    rows = ["| Criterion | Meaning | Looks at |", "|---|---|---|"]
    for name in sorted(criteria.__all__, key=str.lower):
        criterion: Criterion = getattr(criteria, name)()
        statistic = criterion.statistic(nothing)
        meaning = (inspect.getdoc(criterion) or "").partition("\n\n")[0].replace("\n", " ")
        meaning = (
            meaning.replace("|", "\\|").replace(":math:`", "$").replace("`", "$") if ":math:" in meaning else meaning
        )
        rows.append(f"| `{name}` | {meaning} | {'weights' if statistic is None else statistic.evidence} |")
    return "\n".join(rows) + "\n"
