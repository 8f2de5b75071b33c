"""Remaining size against the number of classes: ``python -m benchmarks.classes --root F --work G``.

Ratajczyk & Horzyk (2024) expect an easier task to result in a smaller network. Pretrained backbones are scored for two
to five kinds of flowers, always with the same number of images, and the size that `XGBPruning` in one-shot mode would
leave is counted; nothing is trained. ResNet-20 from CIFAR-10 (weights in ``resnet_cifar10`` of LIGHTNING_PRUNE_DATA)
uses ``flowers_small`` at 48 pixels, EfficientNet-Lite0 from ImageNet ``flower_photos`` at 112, both folders in
``--root``. The seed determines the order in which kinds are added, and the images. One round of boosting has one tree
per class, but a single tree for two classes, and more trees use more channels. So sizes are also counted with the same
number of trees for all kinds. ``--resume`` continues a stopped run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.common import add_resume, computed, publish, quiet, rows_in, shown, signed
from lightning_prune import inspect
from lightning_prune.data import ImageFolder
from lightning_prune.models import ImageClassifier
from lightning_prune.planning import Amount, plan_by_use
from lightning_prune.reporting import backbone_modules
from lightning_prune.scoring import DataPass, Station, XGBoost, pooled_features, stations_of
from lightning_prune.scoring.surrogates import split_samples
from lightning_prune.scoring.xgb import LayerScorer, group_usage
from lightning_prune.structure import Size, Structure
from tests.support import pretrained

NETWORKS = ("ResNet-20", "Lite0")
KINDS = (2, 3, 4, 5)
# Rounds of boosting; and instead, trees of all kinds together.
ROUNDS, TREES = 30, 150
#: How much goes: the default, less, and a threshold; whether the number of trees is the same for all kinds.
AMOUNTS = {
    "gain 0.99": (Amount("gain", 0.99), False),
    "gain 0.9": (Amount("gain", 0.9), False),
    "ρ = 0.001": (Amount("threshold", 0.001), False),
    "gain 0.9, as many trees": (Amount("gain", 0.9), True),
}


@cache
def features(network: str, root: Path, work: Path) -> tuple[Structure, frozenset[str], dict[Station, Tensor], Any]:
    """Structure, modules of the backbone, and pooled features of all training images with their labels."""
    settings: dict[str, Any] = {"root": str(root / "flowers_small"), "size": 48, "mean": pretrained.MEAN}
    settings["std"] = pretrained.STD
    model: nn.Module
    if network == "Lite0":  # trained with (pixel − 127) / 128
        settings = {"root": str(root / "flower_photos"), "size": 112, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
        model = ImageClassifier("timm.tf_efficientnet_lite0", 5, 112, "efficientnet-lite0").eval()
    else:
        model = pretrained.load(20)
    images, _ = ImageFolder(**settings, cache=str(work / "images")).load()
    data = DataPass((images.images, images.labels), batch_size=100)
    structure = inspect(model, images.images[:2]).structure
    producers = {layer for group in structure.groups for layer in group.producers}
    stations = [station for station in stations_of(model, next(iter(data))) if station.layer in producers]
    tables = pooled_features(model, data, stations)
    backbone = backbone_modules(model)
    assert backbone is not None
    return structure, backbone, tables, data.labels.numpy()


def drawn(labels: npt.NDArray[Any], kinds: int, samples: int, seed: int) -> npt.NDArray[np.int64]:
    """Rows of so many images, as many of each of the first classes in an order that the seed draws."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.unique(labels))[:kinds]
    return np.concatenate([rng.permutation(np.flatnonzero(labels == one))[: samples // kinds] for one in order])


def score(job: dict[str, Any], root: Path, work: Path) -> dict[str, Any]:
    """What is left for so many kinds of flowers, by amount, and the best μ."""
    structure, backbone, tables, labels = features(job["network"], root, work)
    rows = drawn(labels, job["classes"], job["samples"], job["seed"])
    parts = split_samples(labels[rows], "classification", seed=job["seed"])
    uses, best = {}, 0.0
    for same_trees in (False, True):
        rounds = TREES // (job["classes"] if job["classes"] > 2 else 1) if same_trees else ROUNDS
        surrogate = XGBoost(rounds=rounds, threads=1, seed=job["seed"])
        scorer = LayerScorer(surrogate, labels[rows], parts)
        found = {station: scorer.score(station, table[rows]) for station, table in tables.items()}
        uses[same_trees] = group_usage(structure.groups, found)
        best = best or max(one.score for one in found.values())
    sizes = {}
    for name, (amount, same_trees) in AMOUNTS.items():
        plan, _ = plan_by_use(structure, uses[same_trees], amount, Size.of(structure))
        sizes[name] = structure.cost.params(structure.take(plan.kept).widths, backbone)
    return {"sizes": sizes, "dense": structure.cost.params(structure.widths, backbone), "best": best}


def shares(rows: Sequence[dict[str, Any]], network: str, kinds: int, amount: str) -> dict[int, float]:
    """Share of the backbone that is left, in %, by seed."""
    mine = [row for row in rows if (row["network"], row["classes"]) == (network, kinds)]
    return {row["seed"]: 100 * row["sizes"][amount] / row["dense"] for row in mine}


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a row per network and number of kinds."""
    yield f"| network | kinds | seeds | best μ | {' | '.join(f'left by {name}, %' for name in AMOUNTS)} |"
    yield "|---|---:|---:|---:|" + "---:|" * len(AMOUNTS)
    for network in NETWORKS:
        for kinds in KINDS:
            mine = [row for row in rows if (row["network"], row["classes"]) == (network, kinds)]
            if mine:
                left = [shown(list(shares(rows, network, kinds, name).values()), 1) for name in AMOUNTS]
                best = f"{fmean(row['best'] for row in mine):.3f}"
                yield f"| {' | '.join([network, str(kinds), str(len(mine)), best, *left])} |"
    yield ""
    yield f"| two kinds less five, points, paired by seed | {' | '.join(AMOUNTS)} |"
    yield "|---|" + "---:|" * len(AMOUNTS)
    for network in NETWORKS:
        pairs = [_less(shares(rows, network, 2, name), shares(rows, network, 5, name)) for name in AMOUNTS]
        if all(pairs):
            yield f"| {network} | {' | '.join(signed(pair, 1) for pair in pairs)} |"


def _less(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def figure(rows: Sequence[dict[str, Any]]) -> Any:
    """What is left against the number of kinds, a panel per network: every seed, and the mean."""
    networks = [network for network in NETWORKS if any(row["network"] == network for row in rows)]
    drawn_on = Figure(figsize=(6 * len(networks), 4), dpi=130)
    drawn_on.set_layout_engine("constrained")
    for axes, network in zip(drawn_on.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        for place, amount in enumerate(AMOUNTS):
            found = {kinds: list(shares(rows, network, kinds, amount).values()) for kinds in KINDS}
            found = {kinds: values for kinds, values in found.items() if values}
            for kinds, values in found.items():
                axes.plot([kinds] * len(values), values, ".", color=f"C{place}", alpha=0.5)
            axes.plot(list(found), [fmean(one) for one in found.values()], "o-", color=f"C{place}", label=amount)
        axes.set(title=network, xlabel="kinds of flowers", ylabel="parameters of the backbone left, %", xticks=KINDS)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", frameon=False, loc="lower right")
    return drawn_on


def main() -> None:
    """All numbers of kinds, for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder of `flowers_small` and `flower_photos`")
    parser.add_argument("--work", required=True, type=Path, help="folder of finished rows")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--samples", type=int, default=900, help="images, the same number for any number of kinds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="only write the table")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    shared = {"samples": given.samples}
    jobs = [
        {"network": network, "classes": kinds, "seed": seed, **shared}
        for network in given.networks
        for seed in range(given.seeds)
        for kinds in KINDS
    ]
    file = given.work / "rows.jsonl"
    if not given.table:
        for row in computed(jobs, partial(score, root=given.root, work=given.work), file, resume=given.resume):
            print(row["sizes"], flush=True)
    rows = rows_in(file, **shared)
    publish("classes", {"rows": rows}, "\n".join(table(rows)), figure(rows))


if __name__ == "__main__":
    main()
