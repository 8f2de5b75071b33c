"""Cumulative parameters over the depth of a backbone: ``python -m benchmarks.depth``.

Figure 2 of Ratajczyk & Horzyk (2024): the share of a backbone's parameters in its first layers, against the share of
its layers. The paper states at most 36 % at half of the depth for VGG19, ResNet50, ResNet101 (v2) and Inception (v2);
here it is computed for torchvision's networks, some of which are other versions. Nothing is trained, and no weights are
needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from benchmarks.common import publish, quiet
from lightning_prune.extras import require
from lightning_prune.structure.backbone import Backbone

NETWORKS = ("vgg16", "vgg19", "resnet50", "resnet101", "inception_v3", "googlenet", "densenet121", "efficientnet_b0")


def build(name: str) -> nn.Module:
    """A network of torchvision without weights, its auxiliary classifiers left out."""
    models = require("torchvision.models", extra="vision")
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    net: nn.Module = models.get_model(name, weights=None, **options)
    for auxiliary in ("AuxLogits", "aux1", "aux2"):
        if hasattr(net, auxiliary):
            setattr(net, auxiliary, None)
    return net


def cumulative(net: nn.Module) -> list[int]:
    """Parameters of the first convolution, of the first two, and so on, norms included."""
    counts = (sum(p.numel() for p in layer.parameters.values()) for layer in Backbone.of(net).layers)
    return list(accumulate(counts))


def at_half(counts: Sequence[int]) -> float:
    """Share of the parameters in the first half of the layers."""
    return counts[len(counts) // 2 - 1] / counts[-1]


def table(found: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """Markdown: a row for each network."""
    yield "| backbone | convolutions | parameters | in the first half of the layers |"
    yield "|---|---:|---:|---:|"
    for name, counts in found.items():
        yield f"| {name} | {len(counts)} | {counts[-1]:,} | {100 * at_half(counts):.1f} % |"


def figure(found: Mapping[str, Sequence[int]]) -> Any:
    """The share of the parameters against the share of the layers."""
    pyplot = require("matplotlib.pyplot", extra="plot")
    drawn, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, counts in found.items():
        axes.plot(
            [(i + 1) / len(counts) for i in range(len(counts))], [count / counts[-1] for count in counts], label=name
        )
    axes.axvline(0.5, color="0.7", linewidth=1, zorder=0)
    axes.set(xlabel="share of the convolutions", ylabel="share of the backbone's parameters", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False)
    return drawn


def main() -> None:
    """All networks."""
    quiet()
    with torch.device("meta"):
        found = {name: cumulative(build(name)) for name in NETWORKS}
    publish("depth", {"cumulative": found}, "\n".join(table(found)), figure(found))


if __name__ == "__main__":
    main()
