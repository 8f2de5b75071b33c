"""Budgets of parameters: what is left, in the form of the paper's appendix C, and its latency: part ``budgets``.

VGG16-BN as far as it was trained, and ResNet-56 with projection shortcuts (the pretrained network's function), ranked
in groups of four on two training images of every class of CIFAR-10, in a run of Lightning. The chain with
``coupling="group"``, the residual network with ``"stage"``.
"""

from __future__ import annotations

import gc
import io
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import quiet_fit
from benchmarks.spvr_networks import balanced, cifar10, resnet56_projection, vgg16
from lightning_prune import SPvRPruning
from lightning_prune.callbacks import spvr as callback_file
from lightning_prune.callbacks.showing import Showing
from lightning_prune.models.classifier import Classifier
from lightning_prune.planning import ranked

__all__ = ["NETWORKS", "SHARES", "cut", "latency", "size_on_disk"]

Row = dict[str, Any]
NETWORKS: dict[str, tuple[Callable[[Path], Classifier], str]] = {
    "VGG16-BN": (vgg16, "group"),
    "ResNet-56": (lambda _: resnet56_projection(), "stage"),
}
SHARES = (1.0, 0.3, 0.1, 0.05, 0.02)
RUNS, WARM = 1500, 100


def cut(name: str, share: float, work: Path) -> Row:
    """One network at one budget; at 1 as it is."""
    make, coupling = NETWORKS[name]
    model, row = make(work), Row()
    whole = sum(p.numel() for p in model.parameters())
    if share < 1:
        x, y = balanced(cifar10(train=True), 2)
        plans: list[ranked.RankedPlan] = []
        planned = callback_file.plan_ranked

        def watched(*args: Any) -> ranked.RankedPlan:
            plans.append(planned(*args))
            return plans[-1]

        pruning = SPvRPruning(
            share,
            group_size=4,
            samples_per_class=5,
            coupling=coupling,
            race=None,
            dirpath=str(work / "rankings" / name),
        )
        Showing.measure = lambda self, subject, size: size  # type: ignore[method-assign]
        callback_file.plan_ranked = watched  # type: ignore[assignment]
        try:
            loader = DataLoader(TensorDataset(x, y), batch_size=20)
            quiet_fit(model, loader, [pruning], max_epochs=1, limit_train_batches=1)
        finally:
            callback_file.plan_ranked = planned
        assert pruning.structure is not None
        row = {"before_last": plans[-1].params_before, "limit": int(share * whole + 1e-9)}
    model.eval()
    params = sum(p.numel() for p in model.parameters())
    row |= {"params": params, "of": whole, "form": form(model), "layers": len(_convolutions(model))}
    return row | {"latency": latency(model), "bytes": size_on_disk(model)}


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


def form(model: nn.Module) -> str:
    """Widths of a chain with "M" for its pooling; of a residual network those of the blocks that are left."""
    if hasattr(model, "features"):
        marks = {nn.Conv2d: lambda layer: str(layer.out_channels), nn.MaxPool2d: lambda _: "M"}
        return ", ".join(marks[type(layer)](layer) for layer in model.features if type(layer) in marks)
    found: list[tuple[str, int]] = []
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage.children():
            layers = [layer.out_channels for layer in _convolutions(block)]
            text = str(layers[:2]) if len(layers) > 1 else ""
            if text and found and found[-1][0] == text:
                found[-1] = text, found[-1][1] + 1
            elif text:
                found.append((text, 1))
    return ", ".join(f"{text} × {count}" for text, count in found) or "no block"


@torch.inference_mode()
def latency(model: nn.Module) -> list[float]:
    """Quartiles of milliseconds with one image."""
    x = torch.randn(1, 3, 32, 32)
    for _ in range(WARM):
        model(x)
    gc.disable()
    spent = []
    for _ in range(RUNS):
        began = time.perf_counter()
        model(x)
        spent.append(1000 * (time.perf_counter() - began))
    gc.enable()
    return quantiles(spent, n=4)


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the state dict."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()
