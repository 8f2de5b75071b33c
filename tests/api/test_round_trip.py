"""Networks of other libraries through a file; `python -m benchmarks.portable` does this with all of the survey's."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_prune import load, prune, rebuild, save
from lightning_prune.surgery.tensors import named

IMAGES = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=10), IMAGES),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), IMAGES),
    "timm": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=10), IMAGES),
    "transformer": (lambda: timm.create_model("deit_tiny_patch16_224", img_size=64, depth=2, num_classes=10), IMAGES),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_equal_bit_for_bit(name: str, tmp_path: Path) -> None:
    build, example = NETWORKS[name]
    torch.manual_seed(1)
    network = build().eval()
    prune(network, example, pruning_ratio=1 / 3)
    save(network, tmp_path / "small.safetensors")
    rebuild(network, tmp_path / "small.py")
    torch.manual_seed(2)
    fresh = build().eval()
    dense = sum(parameter.numel() for parameter in fresh.parameters())
    load(fresh, tmp_path / "small.safetensors")
    assert sum(parameter.numel() for parameter in fresh.parameters()) < 0.9 * dense
    assert all(torch.equal(tensor, named(network)[name]) for name, tensor in named(fresh).items())
    assert torch.equal(fresh(example), network(example))
    rebuilt = build().eval()
    runpy.run_path(str(tmp_path / "small.py"))["load"](rebuilt, tmp_path / "small.safetensors")
    assert repr(rebuilt) == repr(network)
    assert torch.equal(rebuilt(example), network(example))
