"""A running study that is killed at random moments: ``python -m benchmarks.study_kills``.

Small runs on the digits with two workers. SIGKILL is sent to the launcher, to a worker, or to all processes, at a
random moment after work has begun; then the same command is run again. At the end, the table must equal that of an
undisturbed study, and no finished cell may have been changed. Kills are recorded in the working folder, so that the
benchmark continues when it is run again. If it is interrupted, it stops the study as well.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import EVIDENCE as HOME
from benchmarks.common import command, fill, machine

DEFINITION = """
recipe:
  model:
    class_path: CNNClassifier
    init_args: {input_shape: [1, 8, 8], channels: [8, 16], hidden: [16, 16], momentum: 0.9}
  data:
    class_path: Digits
    init_args: {batch_size: 32, val_share: 0.2, split_seed: 0}
  trainer: {max_epochs: 4}
grid:
  model.weight_decay: {prior: 1.0e-3, step: 0.5, points: 3}
  model.lr: {prior: 0.02, step: 0.5, points: 3}
most: 3
variants:
  - {remaining: 0.6, scope: [uniform, non-uniform]}
  - {remaining: 0.6, pipeline: training, method: {class_path: lightning_prune.StructuredPruning,
     init_args: {schedule: {class_path: lightning_prune.OneShot, init_args: {at: 2}}}}}
seeds: [0, 1]
seed_keys: [data.seed]
"""

#: Longest wait before a kill once a process works, seconds.
LONGEST = 8.0


@contextlib.contextmanager
def started(work: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """The study's command in a session of its own, which does not outlive the block."""
    code = "import sys; from lightning_prune.cli import main; main(sys.argv[1:])"
    words = ["study", "run", str(work / "study.yaml"), "--folder", str(work / name), "--workers", "2"]
    log = (work / f"{name}.log").open("ab")
    launcher = subprocess.Popen([sys.executable, "-c", code, *words], stdout=log, stderr=log, start_new_session=True)
    try:
        yield launcher
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def ended(work: Path, name: str) -> int:
    """The exit status of the study's command, run to its end."""
    with started(work, name) as launcher:
        return launcher.wait()


def finished(folder: Path) -> dict[str, int]:
    """When each finished cell was written, by its key."""
    return {file.parent.name: file.stat().st_mtime_ns for file in folder.glob("cells/*/result.json")}


def table(folder: Path) -> list[dict[str, str]]:
    """The table without what differs from one run to the next."""
    with (folder / "table.csv").open() as stream:
        return [{key: cell for key, cell in row.items() if key != "seconds"} for row in csv.DictReader(stream)]


def workers(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Its worker processes that have begun to train."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def disturb(work: Path, kills: list[dict[str, Any]], wanted: int, draw: random.Random) -> None:
    """Kill until there were enough kills, then let the study end."""
    folder = work / "disturbed"
    while len(kills) < wanted:
        with started(work, "disturbed") as launcher:
            for _ in range(2):  # three deaths of the same cell's worker in one life would give that cell up
                if not strike(launcher, folder, kills, draw):
                    break
                (work / "kills.json").write_text(json.dumps(kills))
                print(len(kills), kills[-1]["what"], len(finished(folder)), "cells", flush=True)
                if kills[-1]["what"] != "a worker" or len(kills) == wanted:
                    break
        if launcher.returncode == 0 and len(kills) < wanted:
            raise SystemExit(f"the study ended after {len(kills)} kills: make it larger")
    if ended(work, "disturbed"):
        raise SystemExit(f"the study failed, see {work / 'disturbed.log'}")


def strike(launcher: subprocess.Popen[bytes], folder: Path, kills: list[dict[str, Any]], draw: random.Random) -> bool:
    """One kill; False if the study ended before it."""
    began = len(list(folder.glob("running/*/fit/*"))), len(finished(folder))
    while launcher.poll() is None and began == (len(list(folder.glob("running/*/fit/*"))), len(finished(folder))):
        time.sleep(0.05)
    time.sleep(draw.uniform(0, LONGEST))
    if launcher.poll() is not None:
        return False
    what = draw.choice(["the launcher", "a worker", "all processes"])
    found = workers(launcher)
    if what == "a worker" and found:
        os.kill(draw.choice(found).pid, signal.SIGKILL)
    elif what == "all processes":
        os.killpg(launcher.pid, signal.SIGKILL)
    else:
        what = "the launcher"
        launcher.kill()
    running = [place.name for place in folder.glob("running/*")]
    kills.append({"what": what, "finished": finished(folder), "running": len(running)})
    return True


def verdict(work: Path, kills: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Whether the two studies came to the same, as a table and as facts."""
    undisturbed, disturbed = work / "undisturbed", work / "disturbed"
    now = finished(disturbed)
    touched = {key for kill in kills for key, when in kill["finished"].items() if now.get(key) != when}
    same = table(undisturbed) == table(disturbed)
    cells = finished(undisturbed).keys() == now.keys()
    kinds = Counter(kill["what"] for kill in kills)
    rows = [
        ("kills", f"{len(kills)} ({', '.join(f'{kind}: {count}' for kind, count in sorted(kinds.items()))})"),
        ("runs in the table", str(len(table(disturbed)))),
        ("table equal to the undisturbed one, but for seconds", "yes" if same else "NO"),
        ("the same cells, preparations included", f"yes, {len(now)}" if cells else "NO"),
        ("finished cells that were run again", str(len(touched))),
        ("failed or damaged", str(sum(len(list(disturbed.glob(f"{kind}/*"))) for kind in ("failed", "damaged")))),
    ]
    text = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    facts = {"kills": len(kills), "kinds": dict(kinds), "equal": same, "cells": len(now), "touched": len(touched)}
    if not (same and cells) or touched:
        raise SystemExit(text)
    return text, facts


def main() -> None:
    """Kill, compare, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, help="working folder; a stopped benchmark continues from it"
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    work: Path = given.work
    work.mkdir(parents=True, exist_ok=True)
    (work / "study.yaml").write_text(DEFINITION)
    kills = json.loads((work / "kills.json").read_text()) if (work / "kills.json").is_file() else []
    disturb(work, kills, given.kills, random.Random(given.seed + len(kills)))
    if not (work / "undisturbed" / "table.csv").is_file() and ended(work, "undisturbed"):
        raise SystemExit(f"the undisturbed study failed, see {work / 'undisturbed.log'}")
    text, facts = verdict(work, kills)
    facts |= {"command": command("benchmarks.study_kills"), "seed": given.seed, "machine": machine()}
    home = HOME / "study_kills"
    home.mkdir(parents=True, exist_ok=True)
    (home / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    fill(
        home / "README.md",
        f"{text}\n\n`{facts['command']}` on {facts['machine']['processor']}; {facts['machine']['versions']}",
    )
    print(text)


if __name__ == "__main__":
    main()
