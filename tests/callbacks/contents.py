"""All that a pruning run ends with, in a form to compare bit by bit."""

from __future__ import annotations

import copy
from typing import Any

import lightning_prune
from lightning_prune import StructuredPruning
from lightning_prune.surgery import history_of
from tests.callbacks.networks import equal, weights

TIMES = {"seconds", "latency", "latency_spread", "run", "overhead", "bytes"}


def pruning_callbacks() -> list[type[StructuredPruning]]:
    """Every one that cuts as often as its schedule says."""
    found = {thing for name in lightning_prune.__all__ if isinstance(thing := getattr(lightning_prune, name), type)}
    kinds = [kind for kind in found if issubclass(kind, StructuredPruning) and not kind.acts_once]
    return sorted(kinds, key=lambda kind: kind.__name__)


def untimed(value: Any) -> Any:
    """A report without what differs between two runs of the same thing."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key not in TIMES}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def content(run: Any, model: Any, pruner: StructuredPruning) -> dict[str, Any]:
    """All that a run ends with."""
    history = history_of(model)
    state = copy.deepcopy(pruner.state_dict())
    report, state["run"] = untimed(state.pop("report")), ""
    return {
        "weights": weights(model),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "history": history.to_plain() if history else None,
        "state": state,
        "report": report,
        "timeline": [(point.unit, point.at, point.share) for point in pruner._timeline],
        **{f"attribute {name}": value for name, value in attributes(pruner).items()},
    }


def attributes(pruner: StructuredPruning) -> dict[str, Any]:
    """Every attribute that a run changes, in a form to compare."""
    other = {
        "log",
        "log_dict",
        "run_id",
        "session",
        "_pace",
        "report",
        "_traced_model",
        *("_data_at_cut", "_data_of_draws", "_held_out"),  # read the run's own loader
        "_dense_network",  # is timed at the end
        "_manual_averages",  # looks at the network before its first cut
        "_trained",
        "_structure",
        "_observation",
        "_measured",
    }
    found = {name: value for name, value in vars(pruner).items() if name not in other}
    found["_measured"] = sorted(name for name in pruner._measured)
    found["_structure"] = pruner._structure.widths if pruner._structure else None
    found["_observation"] = pruner._observation.state(), pruner._observation.batches
    found["_extensions"] = pruner._extensions.state()
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of the parts that are not equal bit by bit."""
    return [part for part in expected if not equal(found[part], expected[part])]
