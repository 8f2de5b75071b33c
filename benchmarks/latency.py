"""Latency by the table beside latency as measured, of ResNet-18 before and after cuts.

The table is made from the dense network alone. Each cut network is then really timed, at batch 1.
"""

from __future__ import annotations

import argparse
import json
from statistics import fmean

import torch
from torchvision.models import resnet18

from benchmarks.common import EVIDENCE, command, fill, machine
from lightning_prune import Random, prune
from lightning_prune.reporting.measure import latency
from lightning_prune.structure import Subject, trace
from lightning_prune.structure.latency import measure_latency, with_latency

HERE = EVIDENCE / "latency"
CUTS = (
    {"pruning_ratio": 0.25},
    {"pruning_ratio": 0.5},
    {"pruning_ratio": 0.75},
    {"budget": {"params": 0.3}, "scope": "global"},
    {"budget": {"macs": 0.3}, "scope": "global"},
    {"budget": {"latency": 0.7}},
    {"budget": {"latency": 0.5}},
    {"budget": {"latency": 0.3}, "scope": "global"},
)


def main() -> None:
    """Measure, write results.json and the tables of README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend on each measured latency")
    given = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(1, 3, given.size, given.size)
    torch.manual_seed(0)
    model = resnet18().eval()
    subject = Subject.of(model, x)
    table = measure_latency(subject, trace(subject))
    rows = [_row("dense", model, subject, table, given.seconds)]
    for cut in CUTS:
        torch.manual_seed(0)
        model = resnet18().eval()
        prune(model, x, criterion=Random(), **cut)  # type: ignore[arg-type]
        rows.append(_row(json.dumps(cut), model, Subject.of(model, x), table, given.seconds))
    error = fmean(abs(row["reckoned"] / row["measured"] - 1) for row in rows[1:])
    shares = fmean(
        abs(row["reckoned"] / rows[0]["reckoned"] - row["measured"] / rows[0]["measured"]) for row in rows[1:]
    )
    results = {
        "command": command("benchmarks.latency"),
        "machine": machine(),
        "rows": rows,
        "mean relative error": error,
        "mean error of the share that remains": shares,
    }
    HERE.mkdir(parents=True, exist_ok=True)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    fill(HERE / "README.md", _table(results))


def _row(name: str, model: torch.nn.Module, subject: Subject, table: object, seconds: float) -> dict[str, object]:
    structure = with_latency(trace(subject), table)  # type: ignore[arg-type]
    cost, widths = structure.cost, structure.widths
    measured = latency(model, subject.calls[0], batch_sizes=(1,), seconds=seconds)[1]
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
