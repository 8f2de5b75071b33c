"""Runs that are killed at random moments and resumed: ``python -m benchmarks.faults``.

Pruning during training (``cuts``), scoring layers with boosted trees (``one_shot``, ``layer_wise``) and gradual
unfreezing (``unfreezing``), with one and with two processes. `tests/support/kills.py` kills them and compares them with
uninterrupted runs. With ``--resume``, stored results are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import EVIDENCE, add_resume, command, fill, here
from tests.support.kills import campaign
from tests.support.transfer_kills import counts, transfer

#: Kills in one process and in two, by what the run does.
KILLS = {"cuts": (50, 10), "one_shot": (20, 6), "layer_wise": (20, 6), "unfreezing": (20, 6)}


def tables(campaigns: dict[str, Any]) -> str:
    """A line for each kind of run and number of processes, and what was going on when they were killed."""
    lines = ["| run | processes | kills | killed during | runs | differing results | layers fitted again |"]
    lines.append("|---|---:|---:|---|---:|---:|---|")
    for name, found in campaigns.items():
        amid = Counter(kill["amid"] for kill in found["kills"])
        said = ", ".join(f"{kind} {times}" for kind, times in sorted(amid.items()))
        fits = found.get("counted")
        again = "–"
        if fits:
            again = f"{fits['fitted again']} ({fits['fits begun']} fits begun for {fits['layers']} layers)"
        lines.append(
            f"| {name.partition(' ')[0]} | {found['processes']} | {len(found['kills'])} | {said} | {found['runs']} | "
            f"{len(found['wrong'])} | {again} |"
        )
    return "\n".join(lines)


def main() -> None:
    """All campaigns, each stored when it is through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(KILLS), choices=list(KILLS))
    parser.add_argument("--kills", type=int, nargs=2, help="kills with one and with two processes")
    parser.add_argument("--seed", type=int, default=0)
    add_resume(parser)
    given = parser.parse_args()
    folder = EVIDENCE / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "kills.json"
    campaigns: dict[str, Any] = {}
    if given.resume and file.is_file():
        campaigns = json.loads(file.read_text(encoding="utf-8"))["campaigns"]
    for name in given.runs:
        for processes, kills in zip((1, 2), given.kills or KILLS[name], strict=True):
            key = f"{name} {processes}"
            if key in campaigns or not kills:
                continue
            with tempfile.TemporaryDirectory() as home:
                special: dict[str, Any] = {}
                if name != "cuts":
                    special = {"work": transfer, "args": [name], "count": counts}
                found = campaign(Path(home), processes, kills, given.seed, **special)
            campaigns[key] = {**found, "at": here()}
            results = {"command": command("benchmarks.faults"), "campaigns": campaigns}
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            on = f"{here()['processor']}; {here()['versions']}"
            fill(folder / "README.md", f"{tables(campaigns)}\n\nSeed {given.seed}. `{results['command']}` on {on}")
            print(tables(campaigns), flush=True)


if __name__ == "__main__":
    main()
