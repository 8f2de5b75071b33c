"""Repairs of networks with grouped convolutions right after a cut: ``python -m benchmarks.repair_grouped``.

torchvision's networks with random weights are run on noise, without training. Measured is the squared error of the
outputs, relative to the squared outputs, right after 30 % of every group was removed by L1. Repairs use 16 batches of 8
images.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Sequence

import torch
import torchvision
from torch import nn

from benchmarks.common import publish, quiet
from lightning_prune import FoldMean, Ridge, prune
from lightning_prune.surgery import Repair

NETWORKS = ("resnext50_32x4d", "regnet_y_400mf", "shufflenet_v2_x0_5")
REPAIRS: dict[str, tuple[Repair, ...]] = {"none": (), "mean": (FoldMean(16),), "ridge": (Ridge(16),)}


def drawn(name: str, generator: torch.Generator) -> nn.Module:
    """A network whose norms have seen some noise."""
    network: nn.Module = torchvision.models.get_model(name, num_classes=10)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, 64, 64, generator=generator))
    return network.eval()


@torch.no_grad()
def error(dense: nn.Module, narrow: nn.Module, images: torch.Tensor) -> float:
    """Squared error of the outputs over the squared outputs."""
    expected = dense(images)
    return float((narrow.eval()(images) - expected).square().sum() / expected.square().sum())


def row(name: str, seed: int) -> dict[str, float]:
    """The error by each repair."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    dense = drawn(name, generator)
    data: Sequence[torch.Tensor] = [torch.randn(8, 3, 64, 64, generator=generator) for _ in range(16)]
    images = torch.randn(16, 3, 64, 64, generator=generator)
    found = {}
    for label, repairs in REPAIRS.items():
        narrow = copy.deepcopy(dense)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that stay as they are
            prune(narrow, images[:2], pruning_ratio=0.3, data=data if repairs else None, extensions=repairs)
        found[label] = error(dense, narrow, images)
    return found


def main() -> None:
    """Three networks, three seeds."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    quiet()
    rows = {name: [row(name, seed) for seed in range(3)] for name in NETWORKS}
    lines = [f"| | {' | '.join(REPAIRS)} |", f"|---|{'---:|' * len(REPAIRS)}"]
    for name, found in rows.items():
        cells = (f"{sorted(one[label] for one in found)[1]:.2g}" for label in REPAIRS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    publish("repair_grouped", {"rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
