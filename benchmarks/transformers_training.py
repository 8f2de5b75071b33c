"""Transformers pruned while they train: ``python -m benchmarks.transformers_training --resume``.

A vision transformer of PyTorch's layers on Fashion-MNIST, and a character model (GPT) on the licences and descriptions
of the installed packages. Each loses attention heads, feed-forward units and embedding width until half of its MACs are
left, by several criteria in five cuts within the run. Controls are the dense network, the same budget from feed-forward
units alone, and the narrow network of L1's widths trained from random weights for as many epochs. ``--resume`` goes on
where it was stopped. Needs Fashion-MNIST in the folder that ``LIGHTNING_PRUNE_DATA`` names.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import EVIDENCE, add_resume, command, computed, fill, here, quiet, quiet_fit, shown
from lightning_prune import L1, Contribution, OneShot, Random, StructuredPruning, Taylor
from lightning_prune.data import FashionMNIST
from lightning_prune.structure import Size, TracedModel, trace
from lightning_prune.surgery import Reinitialise, history_of

FOLDER = EVIDENCE / "transformers_training"
BUDGET = {"macs": 0.5}
CONTEXT, TEXT_BYTES = 64, 1_000_000

WAYS: dict[str, Callable[[int], list[StructuredPruning]]] = {
    "dense": lambda _: [],
    "L1": lambda _: [StructuredPruning(criterion=L1(), budget=BUDGET)],
    "Taylor": lambda _: [StructuredPruning(criterion=Taylor(), budget=BUDGET)],
    "Contribution": lambda _: [StructuredPruning(criterion=Contribution(), budget=BUDGET)],
    "Random": lambda seed: [StructuredPruning(criterion=Random(seed=seed), budget=BUDGET)],
    "L1, feed-forward units alone": lambda _: [StructuredPruning(criterion=L1(), budget=BUDGET, layers="*.linear1")],
    "narrow from random weights": lambda seed: [
        StructuredPruning(
            criterion=L1(),
            budget=BUDGET,
            schedule=OneShot(at=1, unit="step"),
            extensions=[Reinitialise(seed=seed, rule="own")],
        )
    ],
}


class Module(LightningModule):
    """Trains by AdamW at a learning rate that rises and falls once."""

    lr = 2e-3

    def configure_optimizers(self) -> Any:
        """One cycle over the run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Tokens(nn.Module):
    """Patches of 7 as tokens, and one for the class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.first, self.places = nn.Parameter(torch.empty(1, 1, width)), nn.Parameter(torch.empty(1, 17, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what is not in a layer."""
        for parameter in (self.first, self.places):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, 1, 28, 28)`` → ``(batch, 17, width)``."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat((self.first.expand(len(tokens), -1, -1), tokens), 1) + self.places


class ViT(Module):
    """A vision transformer of PyTorch's layers, on grey images: four blocks of width 64 with four heads."""

    measures = "test accuracy in %"

    def __init__(self) -> None:
        super().__init__()
        layers = [
            nn.TransformerEncoderLayer(64, 4, 256, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(4)
        ]
        self.tokens, self.blocks = Tokens(64), nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)
        self.example_input_array = torch.zeros(2, 1, 28, 28)

    def forward(self, x: Tensor) -> Any:
        """Logits of grey images."""
        return self.head(self.norm(self.blocks(self.tokens(x))[:, 0]))

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Cross entropy of images, of which half are mirrored."""
        images, labels = batch
        mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
        return F.cross_entropy(self(mirrored), labels)

    @torch.no_grad()
    def measure(self) -> float:
        """Share of the test images that are classified right, in %."""
        images, labels = fashion()[1]
        right = [
            (self(x).argmax(1) == y).sum()
            for x, y in zip(torch.split(images, 500), torch.split(labels, 500), strict=True)
        ]
        return 100 * float(sum(right)) / len(labels)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, width)`` → the same shape."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = Attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, width)`` → the same shape."""
        x = x + self.attention(self.norms[0](x))
        out: Tensor = x + self.linear2(F.gelu(self.linear1(self.norms[1](x))))
        return out


class Table(nn.Embedding):
    """Small weights, as GPT-2's."""

    def reset_parameters(self) -> None:
        """Initialise the weights."""
        nn.init.normal_(self.weight, std=0.02)


class Head(nn.Linear):
    """The same for the weights that the output shares with the characters."""

    def reset_parameters(self) -> None:
        """Initialise the weights."""
        nn.init.normal_(self.weight, std=0.02)


class GPT(Module):
    """A character model with 64 characters of context: four blocks of width 96 with six heads, tied embeddings."""

    measures = "test loss in bits per character"

    def __init__(self) -> None:
        super().__init__()
        size = len(text()[2])
        self.characters, self.places = Table(size, 96), Table(CONTEXT, 96)
        self.blocks = nn.Sequential(*(Block(96, 6) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(96), Head(96, size, bias=False)
        self.characters.weight = self.head.weight
        self.example_input_array = torch.zeros(2, CONTEXT, dtype=torch.long)

    def forward(self, x: Tensor) -> Any:
        """Logits of the next characters, ``(batch, length, characters)``."""
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(self.characters(x) + places)))

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Cross entropy of the next characters."""
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    @torch.no_grad()
    def measure(self) -> float:
        """Cross entropy of the next characters of the text that was not trained on, in bits."""
        inputs, targets = text()[1]
        losses = [
            F.cross_entropy(self(x).flatten(0, 1), y.flatten(), reduction="sum")
            for x, y in zip(torch.split(inputs, 256), torch.split(targets, 256), strict=True)
        ]
        return float(sum(losses)) / targets.numel() / math.log(2)


@cache
def fashion() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels of training and test."""
    train, test = FashionMNIST(root=os.environ["LIGHTNING_PRUNE_DATA"]).load()
    return (train.images, train.labels), (test.images, test.labels)


@cache
def text() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
    """Inputs and targets of training and test, and the characters.

    The text is that of the licences and descriptions (``LICENSE*``, ``METADATA``) of the installed packages, each
    content once, in the order of the names; every tenth piece of it is held out.
    """
    files = sorted(
        Path(sysconfig.get_path("purelib")).glob("*.dist-info/**/*"), key=lambda file: file.as_posix().lower()
    )
    parts: dict[str, None] = {}
    for file in files:
        if file.is_file() and (file.name.upper().startswith("LICENSE") or file.name == "METADATA"):
            parts[file.read_text(encoding="utf-8", errors="ignore")] = None
    whole = "".join(character for character in "".join(parts) if " " <= character <= "~" or character == "\n")
    whole = whole[:TEXT_BYTES]
    known = "".join(sorted(set(whole)))
    codes = torch.tensor([known.index(character) for character in whole])
    pieces = codes[: (len(codes) - 1) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    following = codes[1 : 1 + pieces.numel()].view(-1, CONTEXT)
    held_out = torch.arange(len(pieces)) % 10 == 9
    return (pieces[~held_out], following[~held_out]), (pieces[held_out], following[held_out]), known


NETWORKS: dict[str, tuple[type[Any], Callable[[], tuple[Tensor, Tensor]]]] = {
    "ViT": (ViT, lambda: fashion()[0]),
    "GPT": (GPT, lambda: text()[0]),
}


def size_of(model: LightningModule) -> Size:
    """Parameters and MACs as it is now."""
    return Size.of(trace(TracedModel.of(model, model.example_input_array)))


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """One run."""
    build, data = NETWORKS[job["network"]]
    torch.manual_seed(job["seed"])
    model = build()
    dense = size_of(model)
    loader = DataLoader(
        TensorDataset(*data()), 128, shuffle=True, drop_last=True,
        generator=torch.Generator().manual_seed(job["seed"]),
    )  # fmt: skip
    began = time.process_time()
    quiet_fit(model, loader, WAYS[job["way"]](job["seed"]), max_epochs=job["epochs"])
    seconds = time.process_time() - began
    model.eval()
    size, history = size_of(model), history_of(model)
    return {
        "result": round(model.measure(), 3),
        "params": size.params / dense.params,
        "macs": size.macs / dense.macs,
        "widths": {} if history is None else dict(history.widths_now),
        "dense_widths": dict(dense.widths),
        "seconds": round(seconds),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each network and number of epochs."""
    blocks = []
    for network, epochs in dict.fromkeys((row["network"], row["epochs"]) for row in rows):
        own = [row for row in rows if (row["network"], row["epochs"]) == (network, epochs)]
        lines = [
            f"{network}, {epochs} epochs:",
            "",
            f"| way | seeds | {NETWORKS[network][0].measures} | MACs left | parameters left | first widths | s |",
            "|---|---:|---:|---:|---:|---|---:|",
        ]
        for way in WAYS:
            found = [row for row in own if row["way"] == way]
            if found:
                first, results = found[0], shown([row["result"] for row in found])
                lines.append(
                    f"| {way} | {len(found)} | {results} | {100 * first['macs']:.0f} % | "
                    f"{100 * first['params']:.0f} % | {_widths(first)} | {first['seconds']} |"
                )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _widths(row: Mapping[str, Any]) -> str:
    """Units left by kind: of each group of the same name but for numbers, the range."""
    kinds: dict[str, list[str]] = {}
    for name, width in (row["widths"] or {}).items():
        if "#" in name:  # features of heads, which are not pruned here
            continue
        short = "heads" if "att" in name else "feed-forward" if "linear1" in name else "embedding"
        kinds.setdefault(short, []).append(f"{width}/{row['dense_widths'][name]}")
    return ", ".join(f"{kind} {' '.join(dict.fromkeys(found))}" for kind, found in kinds.items())


def main() -> None:
    """Every row, stored as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, …")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    jobs = [
        {"network": network, "way": way, "epochs": given.epochs, "seed": seed}
        | ({"text": hashlib.sha256(text()[0][0].numpy().tobytes()).hexdigest()[:12]} if network == "GPT" else {})
        for seed in range(given.seeds)
        for network in given.networks
        for way in given.ways
    ]
    rows = []
    for row in computed(jobs, partial(measure), FOLDER / "rows.jsonl", resume=given.resume):
        rows.append(row)
        ran = f"`{command('benchmarks.transformers_training')}` on {here()['processor']}"
        fill(FOLDER / "README.md", f"{table(rows)}\n\n{ran}")


if __name__ == "__main__":
    main()
