"""Files that make a narrow network without this package: what they make is the network, and they refuse any other."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import PruningError, Scope, load, prune, rebuild, save, strip
from lightning_prune.api import rebuilding, standalone
from lightning_prune.models import CNNClassifier
from lightning_prune.structure import TracedModel, stubs, trace
from lightning_prune.surgery import LayerSpec, transaction
from lightning_prune.surgery.tensors import named


class Block(nn.Module):
    """A residual block with tied heads, a grouped convolution, and a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(8, 8)
        self.inner, self.outer = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.first, self.second = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.linspace(0.5, 2, 8)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x))) * self.scale
        x = (self.deep(x) + self.outer(F.relu(self.inner(x)))).mean((2, 3))
        return self.first(x) + self.second(x)


class Folded(nn.Sequential):
    """What flattens and unflattens."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.Unflatten(1, (8, 2)), nn.Conv1d(8, 4, 1), nn.Flatten(), nn.Linear(8, 3))


class Conv1D(nn.Module):
    """GPT-2's layer in transformers: ``forward`` reads the width of its outputs from an attribute."""

    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


IMAGES, VECTORS = torch.zeros(2, 3, 8, 8), torch.zeros(2, 6)


class Reader(nn.Module):
    """A recurrent layer between a table and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.memory = nn.Embedding(9, 4), nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(self.embed(x.abs().long()))[0])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, VECTORS),
    "residual": (Block, IMAGES),
    "half": (lambda: mlp().bfloat16(), VECTORS.bfloat16()),
    "folded": (Folded, VECTORS),
    "attributes": (lambda: nn.Sequential(Conv1D(8, 6), nn.GELU(), Conv1D(3, 8)), VECTORS),
    "recurrent": (Reader, VECTORS),
    "module": (lambda: CNNClassifier(channels=(4, 4), hidden=(6, 6)), torch.zeros(2, 3, 32, 32)),
}


@pytest.fixture(autouse=True)
def _no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files must not import this package."""
    run = runpy.run_path

    def alone(path: str) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "lightning_prune", None)
            return run(path)

    monkeypatch.setattr(runpy, "run_path", alone)


def rebuilt(net: nn.Module, fresh: nn.Module, folder: Path) -> nn.Module:
    """A fresh network that took both files."""
    save(net, folder / "small.safetensors")
    rebuild(net, folder / "small.py")
    small = runpy.run_path(str(folder / "small.py"))
    return small["load"](fresh, folder / "small.safetensors")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ratios", [(0.4,), (0.25, 0.6)], ids=["one cut", "two cuts"])
def test_a_new_network_becomes_the_narrow_one(name: str, ratios: tuple[float, ...], tmp_path: Path) -> None:
    build, example = NETWORKS[name]
    net, fresh = build(), build()
    for ratio in ratios:
        prune(net, example, pruning_ratio=ratio)
    dense = sum(tensor.numel() for tensor in fresh.parameters())
    assert rebuilt(net, fresh, tmp_path) is fresh
    assert sum(tensor.numel() for tensor in fresh.parameters()) < dense
    assert repr(fresh) == repr(net)
    assert all(torch.equal(tensor, named(net)[name]) for name, tensor in named(fresh).items())
    x = torch.randn_like(example)
    assert torch.equal(fresh.eval()(x), net.eval()(x))
    out = fresh.train()(x).sum()
    out.backward()
    assert all(parameter.grad is not None for parameter in fresh.parameters())


def test_a_loaded_network_is_rebuilt_too(tmp_path: Path) -> None:
    net = Block()
    prune(net, IMAGES, pruning_ratio=0.5)
    save(net, tmp_path / "first.safetensors")
    again = load(Block(), tmp_path / "first.safetensors")
    x = torch.randn_like(IMAGES)
    assert torch.equal(rebuilt(again, Block(), tmp_path)(x), net(x))


def test_attributes_are_widened_again(tmp_path: Path) -> None:
    """Also those of layers that PyTorch does not know."""
    build, example = NETWORKS["attributes"]
    net, other = build(), build()
    save(net, tmp_path / "dense.safetensors")
    prune(other, example, pruning_ratio=0.5)
    x = torch.randn_like(example)
    assert torch.equal(load(other, tmp_path / "dense.safetensors")(x), net(x))


def test_compiled_layers_have_the_names_of_others(tmp_path: Path) -> None:
    net = mlp()
    prune(net, VECTORS, pruning_ratio=0.5)
    net[2] = torch.compile(net[2])  # type: ignore[assignment]
    compiled: Any = torch.compile(net)
    x = torch.randn_like(VECTORS)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(rebuilt(compiled, mlp(), tmp_path)(x), compiled(x))


def test_narrow_alone_keeps_the_weights_in_front(tmp_path: Path) -> None:
    """To train the narrow network from scratch."""
    net, fresh = mlp(), mlp()
    prune(net, VECTORS, pruning_ratio=0.5)
    rebuild(net, tmp_path / "small.py")
    before = fresh[0].weight.detach().clone()
    small = runpy.run_path(str(tmp_path / "small.py"))
    assert small["narrow"](fresh) is fresh
    assert torch.equal(fresh[0].weight, before[:4])
    assert fresh[0].weight.is_leaf


def test_replaced_layers(tmp_path: Path) -> None:
    net = mlp().double()
    prune(net, VECTORS.double(), pruning_ratio=0.25)
    linear = LayerSpec("Linear", {"in_features": 6, "out_features": 5})
    head = LayerSpec("Sequential", layers=(linear, LayerSpec("ELU")))
    with transaction(net, run=lambda: net(VECTORS.double())) as change:
        specs = {"3": LayerSpec("ReLU", {"inplace": True}), "4": head}
        change.replace(specs, lambda: trace(TracedModel.of(net, VECTORS.double())))
    prune(net, VECTORS.double(), pruning_ratio={"2": 0.5})
    fresh = rebuilt(net, mlp().double().eval(), tmp_path)
    x = torch.randn_like(VECTORS).double()
    assert torch.equal(fresh(x), net(x))
    assert repr(fresh) == repr(net)
    assert fresh[4][0].weight.dtype == torch.float64
    assert not fresh[3].training


class Branches(nn.Module):
    """Two branches that can go, with convolutions or linear layers."""

    def __init__(self, convolutions: bool) -> None:
        super().__init__()

        def make(inputs: int, outputs: int) -> nn.Module:
            if convolutions:
                return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=outputs != 8)
            return nn.Linear(inputs, outputs)

        self.stem, self.inner, self.outer = make(3, 8), make(8, 6), make(6, 8)
        self.norm = nn.BatchNorm2d(6) if convolutions else nn.LayerNorm(6)
        self.skip = nn.AvgPool2d(4) if convolutions else nn.Identity()
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.skip(x) + self.outer(self.norm(self.inner(x)))
        return self.head(x.flatten(2).mean(2) if x.dim() == 4 else x)


@pytest.mark.parametrize("convolutions", [False, True])
def test_removed_layers(convolutions: bool, tmp_path: Path) -> None:
    """The file has modules of its own for them, which `strip` refuses to leave."""
    x = torch.randn(2, 3, 16, 16) if convolutions else torch.randn(2, 3)
    net = Branches(convolutions)
    with torch.no_grad():
        net.inner.weight.zero_()  # the first to go
    prune(net, x, budget={"units": 8}, scope=Scope("global", min_width=0), layers=["inner", "stem"])
    assert isinstance(net.outer, stubs.Constant)
    assert isinstance(net.inner, stubs.Empty)
    fresh = rebuilt(net, Branches(convolutions), tmp_path)
    assert torch.equal(fresh(x), net(x))
    fresh(x).sum().backward()
    assert all(parameter.grad is not None for parameter in fresh.parameters())


class TestRefusals:
    @pytest.fixture
    def small(self, tmp_path: Path) -> Iterator[dict[str, Any]]:
        net = mlp()
        prune(net, VECTORS, pruning_ratio=0.25)
        with transaction(net, run=lambda: net(VECTORS)) as change:
            change.replace({"3": LayerSpec("ReLU")}, lambda: trace(TracedModel.of(net, VECTORS)))
        save(net, tmp_path / "small.safetensors")
        rebuild(net, tmp_path / "small.py")
        return runpy.run_path(str(tmp_path / "small.py"))

    def refused(self, small: dict[str, Any], match: str, net: nn.Module) -> None:
        before = {name: tensor.clone() for name, tensor in named(net).items()}
        with pytest.raises(ValueError, match=match):
            small["narrow"](net)
        assert all(torch.equal(tensor, before[name]) for name, tensor in named(net).items())

    def test_another_network(self, small: dict[str, Any]) -> None:
        wide = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))
        self.refused(small, r"0\.out_features is 9 instead of 8; 0\.weight is \(9, 6\) instead of \(8, 6\)", wide)
        self.refused(small, r"4\.in_features is missing instead of 8", nn.Sequential(*mlp()[:4]))
        self.refused(small, r"3 is of the class ReLU instead of Tanh", nn.Sequential(*mlp()[:3], nn.ReLU(), mlp()[4]))

    def test_a_network_that_is_narrow_already(self, small: dict[str, Any]) -> None:
        self.refused(small, "expected the dense Sequential, built as before", small["narrow"](mlp()))

    def test_weights_of_another_network(self, small: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"only the network has 0\.bias"):
            small["load"](mlp(), {"0.weight": torch.zeros(6, 6)})
        save(nn.Sequential(*mlp(), nn.Linear(3, 3, bias=False)), tmp_path / "other")
        with pytest.raises(ValueError, match=r"only the file has 5\.weight"):
            small["load"](mlp(), tmp_path / "other")
        with pytest.raises(RuntimeError, match="size mismatch"):
            small["load"](mlp(), mlp().state_dict())

    def test_a_network_without_history(self, tmp_path: Path) -> None:
        net = mlp()
        with pytest.raises(ValueError, match=r"expected a pruned Sequential with its pruning history.* before `strip`"):
            rebuild(net, tmp_path / "small.py")
        prune(net, VECTORS, pruning_ratio=0.5)
        with pytest.raises(ValueError, match="stripped"):
            rebuild(strip(net), tmp_path / "small.py")
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
            rebuild(None, tmp_path / "small.py")  # type: ignore[arg-type]
        assert not [*tmp_path.iterdir()]


class TestVerification:
    """What a file makes is compared before it is written."""

    def test_a_missing_layer_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        net = mlp()
        prune(net, VECTORS, pruning_ratio=0.5)
        monkeypatch.setattr(rebuilding, "_changed", lambda *_: [("0", {"weight": ((8, 6), (4, 6))})])
        with pytest.raises(PruningError, match=r"size mismatch for 0\.bias"):
            rebuild(net, tmp_path / "small.py")
        assert not [*tmp_path.iterdir()]

    def test_other_weights_are_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        net = mlp()
        prune(net, VECTORS, pruning_ratio=0.5)
        monkeypatch.setattr(
            rebuilding, "tensors_to_store", lambda net: ({n: t + 1 for n, t in net.state_dict().items()}, {})
        )
        with pytest.raises(PruningError, match=r"0\.weight has other weights"):
            rebuild(net, tmp_path / "small.py")

    def test_other_options_are_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        changed = rebuilding._changed

        def without_options(network: nn.Module, history: Any) -> Iterator[Any]:
            for name, parts in changed(network, history):
                yield name, {part: both for part, both in parts.items() if part != "out_features"}

        net = mlp()
        prune(net, VECTORS, pruning_ratio=0.5)
        monkeypatch.setattr(rebuilding, "_changed", without_options)
        with pytest.raises(PruningError, match=r"0 has the options .*'out_features': 8.* instead of .*4"):
            rebuild(net, tmp_path / "small.py")


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_stubs_compute_what_those_of_this_package_do(kind: str) -> None:
    layer = nn.Linear(4, 3) if kind == "linear" else nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2))
    x = torch.randn(2, 4) if kind == "linear" else torch.randn(2, 4, 9, 8)
    empty, constant = stubs.Empty(layer), stubs.Constant(layer)
    assert standalone.Empty(empty.window)(x).shape == empty(x).shape
    none = x[:, :0]
    own = standalone.Constant(3, True, constant.window)
    own.load_state_dict(constant.state_dict())
    assert torch.equal(own(none), constant(none))
    layer.bias = None
    bare = stubs.Constant(layer)
    assert torch.equal(standalone.Constant(3, False, bare.window)(none), bare(none))
