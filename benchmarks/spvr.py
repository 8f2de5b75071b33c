"""SPvR as in the paper, and the cost of its ranking: ``python -m benchmarks.spvr --part macs --resume``.

Every part is a table of `docs/evidence/spvr`; its rows are stored in ``--work`` and kept with ``--resume``. ``--part
page`` writes the tables of the page. The environment variable LIGHTNING_PRUNE_DATA names the folder of CIFAR-10,
Fashion-MNIST and ``resnet_cifar10/resnet56-….th``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import spvr_pages, spvr_segnet
from benchmarks.common import EVIDENCE, add_resume, computed, publish, quiet, rows_in

Row = dict[str, Any]
Job = dict[str, Any]


def parts(work: Path) -> dict[str, tuple[list[Job], Callable[[Job], Row]]]:
    """Jobs of every part, the most valuable first, and how the rest of a row is computed."""
    from benchmarks import spvr_budgets, spvr_race, spvr_speed, spvr_tau  # each part imports what it needs

    networks, sizes = [*spvr_speed.NETWORKS], (8, 32, 2)
    races: list[Job] = [
        {"plan": "layers", "kept": share, "race": kind, "per_class": 20, "samples": 16}
        for kind in ("exact", "statistical")
        for share in spvr_race.SHARES
    ]
    budgets: list[Job] = [
        {"network": name, "budget": share} for name in spvr_budgets.NETWORKS for share in spvr_budgets.SHARES
    ]
    speed: list[Job] = [{"network": name, "d": d} for d in sizes for name in networks]
    return {
        "macs": (speed, lambda job: spvr_speed.macs(job["network"], job["d"], work)),
        "seconds": (speed, lambda job: spvr_speed.seconds(job["network"], job["d"], work)),
        "race": (races, lambda job: spvr_race.race(job["kept"], job["race"], job["per_class"], job["samples"])),
        "budgets": (budgets, lambda job: spvr_budgets.cut(job["network"], job["budget"], work)),
        "latency": (
            [{"network": name} for name in spvr_budgets.NETWORKS],
            lambda job: spvr_budgets.latencies(job["network"], work),
        ),
        "segnet": (
            [{"seed": seed, "method": method} for seed in spvr_segnet.SEEDS for method in spvr_segnet.METHODS],
            lambda job: spvr_segnet.segment(job["method"], job["seed"], work),
        ),
        "tau": ([{"seed": seed} for seed in range(24)], lambda job: spvr_tau.kendall(job["seed"])),
    }


def rows(part: str, work: Path, *, resume: bool) -> Iterator[Row]:
    """Rows of a part, computed where they are not there."""
    jobs, run = parts(work)[part]
    return computed(jobs, run, work / f"{part}.jsonl", resume=resume)


def main() -> None:
    """Compute a part, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/spvr"), help="folder of finished rows")
    parser.add_argument("--part", required=True, choices=["page", "vgg", *parts(Path())])
    parser.add_argument("--steps", type=int, default=1170, help="steps of --part vgg; 1170 are three epochs")
    parser.add_argument("--minutes", type=float, default=14, help="time limit of --part vgg")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.part == "vgg":
        from benchmarks.spvr_networks import train_vgg16

        print(train_vgg16(given.work, given.steps, given.minutes), "steps are done")
    elif given.part == "page":
        found = {part: stored_rows(given.work / f"{part}.jsonl") for part in parts(given.work)}
        publish("spvr", found, spvr_pages.tables(found))
        if (figure := spvr_segnet.picture(given.work)) is not None:
            figure.savefig(EVIDENCE / "spvr" / "segnet.png")
    else:
        list(rows(given.part, given.work, resume=given.resume))


def stored_rows(file: Path) -> list[Row]:
    """The rows of a part."""
    return rows_in(file) if file.is_file() else []


if __name__ == "__main__":
    main()
