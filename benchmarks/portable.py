"""Round trip of the survey's networks: a third removed, saved, and loaded in a new process without Lightning."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from benchmarks.common import EVIDENCE, add_resume, computed, publish, rows_in
from benchmarks.survey_networks import catalogue

ROWS = EVIDENCE / "portable" / "rows.jsonl"

#: Seconds that a network may take, and parameters of the networks of one process: to start it takes longer than to
#: prune a small one.
_SECONDS, _PARAMETERS = 3600, 150_000_000


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
    found: dict[str, dict[str, Any]] = {}

    def run(job: dict[str, Any]) -> dict[str, Any]:
        """The row of a network, computed with those that follow."""
        name = job["network"]
        if name not in found:
            stored = {row["network"] for row in rows_in(ROWS)} if ROWS.is_file() else set()
            following = [other for other in jobs[jobs.index(job) :] if other["network"] not in stored]
            together = accumulate(sizes.get(other["network"], 0) for other in following)
            count = max(1, sum(total <= _PARAMETERS for total in together))
            found.update(round_trips(following[:count]))
        return found.get(name) or round_trips([job], alone=True)[name]

    try:
        for _ in computed(jobs, run, ROWS, resume=given.resume):
            pass
    finally:  # a stopped run has a table, too
        rows = rows_in(ROWS) if ROWS.is_file() else []
        publish("portable", {"networks": len(rows)}, table(rows, sum(map(len, catalogue().values()))))


def round_trips(jobs: Sequence[Mapping[str, str]], *, alone: bool = False) -> dict[str, dict[str, Any]]:
    """Rows by network, pruned in a process and loaded in another.

    Args:
        jobs: Networks and families.
        alone: There is one, which has failed if its process ends. Else those of such a process have no row.
    """
    rows: dict[str, dict[str, Any]] = {job["network"]: {} for job in jobs}
    with tempfile.TemporaryDirectory() as folder:
        for step in ("prune", "load"):
            left = [job for job in jobs if "failure" not in rows.get(job["network"], {"failure": ""})]
            done, why = process(step, folder, left)
            for name in (job["network"] for job in left):
                if name in done:
                    rows[name] |= done[name]
                elif alone:
                    rows[name] = {"failure": f"{step}: {why}"}
                else:
                    del rows[name]
    return rows


def process(step: str, folder: str, jobs: Sequence[Mapping[str, str]]) -> tuple[dict[str, dict[str, Any]], str]:
    """What a process prints, by network, and how it ended."""
    words = [f"{job['network']}={job['family']}" for job in jobs]
    command = [sys.executable, "-m", "benchmarks.portable_process", step, folder, *words]
    seconds = _SECONDS * len(jobs)
    try:
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds, check=False)
        text, why = ended.stdout, f"its process ended with code {ended.returncode}"
    except subprocess.TimeoutExpired as stopped:
        text, why = (stopped.stdout or b"").decode(), f"not done after {seconds} s"
    return {row.pop("network"): row for row in map(json.loads, text.splitlines())}, why


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
