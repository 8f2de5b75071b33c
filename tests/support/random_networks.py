"""Random networks, and what every cut of them must satisfy."""

import numpy as np
import torch
from hypothesis import event
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_prune.structure import TracedModel, Tracing, verify_shapes
from tests.support.counting import counting
from tests.support.cutting import draw, masked, settle, shrunk

SIZE, PAIRS = 4, 3


def _groups(width, wish):
    """A number of groups that divides the width."""
    return [g for g in range(1, width + 1) if width % g == 0][wish % sum(width % g == 0 for g in range(1, width + 1))]


class Buffered(nn.Module):
    """Buffers as wide as what they scale."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 2, width)[:, None, None])
        self.register_buffer("shift", torch.linspace(-1, 1, width)[:, None, None], persistent=False)


class Heads(nn.Module):
    """Attention that computes with attributes, or views the features of all heads as its inputs are wide."""

    def __init__(self, width, heads, features, tied):
        super().__init__()
        self.heads, self.features, self.inner, self.tied = heads, features, heads * features, tied
        self.qkv, self.out = nn.Linear(width, 3 * self.inner), nn.Linear(self.inner, width)

    def forward(self, x):
        n, length, width = x.shape
        inner, features = (width, width // self.heads) if self.tied else (self.inner, self.features)
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, features).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(n, length, inner))


class Rotary(nn.Module):
    """Attention that turns pairs of features by angles which the network has once."""

    def __init__(self, width, heads, shared, way, angles):
        super().__init__()
        self.features, self.shared, self.way, self.angles = 2 * PAIRS, shared, way, angles
        self.q, self.out = nn.Linear(width, heads * self.features), nn.Linear(heads * self.features, width)
        self.k, self.v = (nn.Linear(width, heads // shared * self.features) for _ in "kv")

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (-1, self.features)).transpose(1, 2) for part in (self.q, self.k, self.v))
        angles = torch.arange(x.shape[1])[:, None] * self.angles.frequencies
        q, k = (self.turned(part, angles) for part in (q, k))
        k, v = (part.repeat_interleave(self.shared, 1) for part in (k, v))
        mixed = (q @ k.transpose(-1, -2) * 0.4).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2))

    def turned(self, x, angles):
        if self.way == 0:
            other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            return x * angles.cos().repeat_interleave(2, -1) + other * angles.sin().repeat_interleave(2, -1)
        if self.way == 1:
            first, second = x.chunk(2, -1)
        else:
            first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        angles = torch.cat((angles, angles), -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


class OwnNorm(nn.Module):
    """A root-mean-square norm of tokens, or a global response norm of images with channels last."""

    def __init__(self, width, response):
        super().__init__()
        self.weight, self.response = nn.Parameter(torch.rand(width) + 0.5), response
        if response:
            self.bias = nn.Parameter(torch.randn(width) * 0.2)

    def forward(self, x):
        if self.response:
            size = x.norm(dim=(1, 2), keepdim=True)
            return x + self.weight * (x * size / (size.mean(-1, keepdim=True) + 1e-6)) + self.bias
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class OverChannels(nn.Module):
    """A norm over the channels, or over groups of them.

    Zeros would count in its statistics, so that a masked network has to leave them out: it sets `kept`, and the norm is
    computed here by its formula.
    """

    def __init__(self, width, kind, groups):
        super().__init__()
        self.kind, self.groups, self.kept = kind, groups if kind == "group" else 1, None
        if kind == "group":
            self.norm = nn.GroupNorm(groups, width)
        elif kind in ("layer", "root mean square"):
            self.norm = (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(width, eps=1e-6)
        else:
            self.norm = OwnNorm(width, response=kind == "response")

    def forward(self, x):
        if self.kept is not None:
            return self.of_kept(x)
        if self.kind == "group":
            return self.norm(x)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def of_kept(self, x):
        weight, bias = (
            None if one is None else one[:, None, None] for one in map(self.norm._parameters.get, ("weight", "bias"))
        )
        normed = torch.zeros_like(x)
        for part in np.array_split(np.arange(x.shape[1]), self.groups):
            one = np.intersect1d(part, self.kept)
            if not len(one):
                continue
            y = x[:, one]
            if self.kind == "response":
                size = y.square().sum((2, 3), keepdim=True).sqrt()
                normed[:, one] = y * size / (size.mean(1, keepdim=True) + 1e-6)
            elif self.kind == "group":
                normed[:, one] = (y - y.mean((1, 2, 3), keepdim=True)) / (
                    y.var((1, 2, 3), correction=0, keepdim=True) + 1e-5
                ).sqrt()
            elif self.kind == "layer":
                normed[:, one] = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
            else:
                normed[:, one] = y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt()
        normed = normed * weight + (0 if bias is None else bias)
        return x + normed if self.kind == "response" else normed


class Recurrent(nn.Module):
    """A recurrent layer along the positions, or a cell that is called at each of them."""

    def __init__(self, width, hidden, a, b):
        super().__init__()
        name = ("LSTM", "GRU", "RNN")[b % 3]
        self.is_cell = a > 4
        if self.is_cell:
            self.layer, self.out = getattr(nn, f"{name}Cell")(width, hidden), hidden
            return
        self.layer = getattr(nn, name)(width, hidden, 1 + b % 2, bidirectional=a % 2 > 0, batch_first=True)
        self.out = hidden * (1 + a % 2)

    def forward(self, x):
        if not self.is_cell:
            return self.layer(x)[0]
        states, state = [], None
        for token in x.unbind(1):
            state = self.layer(token, state)
            states.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(states, 1)


class Parts(nn.Module):
    """Parts of sizes in a list, one of them through a layer."""

    def __init__(self, width, first, out):
        super().__init__()
        self.sizes, self.layer = [first, width - first], nn.Conv2d(first, out, 1)

    def forward(self, x):
        u, v = x.split(self.sizes, 1)
        return torch.cat([self.layer(u), v], 1)


class RandomNet(nn.Module):
    """A network from a list of steps ``(kind, a, b)``, each on the latest value and perhaps an earlier one."""

    def __init__(self, steps, end):
        super().__init__()
        self.steps, self.end = [], end
        self.layers = nn.ModuleDict()
        widths = [3]
        for number, (kind, a, b) in enumerate([("conv", 4, 0), *steps]):
            width, earlier = widths[-1], a % len(widths)
            build = getattr(self, f"_{kind}")
            step = build(str(number), width, (earlier, widths[earlier]), a, b)
            if step is not None:
                out, place, function = step
                if str(number) not in self.layers:
                    self.layers[str(number)] = nn.Identity()
                self.steps.append((str(number), place, function))  # a copy of the network has layers of its own
                widths.append(out)
        features = widths[-1] if end == "pool" else widths[-1] * SIZE * SIZE
        self.head = nn.Linear(features, 2)

    def forward(self, x):
        values = [x]
        for name, earlier, step in self.steps:
            values.append(step(self.layers[name], values[-1], values[earlier]))
        x = values[-1]
        if self.end == "pool":
            return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return self.head((x.permute(0, 2, 3, 1) if self.end == "channels last" else x).flatten(1))

    def _layer(self, name, layer):
        self.layers[name] = layer

    def _conv(self, name, width, earlier, a, b):
        self._layer(name, nn.Conv2d(width, 2 + a, 3, padding=1, bias=b % 2 == 0))
        return 2 + a, 0, lambda layer, x, _: layer(x).relu()

    def _depthwise(self, name, width, earlier, a, b):
        times = 1 + b % 2
        self._layer(name, nn.Conv2d(width, width * times, 3, padding=1, groups=width))
        return width * times, 0, lambda layer, x, _: layer(x)

    def _grouped(self, name, width, earlier, a, b):
        groups = _groups(width, a)
        out = groups * (1 + b % 4)
        self._layer(name, nn.Conv2d(width, out, 1, groups=groups))
        return out, 0, lambda layer, x, _: layer(x).relu()

    def _transposed(self, name, width, earlier, a, b):
        groups = _groups(width, b)
        out = groups * (1 + a % 4)
        self._layer(name, nn.ConvTranspose2d(width, out, 3, padding=1, groups=groups))
        return out, 0, lambda layer, x, _: layer(x).relu()

    def _norm(self, name, width, earlier, a, b):
        self._layer(name, nn.BatchNorm2d(width, affine=b % 4 > 0))
        return width, 0, lambda layer, x, _: layer(x)

    def _over_channels(self, name, width, earlier, a, b):
        """A norm over the channels: of layers, root mean squares, global responses or groups."""
        kind = ("layer", "root mean square", "own", "response", "group")[a % 5]
        self._layer(name, OverChannels(width, kind, _groups(width, b)))
        return width, 0, lambda layer, x, _: layer(x)

    def _instance_norm(self, name, width, earlier, a, b):
        self._layer(name, nn.InstanceNorm2d(width, affine=b % 2 == 0, track_running_stats=b % 3 == 0))
        return width, 0, lambda layer, x, _: layer(x)

    def _recurrent(self, name, width, earlier, a, b):
        layer = Recurrent(width, 2 + (a + b) % 4, a, b)
        self._layer(name, layer)
        return layer.out, 0, _over_positions

    def _prelu(self, name, width, earlier, a, b):
        self._layer(name, nn.PReLU(width if b % 2 else 1))
        return width, 0, lambda layer, x, _: layer(x)

    def _residual(self, name, width, earlier, a, b):
        place, wanted = earlier
        self._layer(name, nn.Identity() if width == wanted else nn.Conv2d(width, wanted, 1))
        return wanted, place, lambda layer, x, y: layer(x) + y

    def _product(self, name, width, earlier, a, b):
        place, wanted = earlier
        self._layer(name, nn.Identity() if width == wanted else nn.Conv2d(width, wanted, 1))
        return wanted, place, lambda layer, x, y: torch.sigmoid(layer(x)) * y

    def _concat(self, name, width, earlier, a, b):
        place, other = earlier
        if width + other > 40:
            return None
        return width + other, place, lambda layer, x, y: torch.cat([x, y] if b % 2 else [y, x], 1)

    def _gate(self, name, width, earlier, a, b):
        if width % 2:
            return None
        return width // 2, 0, lambda layer, x, _: (lambda u, v: u * torch.sigmoid(v))(*x.chunk(2, 1))

    def _glu(self, name, width, earlier, a, b):
        return None if width % 2 else (width // 2, 0, lambda layer, x, _: F.glu(x, 1))

    def _swap(self, name, width, earlier, a, b):
        return None if width % 2 else (width, 0, lambda layer, x, _: torch.cat(x.chunk(2, 1)[::-1], 1))

    def _branch(self, name, width, earlier, a, b):
        """Unequal parts, one of them through a layer."""
        if width < 3:
            return None
        first = 1 + a % (width - 1)
        self._layer(name, nn.Conv2d(first, 2 + b, 1))

        def step(layer, x, _):
            u, v = x.split([first, width - first], 1)
            return torch.cat([layer(u), v], 1)

        return 2 + b + width - first, 0, step

    def _shuffle(self, name, width, earlier, a, b):
        groups = _groups(width, a)

        def step(layer, x, _):
            n, c, h, w = x.shape
            return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

        return width, 0, step

    def _slice(self, name, width, earlier, a, b):
        if width < 3:
            return None
        at = 1 + a % (width - 2)
        return (width - at, 0, lambda layer, x, _: x[:, at:]) if b % 2 else (at, 0, lambda layer, x, _: x[:, :at])

    def _equal_part(self, name, width, earlier, a, b):
        """One of equal parts, at bounds that are computed from the width: alone, or written to within the rest."""
        parts = _groups(width, a + 2)
        at = b % parts

        def step(layer, x, _):
            length = x.shape[1] // parts
            if b % 3 == 0:
                return x[:, at * length : (at + 1) * length]
            x = x.clone()
            x[:, at * length : (at + 1) * length].mul_(0.5)
            return x

        return width // parts if b % 3 == 0 else width, 0, step

    def _reuse(self, name, width, earlier, a, b):
        self._layer(name, nn.Conv2d(width, width, 1))
        return width, 0, lambda layer, x, _: layer(layer(x).relu()).relu()

    def _tied(self, name, width, earlier, a, b):
        first, second = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1, bias=False)
        second.weight = first.weight
        self._layer(name, nn.ModuleList([first, second]))
        return width, 0, lambda layer, x, _: layer[1](layer[0](x).relu())

    def _function(self, name, width, earlier, a, b):
        self._layer(name, nn.ParameterList([torch.randn(2 + a, width) * 0.3, torch.randn(2 + a)]))
        return 2 + a, 0, lambda layer, x, _: F.linear(x.movedim(1, -1), layer[0], layer[1]).movedim(-1, 1)

    def _scale(self, name, width, earlier, a, b):
        self._layer(name, nn.ParameterList([torch.rand(width, 1, 1) + 0.5]))
        return width, 0, lambda layer, x, _: x * layer[0]

    def _excite(self, name, width, earlier, a, b):
        down, up = nn.Conv2d(width, 1 + a, 1), nn.Conv2d(1 + a, width, 1)
        self._layer(name, nn.ModuleList([down, up]))
        return width, 0, lambda layer, x, _: x * torch.sigmoid(layer[1](layer[0](F.adaptive_avg_pool2d(x, 1)).relu()))

    def _pool(self, name, width, earlier, a, b):
        pool = F.max_pool2d if b % 2 else F.avg_pool2d
        return width, 0, lambda layer, x, _: pool(x, 3, stride=1, padding=1)

    def _pad(self, name, width, earlier, a, b):
        return width + a + b, 0, lambda layer, x, _: F.pad(x, (0, 0, 0, 0, a, b))

    def _kernel(self, name, width, earlier, a, b):
        """A convolution by a function, its weight a bare parameter."""
        self._layer(name, nn.ParameterList([torch.randn(2 + a, width, 3, 3) * 0.2, torch.randn(2 + a)]))
        return 2 + a, 0, lambda layer, x, _: F.conv2d(x, layer[0], layer[1] if b % 2 else None, padding=1)

    def _buffer(self, name, width, earlier, a, b):
        self._layer(name, Buffered(width))
        return width, 0, lambda layer, x, _: x * layer.scale + layer.shift

    def _unflatten(self, name, width, earlier, a, b):
        """A linear layer whose output becomes an image."""
        self._layer(name, nn.Linear(width, (2 + a) * SIZE * SIZE))
        return 2 + a, 0, lambda layer, x, _: layer(x.mean((2, 3))).relu().view(len(x), -1, SIZE, SIZE)

    def _attention(self, name, width, earlier, a, b):
        """Attention over the positions, its heads counted by what is left."""
        heads, features = 1 + a % 4, 1 + b % 3
        inner = [nn.Linear(width, heads * features) for _ in range(3)] + [nn.Linear(heads * features, width)]
        self._layer(name, nn.ModuleList(inner))

        def step(layer, x, _):
            tokens = x.flatten(2).transpose(1, 2)
            q, k, v = (part(tokens).unflatten(-1, (-1, features)).transpose(1, 2) for part in layer[:3])
            if a % 2:
                mixed = F.scaled_dot_product_attention(q, k, v)
            else:
                mixed = (q @ k.transpose(-1, -2) * features**-0.5).softmax(-1) @ v
            return x + layer[3](mixed.transpose(1, 2).flatten(2)).transpose(1, 2).view(x.shape)

        return width, 0, step

    def _sized(self, name, width, earlier, a, b):
        """Attention whose heads and features are attributes."""
        self._layer(name, Heads(width, 1 + a % 4, 1 + b % 3, tied=False))
        return width, 0, _over_positions

    def _tied_heads(self, name, width, earlier, a, b):
        """Attention whose features are as many as its inputs."""
        heads = _groups(width, a)
        self._layer(name, Heads(width, heads, width // heads, tied=True))
        return width, 0, _over_positions

    def _multihead(self, name, width, earlier, a, b):
        """PyTorch's attention, by itself or with another value."""
        self._layer(name, nn.MultiheadAttention(width, _groups(width, a), bias=b % 2 == 0, batch_first=True))
        return width, 0, lambda layer, x, _: x + _over_positions(lambda y: layer(y, y, y)[0], x, None)

    def _rotary(self, name, width, earlier, a, b):
        """Attention with rotary embeddings, in which query heads may share those of keys and values."""
        shared = 1 + b % 2
        angles = next((one.angles for one in self.layers.values() if isinstance(one, Rotary)), None)
        if angles is None:
            angles = nn.Module()
            angles.register_buffer("frequencies", 2.0 ** -torch.arange(PAIRS), persistent=False)
        self._layer(name, Rotary(width, shared * (1 + a % 3), shared, b % 3, angles))
        return width, 0, _over_positions

    def _every_second(self, name, width, earlier, a, b):
        """Every second channel, or all of them in another order."""
        if width % 2:
            return None
        if a % 2:
            return width // 2, 0, lambda layer, x, _: x[:, b % 2 :: 2]
        return width, 0, lambda layer, x, _: torch.stack((x[:, 1::2], x[:, ::2]), 2).flatten(1, 2)

    def _parts(self, name, width, earlier, a, b):
        if width < 3:
            return None
        first = 1 + a % (width - 1)
        self._layer(name, Parts(width, first, 2 + b))
        return 2 + b + width - first, 0, lambda layer, x, _: layer(x)

    def _from_end(self, name, width, earlier, a, b):
        """A bound counted from the end."""
        if width < 3:
            return None
        at = 1 + a % (width - 2)
        if b % 3 == 0:
            return at, 0, lambda layer, x, _: x[:, -at:]
        if b % 3 == 1:
            return width - at, 0, lambda layer, x, _: x[:, :-at]
        return width, 0, lambda layer, x, _: torch.cat([x[:, :-at].tanh(), x[:, -at:]], 1)

    def _in_place(self, name, width, earlier, a, b):
        """A write through a view."""
        if width < 3:
            return None
        at = 1 + a % (width - 2)

        def step(layer, x, _):
            x = x.clone()
            (x[:, :at] if b % 2 else x[:, -at:]).sub_(1.0 if b % 3 else 0.0)
            return x + x.sum(1, keepdim=True) * (0.1 if b > 3 else 0.0)

        return width, 0, step

    def _filled(self, name, width, earlier, a, b):
        """A mask or a copy written into zeros."""
        at = 1 + a % width

        def step(layer, x, _):
            zeros = x.new_zeros(x.shape)
            if b % 2:
                zeros[:, :at] = 1
                return x * zeros
            for number, sample in enumerate(x):
                zeros[number] = sample
            return zeros + zeros.sum(1, keepdim=True) * (0.1 if b > 3 else 0.0)

        return width, 0, step

    def _circular(self, name, width, earlier, a, b):
        return width, 0, lambda layer, x, _: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="circular"), 3, stride=1)

    def _channelwise(self, name, width, earlier, a, b):
        """A product of each channel with itself, summed over the channels."""

        def step(layer, x, _):
            y = torch.sigmoid(x) if b % 2 else x
            return x + torch.einsum("nchw,nchw->nc", y, x if a % 2 else y).sum(1)[:, None, None, None] * 0.01

        return width, 0, step

    def _generated(self, name, width, earlier, a, b):
        """A kernel that is computed, and nowhere zero."""
        self._layer(name, nn.ParameterList([torch.randn(2 + a, width, 1, 1) * 0.2]))
        return 2 + a, 0, lambda layer, x, _: F.conv2d(torch.sigmoid(x) if b % 2 else x, torch.exp(layer[0]) - 0.5)

    def _positions(self, name, width, earlier, a, b):
        """A layer or a norm over the positions, its bias there for every channel."""
        size = SIZE * SIZE
        self._layer(name, nn.Linear(size, size) if b % 2 else nn.LayerNorm(size))

        def step(layer, x, _):
            y = layer(x.flatten(2)).view(x.shape)
            return y + y.sum(1, keepdim=True) * (0.1 if a % 2 else 0.0)

        return width, 0, step

    def _counted(self, name, width, earlier, a, b):
        """A mean whose divisor is counted."""
        return width, 0, lambda layer, x, _: x / (x[:, :1] * 0 + 1).expand_as(x).sum(1, keepdim=True)

    def _mix(self, name, width, earlier, a, b):
        """A mean over the channels: freezes them."""
        return width, 0, lambda layer, x, _: x + x.mean(1, keepdim=True)


def _over_positions(layer, x, _):
    """A layer of tokens, applied to the positions of an image."""
    return layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(len(x), -1, *x.shape[2:])


KINDS = sorted(name[1:] for name in vars(RandomNet) if name.startswith("_") and not name.startswith("__"))
KINDS.remove("layer")
step = st.tuples(st.sampled_from(KINDS), st.integers(0, 6), st.integers(0, 6))
networks = st.tuples(
    st.lists(step, min_size=1, max_size=9), st.sampled_from(["pool", "flatten", "channels last"]), st.integers(0, 99)
)


def _reference(model, axes):
    """The masked network, whose norms are over what is kept."""
    reference = masked(model, axes)
    for name, module in reference.named_modules():
        if isinstance(module, OverChannels):
            module.kept = axes.get(f"{name}.norm.weight", {}).get(0)
    return reference


def check(drawn):
    """The property, for one network."""
    steps, end, seed = drawn
    torch.manual_seed(seed)
    model = settle(RandomNet(steps, end)).eval()
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    tracing = Tracing(TracedModel.of(model, x))
    structure = tracing.structure
    event(f"groups: {min(len(structure.groups), 5)}")
    for number in range(2):  # a second cut with what `take` says after the first
        kept = draw(structure, seed)
        if number == 0:
            tracing.verify_shapes(kept)
        verify_shapes(TracedModel.of(model, x), structure, kept)
        axes = structure.axes(kept)
        small = shrunk(model, axes, structure.factors(kept))
        torch.testing.assert_close(small(x), _reference(model, axes)(x), rtol=1e-9, atol=1e-9)
        structure, model = structure.take(kept), small
        assert structure.cost.params(structure.widths) == sum(p.numel() for p in model.parameters())
        with counting() as counter:
            model(x)
        assert structure.cost.macs(structure.widths) * 2 * len(x) == counter.get_total_flops()
    model.train()(x).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape, name
