"""Networks and images of `benchmarks.spvr`."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.data import CIFAR10, ImageTensors
from lightning_prune.models import VGG16CIFAR, ResNetCIFAR
from tests.support.pretrained import load, normalised

__all__ = ["balanced", "cifar10", "resnet56", "resnet56_projection", "train_vgg16", "vgg16"]

_BATCH = 128


@cache
def cifar10(*, train: bool) -> ImageTensors:
    """All images, as the pretrained networks expect them; the folder is that of ``LIGHTNING_PRUNE_DATA``."""
    source = CIFAR10(root=os.environ["LIGHTNING_PRUNE_DATA"])
    return normalised(source.load()[0 if train else 1], source)


def balanced(images: ImageTensors, per_class: int) -> tuple[Tensor, Tensor]:
    """The first images of every class, one class after the other in turn."""
    rows = torch.stack([(images.labels == label).nonzero()[:per_class, 0] for label in range(10)], 1).flatten()
    return images.images[rows], images.labels[rows]


def vgg16(work: Path) -> VGG16CIFAR:
    """VGG16-BN as far as it was trained; with random weights where it was not."""
    torch.manual_seed(0)
    model = VGG16CIFAR()
    if (work / "vgg16.pt").is_file():
        model.load_state_dict(torch.load(work / "vgg16.pt", weights_only=True)["model"])
    return model.eval()


def resnet56() -> ResNetCIFAR:
    """The pretrained one, with option-A shortcuts."""
    return load(56)


def resnet56_projection() -> ResNetCIFAR:
    """The same function with projection shortcuts: their 1×1 convolutions put channels where zero padding puts them."""
    padded, model = resnet56(), ResNetCIFAR(56, shortcut="projection")
    model.load_state_dict(padded.state_dict(), strict=False)
    for module in model.modules():
        shortcut = getattr(module, "shortcut", None)
        if isinstance(shortcut, nn.Sequential):
            conv, norm = shortcut
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            more = conv.out_channels - conv.in_channels
            with torch.no_grad():
                conv.weight.zero_()
                conv.weight[more // 2 : more // 2 + conv.in_channels, :, 0, 0] = torch.eye(conv.in_channels)
                norm.running_var.fill_(1 - norm.eps)  # type: ignore[union-attr]
    return model.eval()


def train_vgg16(work: Path, steps: int, minutes: float) -> int:
    """Train VGG16-BN for so many steps of 128 images, or as far as the time reaches; goes on where it was stopped.

    Returns:
        Steps that are done.
    """
    data, file = cifar10(train=True), work / "vgg16.pt"
    torch.manual_seed(0)
    model = VGG16CIFAR().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=max(steps, 2))
    done, until = 0, time.monotonic() + 60 * minutes
    if file.is_file():
        stored = torch.load(file, weights_only=True)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        schedule.load_state_dict(stored["schedule"])
        done = stored["steps"]
    model.train()
    while done < steps and time.monotonic() < until:
        x, y = _batch(data, done)
        with torch.autocast("cpu", torch.bfloat16):  # half the time
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        done += 1
        if done % 25 == 0 or done == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"schedule": schedule.state_dict(), "steps": done}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
            print("step", done, "of", steps, f"loss {loss.item():.3f}", flush=True)
    return done


def _batch(data: ImageTensors, step: int) -> tuple[Tensor, Tensor]:
    """The images of a step, mirrored and shifted; a function of its number."""
    epoch, place = divmod(step, len(data) // _BATCH)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch))
    rows, draw = order[place * _BATCH : (place + 1) * _BATCH], torch.Generator().manual_seed(step)
    x = data.images[rows]
    x = torch.where((torch.rand(len(x), generator=draw) < 0.5)[:, None, None, None], x.flip(3), x)
    down, right = torch.randint(0, 9, (2,), generator=draw).tolist()
    x = F.pad(x, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
    return x.contiguous(memory_format=torch.channels_last), data.labels[rows]
