"""Pruning runs that are killed at random moments and resumed: ``python -m benchmarks.faults``.

How they are killed, and what they are compared with, is in `tests/support/kills.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import EVIDENCE, command, fill, machine
from tests.support.kills import campaign


def tables(campaigns: dict[str, Any]) -> str:
    """A line for each number of processes, and what was going on when they were killed."""
    amid = {name: Counter(kill["amid"] for kill in found["kills"]) for name, found in campaigns.items()}
    kinds = sorted({kind for counts in amid.values() for kind in counts})
    lines = [
        "| processes | kills | amid " + " | amid ".join(kinds) + " | runs | cuts a run | otherwise than undisturbed |"
    ]
    lines.append("|---|---|" + "---|" * len(kinds) + "---|---|---|")
    for name, found in campaigns.items():
        counts = " | ".join(str(amid[name][kind]) for kind in kinds)
        lines.append(
            f"| {found['processes']} | {len(found['kills'])} | {counts} | {found['runs']} | {found['cuts']} | "
            f"{len(found['wrong'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Fifty kills of one process, ten of two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, nargs="+", default=[50, 10], help="for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    campaigns: dict[str, Any] = {}
    folder = EVIDENCE / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    for processes, kills in zip(given.processes, given.kills, strict=True):
        with tempfile.TemporaryDirectory() as home:
            campaigns[str(processes)] = campaign(Path(home), processes, kills, given.seed)
        here = machine()
        results = {"command": command("benchmarks.faults"), "machine": here, "campaigns": campaigns}
        (folder / "kills.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        on = f"{here['processor']}; {here['versions']}"
        fill(folder / "README.md", f"{tables(campaigns)}\n\nSeed {given.seed}. `{results['command']}` on {on}")
        print(tables(campaigns), flush=True)


if __name__ == "__main__":
    main()
