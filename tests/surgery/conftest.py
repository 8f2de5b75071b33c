"""A zoo of small networks in float64, one structural difficulty each, with their groups written by hand."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.structure.cost import CostModel
from lightning_prune.structure.graph import Group, Member, Structure


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(4)
        self.outer = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.inner_norm(self.inner(x))))
        return self.head(F.relu(x).mean((2, 3)))


class Tied(nn.Module):
    """Two layers with one weight, cut along both of its dimensions at once."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.third.weight = self.second.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.third(F.relu(self.second(F.relu(self.first(x))))))


class Shared(nn.Module):
    """One layer called twice, and buffers as wide as the layer: one in the state dict, one not."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("gain", torch.linspace(0.5, 2, 8))
        self.register_buffer("offset", torch.linspace(-1, 1, 8), persistent=False)

    def forward(self, x):
        x = F.relu(self.first(x)) * self.gain
        x = torch.tanh(self.middle(x)) * self.offset
        return self.head(torch.tanh(self.middle(x)))


def _group(name, width, *axes):
    """Axes are ``(tensor, dim, role)`` or ``(tensor, dim, role, repeat)``, ``repeat`` positions per unit in a row."""
    members = []
    for tensor, dim, role, *repeat in axes:
        index = np.arange(width * (repeat[0] if repeat else 1)).reshape(width, -1)
        members.append(Member(tensor, dim, role, index))
    return Group(name, width, tuple(members))


def _batch_norm(name):
    return [(f"{name}.{tensor}", 0, "along") for tensor in ("weight", "bias", "running_mean", "running_var")]


def _layer(name, *, bias=True, repeat=1):
    return [(f"{name}.{tensor}", 0, "out", repeat) for tensor in (("weight", "bias") if bias else ("weight",))]


@dataclass(frozen=True)
class Net:
    """A network, its input for a batch of one and its groups."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: tuple[Group, ...]

    def model(self, seed=0):
        torch.manual_seed(seed)
        model = self.build().double()
        for name, buffer in model.named_buffers():  # running statistics that matter
            if "running" in name:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        return model

    def example(self, seed=1, batch=5):
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def structure(self, model):
        shapes = {name: tuple(t.shape) for name, t in [*model.named_parameters(), *model.named_buffers()]}
        return Structure(self.groups, (), CostModel((), (), shapes), ())

    def kept(self, seed=0):
        """About half of every group, drawn."""
        random = np.random.default_rng(seed)
        return {
            group.name: tuple(np.sort(random.permutation(group.width)[: group.width // 2 + 1]).tolist())
            for group in self.groups
        }

    def axes(self, model, seed=0):
        return self.structure(model).axes(self.kept(seed))

    def step(self, model, optimizer, seed=1):
        """One training step on a batch of its own."""
        optimizer.zero_grad()
        model(self.example(seed)).square().sum().backward()
        optimizer.step()


ZOO = (
    Net(
        "mlp",
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)),
        (6,),
        (
            _group("0", 8, *_layer("0"), ("2.weight", 1, "in")),
            _group("2", 5, *_layer("2"), ("4.weight", 1, "in")),
        ),
    ),
    Net(
        "cnn",
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)),
        ),
        (3, 8, 8),
        (
            _group("0", 6, *_layer("0", bias=False), *_batch_norm("1"), ("4.weight", 1, "in")),
            _group("4", 4, *_layer("4"), *_batch_norm("5"), ("8.weight", 1, "in", 16)),
        ),
    ),
    Net(
        "depthwise",
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 1)),
            *(nn.ConvTranspose2d(4, 4, 2, groups=4), nn.ReLU(), nn.Flatten(2), nn.AvgPool1d(25), nn.Flatten()),
            nn.Linear(4, 2),
        ),
        (3, 4, 4),
        (
            _group("0", 6, *_layer("0"), *_layer("1", repeat=2), ("3.weight", 1, "in", 2)),
            _group("3", 4, *_layer("3"), *_layer("4"), ("9.weight", 1, "in")),
        ),
    ),
    Net(
        "transposed",
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3)
        ),
        (3, 6, 6),
        (
            _group("0", 6, *_layer("0"), ("2.weight", 0, "in")),
            _group("2", 5, ("2.weight", 1, "out"), ("2.bias", 0, "out"), ("4.weight", 1, "in")),
        ),
    ),
    Net(
        "residual",
        Residual,
        (3, 6, 6),
        (
            _group(
                "stem", 6, *_layer("stem"), *_layer("outer"), *_batch_norm("norm"), ("inner.weight", 1, "in"),
                ("head.weight", 1, "in"),
            ),
            _group("inner", 4, *_layer("inner", bias=False), *_batch_norm("inner_norm"), ("outer.weight", 1, "in")),
        ),
    ),
    Net(
        "tied",
        Tied,
        (4,),
        (
            _group(
                "first", 8, *_layer("first"), *_layer("second"), ("second.weight", 1, "in"), ("head.weight", 1, "in"),
            ),
        ),
    ),
    Net(
        "shared",
        Shared,
        (4,),
        (
            _group(
                "first", 8, *_layer("first"), *_layer("middle"), ("middle.weight", 1, "in"), ("gain", 0, "along"),
                ("offset", 0, "along"), ("head.weight", 1, "in"),
            ),
        ),
    ),
)  # fmt: skip


@pytest.fixture(params=ZOO, ids=lambda net: net.name)
def net(request):
    return request.param


@pytest.fixture
def zoo():
    return {net.name: net for net in ZOO}


@pytest.fixture
def photograph():
    """Everything about a network and its optimizers that a cut may touch, as values that can be compared."""

    def take_photograph(model, optimizers=()):
        named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        picture = {}
        for name, tensor in named.items():
            grad = tensor.grad
            picture[name] = (
                id(tensor),
                tensor.detach().clone(),
                tensor.stride(),
                None if grad is None else grad.clone(),
            )
        for name, module in model.named_modules():
            picture[f"{name} attributes"] = {
                key: value for key, value in vars(module).items() if not isinstance(value, dict)
            }
        for number, optimizer in enumerate(optimizers):
            picture[f"optimizer {number}"] = (
                [[id(p) for p in group["params"]] for group in optimizer.param_groups],
                {id(p): {k: _copy(v) for k, v in state.items()} for p, state in optimizer.state.items()},
            )
        return picture

    return take_photograph


def _copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.fixture
def same():
    """Bit for bit equality of nested values."""

    def compare(first, second):
        if isinstance(first, torch.Tensor):
            return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        if isinstance(first, dict):
            return first.keys() == second.keys() and all(compare(first[key], second[key]) for key in first)
        if isinstance(first, list | tuple):
            return len(first) == len(second) and all(map(compare, first, second))
        return first == second

    return compare
