"""Prune, then quantise: dense, pruned, quantised and both, on trained networks: ``python -m benchmarks.quantise``.

A CNN is trained on Fashion-MNIST, loses half of its units and is trained again; a pretrained ResNet-20 on CIFAR-10
loses the channels inside its blocks that `Reconstruction` chooses, until its MACs are divided by 2.1, and is repaired
by `SequentialRidge` without training. Both are quantised after that by `lightning_prune.quantise`. Needs the data in
the folder that ``LIGHTNING_PRUNE_DATA`` names.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import EVIDENCE, add_resume, computed, publish, quiet
from lightning_prune import Reconstruction, SequentialRidge, prune, quantise
from lightning_prune.data import CIFAR10, FashionMNIST, ImageTensors
from lightning_prune.models import CNNClassifier
from lightning_prune.reporting import Quantised, QuantisedRow
from tests.support.pretrained import load, normalised

_BATCH, _CALIBRATION, _DRAWN = 128, 512, 2048
_EPOCHS = {"dense": 3, "pruned": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    jobs = [{"network": name} for name in NETWORKS]
    file = EVIDENCE / "quantise" / "rows.jsonl"
    rows = list(computed(jobs, lambda job: measured(**job), file, resume=given.resume))
    publish("quantise", {"networks": len(rows)}, tables(rows))


def measured(network: str) -> dict[str, Any]:
    """The table of one network."""
    torch.manual_seed(0)
    dense, small, train, test = NETWORKS[network]()
    drawn = train.images[torch.randperm(len(train))[:_CALIBRATION]]
    batches = list(zip(test.images.split(500), test.labels.split(500), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        done = quantise(small, Path(folder, "small.onnx"), drawn.split(_BATCH), batches, dense=dense)
    return {"runtime": done.runtime, "samples": done.samples, "rows": [vars(row) for row in done.rows]}


def fashion_mnist() -> tuple[nn.Module, nn.Module, ImageTensors, ImageTensors]:
    """A CNN, dense and with half of its units."""
    train, test = FashionMNIST().load()
    dense = CNNClassifier((1, 28, 28))
    fit(dense, train, _EPOCHS["dense"])
    small = copy.deepcopy(dense)
    prune(small, test.images[:2], pruning_ratio=0.5)
    fit(small, train, _EPOCHS["pruned"])
    return dense.eval(), small.eval(), train, test


def resnet20() -> tuple[nn.Module, nn.Module, ImageTensors, ImageTensors]:
    """The pretrained network, dense and cut without training."""
    source = CIFAR10()
    train, test = (normalised(part, source) for part in source.load())
    dense = load(20)
    small = copy.deepcopy(dense)
    prune(
        small,
        test.images[:2],
        budget={"macs": 1 / 2.1},
        criterion=Reconstruction(_DRAWN // _BATCH),
        layers=[f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)],
        data=list(train.images[torch.randperm(len(train))[:_DRAWN]].split(_BATCH)),
        extensions=[SequentialRidge(_DRAWN // _BATCH, strength=0.01, rows=4096)],
    )
    return dense, small.eval(), train, test


NETWORKS = {"CNN, Fashion-MNIST": fashion_mnist, "ResNet-20, CIFAR-10": resnet20}


def fit(model: nn.Module, data: ImageTensors, epochs: int) -> None:
    """Train with Adam; the learning rate falls along a half cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = epochs * (len(data) // _BATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for images, labels in shuffled(data):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            scheduler.step()


def shuffled(data: ImageTensors) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in torch.randperm(len(data)).split(_BATCH)[: len(data) // _BATCH]:
        yield data.images[rows], data.labels[rows]


def tables(rows: list[dict[str, Any]]) -> str:
    """A table per network."""
    parts = []
    for row in rows:
        found = tuple(QuantisedRow(**values) for values in row["rows"])
        shown = Quantised(Path(row["network"]), row["runtime"], 1, row["samples"], found)
        parts.append(shown.grids()[0].markdown())
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
