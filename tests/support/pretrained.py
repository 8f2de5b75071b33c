"""Pretrained ResNets for CIFAR-10 in this package's models: their accuracy, and that without their dead channels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_prune.data import CIFAR10, ImageTensors
from lightning_prune.models import ResNetCIFAR, load_pretrained
from lightning_prune.structure import TracedModel, trace
from lightning_prune.surgery import cut

__all__ = ["PUBLISHED", "accuracy", "dead", "load", "normalised", "weights", "without"]

#: Depth, and test accuracy in % that the authors of the weights give.
PUBLISHED = {20: 91.73, 56: 93.39}
# What the pretrained weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images: ImageTensors, source: CIFAR10) -> ImageTensors:
    """The images as the pretrained network expects them."""
    old_mean, old_std, mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (source.mean, source.std, MEAN, STD))
    return ImageTensors((images.images * old_std + old_mean - mean) / std, images.labels)


@torch.no_grad()
def accuracy(module: LightningModule, images: ImageTensors) -> float:
    """Share of images classified right, in %."""
    module.eval()
    pairs = zip(images.images.split(500), images.labels.split(500), strict=True)
    return round(100 * sum(int((module(x).argmax(1) == y).sum()) for x, y in pairs) / len(images), 2)


def weights(depth: int) -> Path | None:
    """The file of a network's weights, if it is there: ``resnet20-….th`` in ``resnet_cifar10`` beside the data."""
    folder = Path(os.environ.get("LIGHTNING_PRUNE_DATA", ".")) / "resnet_cifar10"
    return next(iter(sorted(folder.glob(f"resnet{depth}-*.th"))), None)


def load(depth: int) -> ResNetCIFAR:
    """The pretrained network, in eval mode."""
    path = weights(depth)
    if path is None:
        raise FileNotFoundError(
            f"expected resnet_cifar10/resnet{depth}-….th in the folder that LIGHTNING_PRUNE_DATA names, found none"
        )
    model = ResNetCIFAR(depth)
    load_pretrained(model, path)
    return model.eval()


@torch.no_grad()
def dead(model: ResNetCIFAR, images: Tensor) -> dict[str, list[int]]:
    """Inner channels of the blocks that the ReLU leaves at zero at every position of all these images, by group."""
    highest: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Tensor) -> None:
            highest[name] = torch.maximum(highest.get(name, torch.tensor(0.0)), out.amax((0, 2, 3)))

        return hook

    handles = [
        module.register_forward_hook(watch(name.replace("bn1", "conv1")))
        for name, module in model.named_modules()
        if name.startswith("layer") and name.endswith("bn1")
    ]
    for batch in images.split(500):
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.nonzero(values == 0).flatten().tolist() for name, values in highest.items()}


@torch.no_grad()
def logits(model: ResNetCIFAR, images: Tensor) -> Tensor:
    """The network's answers, in batches."""
    return torch.cat([model(batch) for batch in images.split(500)])


def without(model: ResNetCIFAR, gone: dict[str, list[int]], test: ImageTensors) -> dict[str, Any]:
    """Cut these channels; what the network answers before and after."""
    before, dense = logits(model, test.images), accuracy(model, test)
    structure = trace(TracedModel.of(model, model.example_input_array))
    kept = {name: sorted({*range(structure.group(name).width)} - {*units}) for name, units in gone.items()}
    after = structure.take(kept)
    cut(model, structure.axes(kept))
    now = logits(model, test.images)
    return {
        "accuracy": dense,
        "params": structure.cost.params(structure.widths),
        "flops": 2 * structure.cost.macs(structure.widths),
        "dead": sum(map(len, gone.values())),
        "of": sum(structure.group(name).width for name in gone),
        "accuracy_after": accuracy(model, test),
        "params_after": after.cost.params(after.widths),
        "flops_after": 2 * after.cost.macs(after.widths),
        "answers_changed": int((before.argmax(1) != now.argmax(1)).sum()),
        "largest_difference": float((before - now).abs().max()),
        "largest_logit": float(before.abs().max()),
    }
