"""Prune, then quantise, after training and in training, on trained networks: ``python -m benchmarks.quantise``.

A CNN is trained on Fashion-MNIST, loses half of its units and is trained again; a pretrained ResNet-20 on CIFAR-10
loses the channels inside its blocks that `Reconstruction` chooses, until its MACs are divided by 2.1, and is repaired
by `SequentialRidge` without training. Both are quantised after that by `lightning_prune.quantise`.

Then each of the four networks, dense and pruned, is trained on for the same steps in float32, with the rounding of
8-bit integers, and with 4-bit weights. The first is quantised after training, the others as they were trained. Needs
the data in the folder that ``LIGHTNING_PRUNE_DATA`` names.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import EVIDENCE, add_resume, computed, publish, quiet
from lightning_prune import FakeQuantisation, Reconstruction, SequentialRidge, prune, quantise
from lightning_prune.data import CIFAR10, FashionMNIST, ImageTensors
from lightning_prune.models import CNNClassifier
from lightning_prune.reporting import Quantised, QuantisedRow
from lightning_prune.reporting.grid import Grid, kib, number
from lightning_prune.reporting.quantised import wilson
from tests.support.pretrained import load, normalised

_BATCH, _CALIBRATION, _DRAWN = 128, 512, 2048
_EPOCHS = {"dense": 3, "pruned": 2}
# Of the training that is compared: learning rate, images, and images of the test.
_RATE = 3e-4
_MORE = {"CNN, Fashion-MNIST": (10_000, 10_000), "ResNet-20, CIFAR-10": (4_000, 2_000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    folder = EVIDENCE / "quantise"
    jobs = [{"network": name} for name in NETWORKS]
    rows = list(computed(jobs, lambda job: measured(**job), folder / "rows.jsonl", resume=given.resume))
    jobs = [{"network": name, "size": size} for name in NETWORKS for size in ("dense", "pruned")]
    trained = list(computed(jobs, lambda job: trained_on(**job), folder / "trained.jsonl", resume=given.resume))
    publish("quantise", {"networks": len(rows)}, f"{tables(rows)}\n\n{comparison(trained)}")


@cache
def made(network: str) -> tuple[nn.Module, nn.Module, ImageTensors, ImageTensors]:
    """The dense network, the pruned one, training and test data."""
    torch.manual_seed(0)
    return NETWORKS[network]()


def measured(network: str) -> dict[str, Any]:
    """The table of one network."""
    dense, small, train, test = made(network)
    drawn, batches = calibration(train), in_batches(test)
    with tempfile.TemporaryDirectory() as folder:
        done = quantise(small, Path(folder, "small.onnx"), drawn.split(_BATCH), batches, dense=dense)
    return {"runtime": done.runtime, "samples": done.samples, "rows": [vars(row) for row in done.rows]}


def trained_on(network: str, size: str) -> dict[str, Any]:
    """One network trained on in float32 and with rounding, and quantised; all with the same batches."""
    dense, small, train, test = made(network)
    images, tested = _MORE[network]
    part = ImageTensors(train.images[:images], train.labels[:images])
    test = ImageTensors(test.images[:tested], test.labels[:tested])
    begun, batches, found = small if size == "pruned" else dense, in_batches(test), {}
    for bits in (None, 8, 4):
        net, rounding = copy.deepcopy(begun), None if bits is None else FakeQuantisation(bits)
        torch.manual_seed(1)
        if rounding is not None:
            rounding.attach(net)
        fit(net, part, 1, _RATE)
        net.eval()
        if rounding is not None:
            rounding.detach()
            found[f"{bits} bits, in training"] = last_row(net, rounding, batches)
            continue
        drawn = calibration(train).split(_BATCH)
        with tempfile.TemporaryDirectory() as folder:
            done = quantise(net, Path(folder, "net.onnx"), drawn, batches)
        found |= {"float32": vars(done.rows[0]), "8 bits, after training": vars(done.rows[-1])}
        found["4 bits, after training"] = last_row(net, ranges_of(net, drawn), batches)
    return {"samples": len(test), "rows": found}


def last_row(net: nn.Module, rounding: FakeQuantisation, batches: list[Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return vars(quantise(net, Path(folder, "net.onnx"), rounding, batches).rows[-1])


def ranges_of(net: nn.Module, batches: tuple[Tensor, ...]) -> FakeQuantisation:
    """4-bit weights and the ranges of inputs in a network that is not trained with them."""
    rounding, scratch = FakeQuantisation(4), copy.deepcopy(net)
    rounding.attach(scratch)
    for layer in rounding.require_layers(scratch).values():
        layer.train()
    with torch.no_grad():
        for images in batches:
            scratch(images)
    rounding.detach()
    return rounding


def calibration(train: ImageTensors) -> Tensor:
    torch.manual_seed(2)
    return train.images[torch.randperm(len(train))[:_CALIBRATION]]


def in_batches(test: ImageTensors) -> list[Any]:
    return list(zip(test.images.split(500), test.labels.split(500), strict=True))


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


def fit(model: nn.Module, data: ImageTensors, epochs: int, rate: float = 1e-3) -> None:
    """Train with Adam; the learning rate falls along a half cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
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
        shown = Quantised(Path(row["network"]), row["runtime"], 1, row["samples"], found, _CALIBRATION)
        parts.append(shown.grids()[0].markdown())
    return "\n\n".join(parts)


def comparison(rows: list[dict[str, Any]]) -> str:
    """All networks after the same further training."""
    columns = ("", "quantised", "accuracy, %", "KiB", "ms", "same prediction, %")
    cells = []
    for row in rows:
        for kind in ORDER:
            values = QuantisedRow(**row["rows"][kind])
            same = "–"
            if values.agreed is not None:
                low, high = wilson(values.agreed, row["samples"])
                same = f"{100 * values.agreed / row['samples']:.2f} ({100 * low:.2f} to {100 * high:.2f})"
            assert values.accuracy is not None
            shown = f"{100 * values.accuracy:.2f}", kib(values.bytes), number(values.latency_ms, 3), same
            cells.append((f"{row['network']}, {row['size']}" if kind == ORDER[0] else "", kind, *shown))
    return Grid("After the same further training", columns, tuple(cells)).markdown()


ORDER = (
    *("float32", "8 bits, after training", "8 bits, in training"),
    *("4 bits, after training", "4 bits, in training"),
)

if __name__ == "__main__":
    main()
