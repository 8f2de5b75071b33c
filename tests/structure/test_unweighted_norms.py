"""Norms without weights: their width is in an attribute alone, which follows the cut."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.api import load, load_by_shapes, prune, save
from lightning_prune.structure import Structure, TracedModel, trace
from lightning_prune.surgery.shrink import cut, mask

WIDTH = 8


class Block(nn.Module):
    """A block of a diffusion transformer: scale and shift of its norm are computed from a condition."""

    def __init__(self, width: int = WIDTH, inner: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.condition, self.first, self.second = (
            nn.Linear(3, 3 * width),
            nn.Linear(width, inner),
            nn.Linear(inner, width),
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate = self.condition(condition)[:, None].chunk(3, -1)
        return x + gate * self.second(F.gelu(self.first(self.norm(x) * (1 + scale) + shift)))


class Diffusion(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Linear(3, width),
            nn.ModuleList([Block(width), Block(width)]),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        for block in self.blocks:
            y = block(y, x.mean(1))
        return self.head(y)


def _structure(model: nn.Module, x: Tensor) -> Structure:
    return trace(TracedModel.of(model, x))


def test_a_layer_norm_without_weights_equals_that_of_a_narrow_network(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Diffusion().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    structure, dense = _structure(model, x), copy.deepcopy(model)
    assert structure.widths == {"embed": WIDTH, "blocks.0.first": 12, "blocks.1.first": 12}
    kept = torch.tensor([0, 3, 4, 7, 5]).sort().values
    change = cut(model, structure.axes({"embed": tuple(kept.tolist())}))
    narrow = Diffusion(5).double()
    with torch.no_grad():
        for name, tensor in narrow.named_parameters():
            given = dense.get_parameter(name)
            if "condition" in name:
                given = given.unflatten(0, (3, WIDTH))[:, kept].flatten(0, 1)
            elif name.startswith("embed") or "second" in name:
                given = given[kept]
            elif "first.weight" in name or name == "head.weight":
                given = given[:, kept]
            tensor.copy_(given)
    torch.testing.assert_close(model(x), narrow(x), rtol=1e-12, atol=1e-12)
    assert [block.norm.normalized_shape for block in model.blocks] == [(5,), (5,)]
    again = _structure(model, x)
    assert again.widths == {"embed": 5, "blocks.0.first": 12, "blocks.1.first": 12}
    change.undo()
    assert [block.norm.normalized_shape for block in model.blocks] == [(WIDTH,), (WIDTH,)]
    torch.testing.assert_close(model(x), dense(x), rtol=0, atol=0)
    prune(model, x, pruning_ratio=0.5)
    save(model, tmp_path / "small.safetensors")
    loaded = load(copy.deepcopy(dense), tmp_path / "small.safetensors")
    by_shapes = load_by_shapes(copy.deepcopy(dense), model.state_dict(), x)
    for other in (loaded, by_shapes):
        assert [block.norm.normalized_shape for block in other.blocks] == [(WIDTH // 2,), (WIDTH // 2,)]
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


class Images(nn.Module):
    """An instance norm without weights over the channels of two layers, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(10, 4, 3)
        self.both, self.twice, self.head = nn.InstanceNorm2d(10), nn.InstanceNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        b = self.b(x)
        y = self.both(torch.cat([self.a(x), b], 1)).relu()
        return self.head(self.twice(self.c(y)).relu().mean((2, 3)) + self.twice(b).tanh().amax((2, 3)))


def test_instance_norms_without_weights_count_the_channels_that_are_left() -> None:
    """PyTorch warns of an instance norm with another number of channels, and warnings are errors here."""
    torch.manual_seed(0)
    model, x = Images().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    structure = _structure(model, x)
    assert structure.widths == {"a": 6, "b": 4}, "the norm that is called twice has one number of channels"
    axes, zeroed = structure.axes({"a": (1, 2, 5), "b": (0, 3)}), copy.deepcopy(model)
    cut(model, axes)
    mask(zeroed, axes)
    assert (model.both.num_features, model.twice.num_features) == (5, 2)
    torch.testing.assert_close(model(x), zeroed(x), rtol=1e-12, atol=1e-12)
    assert _structure(model, x).widths == {"a": 3, "b": 2}


def test_inputs_without_samples() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv1d(3, 6, 3), nn.InstanceNorm1d(6), nn.Conv1d(6, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(x)).relu())

    model, x = Alone(), torch.randn(3, 9)
    prune(model, x, pruning_ratio=0.5)
    assert model.norm.num_features == model.conv.out_channels == 3


class Written(nn.Module):
    """Its width is a number in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.layer_norm(self.first(x), (WIDTH,)))


class OwnForward(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    "model",
    [
        Written(),
        nn.Sequential(nn.Linear(3, WIDTH), OwnForward(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 2)),
    ],
)
def test_a_width_that_cannot_be_set_is_frozen(model: nn.Module) -> None:
    structure = _structure(model, torch.randn(4, 3))
    assert not structure.groups
    assert "a layer norm of [8] met an input of [4, 5]" in structure.frozen[0].reason


def test_a_width_that_is_read_from_the_input_follows() -> None:
    class Read(Written):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(F.layer_norm(y, y.shape[-1:]))

    assert _structure(Read(), torch.randn(4, 3)).widths == {"first": WIDTH}
