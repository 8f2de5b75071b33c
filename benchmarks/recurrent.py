"""An LSTM pruned while it trains: ``python -m benchmarks.recurrent --resume``.

It reads the rows of Fashion-MNIST images, 28 steps of 28 pixels, and loses half of its 128 hidden units by several
criteria, in the cuts of the default schedule. Controls are the dense network, and the narrow one trained from random
weights for as many epochs. It trains on a third of the images, so that the runs fit on two cores; accuracy is that of
all 10,000 test images. Needs Fashion-MNIST in the folder that ``LIGHTNING_PRUNE_DATA`` names.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import EVIDENCE, add_resume, command, computed, fill, here, quiet, quiet_fit, shown, signed
from lightning_prune import L1, Contribution, OneShot, Random, StructuredPruning, Taylor
from lightning_prune.data import FashionMNIST
from lightning_prune.structure import Size, TracedModel, trace
from lightning_prune.surgery import Reinitialise

FOLDER = EVIDENCE / "recurrent"
IMAGES = 20_000
NARROW = "narrow from random weights"

WAYS: dict[str, Callable[[int], list[StructuredPruning]]] = {
    "dense": lambda _: [],
    "L1": lambda _: [StructuredPruning(criterion=L1(), pruning_ratio=0.5)],
    "Taylor": lambda _: [StructuredPruning(criterion=Taylor(), pruning_ratio=0.5)],
    "Contribution": lambda _: [StructuredPruning(criterion=Contribution(), pruning_ratio=0.5)],
    "Random": lambda seed: [StructuredPruning(criterion=Random(seed=seed), pruning_ratio=0.5)],
    NARROW: lambda seed: [
        StructuredPruning(
            criterion=L1(),
            pruning_ratio=0.5,
            schedule=OneShot(at=1, unit="step"),
            extensions=[Reinitialise(seed=seed, rule="own")],
        )
    ],
}


class Rows(LightningModule):
    """Classifies an image by the last hidden state after its rows; AdamW at a learning rate that rises and falls."""

    lr = 4e-3

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(28, 128, batch_first=True), nn.Linear(128, 10)
        self.example_input_array = torch.zeros(2, 1, 28, 28)

    def forward(self, x: Tensor) -> Any:
        """Logits of grey images, ``(batch, 1, 28, 28)``."""
        return self.head(self.memory(x.squeeze(1))[0][:, -1])

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """One cycle over the run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@cache
def fashion() -> tuple[Any, Any]:
    """Images and labels of training and test."""
    return FashionMNIST(root=os.environ["LIGHTNING_PRUNE_DATA"]).load()


def size_of(model: LightningModule) -> Size:
    """Parameters and MACs as it is now."""
    return Size.of(trace(TracedModel.of(model, model.example_input_array)))


@torch.no_grad()
def accuracy(model: LightningModule) -> float:
    """Share of the test images that are classified right, in %."""
    test, right = fashion()[1], 0
    for x, y in zip(torch.split(test.images, 500), torch.split(test.labels, 500), strict=True):
        right += int((model(x).argmax(1) == y).sum())
    return 100 * right / len(test.labels)


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """One run."""
    torch.manual_seed(job["seed"])
    model, train = Rows(), fashion()[0]
    dense = size_of(model)
    data = TensorDataset(train.images[:IMAGES], train.labels[:IMAGES])
    draw = torch.Generator().manual_seed(job["seed"])
    loader = DataLoader(data, 128, shuffle=True, drop_last=True, generator=draw)
    began = time.process_time()
    quiet_fit(model, loader, WAYS[job["way"]](job["seed"]), max_epochs=job["epochs"])
    seconds = time.process_time() - began
    model.eval()
    size = size_of(model)
    return {
        "accuracy": accuracy(model),
        "hidden": model.memory.hidden_size,
        "params": size.params / dense.params,
        "macs": size.macs / dense.macs,
        "seconds": round(seconds),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each way, with the differences to the narrow network from random weights, seed by seed."""
    found = {(row["way"], row["seed"]): row["accuracy"] for row in rows}
    lines = [
        f"| way | seeds | hidden units | parameters | MACs | test accuracy in % | points above {NARROW} |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        pairs = [row["accuracy"] - found[NARROW, row["seed"]] for row in own if (NARROW, row["seed"]) in found]
        above = signed(pairs) if pairs and way != NARROW else ""
        first = own[0]
        lines.append(
            f"| {way} | {len(own)} | {first['hidden']} | {first['params']:.0%} | {first['macs']:.0%} | "
            f"{shown([row['accuracy'] for row in own])} | {above} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Every row, stored as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, …")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    jobs = [{"way": way, "epochs": given.epochs, "seed": seed} for seed in range(given.seeds) for way in WAYS]
    rows = []
    for row in computed(jobs, measure, FOLDER / "rows.jsonl", resume=given.resume):
        rows.append(row)
        ran = f"`{command('benchmarks.recurrent')}` on {here()['processor']}"
        fill(FOLDER / "README.md", f"{table(rows)}\n\n{ran}")


if __name__ == "__main__":
    main()
