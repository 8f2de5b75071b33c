"""Replaced modules in real networks: ``python -m benchmarks.replace``.

ResNet-18, VGG16-BN and EfficientNet-B0 of torchvision, in float64, with random weights. In a Lightning run, each is
truncated after a layer and gets a new head (VGG16-BN also once with a bypassed layer), and loses half of its units by
L1, after four steps of SGD with momentum; ten steps follow. The result is compared with a network written by hand (its
outputs, and ten steps made by hand), with resumed runs, and with the network loaded without a callback; also with two
processes (gloo). Needs torchvision; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import here, publish, quiet, rows_in
from tests.support.replacing import CASES, measure, measure_ranks


def run(case: str, processes: int) -> dict[str, Any]:
    """What one run of a case has shown."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(case, Path(folder)) if processes == 1 else measure_ranks(case, Path(folder), processes)
    return {"case": case, "processes": processes, **found, "at": here()}


def rows(file: Path | None) -> list[dict[str, Any]]:
    """The rows of all cases: from the lines of a file, or run and added to them."""
    done = rows_in(file) if file and file.is_file() else []
    found = []
    for case in CASES:
        for processes in (1, 2):
            row = next((row for row in done if (row["case"], row["processes"]) == (case, processes)), None)
            if row is None:
                row = json.loads(json.dumps(run(case, processes)))
                if file is not None:
                    with file.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(row) + "\n")
            print(row, flush=True)
            found.append(row)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """All that was measured, a line per run."""
    lines = [
        "| network | processes | parameters | by hand: outputs | by hand: ten steps | loaded | resumed | seconds |",
        "|---|---:|---|---:|---:|---:|---|---:|",
    ]
    for row in found:
        dense, replaced, cut = row["params"]
        resumed = "bit by bit" if all(row["resumed"].values()) else f"differs: {row['resumed']}"
        steps = f"{row['steps']:.1e}" if "steps" in row else "–"
        lines.append(
            f"| {row['case']} | {row['processes']} | {dense:,} → {replaced:,} → {cut:,} | {row['by_hand']:.1e} "
            f"| {steps} | {row['loaded']:.1e} | {resumed} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is not done yet, and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="file of finished runs, which is updated")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    quiet()
    found = rows(arguments.work)
    publish("replace", {"rows": found}, table(found))


if __name__ == "__main__":
    main()
