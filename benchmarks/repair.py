"""Test accuracy right after a cut, without training, with and without repairs: ``python -m benchmarks.repair``.

The contribution paper's CNN, trained here for some epochs, or with ``--weights`` a pretrained ResNet-20, loses 10, 30
and 50 % of its units in one cut (the ResNet those of the inner width of every block). Needs CIFAR-10 in ``--root`` or
``LIGHTNING_PRUNE_DATA``. Repairs use training images only. The seed draws their batches and trains the CNN. With
``--resume``, seeds that were measured with the same settings are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import EVIDENCE, add_resume, command, here, machine, shown, stored, summary
from lightning_prune import L1, Contribution
from lightning_prune.data import CIFAR10, ImageTensors
from lightning_prune.data.tensors import crop_and_mirror
from lightning_prune.extras import require
from lightning_prune.models import CNNClassifier, ResNetCIFAR, load_pretrained
from lightning_prune.planning import Scope, Target, make_plan, select
from lightning_prune.scoring import Criterion, DataPass, score_groups
from lightning_prune.structure import Size, Structure, TracedModel, trace
from lightning_prune.surgery import Fold, FoldMean, ReestimateBatchNorm, Repair, Ridge, cut, install, repaired
from lightning_prune.surgery.tensors import named
from tests.support.pretrained import accuracy, normalised

BATCH, SHARES = 128, (0.1, 0.3, 0.5)

Row = dict[str, Any]


def repairs(batches: int) -> dict[str, tuple[Repair, ...]]:
    """What is compared."""
    fold, mean, ridge, norm = Fold(batches), FoldMean(batches), Ridge(batches), ReestimateBatchNorm(batches)
    return {
        "none": (),
        "mean": (mean,),
        "fold": (fold,),
        "BN": (norm,),
        "ridge": (ridge,),
        "ridge + BN": (ridge, norm),
    }


def train(module: CNNClassifier, images: ImageTensors, epochs: int, seed: int) -> None:
    """SGD with momentum, one cycle of the learning rate, crops and mirrors."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    module.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH)[: len(images) // BATCH]:
            batch = images.take(rows)
            optimizer.zero_grad()
            F.cross_entropy(module(crop_and_mirror(batch.images, generator)), batch.labels).backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}", flush=True)


def calibration(images: ImageTensors, batches: int, seed: int) -> tuple[list[Tensor], DataPass]:
    """Batches drawn once from the training images, and how a repair takes them."""
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: batches * BATCH]
    drawn = list(images.images[rows].split(BATCH))
    return drawn, DataPass(drawn)


def scores_of(
    criterion: Criterion, structure: Structure, names: Sequence[str], module: LightningModule, drawn: Sequence[Tensor]
) -> Mapping[str, Tensor]:
    """Scores of the trained network, observed on the calibration batches where the criterion needs that."""
    statistic = criterion.statistic(structure)
    observed = copy.deepcopy(module).train()
    for batch in drawn if statistic is not None else ():
        handles = statistic.attach(observed)
        with torch.no_grad():
            observed(batch)
        for handle in handles:
            handle.remove()
    tensors = {name: tensor.detach() for name, tensor in named(module).items()}
    return score_groups(criterion, [structure.group(name) for name in names], tensors, statistic)


def measure(
    name: str,
    module: LightningModule,
    train: ImageTensors,
    test: ImageTensors,
    ignore: str | None,
    batches: int,
    seed: int,
) -> Iterator[Row]:
    """One row per criterion, share and repair; every cut is undone."""
    module.eval()
    structure = trace(TracedModel.of(module, module.example_input_array))
    names, _ = select(structure, ignore=ignore)
    drawn, data = calibration(train, batches, seed)
    dense = accuracy(module, test)
    print(f"{name}: {dense} % dense", flush=True)
    for criterion, share in product((L1(), Contribution()), SHARES):
        scores = scores_of(criterion, structure, names, module, drawn)
        plan = make_plan(structure, scores, Target.of(share), 1.0, Scope(), Size.of(structure))
        axes, after = structure.axes(plan.kept), structure.take(plan.kept)
        for label, chosen in repairs(batches).items():
            began = time.perf_counter()
            contents = repaired(lambda: copy.deepcopy(module).train(), axes, chosen, data)
            seconds = time.perf_counter() - began
            with cut(module, axes) as change:
                install(change, module, contents)
                after_cut = accuracy(module, test)
            row = {
                "network": name,
                "seed": seed,
                "criterion": type(criterion).__name__,
                "removed": share,
                "repair": label,
            }
            row |= {"params": after.cost.params(after.widths), "macs": after.cost.macs(after.widths)}
            yield {**row, "dense": dense, "accuracy": after_cut, "seconds": round(seconds, 2)}


def by_seed(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[float]]:
    """Accuracies of all seeds for each combination of what the keys name."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row["accuracy"])
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per criterion and share, a column per repair."""
    labels = list(dict.fromkeys(row["repair"] for row in rows))
    lines = [f"| network | criterion | removed | parameters | dense | {' | '.join(labels)} |"]
    lines.append("|---|---|---:|---:|---:|" + "---:|" * len(labels))
    dense = shown(list({row["seed"]: row["dense"] for row in rows}.values()))
    cells: dict[tuple[Any, ...], list[list[float]]] = {}
    for (*key, _), values in by_seed(rows, "network", "criterion", "removed", "params", "repair").items():
        cells.setdefault(tuple(key), []).append(values)
    for (network, criterion, removed, params), columns in cells.items():
        best = max(map(fmean, columns))
        texts = [f"**{shown(values)}**" if fmean(values) == best else shown(values) for values in columns]
        lines.append(
            f"| {network} | {criterion} | {100 * removed:.0f} % | {params:,} | {dense} | {' | '.join(texts)} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row]) -> Any:
    """Accuracy against share removed, a panel per criterion, a line per repair."""
    criteria = list(dict.fromkeys(row["criterion"] for row in rows))
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=(10, 4), layout="constrained", dpi=130)
    panels = figure.subplots(1, len(criteria), squeeze=False, sharey=True)[0]
    looks = [("#999999", "o-"), ("#56B4E9", "s--"), ("#CC79A7", "^:"), ("#E69F00", "D--"), ("#D55E00", "D-")]
    for axes, criterion in zip(panels, criteria, strict=True):
        mine = [row for row in rows if row["criterion"] == criterion]
        axes.axhline(fmean(row["dense"] for row in mine), color="black", lw=0.8, ls=(0, (4, 3)), label="dense")
        for label, (colour, style) in zip(repairs(1), looks, strict=True):
            points = by_seed([row for row in mine if row["repair"] == label], "removed")
            middles = [summary(values) for values in points.values()]
            shares, (heights, halves) = [100 * share for (share,) in points], zip(*middles, strict=True)
            axes.errorbar(shares, heights, halves, fmt=style, color=colour, ms=5, capsize=3, label=label)
        axes.set(title=criterion, ylim=(0, 100), xticks=[100 * share for share in SHARES])
        axes.set_xlabel("units removed at once (%)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, no training (%)")
    panels[0].legend(fontsize="small", ncols=2, loc="lower left")
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"{rows[0]['network']} ({f'{seeds} seeds, bars: 95 %' if seeds > 1 else 'one seed'})")
    return figure


def write(rows: Sequence[Row], settings: Mapping[str, Any], line: str, folder: Path, name: str) -> None:
    """Rows, table and picture, named after the network."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"settings": settings, "command": line, "machine": machine()}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    (folder / f"{name}.json").write_text(f'{json.dumps(facts)[:-1]},\n "rows": [\n  {lines}\n ]}}\n')
    (folder / f"{name}.md").write_text(f"{table(rows)}\n", encoding="utf-8")
    draw(rows).savefig(folder / f"{name}.png")


def main() -> None:
    """One network, writing after each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder of CIFAR-10, in torchvision's layout")
    parser.add_argument(
        "--weights", type=Path, help="weights of a ResNet-20 trained on CIFAR-10; otherwise the CNN is used"
    )
    parser.add_argument("--epochs", type=int, default=8, help="training epochs of the CNN")
    parser.add_argument("--test-limit", type=int, default=10000, help="use only the first test images")
    parser.add_argument("--batches", type=int, default=16, help=f"batches of {BATCH} for repairs")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    add_resume(parser)
    given = parser.parse_args()
    source = CIFAR10(root=given.root)
    images, test = (normalised(part, source) for part in source.load())
    test = test.take(torch.arange(min(given.test_limit, len(test))))
    settings = {"test_limit": given.test_limit, "batches": given.batches}
    folder, name = EVIDENCE / "repair", "resnet-20"
    if given.weights is None:
        settings, name = settings | {"epochs": given.epochs}, "cnn"
    line = command("benchmarks.repair").replace(str(given.weights), getattr(given.weights, "name", ""))
    rows = stored(folder / f"{name}.json", settings, resume=given.resume)
    for seed in sorted({*range(given.seeds)} - {row["seed"] for row in rows}):
        for row in network(given, images, test, seed):
            rows.append({**row, "at": here()})
            print(row, flush=True)
        write(rows, settings, line, folder, name)
    print(table(rows))


def network(given: argparse.Namespace, images: ImageTensors, test: ImageTensors, seed: int) -> Iterator[Row]:
    """The rows of the network that was asked for."""
    seed_everything(seed, verbose=False)
    if given.weights is None:
        cnn = CNNClassifier().to(memory_format=torch.channels_last)
        train(cnn, images, given.epochs, seed)
        return measure("CNN", cnn, images, test, None, given.batches, seed)
    resnet = ResNetCIFAR(20).to(memory_format=torch.channels_last)
    load_pretrained(resnet, given.weights)
    # The residual stream stays: two of its stages are padded.
    return measure("ResNet-20", resnet, images, test, "conv1", given.batches, seed)


if __name__ == "__main__":
    main()
