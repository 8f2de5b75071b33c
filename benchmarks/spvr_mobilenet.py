"""A ResNet pruned by SPvR compared with MobileNetV3-small (the paper's Table 4, reduced).

Rows of `benchmarks.spvr_accuracy`. ResNet-20 with projection shortcuts is trained on Fashion-MNIST, pruned to the
number of parameters of a narrow MobileNet, and to two thirds of it (the paper's ratio), and trained from scratch.
MobileNet has torchvision's widths times a factor. It is made for images of 224 pixels: here its first two strides are
1, so that 28×28 pixels are reduced to 4×4 positions, and its norms have the same momentum as ResNet's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from benchmarks.common import quiet_fit, shown, signed, trained_once
from lightning_prune import Reinitialise, Scope, SPvRPruning, inspect, prune
from lightning_prune.data import FashionMNIST
from lightning_prune.extras import require
from lightning_prune.models import ResNetCIFAR
from lightning_prune.models.classifier import Classifier
from tests.support.pretrained import accuracy

__all__ = ["IMAGES_KEY", "fitted", "jobs", "tables"]

Row = dict[str, Any]
Job = dict[str, Any]

IMAGES, BATCH, BEFORE, AFTER, LR = 3000, 64, 2, 6, 0.002
# In every row: earlier rows are of the first images of the data set, not of drawn ones, and are not taken.
IMAGES_KEY = {"images": f"{IMAGES} drawn"}
GROUP, PER_CLASS, SEEDS = 2, 10, range(3)
FACTOR = 0.15
MOBILE, EQUAL, FEWER, EVEN = (
    "MobileNetV3-small × 0.15",
    "ResNet-20, SPvR",
    "ResNet-20, SPvR, ⅔",
    "ResNet-20, narrowed evenly",
)


class MobileNet(Classifier):
    """MobileNetV3-small with the widths times a factor."""

    def __init__(self) -> None:
        super().__init__((3, 28, 28), 10, "adam", LR)
        self.net: nn.Module = require("torchvision.models", extra="vision").mobilenet_v3_small(
            num_classes=10, width_mult=FACTOR
        )
        strided = [m for m in self.net.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        for conv in strided[:2]:
            conv.stride = (1, 1)
        for norm in self.net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.1

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


@cache
def data_of(seed: int) -> FashionMNIST:
    """The same images for every seed, in another order."""
    settings: dict[str, Any] = {"root": os.environ["LIGHTNING_PRUNE_DATA"], "rgb": True}
    data = FashionMNIST(batch_size=BATCH, val_share=0, train_limit=IMAGES, seed=seed, **settings)
    data.setup("fit")
    return data


def resnet(seed: int) -> ResNetCIFAR:
    torch.manual_seed(seed)
    return ResNetCIFAR(20, size=28, shortcut="projection", optimizer="adam", lr=LR)


def trained(seed: int, work: Path) -> ResNetCIFAR:
    """The dense network of a seed."""
    model, file = resnet(seed), work / f"resnet-drawn-{seed}.pt"
    trained_once(model, file, lambda: quiet_fit(model, data_of(seed), max_epochs=BEFORE))
    return model


def fitted(job: Job, work: Path) -> Row:
    """A small network, trained from scratch."""
    seed, network = job["seed"], job["network"]
    torch.manual_seed(seed)
    model: LightningModule = MobileNet()
    params, began = _params(model), time.process_time()
    callbacks: list[Callback] = []
    reinitialise = Reinitialise(rule="own", seed=seed)
    if network in (EQUAL, FEWER):
        budget = params if network == EQUAL else round(params * 2 / 3)
        model = trained(seed, work)
        callbacks = [SPvRPruning({"params": budget}, GROUP, PER_CLASS, reinit=reinitialise, seed=seed)]
    elif network == EVEN:
        model = resnet(seed)
        prune(model, budget={"params": params}, scope=Scope("local"), extensions=[reinitialise])
    quiet_fit(model, data_of(seed), callbacks, max_epochs=AFTER)
    structure = inspect(model).structure
    return {
        "accuracy": accuracy(model, data_of(seed).test_dataloader().dataset.data),  # type: ignore[attr-defined]
        "params": _params(model),
        "macs": structure.cost.macs(structure.widths),
        "seconds": round(time.process_time() - began, 1),
    }


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def jobs() -> list[Job]:
    """Seed by seed."""
    networks = (MOBILE, FEWER, EQUAL, EVEN)
    return [{"network": network, **IMAGES_KEY, "seed": seed} for seed in SEEDS for network in networks]


def tables(rows: Sequence[Row]) -> str:
    """Accuracies, and what each has more than MobileNet, seed by seed."""
    lines = [
        "## ResNet-20 and MobileNetV3-small, from scratch",
        "",
        "| network | parameters | MACs of one image | accuracy, % | more than MobileNet, paired |",
        "|---|---:|---:|---:|---:|",
    ]
    mobile = {row["seed"]: row for row in rows if row["network"] == MOBILE}
    for network in (MOBILE, FEWER, EQUAL, EVEN):
        mine = [row for row in rows if row["network"] == network and row["seed"] in mobile]
        if mine:
            params, macs = (round(sum(row[key] for row in mine) / len(mine)) for key in ("params", "macs"))
            gap = signed([row["accuracy"] - mobile[row["seed"]]["accuracy"] for row in mine])
            more = "" if network == MOBILE else gap
            lines.append(f"| {network} | {params:,} | {macs:,} | {shown([r['accuracy'] for r in mine])} | {more} |")
    return "\n".join(lines)
