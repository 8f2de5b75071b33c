"""Channels that are dead: cutting them changes no answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lightning_prune.data import CIFAR10, ImageTensors
from lightning_prune.models import ResNetCIFAR
from tests.support.pretrained import PUBLISHED, dead, load, normalised, weights, without

KILLED = {"layer1.0.conv1": [0, 7], "layer2.0.conv1": [3], "layer3.0.conv1": [1, 2, 63]}


def crippled(lowest: float) -> ResNetCIFAR:
    """A network of which some inner channels are normalised to no more than this number."""
    model = ResNetCIFAR(8).eval()
    for name, units in KILLED.items():
        norm = model.get_submodule(name.replace("conv1", "bn1"))
        with torch.no_grad():
            norm.weight[units], norm.bias[units] = 0.0, lowest
    return model


@pytest.mark.parametrize("lowest", [0.0, -1.0])
def test_what_never_passes_a_relu_is_dead_and_can_go(lowest: float) -> None:
    model, images = crippled(lowest), ImageTensors(torch.randn(20, 3, 32, 32), torch.randint(10, (20,)))
    found = dead(model, images.images)
    assert {name: units for name, units in found.items() if units} == KILLED
    before = [model.get_submodule(name).out_channels for name in KILLED]
    row = without(model, found, images)
    assert (row["dead"], row["answers_changed"]) == (6, 0)
    assert row["accuracy"] == row["accuracy_after"]
    assert row["largest_difference"] <= 1e-5 * row["largest_logit"]
    lost = [len(units) for units in KILLED.values()]
    assert [model.get_submodule(name).out_channels for name in KILLED] == [
        wide - n for wide, n in zip(before, lost, strict=True)
    ]
    assert row["params_after"] == sum(p.numel() for p in model.parameters()) < row["params"]


def test_what_passes_a_relu_once_is_alive() -> None:
    assert not any(dead(crippled(1e-6), torch.randn(20, 3, 32, 32)).values())


CIFAR_IS_HERE = (Path(os.environ.get("LIGHTNING_PRUNE_DATA", "")) / "cifar-10-batches-py").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("depth", PUBLISHED)
@pytest.mark.skipif(not CIFAR_IS_HERE, reason="needs CIFAR-10 under LIGHTNING_PRUNE_DATA")
def test_pretrained_networks_are_as_good_as_published(depth: int) -> None:
    if weights(depth) is None:
        pytest.skip(f"needs resnet_cifar10/resnet{depth}-….th under LIGHTNING_PRUNE_DATA")
    source = CIFAR10()
    images, test = (normalised(part, source) for part in source.load())
    model = load(depth)
    row = without(model, dead(model, images.images), test)
    assert row["accuracy"] == row["accuracy_after"] == PUBLISHED[depth]
    assert row["dead"] > 0
    assert row["answers_changed"] == 0
