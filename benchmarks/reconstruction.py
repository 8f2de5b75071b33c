"""Accuracy right after a cut, without training, ingredient by ingredient: ``python -m benchmarks.reconstruction``.

Pretrained ResNet-20 and ResNet-56 on CIFAR-10 lose inner channels of their blocks until their MACs are divided by 1.5,
2.1, 2.55 and 4. What is chosen (L1, `Reconstruction`), how widths are allocated (uniform, global, global by price) and
what repairs the cut vary one at a time; Torch-Pruning's L1 with BatchNorm's statistics estimated again is in the same
run. Repairs and criteria see 2,048 training images without labels; all test images count. With ``--resume`` it goes on
where it was stopped. Needs CIFAR-10 and ``resnet_cifar10/resnet20-….th`` in the folder that ``LIGHTNING_PRUNE_DATA``
names, and Torch-Pruning (1.6.1).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.common import EVIDENCE, add_resume, computed, fill, quiet, rows_in, shown, summary
from benchmarks.criteria import PREFIX, Bench
from benchmarks.repair import calibration
from lightning_prune import L1, Reconstruction, Scope
from lightning_prune.data import CIFAR10, ImageTensors
from lightning_prune.planning import Target, make_plan
from lightning_prune.scoring import score_groups
from lightning_prune.structure import Axes, Size
from lightning_prune.surgery import (
    Fold,
    FoldMean,
    ReestimateBatchNorm,
    Repair,
    Ridge,
    SequentialRidge,
    install,
    repaired,
)
from lightning_prune.surgery import cut as cut_units
from lightning_prune.surgery.tensors import named
from tests.support.pretrained import accuracy, load, normalised

BATCHES, ROWS_PER_BATCH = 16, 4096
FOLDER = EVIDENCE / "reconstruction"

REPAIRS: dict[str, tuple[Repair, ...]] = {
    "none": (),
    "BatchNorm re-estimated": (ReestimateBatchNorm(BATCHES),),
    "means folded": (FoldMean(BATCHES),),
    "units merged": (Fold(BATCHES),),
    "ridge": (Ridge(BATCHES),),
    "sequential ridge": (SequentialRidge(BATCHES, strength=0.01, rows=ROWS_PER_BATCH),),
}
SCOPES = {
    "uniform": Scope(),
    "global": Scope("global", normalize="none"),
    "global per MAC": Scope("global", normalize="none", per="macs"),
}
#: Criterion, allocation and repair of every row; a draw of the images for all but those that see none.
ROWS = (
    (PREFIX + "L1", "uniform", "BatchNorm re-estimated"),
    *(("L1", "uniform", repair) for repair in REPAIRS),
    ("Reconstruction", "uniform", "ridge"),
    *(("Reconstruction", scope, "sequential ridge") for scope in SCOPES),
)


def axes_of(bench: Bench, criterion: str, scope: Scope, divide: float, draw: int) -> tuple[Axes, Mapping[str, float]]:
    """What a cut keeps, and the share of parameters and MACs that remains."""
    if criterion.startswith(PREFIX):
        axes, after = bench.axes(criterion, draw)
    else:
        kind = {"L1": L1(), "Reconstruction": Reconstruction(BATCHES)}[criterion]
        structure = replace(bench.structure, groups=tuple(map(bench.structure.group, bench.names)))
        statistic = kind.statistic(structure)
        if statistic is not None:
            _, data = calibration(bench.train, BATCHES, draw)
            statistic.collect(copy.deepcopy(bench.module).eval(), data)
        tensors = {name: tensor.detach() for name, tensor in named(bench.module).items()}
        scores = score_groups(kind, structure.groups, tensors, statistic)
        target, original = Target.of(budget={"macs": 1 / divide}), Size.of(bench.structure)
        plan = make_plan(bench.structure, scores, target, 1.0, scope, original)
        axes, after = bench.structure.axes(plan.kept), bench.structure.take(plan.kept)
    cost = bench.structure.cost
    whole = bench.structure.widths
    params = after.cost.params(after.widths) / cost.params(whole)
    return axes, {"params": params, "macs": after.cost.macs(after.widths) / cost.macs(whole)}


def measure(bench: Bench, job: Mapping[str, Any]) -> dict[str, Any]:
    """One row."""
    began = time.process_time()
    bench.given.divide = job["divide"]
    axes, left = axes_of(bench, job["criterion"], SCOPES[job["scope"]], job["divide"], job["draw"])
    _, data = calibration(bench.train, BATCHES, job["draw"])
    contents = repaired(lambda: copy.deepcopy(bench.module).train(), axes, REPAIRS[job["repair"]], data)
    seconds = time.process_time() - began
    with cut_units(bench.module, axes) as change:
        install(change, bench.module, contents)
        return {**left, "seconds": round(seconds, 1), "accuracy": accuracy(bench.module, bench.test)}


def table(rows: Sequence[Mapping[str, Any]], depth: int, dense: float) -> str:
    """Accuracies of one network: a row for each way, a column for each divisor."""
    divides = sorted({row["divide"] for row in rows})
    lines = [
        f"ResNet-{depth}, {dense:.2f} % dense. Test accuracy in %, and the share of the parameters that is left.",
        "",
    ]
    lines.append(
        "| criterion | allocation | repair | " + " | ".join(f"MACs ÷ {one:g}" for one in divides) + " | seconds |"
    )
    lines.append("|---|---|---|" + "---:|" * (len(divides) + 1))
    for way in ROWS:
        cells, seconds = [], []
        for divide in divides:
            found = [r for r in rows if (r["criterion"], r["scope"], r["repair"]) == way and r["divide"] == divide]
            seconds += [row["seconds"] for row in found]
            values = [row["accuracy"] for row in found]
            draws = shown(values, 1) if len(set(values)) > 1 else f"{values[0]:.1f}" if values else ""
            cells.append(f"{draws} ({100 * found[0]['params']:.0f} %)" if found else "")
        spent = f"{summary(seconds)[0]:.0f}" if seconds else ""
        if any(cells):
            lines.append("| " + " | ".join((*way, *cells, spent)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Every row, stored as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder of CIFAR-10, in torchvision's layout")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--divide", type=float, nargs="+", default=[2.1, 1.5, 2.55, 4.0])
    parser.add_argument("--draws", type=int, default=3, help="draws of the training images, seeds 0, 1, …")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    source = CIFAR10(root=given.root)
    train, test = (normalised(part, source) for part in source.load())
    test = ImageTensors(test.images.contiguous(memory_format=torch.channels_last), test.labels)
    file, resume = FOLDER / "rows.jsonl", given.resume
    settings = argparse.Namespace(divide=2.1, observe=10, batches=BATCHES)
    known = {row["depth"] for row in rows_in(file)} if resume and file.is_file() else set()
    benches = {depth: Bench(settings, load(depth), train, test) for depth in sorted({*known, *given.depths})}
    for depth in given.depths:
        jobs = [
            {"depth": depth, "criterion": criterion, "scope": scope, "repair": repair, "divide": divide, "draw": draw}
            for divide in given.divide
            for draw in range(given.draws)
            for criterion, scope, repair in ROWS
            if draw == 0 or REPAIRS[repair]
        ]
        for _ in computed(jobs, partial(measure, benches[depth]), file, resume=resume):
            tables = [table(rows_in(file, depth=one), one, bench.dense) for one, bench in benches.items()]
            fill(FOLDER / "README.md", "\n\n".join(tables))
        resume = True


if __name__ == "__main__":
    main()
