"""Round trip of the survey's networks: a third removed, saved, and loaded in a new process without Lightning."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.common import EVIDENCE, add_resume, computed, publish, rows_in
from benchmarks.survey_networks import catalogue

ROWS = EVIDENCE / "portable" / "rows.jsonl"

#: Seconds that a process may take.
_SECONDS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks, or families (default: all)")
    add_resume(parser)
    given = parser.parse_args()
    jobs = [
        {"network": name, "family": family}
        for family, members in catalogue().items()
        for name in members
        if not given.names or name in given.names or family in given.names
    ]
    sizes = {row["network"]: row.get("params", 0) for row in rows_in(EVIDENCE / "engine" / "survey.jsonl")}
    jobs.sort(key=lambda job: sizes.get(job["network"], 0))
    try:
        for _ in computed(jobs, lambda job: round_trip(**job), ROWS, resume=given.resume):
            pass
    finally:  # a stopped run has a table, too
        rows = rows_in(ROWS) if ROWS.is_file() else []
        publish("portable", {"networks": len(rows)}, table(rows, sum(map(len, catalogue().values()))))


def round_trip(network: str, family: str) -> dict[str, Any]:
    """One network: pruned in a process, loaded in another."""
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in ("prune", "load"):
            command = [sys.executable, "-m", "benchmarks.portable_process", step, network, family, folder]
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                return {"failure": f"{step}: not done after {_SECONDS} s"}
            if done.returncode:
                return {"failure": f"{step}: its process ended with code {done.returncode}"}
            row |= json.loads(done.stdout)
            if "failure" in row:
                break
    return row


def table(rows: Sequence[Mapping[str, Any]], networks: int) -> str:
    """A line per family, and those that fail."""
    lines = [
        f"{len(rows)} of {networks} networks; medians of each family.",
        "",
        "| family | networks | equal bit for bit | parameters left | history in the file | most | load |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        members = [row for row in rows if row["family"] == family]
        done = [row for row in members if "failure" not in row]
        if not done:
            lines.append(f"| {family} | {len(members)} | 0 | | | | |")
            continue
        beside = [row["beside"] / 1024 for row in done]
        lines.append(
            f"| {family} | {len(members)} | {sum(row['equal'] and not row['dense_equal'] for row in done)} "
            f"| {median(row['left'] for row in done):.2f} | {median(beside):.0f} KiB | {max(beside):.0f} KiB "
            f"| {median(row['load_s'] for row in done):.2f} s |"
        )
    failed = [row for row in rows if "failure" in row or not row["equal"] or row["dense_equal"]]
    lines += ["", *(f"- {row['network']}: {row.get('failure', 'outputs differ')}" for row in failed)]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    main()
