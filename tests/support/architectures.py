"""A zoo of small networks, one structural difficulty each, with the widths that can shrink written by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.support.cutting import settle


class Net(nn.Module):
    """A module from its layers and a function of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class BufferScaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("scale", torch.linspace(0.5, 2, 6))
        self.register_buffer("shift", torch.linspace(-1, 1, 6), persistent=False)

    def forward(self, x):
        return self.head(self.first(x) * self.scale + self.shift)


def clamped(weight):
    weight.data = weight.data.clamp(-0.1, 0.1)
    return weight


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.third.weight = self.second.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.third(F.relu(self.second(F.relu(self.first(x))))))


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = F.silu(self.norm(self.stem(x)))
        return self.head(x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))))


class Shuffle(nn.Module):
    """A channel shuffle of two branches, as in ShuffleNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.mix, self.head = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat([left, F.relu(self.branch(right))], dim=1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.mix(x)))


class OptionA(nn.Module):
    """A shortcut padded with empty channels, as in the ResNets for CIFAR-10."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head((shortcut + self.outer(F.relu(self.inner(x)))).mean((2, 3)))


class Attention(nn.Module):
    """An encoder block: LayerNorm, attention, MLP, class token, layer scale."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.scale = nn.Parameter(torch.rand(8))
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], dim=1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0] * self.scale
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x[:, 0])


class Heads(nn.Module):
    """Attention that counts its heads by what is left: whole heads are units, and features if it is fused."""

    def __init__(self, fused=False, **layers):
        super().__init__()
        self.fused, self.features = fused, 7 if fused else 4
        self.out, self.names = nn.Linear(3 * self.features, 3), list(layers)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        if self.names == ["qkv"]:
            q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.features)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (
                layer(x).unflatten(-1, (-1, self.features)).transpose(1, 2) for layer in (self.q, self.k, self.v)
            )
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-1, -2) * self.features**-0.5).softmax(-1) @ v
        return self.out(x.transpose(1, 2).flatten(2))


class Functional(nn.Module):
    """Weights that are bare parameters, used by functions."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(7, 4)), nn.Parameter(torch.randn(7))
        self.kernel = nn.Parameter(torch.randn(5, 7))
        self.out = nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return F.linear(F.relu(F.linear(x, self.weight, self.bias)), self.kernel) @ self.out


class Auxiliary(nn.Module):
    """A second head in train mode only."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Linear(4, 6), nn.Linear(6, 5)
        self.head, self.aux = nn.Linear(5, 2), nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        out = self.head(F.relu(self.body(x)))
        return (out, self.aux(x)) if self.training else out


class HardCoded(nn.Module):
    """A size as a number in `forward`."""

    def __init__(self):
        super().__init__()
        self.free, self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.first(F.relu(self.free(x))).view(-1, 2, 4).sum(1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.bottom = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.join, self.head = nn.Conv2d(9, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        skip = F.relu(self.down(x))
        x = F.relu(self.bottom(F.max_pool2d(skip, 2)))
        return self.head(F.relu(self.join(torch.cat([skip, self.up(x)], dim=1))))


class SegNet(nn.Module):
    """Pooling whose indices are used again."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x, where = F.max_pool2d(F.relu(self.down(x)), 2, return_indices=True)
        return self.head(F.max_unpool2d(self.up(x), where, 2))


class Standardised(nn.Conv2d):
    """A convolution whose filters are brought to mean zero and unit variance, as in NFNets."""

    def forward(self, x):
        flat = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True)
        return self._conv_forward(x, flat.reshape_as(self.weight), self.bias)


class Doubled(nn.Module):
    """A parametrization that keeps zeros."""

    def forward(self, weight):
        return 2 * weight


def parametrized(layer, by):
    nn.utils.parametrize.register_parametrization(layer, "weight", by)
    return layer


class ASPP(nn.Module):
    """Branches of several dilations and one of the whole image, resized to what came in, as in DeepLab."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(6, 4, 3, padding=d, dilation=d) for d in (1, 2))
        self.whole, self.join, self.head = nn.Conv2d(6, 3, 1), nn.Conv2d(11, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        y = F.relu(self.stem(x))
        whole = F.interpolate(self.whole(F.adaptive_avg_pool2d(y, 1)).relu(), size=y.shape[-2:], mode="bilinear")
        y = torch.cat([*(F.relu(branch(y)) for branch in self.branches), whole], dim=1)
        return F.interpolate(self.head(F.relu(self.join(y))), size=x.shape[-2:], mode="bilinear")


class FCN(nn.Module):
    """Scores of two depths, upsampled by transposed convolutions and added."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.early, self.late = nn.Conv2d(4, 2, 1), nn.Conv2d(6, 2, 1)
        self.up, self.out = nn.ConvTranspose2d(2, 2, 2, stride=2), nn.ConvTranspose2d(2, 2, 2, stride=2, bias=False)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        return self.out(self.up(self.late(F.max_pool2d(F.relu(self.second(x)), 2))) + self.early(x))


class DeepSegNet(nn.Module):
    """Encoder and decoder of two levels that hand on where each maximum was."""

    def __init__(self):
        super().__init__()
        self.e1, self.n1, self.e2, self.n2 = (
            *(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)),
            *(nn.Conv2d(5, 7, 3, padding=1), nn.BatchNorm2d(7)),
        )
        self.d2, self.m2 = nn.Conv2d(7, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.d1, self.m1, self.head = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x, first = F.max_pool2d(F.relu(self.n1(self.e1(x))), 2, return_indices=True)
        x, second = F.max_pool2d(F.relu(self.n2(self.e2(x))), 2, return_indices=True)
        x = F.relu(self.m2(self.d2(F.max_unpool2d(x, second, 2))))
        return self.head(F.relu(self.m1(self.d1(F.max_unpool2d(x, first, 2)))))


@dataclass(frozen=True, eq=False)
class Case:
    """A network, its input, and what must be found.

    Attributes:
        widths: Groups by name, and their widths.
        frozen: For tensors that must be frozen a part of the reason.
        masked: Whether the cut network equals the one with zeros (not so under statistics over units, nor where
            weights are divided by their norm).
        integers: If not 0, the input is made of integers below it.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    widths: dict[str, int]
    frozen: dict[str, str] = field(default_factory=dict)
    masked: bool = True
    integers: int = 0

    def model(self, seed=0):
        torch.manual_seed(seed)
        return settle(self.build()).eval()

    def example(self, batch=3, seed=1):
        generator = torch.Generator().manual_seed(seed)
        if self.integers:
            return torch.randint(self.integers, (batch, *self.shape), generator=generator)
        return torch.randn(batch, *self.shape, generator=generator, dtype=torch.float64)


def case(name, shape, widths, frozen=None, *, masked=True, integers=0):
    """Register what builds a network as a case."""

    def register(build):
        CASES.append(Case(name, build, shape, widths, frozen or {}, masked, integers))
        return build

    return register


CASES: list[Case] = []
OUT = "output of the network"

case("linear", (6,), {"0": 8, "2": 5}, {"4.weight": OUT})(
    lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
)
case("linear on sequences", (4, 6), {"0": 8}, {"2.weight": OUT})(
    lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
)
for rank, conv in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
    case(f"conv{rank}d", (3,) + (5,) * rank, {"0": 6, "2": 4})(
        lambda conv=conv, rank=rank: nn.Sequential(
            *(conv(3, 6, 3), nn.ReLU(), conv(6, 4, 3, bias=False), nn.Flatten(), nn.Linear(4, 2))
        )
    )
case("depthwise", (3, 6, 6), {"0": 6, "3": 5})(
    lambda: nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1), nn.ReLU()),
        nn.Conv2d(5, 2, 1),
    )
)
case("depthwise multiplier", (3, 6, 6), {"0": 6})(
    lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 4, 1))
)
case("grouped, several to one", (3, 6, 6), {"0": 3})(
    lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 3, groups=3), nn.ReLU(), nn.Conv2d(3, 4, 1))
)
case("grouped", (3, 6, 6), {"0": 4, "2": 3})(
    lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 4, 1))
)
case("transposed", (3, 4, 4), {"0": 6, "2": 5})(
    lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3))
)
case("transposed grouped", (3, 4, 4), {"0": 4, "2": 3})(
    lambda: nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 3))
    )
)
case("transposed depthwise", (3, 4, 4), {"0": 6})(
    lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 2, 3))
)
case("transposed to the output", (3, 4, 4), {"0": 4}, {"1.weight": OUT})(
    lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 2, 2, stride=2))
)
case("batch norm", (3, 6, 6), {"0": 6, "3": 4})(
    lambda: nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)),
    )
)
case("batch norm without affine", (3, 6, 6), {"0": 6})(
    lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
    )
)
case("layer norm", (5,), {"0": 8, "3": 6}, masked=False)(
    lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
)
case("layer norm without weights", (5,), {"0": 8}, masked=False)(
    lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 2))
)
case("group norm", (3, 6, 6), {"0": 4}, masked=False)(
    lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
)
case("group norm of single channels", (3, 6, 6), {"0": 8})(
    lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
)
case("instance norm", (3, 6, 6), {"0": 8, "3": 6})(
    lambda: nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 6, 1)),
        *(nn.InstanceNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)),
    )
)
case("pooling", (3, 16, 16), {"0": 6, "5": 4})(
    lambda: nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, 1), nn.LPPool2d(2, 2), nn.Conv2d(6, 4, 1)),
        *(nn.AdaptiveMaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )
)
case("dropout", (3, 6, 6), {"0": 6, "6": 4})(
    lambda: nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.Dropout2d(0.3), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(6, 4), nn.AlphaDropout(0.1), nn.ReLU(), nn.Linear(4, 2)),
    )
)
case("residual", (3, 6, 6), {"stem": 6, "inner": 4})(
    lambda: Net(
        lambda m, x: m.head((lambda y: y + m.outer(F.relu(m.inner(y))))(F.relu(m.stem(x)))),
        stem=nn.Conv2d(3, 6, 3, padding=1),
        inner=nn.Conv2d(6, 4, 3, padding=1),
        outer=nn.Conv2d(4, 6, 3, padding=1),
        head=nn.Conv2d(6, 2, 1),
    )
)
case("concat", (3, 6, 6), {"a": 4, "b": 5})(
    lambda: Net(
        lambda m, x: m.head(F.relu(torch.cat([m.a(x), m.b(x)], 1))),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(3, 5, 1),
        head=nn.Conv2d(9, 2, 1),
    )
)
case("concat with the input", (3, 6, 6), {"a": 4})(
    lambda: Net(lambda m, x: m.head(torch.cat([x, F.relu(m.a(x))], 1)), a=nn.Conv2d(3, 4, 1), head=nn.Conv2d(7, 2, 1))
)
case("concat with itself", (3, 6, 6), {"a": 4})(
    lambda: Net(
        lambda m, x: m.head((lambda y: torch.cat([y, y.neg()], 1).relu())(m.a(x))),
        a=nn.Conv2d(3, 4, 1),
        head=nn.Conv2d(8, 2, 1),
    )
)
case("dense block", (3, 6, 6), {"a": 4, "b": 5, "c": 3})(
    lambda: Net(
        lambda m, x: m.head(
            (lambda p: (lambda q: torch.cat([*q, m.c(torch.cat(q, 1)).relu()], 1))([*p, m.b(torch.cat(p, 1)).relu()]))(
                [m.a(x).relu()]
            )
        ),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 5, 1),
        c=nn.Conv2d(9, 3, 1),
        head=nn.Conv2d(12, 2, 1),
    )
)
case("flatten", (3, 4, 4), {"0": 5})(
    lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2))
)
case("flatten channels last", (3, 4, 4), {"a": 5})(
    lambda: Net(
        lambda m, x: m.head(m.a(x).relu().permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(3, 5, 3), head=nn.Linear(20, 2)
    )
)
case("shared module", (4,), {"first": 6})(
    lambda: Net(
        lambda m, x: m.head(m.again(m.again(m.first(x).relu()).relu())),
        first=nn.Linear(4, 6),
        again=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
    )
)
case("tied weights", (4,), {"first": 8})(Tied)
case("functional", (4,), {"weight": 7, "kernel": 5})(Functional)
case(
    "bare parameters and attention",
    (5, 6),
    {"embed": 8, "attention": 2, "attention#head_dim": 4, "up": 12},
    {"head.weight": "an output"},
    masked=False,
)(Attention)
case("shuffles that tie all channels", (3, 4, 4), {"stem": 1, "inner": 5})(
    lambda: Net(
        lambda m, x: m.head(
            (lambda y: y + m.outer(m.inner(m.depth(y)).relu()))(
                (lambda y: y + y.view(len(y), 2, 3, 4, 4).transpose(1, 2).reshape(y.shape) + y.roll(1, 0))(m.stem(x))
            )
        ),
        stem=nn.Conv2d(3, 6, 1),
        depth=nn.Conv2d(6, 6, 3, padding=1, groups=6),
        inner=nn.Conv2d(6, 5, 1),
        outer=nn.Conv2d(5, 6, 1),
        head=nn.Conv2d(6, 2, 1),
    )
)
case("channel shuffle", (3, 4, 4), {"mix": 6, "stem": 4})(Shuffle)
case("gate of halves", (4,), {"up": 6})(
    lambda: Net(
        lambda m, x: m.head((lambda a, b: a * torch.sigmoid(b))(*m.up(x).chunk(2, -1))),
        up=nn.Linear(4, 12),
        head=nn.Linear(6, 2),
    )
)
case("unflattened", (4,), {"0": 6, "3": 5}, {"5.weight": OUT})(
    lambda: nn.Sequential(
        *(nn.Linear(4, 24), nn.ReLU(), nn.Unflatten(1, (-1, 2, 2)), nn.ConvTranspose2d(6, 5, 2), nn.ReLU()),
        nn.Conv2d(5, 2, 1),
    )
)
case("unflattened to channels in numbers", (4,), {"0": 6, "3": 5}, {"5.weight": OUT})(
    lambda: nn.Sequential(
        *(nn.Linear(4, 24), nn.ReLU(), nn.Unflatten(1, (6, 2, 2)), nn.ConvTranspose2d(6, 5, 2), nn.ReLU()),
        nn.Conv2d(5, 2, 1),
    )
)
case("unflattened to positions and channels in numbers", (4,), {"3": 5}, {"0.weight": ""})(
    lambda: nn.Sequential(
        *(nn.Linear(4, 24), nn.ReLU(), nn.Unflatten(1, (4, 6)), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)),
    )
)
case("viewed as channels in numbers", (4,), {"up": 5}, {"first.weight": ""})(
    lambda: Net(
        lambda m, x: m.last(m.up(m.first(x).view(-1, 6, 2, 2)).relu()),
        first=nn.Linear(4, 24),
        up=nn.ConvTranspose2d(6, 5, 2),
        last=nn.Conv2d(5, 2, 1),
    )
)
case("attention heads, three layers", (5, 6), {"q": 3})(
    lambda: Heads(q=nn.Linear(6, 12), k=nn.Linear(6, 12), v=nn.Linear(6, 12))
)
case("attention heads, one layer", (5, 6), {"qkv": 3})(lambda: Heads(qkv=nn.Linear(6, 36)))
case("attention heads, fused", (5, 6), {"qkv": 3, "qkv#head_dim": 7})(lambda: Heads(fused=True, qkv=nn.Linear(6, 63)))
case("glu", (4,), {"0": 6})(lambda: nn.Sequential(nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 2)))
case("slicing", (4,), {"up": 3, "left": 5}, {"up.weight": "bound"})(
    lambda: Net(
        lambda m, x: m.head(m.left(m.up(x)[:, :5].relu())) + m.right(m.up(x)[:, 5:]),
        up=nn.Linear(4, 8),
        left=nn.Linear(5, 5),
        right=nn.Linear(3, 2),
        head=nn.Linear(5, 2),
    )
)
case(
    "split into unequal parts", (4,), {"left": 6}, {"up.weight": "a trial cut failed: RuntimeError: split_with_sizes"}
)(
    lambda: Net(
        lambda m, x: (lambda a, b: m.head(m.left(a).relu()) + m.right(b))(*m.up(x).split([5, 3], 1)),
        up=nn.Linear(4, 8),
        left=nn.Linear(5, 6),
        right=nn.Linear(3, 2),
        head=nn.Linear(6, 2),
    )
)
case("squeeze and excitation", (3, 6, 6), {"stem": 8, "down": 4})(SqueezeExcite)
case("upsampling", (3, 4, 4), {"0": 6, "3": 5})(
    lambda: nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(6, 5, 1)),
        *(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(5, 2, 1)),
    )
)
case("padded shortcut", (3, 6, 6), {"stem": 4, "inner": 8}, {"outer.weight": "padded"})(OptionA)
case("prelu", (3, 6, 6), {"0": 6, "2": 4})(
    lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.PReLU(6), nn.Conv2d(6, 4, 1), nn.PReLU(), nn.Conv2d(4, 2, 1))
)
case("buffers as wide as a layer", (4,), {"first": 6})(BufferScaled)
case("weight norm", (4,), {"0": 6}, masked=False)(
    lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2))
)
case("spectral norm", (4,), {"2": 5}, {"0.parametrizations.weight.original": ""})(
    lambda: nn.Sequential(
        *(parametrizations.spectral_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    )
)
case("unknown operator", (4,), {"b": 6}, {"a.weight": "no rule for the operator `_cdist_forward`"})(
    lambda: Net(
        lambda m, x: m.head(m.b(torch.cdist(m.a(x), m.anchor.weight)).relu()),
        a=nn.Linear(4, 5),
        anchor=nn.Embedding(7, 5),
        b=nn.Linear(7, 6),
        head=nn.Linear(6, 2),
    )
)
case("size as a number", (4,), {"free": 6}, {"first.weight": "trial cut failed"})(HardCoded)
case("head in train mode only", (4,), {"stem": 6, "body": 5}, {"aux.weight": OUT})(Auxiliary)
case("unused weights", (4,), {"a": 6}, {"idle.weight": "not used by any traced call"})(
    lambda: Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(4, 6), b=nn.Linear(6, 2), idle=nn.Linear(6, 6))
)
case("u-net", (3, 6, 6), {"down": 4, "bottom": 6, "up": 5, "join": 4})(UNet)
case("unpooling", (3, 6, 6), {"down": 6})(SegNet)
case("segnet of two levels", (3, 8, 8), {"e1": 5, "e2": 7, "d1": 6})(DeepSegNet)
case("atrous pyramid", (3, 8, 8), {"stem": 6, "branches.0": 4, "branches.1": 4, "whole": 3, "join": 5})(ASPP)
case("fully convolutional", (3, 8, 8), {"first": 4, "second": 6, "late": 2, "up": 2}, {"out.weight": OUT})(FCN)
case("orthogonal weight", (4,), {"0": 6, "2": 5})(
    lambda: nn.Sequential(
        *(parametrizations.orthogonal(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    )
)
case("scaled weight", (4,), {"0": 6, "2": 5})(
    lambda: nn.Sequential(
        *(parametrized(nn.Linear(4, 6), Doubled()), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    )
)
case("weight norm of a convolution", (3, 6, 6), {"0": 6, "2": 4}, masked=False)(
    lambda: nn.Sequential(
        *(parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU()),
        nn.Conv2d(4, 2, 1),
    )
)
case("gates of mobile networks", (3, 6, 6), {"stem": 6, "wide": 8, "squeeze": 3})(
    lambda: Net(
        lambda m, x: m.head(
            (
                lambda s: (
                    s
                    + m.narrow(
                        (lambda w: w * F.hardsigmoid(m.excite(m.squeeze(w.mean((2, 3), True)).relu())))(
                            F.hardswish(m.depth(F.hardswish(m.wide(s))))
                        )
                    )
                )
            )(F.hardswish(m.stem(x)))
        ),
        stem=nn.Conv2d(3, 6, 3, padding=1),
        wide=nn.Conv2d(6, 8, 1),
        depth=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        squeeze=nn.Conv2d(8, 3, 1),
        excite=nn.Conv2d(3, 8, 1),
        narrow=nn.Conv2d(8, 6, 1),
        head=nn.Conv2d(6, 2, 1),
    )
)
case("standardised weights", (3, 6, 6), {"0": 6, "1": 5, "2": 4}, masked=False)(
    lambda: nn.Sequential(nn.Conv2d(3, 6, 3), Standardised(6, 5, 3), nn.Conv2d(5, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
)
case("softmax over units", (4,), {"2": 5}, {"0.weight": "softmax"})(
    lambda: nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
)
case("mean over units", (4,), {"a": 5}, {"b.weight": "reduced over"})(
    lambda: Net(lambda m, x: m.b(m.a(x).relu()).mean(-1, keepdim=True), a=nn.Linear(4, 5), b=nn.Linear(5, 6))
)
case("units that are not zero", (3, 4), {}, {"a.weight": "removed units would not be zero"})(
    lambda: Net(
        lambda m, x: torch.sigmoid(m.a(x)) @ torch.sigmoid(m.b(x)).transpose(1, 2), a=nn.Linear(4, 5), b=nn.Linear(4, 5)
    )
)
case("embedding", (4,), {"0": 6, "1": 5}, integers=9)(
    lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
)
case("weights clamped by data", (3, 5, 5), {"a": 8, "b": 5})(
    lambda: Net(
        lambda m, x: m.c(F.conv2d(m.a(x).relu(), clamped(m.b.weight), m.b.bias)),
        **{"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 5, 1), "c": nn.Conv2d(5, 2, 1)},
    )
)
