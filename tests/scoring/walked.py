"""Networks in which norms and activations stand in every place that matters to a walk, and what a walk has to find.

For each network: the stations that an independent reading of its code gives, as the code that computes them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Basic(nn.Module):
    """A residual network: a functional relu, one in place, option-A shortcut, a projection."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv3, self.norm3 = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.short, self.short_norm = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)
        self.conv4, self.norm4 = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x, see=lambda name, value: value):
        """``see(name, value)`` gives what takes the value's place after norm and activation."""
        x = see("stem", F.relu(self.norm(self.stem(x))))
        y = see("conv1", F.relu_(self.norm1(self.conv1(x))))
        x = F.relu(x + see("conv2", self.norm2(self.conv2(y))))
        y = see("conv3", self.norm3(self.conv3(x)).relu())
        x = (y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))).relu_()
        y = see("conv4", self.norm4(self.conv4(x)))
        x = F.relu(y + see("short", self.short_norm(self.short(x))))
        return see("head", self.head(x.mean((2, 3))))


class Chain(nn.Module):
    """VGG's form, with modules in place, pooling and dropout."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(6), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(nn.Linear(6 * 4, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 3))

    def forward(self, x, see=lambda name, value: value):
        f, c = self.features, self.classifier
        x = f[3](see("features.0", f[2](f[1](f[0](x)))))
        x = f[7](see("features.4", f[6](f[5](f[4](x)))))
        return see("classifier.3", c[3](see("classifier.0", c[2](c[1](c[0](x.flatten(1)))))))


class Dense(nn.Module):
    """DenseNet's form: norm and activation come after a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, 3, 3, padding=1)
        self.norm3, self.head = nn.BatchNorm2d(10), nn.Linear(10, 3)

    def forward(self, x, see=lambda name, value: value):
        x = see("stem", self.stem(x))
        x = torch.cat([x, see("conv1", self.conv1(F.relu(self.norm1(x), inplace=True)))], 1)
        x = torch.cat([x, see("conv2", self.conv2(F.relu(self.norm2(x), inplace=True)))], 1)
        return see("head", self.head(F.relu(self.norm3(x)).mean((2, 3))))


class Gated(nn.Module):
    """EfficientNet's form: SiLU, ReLU6, written out by hand too, depthwise, squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.expand, self.norm1, self.silu = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU(inplace=True)
        self.deep, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        self.squeeze, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.project, self.norm3 = nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3)
        self.top, self.norm4, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x, see=lambda name, value: value):
        y = see("expand", self.silu(self.norm1(self.expand(x))))
        y = self.norm2(self.deep(y))
        y = see("deep", y * torch.sigmoid(y))
        gate = see("squeeze", F.silu(self.squeeze(y.mean((2, 3), keepdim=True))))
        y = y * see("excite", self.excite(gate).sigmoid())
        x = x + see("project", self.norm3(self.project(y)))
        y = see("top", F.relu6(self.norm4(self.top(x))))
        return see("head", self.head(F.adaptive_avg_pool2d(y, 1).flatten(1)))


class Segmentation(nn.Module):
    """SegNet's form: unpooling by the indices of the pooling; and a skip connection."""

    def __init__(self):
        super().__init__()
        self.down1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.down2, self.norm2 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.up2, self.norm3 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.up1 = nn.ConvTranspose2d(8, 3, 3, padding=1)

    def forward(self, x, see=lambda name, value: value):
        x = see("down1", F.relu(self.norm1(self.down1(x))))
        y, first = F.max_pool2d(x, 2, return_indices=True)
        y = see("down2", F.relu(self.norm2(self.down2(y))))
        y, second = F.max_pool2d(y, 2, return_indices=True)
        y = see("up2", F.relu(self.norm3(self.up2(F.max_unpool2d(y, second, 2)))))
        return see("up1", self.up1(torch.cat([F.max_unpool2d(y, first, 2), x], 1)))


class Tokens(nn.Module):
    """Linear layers on tokens, a layer norm, one layer called twice, keywords and a dict as output."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, *, tokens, see=lambda name, value: value):
        x = see("embed", F.gelu(self.norm(self.embed(tokens))))
        x = x + see("mix", F.gelu(self.mix(input=x)))
        x = x + see("mix 1", F.gelu(self.mix(x)))
        return {"logits": see("head", self.head(x.mean(1))), "mean": x.mean((1, 2))}


NETWORKS = {
    "residual": (Basic, (3, 8, 8)),
    "chain": (Chain, (3, 8, 8)),
    "dense": (Dense, (3, 8, 8)),
    "gated": (Gated, (3, 8, 8)),
    "segmentation": (Segmentation, (3, 8, 8)),
    "tokens": (Tokens, (4, 5)),
}


def build(name, dtype=torch.float64):
    """A network with random weights and statistics, in training mode."""
    torch.manual_seed(0)
    model = NETWORKS[name][0]()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
    return model.to(dtype).train()


def raw_batches(name, total=11, size=4, dtype=torch.float64):
    """Batches as a loader gives them."""
    x = torch.randn(total, *NETWORKS[name][1], generator=torch.Generator().manual_seed(1), dtype=dtype)
    return [{"tokens": part} if name == "tokens" else part for part in x.split(size)]


def seen(model, batch):
    """What every layer has after norm and activation, by the network's own code."""
    found = {}

    def see(name, value):
        found[name] = value.clone()
        return value

    with torch.no_grad():
        model(*batch.args, **batch.kwargs, see=see)
    return found


def exchanged(model, batch, changes):
    """The output with other values at some layers, by the network's own code."""
    with torch.no_grad():
        return model(*batch.args, **batch.kwargs, see=lambda name, value: changes.get(name, lambda v: v)(value))


def name_of(station):
    """The name by which a network's own code knows an activation."""
    return f"{station.layer} {station.call}" if station.call else station.layer
