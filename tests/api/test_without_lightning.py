"""What needs no Trainer works where Lightning is not installed: in a process that refuses to import it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_prune
from lightning_prune import Scope, load, prune, save, strip
from lightning_prune.models import CNNClassifier
from lightning_prune.structure.stubs import Constant
from lightning_prune.surgery import history_of, masks_of
from lightning_prune.surgery.masks import attach_masks

REFUSING = '''
import sys


class Refusing:
    """Finds no module of these packages."""

    def __init__(self, *packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "jsonargparse")
sys.meta_path.insert(0, Refusing(*LIGHTNING))
'''
NETWORK = """
import torch
from torch import nn

torch.manual_seed(int(sys.argv[2]))
folder = sys.argv[1]
images = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
network = nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 12), nn.ReLU(), nn.Linear(12, 4)
).eval()
"""
PRUNE = """
import lightning_prune

assert lightning_prune.inspect(network, images).structure.widths == {"0": 8, "4": 12}
scan = lightning_prune.sensitivity(network, lambda net: float(net(images).sum()), images, shares=(0.5,))
assert list(scan.metrics) == ["0", "4"]
report = lightning_prune.prune(network, images, pruning_ratio=0.5)
assert report.widths == {"0": 4, "4": 6}
lightning_prune.save(network, f"{folder}/small.safetensors")
lightning_prune.rebuild(network, f"{folder}/small.py")
assert lightning_prune.export(network, f"{folder}/small.pt2", images).difference < 1e-4
torch.save(network(images), f"{folder}/outputs.pt")
torch.save(lightning_prune.strip(network), f"{folder}/stripped.pt")
"""
LOAD = """
import lightning_prune

outputs = torch.load(f"{folder}/outputs.pt")
assert not torch.equal(network(images), outputs)
assert torch.equal(lightning_prune.load(network, f"{folder}/small.safetensors")(images), outputs)
assert not any(name.partition(".")[0] in LIGHTNING for name in sys.modules)
"""
UNPICKLE = """
sys.meta_path.insert(0, Refusing("lightning_prune"))
stripped = torch.load(f"{folder}/stripped.pt", weights_only=False)
assert torch.equal(stripped(images), torch.load(f"{folder}/outputs.pt"))
assert stripped[0].out_channels == 4
sys.path.insert(0, folder)
import small

small.load(network, f"{folder}/small.safetensors")
assert torch.equal(network(images), torch.load(f"{folder}/outputs.pt"))
exported = torch.export.load(f"{folder}/small.pt2").module()(images)
assert torch.allclose(exported, stripped(images), atol=1e-5)
assert "lightning_prune" not in sys.modules
"""


def run(folder: Path, seed: int, code: str) -> None:
    environment = {"PYTHONPATH": str(Path(lightning_prune.__file__).parent.parent), "PATH": "/usr/bin"}
    command = [sys.executable, "-c", REFUSING + NETWORK + code, str(folder), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_prune_save_and_load_in_other_processes(tmp_path: Path) -> None:
    run(tmp_path, 0, PRUNE)
    run(tmp_path, 1, LOAD)
    run(tmp_path, 2, UNPICKLE)


class TestStrip:
    def test_nothing_of_this_package_stays(self) -> None:
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        x = torch.randn(3, 4)
        prune(net, x, pruning_ratio=0.5)
        attach_masks(net, {"0.weight": torch.zeros(4, 4, dtype=torch.bool)})
        outputs = net(x)
        assert strip(net) is net
        assert history_of(net) is None
        assert not masks_of(net)
        assert b"lightning_prune" not in pickle.dumps(net)
        assert torch.equal(copy.deepcopy(net)(x), outputs)
        assert strip(net) is net

    def test_a_lightning_module_gets_its_own_hooks_back(self) -> None:
        net = CNNClassifier(channels=(4, 4), hidden=(6, 6))
        prune(net, pruning_ratio=0.5)
        assert vars(net).keys() >= {"on_save_checkpoint", "on_load_checkpoint"}
        strip(net)
        assert not vars(net).keys() & {"on_save_checkpoint", "on_load_checkpoint"}
        checkpoint: dict[str, object] = {}
        net.on_save_checkpoint(checkpoint)
        assert not checkpoint

    def test_stand_ins_of_removed_layers_are_refused(self, tmp_path: Path) -> None:
        class Branch(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 8)
                self.head = nn.Linear(8, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.stem(x).relu()
                return self.head(x + self.outer(self.inner(x).relu()))

        net, x = Branch(), torch.randn(3, 4)
        with torch.no_grad():
            net.inner.weight.zero_()  # the first to go
        prune(net, x, budget={"units": 8}, scope=Scope("global", min_width=0), layers=["inner", "stem"])
        assert isinstance(net.outer, Constant)
        history = history_of(net)
        assert history is not None
        with pytest.raises(ValueError, match=r"modules of lightning_prune in place of .*outer.* `rebuild` instead"):
            strip(net)
        assert history_of(net) is history
        save(net, tmp_path / "small.safetensors")
        assert torch.equal(load(Branch(), tmp_path / "small.safetensors")(x), net(x))
