"""Accuracy right after a cut, for other networks: ``python -m benchmarks.reconstruction_networks --work FOLDER``.

A VGG form (no residuals) and a vision transformer (LayerNorm, GELU), trained here on Fashion-MNIST, and
EfficientNet-Lite0 (depthwise convolutions, ReLU6) with ImageNet weights and a linear head for TensorFlow's flowers.
`prune` removes inner units until the MACs are divided, without training: by L1 with and without repairs, and by
`Reconstruction` with uniform widths and per MAC. The transformer also loses embedding width, with its norms refitted or
not. Criteria and repairs see 2,048 training images without labels; all
test images count. With ``--resume`` it goes on where it was stopped; trained networks are kept in ``--work``. Needs
Fashion-MNIST and ``flower_photos`` in the folder that ``LIGHTNING_PRUNE_DATA`` names, timm, and the weights' package.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from benchmarks.common import EVIDENCE, add_resume, computed, fill, quiet, shown, trained_once
from lightning_prune import L1, Reconstruction, RefitLayerNorm, Ridge, Scope, prune
from lightning_prune.data import FashionMNIST, ImageFolder, ImageTensors
from lightning_prune.models import ImageClassifier
from lightning_prune.surgery import SequentialRidge

FOLDER = EVIDENCE / "reconstruction_networks"
IMAGES, BATCH = 2048, 128

REFIT = partial(SequentialRidge, strength=0.01, rows=4096)
WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "L1": lambda: {"criterion": L1()},
    "L1, Ridge": lambda: {"criterion": L1(), "extensions": [Ridge()]},
    "L1, RefitLayerNorm": lambda: {"criterion": L1(), "extensions": [RefitLayerNorm()]},
    "L1, RefitLayerNorm, Ridge": lambda: {"criterion": L1(), "extensions": [RefitLayerNorm(), Ridge()]},
    "L1, SequentialRidge": lambda: {"criterion": L1(), "extensions": [REFIT()]},
    "Reconstruction, SequentialRidge": lambda: {"criterion": Reconstruction(), "extensions": [REFIT()]},
    "Reconstruction per MAC, SequentialRidge": lambda: {
        "criterion": Reconstruction(),
        "scope": Scope("global", per="macs"),
        "extensions": [REFIT()],
    },
}


@dataclass(frozen=True)
class Case:
    """A trained network and what is done to it.

    Attributes:
        network: Returns the trained network, in eval mode.
        images: Returns training and test images.
        divide: The MACs are divided by this.
        chosen: Layers to prune, or to leave alone: arguments of `prune`.
    """

    network: Callable[[Path], nn.Module]
    images: Callable[[Path], tuple[ImageTensors, ImageTensors]]
    divide: float
    chosen: Mapping[str, Any] = field(default_factory=dict)


def convolution(inputs: int, width: int) -> tuple[nn.Module, ...]:
    """A convolution, its norm and a ReLU."""
    return nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()


def vgg() -> nn.Sequential:
    """Four convolutions with batch norms and two linear layers; 15 M MACs."""
    layers: list[nn.Module] = []
    inputs = 1
    for width in (32, 64):
        layers += [
            nn.Conv2d(inputs, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        inputs = width
    for _ in range(2):
        layers += [nn.Conv2d(inputs, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU()]
        inputs = 128
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


class ViT(nn.Module):
    """torchvision's transformer on grey images: patches of 4, four blocks of width 96; 24 M MACs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = VisionTransformer(28, 4, num_layers=4, num_heads=4, hidden_dim=96, mlp_dim=384, num_classes=10)

    def forward(self, x: Tensor) -> Any:
        """Logits of grey images."""
        return self.net(x.expand(-1, 3, -1, -1))


@cache
def fashion(_: Path) -> tuple[ImageTensors, ImageTensors]:
    """60,000 training and 10,000 test images."""
    return FashionMNIST(root=os.environ["LIGHTNING_PRUNE_DATA"]).load()


def trained(
    build: Callable[[], nn.Module], name: str, epochs: int, optimizer: Callable[..., Any], work: Path
) -> nn.Module:
    """A network trained on Fashion-MNIST by a learning rate that rises and falls once, or what is stored of that."""
    torch.manual_seed(0)
    model = build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train() -> None:
        images, _ = fashion(work)
        steps = epochs * (len(images) // BATCH)
        own = optimizer(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(own, own.param_groups[0]["lr"], total_steps=steps)
        for epoch in range(epochs):
            for rows in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
                batch = images.take(rows)
                flipped = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, batch.images.flip(3), batch.images)
                own.zero_grad()
                F.cross_entropy(model(flipped), batch.labels).backward()
                own.step()
                schedule.step()
            print(f"{name}: epoch {epoch + 1} of {epochs}", flush=True)

    trained_once(model, work / f"{name}.pt", train)
    return model.eval()


@cache
def flowers(work: Path) -> tuple[ImageTensors, ImageTensors]:
    """2,934 training and 736 test images, scaled as the weights expect."""
    data = ImageFolder(
        str(Path(os.environ["LIGHTNING_PRUNE_DATA"]) / "flower_photos"), 112, augment=False,
        mean=(127 / 255,) * 3, std=(128 / 255,) * 3, cache=str(work / "images"),
    )  # fmt: skip
    return data.load()


def lite0(work: Path) -> nn.Module:
    """The pretrained network; its head is fitted to the features of the training images, by L-BFGS."""
    torch.manual_seed(0)
    model = ImageClassifier("timm.tf_efficientnet_lite0", 5, 112, "efficientnet-lite0").eval()
    head = model.net.classifier

    def train() -> None:
        images, _ = flowers(work)
        features: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        accuracy(model, images)
        handle.remove()
        inputs = torch.cat(features)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            total = F.cross_entropy(head(inputs), images.labels) + 1e-3 * head.weight.square().sum()
            total.backward()
            return total

        optimizer.step(loss)  # type: ignore[arg-type]

    trained_once(model, work / "lite0.pt", train)
    return model.eval()


CASES: dict[str, Case] = {
    "VGG form, Fashion-MNIST": Case(
        partial(trained, vgg, "vgg", 4, partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)), fashion, 2.1
    ),
    "ViT, Fashion-MNIST": Case(
        partial(trained, ViT, "vit", 6, partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.05)),
        fashion,
        1.5,
        {"layers": "*.mlp.0"},
    ),
    "ViT losing embedding width": Case(
        partial(trained, ViT, "vit", 6, partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.05)),
        fashion,
        1.25,
        {"layers": "net.conv_proj"},
    ),
    "EfficientNet-Lite0, flowers": Case(
        lite0, flowers, 1.5, {"ignore": ["net.conv_stem", "net.blocks.0.0.conv_pw", "*.conv_pwl"]}
    ),
}


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageTensors) -> float:
    """Share of images classified right, in %."""
    pairs = zip(images.images.split(250), images.labels.split(250), strict=True)
    return round(100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(images), 2)


def measure(work: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """One row; the network is taken from the store, and pruned as a user does it."""
    case = CASES[job["network"]]
    model, (train, test) = case.network(work), case.images(work)
    dense = accuracy(model, test)
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(job["draw"]))[:IMAGES]
    batches = list(train.images[drawn].split(BATCH))
    pruned = copy.deepcopy(model)
    began = time.process_time()
    report = prune(
        pruned, batches[0][:2], budget={"macs": 1 / case.divide}, data=batches, **case.chosen, **WAYS[job["way"]]()
    )
    seconds = time.process_time() - began
    size, before = report.size, report.dense
    assert size is not None
    assert before is not None
    return {
        "params": size.params / before.params,
        "macs": size.macs / before.macs,
        "dense": dense,
        "accuracy": accuracy(pruned.eval(), test),
        "seconds": round(seconds, 1),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each network and way."""
    lines = [
        "| network | way | MACs left | parameters left | accuracy in % | seconds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for network in CASES:
        for way in WAYS:
            found = [row for row in rows if (row["network"], row["way"]) == (network, way)]
            if found:
                values = [row["accuracy"] for row in found]
                said = shown(values, 1) if len(set(values)) > 1 else f"{values[0]:.1f}"
                first, seconds = found[0], sum(row["seconds"] for row in found) / len(found)
                lines.append(
                    f"| {network} ({first['dense']:.1f} % dense) | {way} | {100 * first['macs']:.0f} % | "
                    f"{100 * first['params']:.0f} % | {said} | {seconds:.0f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Every row, stored as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for trained networks")
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--draws", type=int, default=3, help="draws of the training images, seeds 0, 1, …")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    given.work.mkdir(parents=True, exist_ok=True)
    jobs = [
        {"network": network, "way": way, "draw": draw}
        for network in given.networks
        for draw in range(given.draws)
        for way in WAYS
        if (draw == 0 or way != "L1") and ("LayerNorm" not in way or "embedding" in network)
    ]
    rows = []
    for row in computed(jobs, partial(measure, given.work), FOLDER / "rows.jsonl", resume=given.resume):
        rows.append(row)
        fill(FOLDER / "README.md", table(rows))


if __name__ == "__main__":
    main()
