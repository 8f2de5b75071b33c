"""SPvR and other criteria with equal budgets and epochs: ``python -m benchmarks.spvr_accuracy --resume``.

A small CNN is trained on some images of Fashion-MNIST, cut once to a share of its parameters, and fine-tuned or trained
from scratch (Tables 2 and 3 of the paper, reduced). All methods use the same network, samples, batches, epochs and
learning rate. Controls: an evenly narrowed network, random groups, and no cut. ``--part mobilenet`` compares a pruned
ResNet with a narrow MobileNet (Table 4), ``--part groups`` measures time and accuracy over the group size (Figure 2),
``--part page`` writes the tables of the page. Rows are stored in ``--work``. The environment variable
LIGHTNING_PRUNE_DATA names the folder of Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, final

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import spvr_mobilenet
from benchmarks.common import add_resume, computed, publish, quiet, quiet_fit, rows_in, shown, signed, trained_once
from lightning_prune import FPGM, L1, KLDivergence, Random, Reinitialise, Scope, SPvRPruning, Taylor, inspect, prune
from lightning_prune.data import FashionMNIST, ImageTensors
from lightning_prune.extras import require
from lightning_prune.models import CNNClassifier
from lightning_prune.scoring import Criterion, DataPass, Statistic
from lightning_prune.structure import Group
from tests.support.pretrained import accuracy

__all__ = ["main"]

Row = dict[str, Any]
Job = dict[str, Any]

IMAGES, BATCH, BEFORE, AFTER, LR = 5000, 128, 3, 5, 0.002
# In every row: earlier rows are of the first images of the data set, not of drawn ones, and are not taken.
IMAGES_KEY = {"images": f"{IMAGES} drawn"}
GROUP, PER_CLASS, DRAWS = 2, 50, 20
BUDGETS, SEEDS = (0.1, 0.02, 0.3), range(3)
# With groups of 16 the smallest network that is left has 4 % of the parameters.
SIZES, SIZES_AT = (1, 2, 4, 8), 0.02
WEIGHTS = ("from scratch", "fine-tuned")
#: What is random goes by a seed, and lies apart from the seeds of the training.
SPVR, EVEN, GROUPS, RANDOM, TRAINED = "SPvR", "narrowed evenly", "random groups", "random, by loss", "random, an epoch"
CRITERIA: Mapping[str, Criterion] = {"l1": L1(), "Taylor": Taylor(), "FPGM": FPGM(), "KL": KLDivergence()}
METHODS = (SPVR, *CRITERIA, RANDOM, EVEN, GROUPS, TRAINED)


@final
@dataclass(frozen=True)
class RandomGroups(Criterion):
    """Groups of units in the order of their numbers, with random scores that compare across layers."""

    seed: int = 0
    comparable = True

    def bundles(self, group: Group, statistic: Statistic | None) -> Sequence[Sequence[int]]:
        return [range(first, min(first + GROUP, group.width)) for first in range(0, group.width, GROUP)]

    def score(self, group: Group, tensors: Mapping[str, Tensor], statistic: Statistic | None) -> Tensor:
        scores = Random(self.seed).score(group, tensors, statistic)
        return scores[torch.arange(group.width) // GROUP]


@cache
def data_of(seed: int) -> FashionMNIST:
    """The same images for every seed, in another order."""
    root = os.environ["LIGHTNING_PRUNE_DATA"]
    data = FashionMNIST(root=root, batch_size=BATCH, val_share=0, train_limit=IMAGES, seed=seed)
    data.setup("fit")
    return data


def images_of(seed: int, part: str) -> ImageTensors:
    """Training or test images."""
    loader = data_of(seed).train_dataloader() if part == "train" else data_of(seed).test_dataloader()
    found: ImageTensors = loader.dataset.data  # type: ignore[attr-defined]
    return found


def test_accuracy(model: LightningModule) -> float:
    """Of all test images, in %."""
    return accuracy(model, images_of(0, "test"))


def sizes(model: LightningModule) -> Row:
    """Parameters, multiply-accumulates of one image and widths."""
    structure = inspect(model).structure
    widths = structure.widths
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs": structure.cost.macs(widths),
        "widths": list(widths.values()),
    }


def network(seed: int) -> CNNClassifier:
    torch.manual_seed(seed)
    return CNNClassifier((1, 28, 28), channels=(16, 32), hidden=(128, 64), optimizer="adam", lr=LR)


def trained(seed: int, work: Path) -> CNNClassifier:
    """The dense network of a seed."""
    model, file = network(seed), work / f"cnn-drawn-{seed}.pt"
    trained_once(model, file, lambda: quiet_fit(model, data_of(seed), max_epochs=BEFORE))
    return model


def samples(seed: int) -> DataPass:
    """What criteria look at."""
    images = images_of(seed, "train")
    return DataPass([(images.images, images.labels)], per_class=PER_CLASS, seed=seed, batch_size=BATCH)


@cache
def cut(method: str, budget: float, seed: int, work: Path) -> CNNClassifier:
    """The dense network of a seed, cut by a criterion."""
    model, (criterion, scope) = trained(seed, work), chosen(method, budget, seed, work)
    prune(model, data=samples(seed), loss=F.cross_entropy, budget=budget, criterion=criterion, scope=scope)
    return model


def drawn_anew(model: CNNClassifier, seed: int) -> CNNClassifier:
    """The network with new weights."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            module.reset_parameters()
    return model


def chosen(method: str, budget: float, seed: int, work: Path) -> tuple[Criterion, Scope]:
    """Which units go, and from where."""
    first = 1000 * seed
    if method == RANDOM:
        return L1(), Scope("random", draws=DRAWS, seed=first)
    if method == TRAINED:
        return L1(), Scope("random", seed=first + best_draw(seed, budget, work))
    if method == EVEN:
        return L1(), Scope("local")
    criterion = CRITERIA.get(method, RandomGroups(seed))
    return criterion, Scope.of("global", comparable=criterion.comparable)


def best_draw(seed: int, budget: float, work: Path) -> int:
    """Of the drawn allocations, the one that is best on a fifth of the images after an epoch on the others."""
    learn, held = images_of(seed, "train").split(0.2, seed)
    found = []
    for number in range(DRAWS):
        model = trained(seed, work)
        prune(model, budget=budget, scope=Scope("random", seed=1000 * seed + number))
        optimizer = torch.optim.Adam(model.parameters(), LR)
        model.train()
        for rows in torch.randperm(len(learn), generator=torch.Generator().manual_seed(seed)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(learn.images[rows]), learn.labels[rows]).backward()
            optimizer.step()
        found.append(accuracy(model, held))
    return max(range(DRAWS), key=found.__getitem__)


def fitted(job: Job, work: Path) -> Row:
    """A network cut and trained."""
    method, seed, is_new = job["method"], job["seed"], job["weights"] == WEIGHTS[0]
    ranking: list[SPvRPruning] = []
    began = time.process_time()
    if method == SPVR:
        reinit = Reinitialise(rule="own", seed=seed) if is_new else False
        ranking = [SPvRPruning(job["budget"], job.get("group_size", GROUP), PER_CLASS, reinit, seed=seed)]
    if method in (SPVR, "unpruned"):
        model = trained(seed, work)
    else:
        model = copy.deepcopy(cut(method, job["budget"], seed, work))
    if is_new and method != SPVR:
        model = drawn_anew(model, seed)
    quiet_fit(model, data_of(seed), ranking, max_epochs=AFTER)
    return {
        "accuracy": test_accuracy(model),
        **sizes(model),
        "seconds": round(time.process_time() - began, 1),
        "ranking_macs": ranking[0].ranking.macs if ranking and ranking[0].ranking else 0,
    }


def jobs() -> list[Job]:
    """The most valuable first."""
    dense: list[Job] = [
        {"method": "unpruned", "budget": 1.0, "weights": weights, **IMAGES_KEY, "seed": seed}
        for weights in WEIGHTS
        for seed in SEEDS
    ]
    cut_ones: list[Job] = [
        {"method": method, "budget": budget, "weights": weights, **IMAGES_KEY, "seed": seed}
        for budget in BUDGETS
        for weights in WEIGHTS
        for method in METHODS
        for seed in SEEDS
    ]
    return dense + sorted(cut_ones, key=lambda job: (job["budget"] == BUDGETS[-1], job["method"] == TRAINED))


def jobs_of_sizes() -> list[Job]:
    """Group sizes of the same budget, from scratch."""
    same: Job = {"method": SPVR, "budget": SIZES_AT, "weights": WEIGHTS[0], **IMAGES_KEY}
    return [{**same, "group_size": size, "seed": seed} for size in SIZES for seed in SEEDS]


def table_of_sizes(rows: Sequence[Row]) -> str:
    """What a ranking costs, and what it is worth."""
    lines = [
        f"## Group size, {SIZES_AT:.0%} of the parameters, from scratch",
        "",
        "| d | multiply-accumulates of the ranking | share of those with d = 1 | accuracy, % | d = 2 − it, paired |",
        "|---:|---:|---:|---:|---:|",
    ]
    by_size = {size: [row for row in rows if row["group_size"] == size] for size in SIZES}
    spent = {size: sum(row["ranking_macs"] for row in mine) / len(mine) for size, mine in by_size.items()}
    for size, mine in by_size.items():
        pairs = zip(by_size[GROUP], mine, strict=True)
        gap = "" if size == GROUP else signed([two["accuracy"] - row["accuracy"] for two, row in pairs])
        cost = f"{spent[size]:.2e} | {spent[size] / spent[1]:.2f}"
        lines.append(f"| {size} | {cost} | {shown([row['accuracy'] for row in mine])} | {gap} |")
    return "\n".join(lines)


def figure_of_sizes(rows: Sequence[Row]) -> Any:
    """Accuracy of every seed, and the work of the ranking, over the group size."""
    drawn = require("matplotlib.figure", extra="plot").Figure(figsize=(6, 3.6), dpi=140, layout="constrained")
    left = drawn.subplots()
    right = left.twinx()
    sizes = [row["group_size"] for row in rows]
    left.scatter(sizes, [row["accuracy"] for row in rows], color="#0072B2", s=14)
    spent = [fmean(row["ranking_macs"] for row in rows if row["group_size"] == size) for size in SIZES]
    right.plot(SIZES, spent, color="#D55E00", marker="s")
    left.set_xscale("log", base=2)
    left.set_xticks(SIZES, [str(size) for size in SIZES])
    left.set_xlabel("units of a group, d")
    left.set_ylabel("test accuracy, % (a point a seed)", color="#0072B2")
    right.set_ylabel("multiply-accumulates of the ranking", color="#D55E00")
    right.set_ylim(0)
    return drawn


def table(rows: Sequence[Row], budget: float, weights: str) -> list[str]:
    """Accuracies of a budget, and what SPvR has more, seed by seed."""
    lines = [
        f"## {budget:.0%} of the parameters, {weights}",
        "",
        "| method | accuracy, % | SPvR − it, paired | parameters | MACs of one image |",
        "|---|---:|---:|---:|---:|",
    ]
    found = {
        method: {row["seed"]: row for row in rows if row["method"] == method and row["weights"] == weights}
        for method in (*METHODS, "unpruned")
    }
    for method, mine in found.items():
        ours = [(row, found[SPVR][seed]) for seed, row in mine.items() if seed in found[SPVR]]
        if ours:
            gap = "" if method == SPVR else signed([spvr["accuracy"] - row["accuracy"] for row, spvr in ours])
            params, macs = (round(sum(row[key] for row, _ in ours) / len(ours)) for key in ("params", "macs"))
            accuracies = shown([row["accuracy"] for row, _ in ours])
            lines.append(f"| {method} | {accuracies} | {gap} | {params:,} | {macs:,} |")
    return lines


def tables(rows: Sequence[Row]) -> str:
    """All that there are rows for."""
    made = []
    for budget in sorted({row["budget"] for row in rows} - {1.0}, reverse=True):
        for weights in WEIGHTS:
            mine = [row for row in rows if row["budget"] in (budget, 1.0)]
            if any(row["method"] == SPVR and row["weights"] == weights and row["budget"] == budget for row in mine):
                made.append("\n".join(table(mine, budget, weights)))
    return "\n\n".join(made)


def main() -> None:
    """Compute the rows of a part, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/spvr_accuracy"), help="folder of finished rows")
    parser.add_argument("--part", choices=["cnn", "mobilenet", "groups", "page"], default="cnn")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    made_of: dict[str, tuple[list[Job], Callable[..., Row], Callable[[Sequence[Row]], str]]] = {
        "cnn": (jobs(), fitted, tables),
        "mobilenet": (spvr_mobilenet.jobs(), spvr_mobilenet.fitted, spvr_mobilenet.tables),
        "groups": (jobs_of_sizes(), fitted, table_of_sizes),
    }
    files = {part: given.work / f"{part}.jsonl" for part in made_of}
    if given.part == "page":
        keys = {"mobilenet": spvr_mobilenet.IMAGES_KEY}
        stored = {part: rows_in(file, **keys.get(part, IMAGES_KEY)) for part, file in files.items() if file.is_file()}
        found = {part: rows for part, rows in stored.items() if rows}
        made = [made_of[part][2](rows) for part, rows in found.items()]
        publish(
            "spvr_accuracy", found, "\n\n".join(made), figure_of_sizes(found["groups"]) if "groups" in found else None
        )
        return
    wanted, run, _ = made_of[given.part]
    networks = {"mobilenet": ["resnet-*.pt"], "cnn": ["cnn-*.pt"]}.get(given.part, [])  # groups take those of cnn
    file = files[given.part]
    list(computed(wanted, partial(run, work=given.work), file, resume=given.resume, leftovers=networks))


if __name__ == "__main__":
    main()
