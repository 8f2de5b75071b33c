"""Latency estimated by the table compared with measured latency, for ResNet-18 before and after cuts.

The table is measured on the dense network only; each pruned network is then timed with batch size 1. Both are processor
time on one thread, which is less affected by other load than wall-clock time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from statistics import fmean, median
from time import process_time

import torch
from torchvision.models import resnet18

from benchmarks.common import publish, quiet
from lightning_prune import Random, Scope, prune
from lightning_prune.structure import TracedModel, trace
from lightning_prune.structure import latency as latency_module
from lightning_prune.structure.latency import measure_latency, with_latency

CUTS = (
    {"pruning_ratio": 0.25},
    {"pruning_ratio": 0.5},
    {"pruning_ratio": 0.75},
    {"budget": {"params": 0.3}, "scope": "global"},
    {"budget": {"macs": 0.3}, "scope": "global"},
    {"budget": {"latency": 0.7}},
    {"budget": {"latency": 0.5}},
    {"budget": {"latency": 0.3}, "scope": "global"},
    {"budget": {"latency": 0.7}, "round_to": 16},
    {"budget": {"latency": 0.5}, "round_to": 16},
    {"budget": {"latency": 0.3}, "scope": "global", "round_to": 16},
)


def main() -> None:
    """Measure, write results.json and the tables of README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--seconds", type=float, default=1.0, help="processor time to spend on each measured latency")
    given = parser.parse_args()
    quiet()
    latency_module.median_seconds = processor_seconds
    x = torch.randn(1, 3, given.size, given.size)
    torch.manual_seed(0)
    model = resnet18().eval()
    traced = TracedModel.of(model, x)
    table = measure_latency(traced, trace(traced))
    rows = [_row("dense", model, traced, table, given.seconds)]
    for cut in CUTS:
        torch.manual_seed(0)
        model = resnet18().eval()
        scope = Scope(cut.get("scope", "local"), round_to=cut.get("round_to", 1))  # type: ignore[arg-type]
        amount = {key: value for key, value in cut.items() if key in ("pruning_ratio", "budget")}
        prune(model, x, criterion=Random(), scope=scope, **amount)  # type: ignore[arg-type]
        rows.append(_row(json.dumps(cut), model, TracedModel.of(model, x), table, given.seconds))
    error = fmean(abs(row["reckoned"] / row["measured"] - 1) for row in rows[1:])
    shares = fmean(
        abs(row["reckoned"] / rows[0]["reckoned"] - row["measured"] / rows[0]["measured"]) for row in rows[1:]
    )
    results = {
        "rows": rows,
        "mean relative error": error,
        "mean error of the share that remains": shares,
    }
    publish("latency", results, _table(results))


def processor_seconds(run: Callable[[], object], seconds: float) -> float:
    """Median processor time of ``run()``, from about so many ``seconds`` and at least five runs."""
    run()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = process_time()
        run()
        times.append(process_time() - start)
    return median(times)


def _row(name: str, model: torch.nn.Module, traced: TracedModel, table: object, seconds: float) -> dict[str, object]:
    structure = with_latency(trace(traced), table)  # type: ignore[arg-type]
    cost, widths = structure.cost, structure.widths
    x = traced.calls[0].args[0]
    with torch.no_grad():
        measured = 1e3 * processor_seconds(lambda: model(x), seconds)
    return {
        "cut": name,
        "params": cost.params(widths),
        "macs": cost.macs(widths),
        "reckoned": cost.latency(widths),
        "measured": measured,
    }


def _table(results: dict[str, object]) -> str:
    rows = results["rows"]
    assert isinstance(rows, list)
    lines = [
        "| cut | MACs left | by the table, ms | measured, ms | error | share left, table | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = rows[0]
    for row in rows:
        reckoned, measured = row["reckoned"], row["measured"]
        lines.append(
            f"| `{row['cut']}` | {row['macs'] / dense['macs']:.2f} | {reckoned:.1f} | {measured:.1f} "
            f"| {100 * (reckoned / measured - 1):+.0f} % | {reckoned / dense['reckoned']:.2f} "
            f"| {measured / dense['measured']:.2f} |"
        )
    mean, share = results["mean relative error"], results["mean error of the share that remains"]
    lines += ["", f"Mean error of the cut networks: {100 * mean:.1f} %; of the share that remains: {share:.3f}."]  # type: ignore[operator]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
