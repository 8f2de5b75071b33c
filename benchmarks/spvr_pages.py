"""Tables of `benchmarks.spvr`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import spvr_segnet
from benchmarks.common import shown

__all__ = ["tables"]

Row = dict[str, Any]


def tables(found: dict[str, list[Row]]) -> str:
    """All that there are rows for."""
    makers: dict[str, Callable[[list[Row]], list[str]]] = {
        "macs": _macs,
        "seconds": _seconds,
        "race": _races,
        "tau": _tau,
        "budgets": _budgets,
        "latency": _latency,
        "segnet": spvr_segnet.table,
    }
    return "\n\n".join("\n".join(make(found[part])) for part, make in makers.items() if found.get(part))


def _sorted(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["network"] != "VGG16-BN", row["d"]))


def _macs(rows: list[Row]) -> list[str]:
    """Full ranks, counted."""
    lines = [
        "## Multiply-accumulates of a full ranking",
        "",
        "| network | d | groups | fewer MACs | without the first pass of both | ranks equal | largest difference |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    line = "| {network} | {d} | {groups} | {ratio:.2f}× | {without_first_pass:.2f}× | {equal} | {difference:.1e} |"
    return lines + [line.format(**row, equal="yes" if row["ranks_equal"] else "no") for row in _sorted(rows)]


def _seconds(rows: list[Row]) -> list[str]:
    """Both rivals."""
    lines = [
        "## Processor seconds of a full ranking, 50 images, one thread, float32",
        "",
        "| network | d | groups | here | a full forward each | batch-expanded, 64 · 256 rows | better one |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in _sorted(rows):
        few, many = row["expanded"]["64"], row["expanded"]["256"]
        lines.append(
            f"| {row['network']} | {row['d']} | {row['groups']} | {row['ours']:.1f} | {row['full']:.0f} "
            f"({row['full'] / row['ours']:.1f}×) | {few:.0f} · {many:.0f} | {min(few, many) / row['ours']:.1f}× |"
        )
    return lines


def _races(rows: list[Row]) -> list[str]:
    """Exact and statistical."""
    rows = [row for row in rows if row["samples"] > 1]
    lines = [
        "## Races, ResNet-56, d = 8, 200 images",
        "",
        "| race | parameters kept | groups that decide | fewer MACs (full ranking) | processor seconds (full ranking) "
        "| decided otherwise |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    line = (
        "| {race} | {kept:.0%} | {decisive:.0%} | {ratio:.2f}× ({full:.2f}×) | {processor:.0f} ({processor_full:.0f}) "
        "| {otherwise:.1%} |"
    )
    return lines + [line.format(**row) for row in sorted(rows, key=lambda row: (row["race"], -row["kept"]))]


def _tau(rows: list[Row]) -> list[str]:
    """Both truths after every number of epochs, over the seeds for which all four are defined."""
    lines = [
        f"## Kendall's τ-b, mean and 95 % interval of {len(rows)} seeds",
        "",
        "| epochs | truth | SPvR | KL | SPvR − KL | undefined seeds |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for epochs in ("2", "3", "5", "10"):
        for truth in ("count", "held-out loss"):
            pairs = [(row[epochs][truth]["SPvR"], row[epochs][truth]["KL"]) for row in rows]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            one, other = ([pair[i] for pair in known] for i in (0, 1))
            gap = shown([a - b for a, b in known], 2, "+")
            lines.append(f"| {epochs} | {truth} | {shown(one)} | {shown(other)} | {gap} | {len(pairs) - len(known)} |")
    return lines


def _budgets(rows: list[Row]) -> list[str]:
    """What is left."""
    lines = [
        "## Budgets",
        "",
        "| network | budget | parameters | of the budget | before the last group | convolutions | what is left "
        "| MB on disk |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        limit, before = row.get("limit", row["params"]), row.get("before_last", row["params"])
        lines.append(
            f"| {row['network']} | {row['budget']:.0%} | {row['params']:,} | {row['params'] / limit:.2%} "
            f"| {before / limit:.2%} | {row['layers']} | {row['form']} | {row['bytes'] / 1e6:.2f} |"
        )
    return lines


def _latency(rows: list[Row]) -> list[str]:
    """Median and quartiles, on the clock and of the processor."""
    lines = [
        "## Latency with one image, milliseconds: median (quartiles) of 1500 runs, one thread",
        "",
        "| network | parameters left | parameters | processor time | on the clock | MB on disk |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        for case, found in row["cases"].items():
            processor, clock = ("{1:.2f} ({0:.2f} to {2:.2f})".format(*found[k]) for k in ("processor", "milliseconds"))
            lines.append(
                f"| {row['network']} | {case} | {found['params']:,} | {processor} | {clock} "
                f"| {found['bytes'] / 1e6:.2f} |"
            )
    return lines
