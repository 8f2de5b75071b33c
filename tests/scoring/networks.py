"""Small networks in float64, each with one thing that makes scoring hard."""

import functools

import torch
from torch import nn

from lightning_prune.scoring import Batch, DataPass
from lightning_prune.scoring.spvr.criterion import MaskingStatistic
from lightning_prune.structure import TracedModel, trace


class Residual(nn.Module):
    """Two layers produce the same units, two take them."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Linear(6, 5), nn.Linear(5, 5)
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.branch(x).relu()
        return torch.cat([self.left(x), self.right(x)], 1)


class Block(nn.Module):
    """Norms on both sides of a residual sum, a depthwise layer, and activations in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.deep, self.deep_norm = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4)
        self.point, self.point_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu_()
        y = self.deep_norm(self.deep(x)).relu_()
        x = (x + self.point_norm(self.point(y))).relu_().mean((2, 3))
        return self.head(self.hidden(x).relu_())


class Shared(nn.Module):
    """One layer called twice; called by keyword."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = self.shared(input=self.first(x).relu()).relu()
        return self.last(input=self.shared(input=x).relu())


class Concatenated(nn.Module):
    """One layer takes the units of two groups."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(9, 2, 3)

    def forward(self, x):
        return self.last(torch.cat([self.left(x), self.right(x)], 1).tanh())


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), (6,)),
    "cnn": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(5, 4, (3, 2)), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(4 * 2 * 3, 3)),
        ),
        (3, 8, 7),
    ),
    "batch norm": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(5, 4, 2), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 1)),
        ),
        (3, 8, 8),
    ),
    "depthwise": (
        lambda: nn.Sequential(
            *(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv1d(8, 3, 1)),
        ),
        (3, 9),
    ),
    "grouped": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        ),
        (3, 5, 5),
    ),
    "transposed": (
        lambda: nn.Sequential(
            *(nn.Linear(6, 5), nn.ReLU(), nn.Unflatten(1, (5, 1)), nn.ConvTranspose1d(5, 8, 3, stride=2), nn.ReLU()),
            *(nn.ConvTranspose1d(8, 8, 3, groups=2, padding=1), nn.ReLU()),
            *(nn.ConvTranspose1d(8, 8, 2, groups=8), nn.ReLU(), nn.ConvTranspose1d(8, 2, 1)),
        ),
        (6,),
    ),
    "other norms": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.InstanceNorm2d(4, affine=True)),
            *(nn.ReLU(), nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(16, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3)),
        ),
        (3, 6, 6),
    ),
    "residual": (Residual, (6,)),
    "block": (Block, (3, 6, 6)),
    "shared": (Shared, (6,)),
    "concatenated": (Concatenated, (3, 6, 6)),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 3)), (6,)),
}


def network(name, seed=0):
    """A network with random weights (none of them, nor any of its norms' scales and shifts, at a special value)."""
    torch.manual_seed(seed)
    model = NETWORKS[name][0]().double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batches(name, sizes=(3, 2, 4, 2), seed=1):
    """Inputs, some of them 0."""
    draw = torch.Generator().manual_seed(seed)
    shape = NETWORKS[name][1]
    return [torch.randn(n, *shape, generator=draw, dtype=torch.float64).clamp_min(-0.5) + 0.5 for n in sizes]


@functools.cache
def structure_of(name):
    """What can be removed."""
    return trace(TracedModel.of(network(name), batches(name)[0]))


def train(model, inputs, statistic=None):
    """Forward and backward passes as a callback observes them, weights as they are; what the network gave out."""
    outputs = []
    for x in inputs:
        handles = statistic.attach(model) if statistic is not None else []
        try:
            out = model(x)
            out.square().sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        outputs.append(out.detach())
    return outputs


def examine(model, inputs, statistic):
    """What a callback has a statistic do before a cut, here for several batches."""
    if isinstance(statistic, MaskingStatistic):
        statistic.collect(model, [Batch((x,)) for x in inputs])
    elif statistic.collects:
        for x in inputs:
            statistic.collect(model, DataPass([x], loss=lambda model, batch: model(*batch.args).square().sum()))


def tensors_of(model):
    """Parameters and buffers by name, detached, without gradients."""
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
