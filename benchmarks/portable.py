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

ROWS, VERSIONS = EVIDENCE / "portable" / "rows.jsonl", EVIDENCE / "portable" / "versions.jsonl"

#: Seconds that a network may take, and parameters of the networks of one process: to start it takes longer than to
#: prune a small one.
_SECONDS, _PARAMETERS = 3600, 150_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks, or families (default: all)")
    parser.add_argument("--python", help="the interpreter that loads, of another version of PyTorch")
    add_resume(parser)
    given = parser.parse_args()
    rows_file = ROWS if given.python is None else VERSIONS
    other = {} if given.python is None else {"loaded_by": version_of(given.python)}
    jobs = [
        {"network": name, "family": family, **other}
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
            stored = {row["network"] for row in rows_in(rows_file, **other)} if rows_file.is_file() else set()
            following = [later for later in jobs[jobs.index(job) :] if later["network"] not in stored]
            together = accumulate(sizes.get(later["network"], 0) for later in following)
            count = max(1, sum(total <= _PARAMETERS for total in together))
            found.update(round_trips(following[:count], given.python))
        return found.get(name) or round_trips([job], given.python, alone=True)[name]

    try:
        for _ in computed(jobs, run, rows_file, resume=given.resume):
            pass
    finally:  # a stopped run has a table, too
        rows, others = (rows_in(file) if file.is_file() else [] for file in (ROWS, VERSIONS))
        tables = table(rows, sum(map(len, catalogue().values())))
        publish("portable", {"networks": len(rows)}, f"{tables}\n\n{table_of_versions(others)}" if others else tables)


def version_of(python: str) -> str:
    """PyTorch's version in an interpreter."""
    command = [python, "-c", "import torch; print(torch.__version__)"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def round_trips(
    jobs: Sequence[Mapping[str, str]], python: str | None = None, *, alone: bool = False
) -> dict[str, dict[str, Any]]:
    """Rows by network, pruned in a process and loaded in another.

    Args:
        jobs: Networks and families.
        python: The interpreter that loads, if it is another.
        alone: There is one, which has failed if its process ends. Else those of such a process have no row.
    """
    rows: dict[str, dict[str, Any]] = {job["network"]: {} for job in jobs}
    with tempfile.TemporaryDirectory() as folder:
        for step in ("prune", "load"):
            left = [job for job in jobs if "failure" not in rows.get(job["network"], {"failure": ""})]
            done, why = process(step, folder, left, python if python and step == "load" else sys.executable)
            for name in (job["network"] for job in left):
                if name in done:
                    rows[name] |= done[name]
                elif alone:
                    rows[name] = {"failure": f"{step}: {why}"}
                else:
                    del rows[name]
    return rows


def process(
    step: str, folder: str, jobs: Sequence[Mapping[str, str]], python: str
) -> tuple[dict[str, dict[str, Any]], str]:
    """What a process prints, by network, and how it ended."""
    words = [f"{job['network']}={job['family']}" for job in jobs]
    command = [python, "-m", "benchmarks.portable_process", step, folder, *words]
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
        "| family | networks | equal bit for bit | rebuilt | parameters left | history in the file | most | load |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        members = [row for row in rows if row["family"] == family]
        done = [row for row in members if "failure" not in row]
        if not done:
            lines.append(f"| {family} | {len(members)} | 0 | | | | | |")
            continue
        beside = [row["beside"] / 1024 for row in done]
        rebuilt = [row["rebuilt"] for row in done if row.get("rebuilt") is not None]
        lines.append(
            f"| {family} | {len(members)} | {sum(row['equal'] and not row['dense_equal'] for row in done)} "
            f"| {sum(rebuilt)} of {len(rebuilt)} | {median(row['left'] for row in done):.2f} "
            f"| {median(beside):.0f} KiB | {max(beside):.0f} KiB "
            f"| {median(row['load_s'] for row in done):.2f} s |"
        )
    failed = [
        row for row in rows if "failure" in row or not row["equal"] or row["dense_equal"] or row.get("rebuilt") is False
    ]
    lines += ["", *(f"- {row['network']}: {row.get('failure', 'outputs differ')}" for row in failed)]
    return "\n".join(lines).rstrip()


def table_of_versions(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per version of PyTorch that loads."""
    lines = [
        "The same kind of file, loaded by other versions of PyTorch:",
        "",
        "| PyTorch | networks | weights equal bit for bit | outputs equal bit for bit | largest relative difference |",
        "|---|---:|---:|---:|---:|",
    ]
    for version in dict.fromkeys(row["loaded_by"] for row in rows):
        members = [row for row in rows if row["loaded_by"] == version]
        done = [row for row in members if "failure" not in row]
        worst = max((row["difference"] for row in done), default=float("nan"))
        lines.append(
            f"| {version} | {len(members)} | {sum(row['weights_equal'] for row in done)} "
            f"| {sum(row['equal'] for row in done)} | {worst:.1e} |"
        )
    failed = [row for row in rows if "failure" in row or not row["weights_equal"]]
    lines += ["", *(f"- {row['network']}, {row['loaded_by']}: {row.get('failure', 'differs')}" for row in failed)]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    main()
