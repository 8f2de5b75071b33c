"""`RefitLayerNorm` against least squares by NumPy on the inputs that each norm had before the cut."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import RefitLayerNorm, Ridge, prune
from lightning_prune.scoring import DataPass
from lightning_prune.structure import TracedModel, trace
from lightning_prune.surgery import cut, install
from lightning_prune.surgery.repairs import repaired

WIDTH, KEPT = 8, (0, 1, 3, 4, 6)


class Written(nn.Module):
    """A root-mean-square norm as networks write it; with ``plus=1`` as Gemma does."""

    def __init__(self, width: int, plus: float = 0.0) -> None:
        super().__init__()
        self.weight, self.plus = nn.Parameter(torch.ones(width)), plus

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.plus + self.weight)


class Channels(nn.LayerNorm):
    """A layer norm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "LayerNorm without a bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "own": lambda: Written(WIDTH),
    "own, 1 + weight": lambda: Written(WIDTH, plus=1.0),
    "channels": lambda: Channels(WIDTH),
}


def network(name: str) -> tuple[nn.Sequential, list[Tensor]]:
    """A layer, a norm and a layer with weights that matter, and batches."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    if name == "channels":
        layers = [nn.Conv2d(3, WIDTH, 1), NORMS[name](), nn.Conv2d(WIDTH, 2, 1)]
        shape = (6, 3, 4, 5)
    else:
        layers = [nn.Linear(3, WIDTH), NORMS[name](), nn.Linear(WIDTH, 2)]
        shape = (6, 7, 3)
    model = nn.Sequential(*layers).double()
    for parameter in model[1].parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    return model, [torch.randn(shape, dtype=torch.float64, generator=draw) for _ in range(3)]


def rows(x: Tensor, name: str) -> np.ndarray:
    last = x.movedim(1, -1) if name == "channels" else x
    return last.reshape(-1, WIDTH).detach().numpy()


@pytest.mark.parametrize("name", NORMS)
def test_units_get_the_best_factor_and_constant(name: str) -> None:
    model, batches = network(name)
    structure = trace(TracedModel.of(model, batches[0]))
    kept = {"0": KEPT}
    axes = structure.axes(kept)
    contents = repaired(partial(copy.deepcopy, model), axes, [RefitLayerNorm(batches=3)], DataPass(batches))
    narrow = copy.deepcopy(model)
    install(cut(narrow, axes), narrow, contents)

    x = np.concatenate([rows(model[0](batch), name) for batch in batches])
    y = np.concatenate([rows(model[1](model[0](batch)), name) for batch in batches])[:, KEPT]
    x = x[:, KEPT]
    if name in ("LayerNorm", "LayerNorm without a bias", "channels"):
        z = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    else:
        eps = torch.finfo(torch.float64).eps if name == "RMSNorm" else 1e-6
        z = x / np.sqrt((x**2).mean(1, keepdims=True) + eps)
    plus = 1.0 if name == "own, 1 + weight" else 0.0
    has_bias = name in ("LayerNorm", "channels")
    assert contents.keys() == ({"1.weight", "1.bias"} if has_bias else {"1.weight"})
    for unit in range(len(KEPT)):
        inputs = np.stack([z[:, unit], np.ones(len(z))], 1) if has_bias else z[:, unit : unit + 1]
        best = np.linalg.lstsq(inputs, y[:, unit], rcond=None)[0]
        np.testing.assert_allclose(narrow[1].weight[unit].item() + plus, best[0], rtol=1e-9)
        if has_bias:
            np.testing.assert_allclose(narrow[1].bias[unit].item(), best[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_outputs_are_nearer_to_those_before(name: str) -> None:
    model, batches = network(name)
    errors = []
    for extensions in ([Ridge()], [RefitLayerNorm(), Ridge()]):
        narrow = copy.deepcopy(model)
        prune(narrow, batches[0], pruning_ratio={"0": 0.5}, extensions=extensions, data=batches)
        assert narrow[0].weight.shape[0] == WIDTH // 2
        with torch.no_grad():
            errors.append(sum(float((narrow(x) - model(x)).square().mean()) for x in batches))
    assert errors[1] < errors[0]


def test_norms_that_keep_their_width_and_others_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, WIDTH), nn.GroupNorm(2, WIDTH), nn.Linear(WIDTH, 6), nn.LayerNorm(6), nn.Linear(6, 2)
    ).double()
    batches = [torch.randn(8, 3, dtype=torch.float64)]
    axes = {"0.weight": {0: np.arange(4)}, "1.weight": {0: np.arange(4)}}
    found = RefitLayerNorm().before(model.eval(), axes, lambda net, _: net(batches[0]))
    assert found == {}
    assert not any(module._forward_hooks for module in model.modules())


def test_units_that_are_constant_keep_their_weight() -> None:
    model, _ = network("LayerNorm")
    zeros = [torch.zeros(4, 3, dtype=torch.float64)]
    axes = trace(TracedModel.of(model, zeros[0])).axes({"0": KEPT})
    contents = repaired(partial(copy.deepcopy, model), axes, [RefitLayerNorm()], DataPass(zeros))
    narrow, before = copy.deepcopy(model), model(zeros[0])
    install(cut(narrow, axes), narrow, contents)
    assert narrow[1].weight.isfinite().all()
    torch.testing.assert_close(narrow[1](narrow[0](zeros[0])), model[1](model[0](zeros[0]))[:, KEPT])
    assert before.isfinite().all()


class Called(nn.Module):
    """A norm between two layers, called in some way."""

    def __init__(self, norm: nn.Module, way: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last, self.way = nn.Linear(3, WIDTH), norm, nn.Linear(WIDTH, 2), way
        nn.init.normal_(norm.weight, 1.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.norm(input=x) if self.way == "keyword" else self.norm(x))


class Float(nn.LayerNorm):
    """As of networks in half precision."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double()).to(input)


class Residual(nn.LayerNorm):
    """Adds another input."""

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        return super().forward(input if other is None else input + other)


def refitted(model: Called, extensions: list[RefitLayerNorm]) -> nn.Module:
    draw = torch.Generator().manual_seed(1)
    batches = list(torch.randn(3, 6, WIDTH, 3, dtype=torch.float64, generator=draw))  # as many positions as units
    prune(model.double(), batches[0], pruning_ratio=0.5, layers="first", extensions=extensions, data=batches)
    return model


@pytest.mark.parametrize("way", ["keyword", "hook", "subclass"])
def test_it_does_not_matter_how_the_norm_is_called(way: str) -> None:
    expected = refitted(Called(nn.LayerNorm(WIDTH)), [RefitLayerNorm()]).norm
    model = Called(Float(WIDTH) if way == "subclass" else nn.LayerNorm(WIDTH), way)
    if way == "hook":
        model.norm.register_forward_hook(lambda _, __, out: 2 * out + 1)
    found = refitted(model, [RefitLayerNorm()]).norm
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


def test_norms_that_are_left_unchanged_are_named() -> None:
    class Two(Called):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.norm(x, x.relu()))

    expected = refitted(Two(Residual(WIDTH)), []).state_dict()
    with pytest.warns(UserWarning, match="unchanged: norm is called with more than one tensor, or returns more"):
        found = refitted(Two(Residual(WIDTH)), [RefitLayerNorm()])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    with pytest.warns(UserWarning, match="unchanged: norm normalizes over 2 axes"):
        refitted(Called(nn.LayerNorm((WIDTH, WIDTH))), [RefitLayerNorm()])


def test_a_constant_output_keeps_its_weight() -> None:
    model, batches = network("LayerNorm")
    one = batches[0][:1, :1].expand(3, 7, -1)
    before = model[1].weight.detach().clone()
    prune(model, one, pruning_ratio=0.5, layers="0", extensions=[RefitLayerNorm()], data=[one])
    assert torch.isin(model[1].weight, before).all()
