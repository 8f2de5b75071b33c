"""Plain weights of narrow networks: loaded where shapes tell all, else the network stays as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import load, load_by_shapes, prune, save, strip
from lightning_prune.surgery import HistoryError, history_of
from lightning_prune.surgery.tensors import named


class Block(nn.Module):
    """A residual block with a depthwise and a grouped convolution, norms and tied heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)
        self.deep, self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1, groups=2)
        self.groups = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, groups=2)
        self.first, self.second = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.up(x + self.groups(self.wide(self.deep(x)))).mean((2, 3))
        return self.first(x) + self.second(x)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


IMAGES, VECTORS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32), torch.zeros(2, 6)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, VECTORS),
    "block": (Block, IMAGES),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), IMAGES),
    "transformer": (lambda: timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, num_classes=10), IMAGES),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_dict(name: str) -> None:
    build, example = NETWORKS[name]
    net, fresh = build().eval(), build().eval()
    prune(net, example, pruning_ratio=0.5)
    with_heads = name == "transformer"
    if with_heads:
        with pytest.raises(HistoryError, match=r"blocks.0.attn may have lost attention heads.* give an `example`"):
            load_by_shapes(fresh, net.state_dict())
    assert load_by_shapes(fresh, net.state_dict(), example if with_heads else None) is fresh
    assert torch.equal(fresh(example), net(example))
    assert repr(fresh) == repr(net)
    assert history_of(fresh) is None
    prune(fresh, example, pruning_ratio=0.25)  # of the present size


class Attention(nn.Module):
    """Attention whose numbers of heads and of their features are attributes."""

    def __init__(self, heads: int, features: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, features
        self.qkv, self.out = nn.Linear(6, 3 * heads * features), nn.Linear(heads * features, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).reshape(*x.shape[:2], self.num_heads * self.head_dim))


TOKENS = torch.linspace(-1, 1, 2 * 4 * 6).view(2, 4, 6)


@pytest.mark.parametrize(
    ("kind", "ratio", "warns"),
    [("qkv", 0.35, 0), ("qkv", 0.5, 2), ("qkv#head_dim", 0.35, 0), ("qkv#head_dim", 2 / 3, 4)],
)
def test_heads_and_their_features(kind: str, ratio: float, warns: int) -> None:
    def build() -> nn.Module:
        return Attention(*((4, 6) if warns else (5, 3) if kind == "qkv" else (3, 5)))

    net, fresh = build(), build()
    prune(net, TOKENS, pruning_ratio=ratio, layers=kind)
    left = f"whole heads are taken.* {warns} of 4 heads of qkv and {6 if warns == 2 else 2} of 6 of qkv#"
    with pytest.warns(match=left) if warns else contextlib.nullcontext():
        load_by_shapes(fresh, net.state_dict(), TOKENS)
    assert torch.equal(fresh(TOKENS), net(TOKENS))
    assert (fresh.num_heads, fresh.head_dim) == (net.num_heads, net.head_dim)


def test_heads_and_features_pruned_together_are_refused() -> None:
    net = Attention(4, 6)
    prune(net, TOKENS, pruning_ratio={"qkv": 0.25, "qkv#head_dim": 0.17})
    with pytest.raises(HistoryError, match="whole heads or units of 'qkv', got an axis of 45 positions"):
        load_by_shapes(Attention(4, 6), net.state_dict(), TOKENS)


@pytest.mark.parametrize("kind", ["torch", "safetensors", "stripped"])
def test_files(kind: str, tmp_path: Path) -> None:
    net, fresh, file = mlp(), mlp(), tmp_path / "small"
    prune(net, VECTORS, pruning_ratio=0.5)
    if kind == "torch":
        torch.save(net.state_dict(), file)
    elif kind == "safetensors":
        save_file(net.state_dict(), file)
    else:
        save(strip(net), file)
    x = torch.randn_like(VECTORS)
    assert torch.equal(load_by_shapes(fresh, file)(x), net(x))


def test_dense_weights() -> None:
    net, fresh = mlp(), mlp()
    x = torch.randn_like(VECTORS)
    assert torch.equal(load_by_shapes(fresh, net.state_dict())(x), net(x))


def test_compiled_layers_have_the_names_of_others() -> None:
    net, fresh = mlp(), mlp()
    prune(net, VECTORS, pruning_ratio=0.5)
    fresh[2] = torch.compile(fresh[2])  # type: ignore[assignment]
    x = torch.randn_like(VECTORS)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(load_by_shapes(fresh, net.state_dict())(x), net(x))


def test_load_names_it(tmp_path: Path) -> None:
    net = mlp()
    prune(net, VECTORS, pruning_ratio=0.5)
    save_file(net.state_dict(), tmp_path / "small")
    with pytest.raises(HistoryError, match=r"0\.weight is \[4, 6\], here it is \[8, 6\].* use `load_by_shapes`"):
        load(mlp(), tmp_path / "small")


class TestRefusals:
    def refused(self, weights: Any, match: str, net: nn.Module | None = None) -> None:
        net = mlp() if net is None else net
        before = {name: tensor.detach().clone() for name, tensor in named(net).items()}
        shown = repr(net)
        with pytest.raises(HistoryError, match=match):
            load_by_shapes(net, weights)
        assert repr(net) == shown
        assert all(torch.equal(tensor, before[name]) for name, tensor in named(net).items())

    def test_another_network(self) -> None:
        wide = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))
        self.refused(wide.state_dict(), r"0\.weight is \[9, 6\], here it is \[8, 6\]; .* Use `save`")
        self.refused(nn.Sequential(*mlp()[:4]).state_dict(), r"4\.bias is missing in the weights; 4\.weight is missing")
        self.refused(nn.Sequential(*mlp(), nn.Linear(3, 3)).state_dict(), r"5\.bias is not in the network")
        self.refused({**mlp().state_dict(), "0.weight": torch.zeros(8)}, r"0\.weight is \[8\], here it is \[8, 6\]")

    def test_removed_layers(self) -> None:
        self.refused(
            {**mlp().state_dict(), "2.weight": torch.zeros(8, 0)}, r"2\.weight is \[8, 0\]: layers were removed"
        )

    def test_a_buffer_that_no_file_holds(self) -> None:
        class Scaled(nn.Sequential):
            def __init__(self) -> None:
                super().__init__(*mlp())
                self.register_buffer("scale", torch.linspace(1, 2, 8), persistent=False)
                self.register_buffer("index", torch.arange(8), persistent=False)

        net = mlp()
        prune(net, VECTORS, pruning_ratio={"2": 0.5})
        self.refused(net.state_dict(), r"scale \[8\] is in no `state_dict`, and which of it was kept", Scaled())
        load_by_shapes(Scaled(), mlp().state_dict())  # nothing was cut

    @pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 1, groups=2), nn.GroupNorm(2, 8)])
    def test_groups_that_are_not_filled(self, layer: nn.Module) -> None:
        narrow = {name: tensor[:5] for name, tensor in layer.state_dict().items()}
        net = nn.Sequential(layer)
        self.refused({f"0.{name}": t for name, t in narrow.items()}, r"0 has 2 groups, which .*5 channels do not", net)

    def test_tied_tensors_of_other_shapes(self) -> None:
        net = Block()
        weights = {**net.state_dict(), "second.weight": torch.zeros(4, 5)}
        self.refused(weights, r"first\.weight is \[4, 8\], here it is \[4, 5\]", net)
        self.refused({**weights, "first.weight": torch.zeros(4, 6)}, "one tensor", net)

    def test_what_is_no_state_dict(self, tmp_path: Path) -> None:
        self.refused({"state_dict": mlp().state_dict(), "epoch": 1}, "got a OrderedDict for 'state_dict', a int for")
        self.refused({"0.weight": torch.zeros(8, 6, device="meta")}, r"got a Tensor for '0\.weight'")
        file = tmp_path / "small.pt"
        torch.save([torch.zeros(1)], file)
        self.refused(file, "tensors by name, got a list")
        torch.save(mlp(), file)
        self.refused(file, "holds other objects, which are not read")
        file.write_bytes(file.read_bytes()[:200])
        self.refused(file, "which is torn")
        file.write_bytes(b"text")
        self.refused(file, "expected a whole safetensors file")

    def test_what_is_no_new_network(self) -> None:
        net = mlp()
        prune(net, VECTORS, pruning_ratio=0.5)
        with pytest.raises(ValueError, match=r"a newly built dense Sequential, got one that was pruned"):
            load_by_shapes(net, net.state_dict())
        with pytest.raises(ValueError, match="load_by_shapes: expected a Sequential with weights, got one on the meta"):
            load_by_shapes(mlp().to("meta"), net.state_dict())
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
            load_by_shapes(None, net.state_dict())  # type: ignore[type-var]
        with pytest.raises(FileNotFoundError):
            load_by_shapes(mlp(), "nowhere.pt")
