"""The XGB pruner written down naively: one network after the other by hand, a full forward for every layer.

Nothing of the package is used. Networks say by hand what their layers give after norm and activation, which layers
share their units, and which of them take these as input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import xgboost
from torch import Tensor, nn
from torch.nn import functional as F


class Coupled(NamedTuple):
    """Layers that give the same units, in the order of execution, and those that take them after the last of these."""

    producers: Sequence[str]
    width: int


Masks = Mapping[str, Tensor]


def masked(x: Tensor, masks: Masks, group: str) -> Tensor:
    """``x`` with the units of a group multiplied by its mask, which is over channels."""
    return x if group not in masks else x * masks[group].view(1, -1, *[1] * (x.dim() - 2))


class Chain(nn.Module):
    """Convolution, norm, activation twice, then two dense layers."""

    groups: ClassVar = {"c1": Coupled(["c1"], 8), "c2": Coupled(["c2"], 6), "d1": Coupled(["d1"], 7)}
    layers = ("c1", "c2", "d1")

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2 = nn.Conv2d(8, 6, 3, padding=1)
        self.d1, self.d2 = nn.Linear(6 * 4, 7), nn.Linear(7, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.n1(self.c1(x))), 2)
        x = F.max_pool2d(torch.tanh(self.c2(x)), 2)
        out: Tensor = self.d2(torch.relu(self.d1(x.flatten(1))))
        return out

    def naive(self, x: Tensor, masks: Masks) -> dict[str, Tensor]:
        found = {"c1": F.relu(self.n1(self.c1(x)))}
        x = masked(F.max_pool2d(found["c1"], 2), masks, "c1")
        found["c2"] = torch.tanh(self.c2(x))
        x = masked(F.max_pool2d(found["c2"], 2), masks, "c2")
        found["d1"] = torch.relu(self.d1(x.flatten(1)))
        return found


class Residual(nn.Module):
    """A stem and two residual blocks on one stream of units."""

    groups: ClassVar = {
        "stem": Coupled(["stem", "b1", "b2"], 6),
        "a1": Coupled(["a1"], 5),
        "a2": Coupled(["a2"], 4),
    }
    layers = ("stem", "a1", "b1", "a2", "b2")

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        for i, width in ((1, 5), (2, 4)):
            setattr(self, f"a{i}", nn.Conv2d(6, width, 3, padding=1))
            setattr(self, f"n{i}", nn.BatchNorm2d(width))
            setattr(self, f"b{i}", nn.Conv2d(width, 6, 3, padding=1))
            setattr(self, f"m{i}", nn.BatchNorm2d(6))
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.n0(self.stem(x)))
        x = self.act(self.m1(self.b1(self.act(self.n1(self.a1(x))))) + x)
        x = self.act(self.m2(self.b2(self.act(self.n2(self.a2(x))))) + x)
        out: Tensor = self.fc(x.mean((2, 3)))
        return out

    def naive(self, x: Tensor, masks: Masks) -> dict[str, Tensor]:
        found = {"stem": F.relu(self.n0(self.stem(x)))}
        stream = found["stem"]
        found["a1"] = F.relu(self.n1(self.a1(stream)))
        found["b1"] = self.m1(self.b1(masked(found["a1"], masks, "a1")))
        stream = F.relu(found["b1"] + stream)
        found["a2"] = F.relu(self.n2(self.a2(stream)))
        # The stream stays unmasked until its last member, b2, is decided; after it there is the classifier alone.
        found["b2"] = self.m2(self.b2(masked(found["a2"], masks, "a2")))
        return found


class Dense(nn.Module):
    """Norm, activation, convolution; what each gives is concatenated to what came before."""

    groups: ClassVar = {
        "stem": Coupled(["stem"], 4),
        "g1": Coupled(["g1"], 3),
        "g2": Coupled(["g2"], 3),
        "t": Coupled(["t"], 5),
    }
    layers = ("stem", "g1", "g2", "t")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.n1, self.g1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)
        self.n2, self.g2 = nn.BatchNorm2d(7), nn.Conv2d(7, 3, 3, padding=1)
        self.n3, self.t = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1)
        self.fc = nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.g1(F.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.g2(F.relu(self.n2(x)))], 1)
        out: Tensor = self.fc(F.relu(self.t(F.relu(self.n3(x)))).mean((2, 3)))
        return out

    def naive(self, x: Tensor, masks: Masks) -> dict[str, Tensor]:
        # What is removed is removed behind the norm that it enters: its scale and shift go with it.
        found = {"stem": self.stem(x)}
        found["g1"] = self.g1(masked(F.relu(self.n1(found["stem"])), masks, "stem"))
        parts = [found["stem"], found["g1"]]
        entering = F.relu(self.n2(torch.cat(parts, 1))).split([4, 3], 1)
        found["g2"] = self.g2(
            torch.cat([masked(p, masks, n) for p, n in zip(entering, ["stem", "g1"], strict=True)], 1)
        )
        parts.append(found["g2"])
        entering = F.relu(self.n3(torch.cat(parts, 1))).split([4, 3, 3], 1)
        names = ["stem", "g1", "g2"]
        found["t"] = F.relu(self.t(torch.cat([masked(p, masks, n) for p, n in zip(entering, names, strict=True)], 1)))
        return found


NETWORKS: tuple[type[Any], ...] = (Chain, Residual, Dense)


def network(kind: type[Any]) -> Any:
    """A network in eval mode, whose norms are not the identity."""
    torch.manual_seed(1)
    made = kind()
    for norm in (m for m in made.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.running_var):
            tensor.data.uniform_(0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            tensor.data.normal_(0, 0.3)
    return made.eval()


def images(n: int = 240, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Noise with a bright row that tells one of three classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    for i, label in enumerate(labels.tolist()):
        x[i, 0, 2 * label : 2 * label + 2] += 1.0
    return x, labels


class Found(NamedTuple):
    """What one layer gave: μ, average gains and total gains, these two with sum 1."""

    mu: float
    importance: np.ndarray
    total: np.ndarray


def surrogate(phi: Tensor, labels: Tensor, parts: Any, reduction: str) -> Found:
    """XGBoost on pooled features, with the defaults that are documented."""
    pooled = phi if phi.dim() == 2 else phi.amax((2, 3)) if reduction == "max" else phi.mean((2, 3))
    features, y = pooled.detach().numpy().astype(np.float32), labels.numpy()
    train = xgboost.QuantileDMatrix(features[parts.fit], y[parts.fit], max_bin=64)
    stop = xgboost.QuantileDMatrix(features[parts.stop], y[parts.stop], ref=train, max_bin=64)
    settings = {
        "objective": "multi:softprob",
        "num_class": 3,
        "tree_method": "hist",
        "max_depth": 3,
        "learning_rate": 0.3,
        "max_bin": 64,
        "seed": 0,
    }
    booster = xgboost.train(settings, train, 100, evals=[(stop, "stop")], early_stopping_rounds=10, verbose_eval=False)
    booster = booster[: booster.best_iteration + 1]
    held = xgboost.DMatrix(features[parts.held_back])
    mu = float((booster.predict(held).argmax(1) == y[parts.held_back]).mean())
    gains = []
    for kind in ("gain", "total_gain"):
        scores = booster.get_score(importance_type=kind)
        values = np.array([scores.get(f"f{i}", 0.0) for i in range(features.shape[1])])
        gains.append(values / values.sum())
    return Found(mu, *gains)


def kept_by(rule: str, amount: float, importance: np.ndarray, total: np.ndarray) -> list[int]:
    """Units of a group that stay, from the maxima over its members."""
    width = len(importance)
    if rule == "threshold":
        kept = [i for i in range(width) if importance[i] > amount]
    elif rule == "quantile":
        kept = [i for i in range(width) if importance[i] > np.quantile(importance, amount)]
    elif rule == "gain":
        order = sorted(range(width), key=lambda i: -total[i])
        kept, held = [], 0.0
        for i in order:
            if held >= amount * total.sum() - 1e-12 or total[i] == 0:
                break
            kept.append(i)
            held += total[i]
    else:  # pruning_ratio
        stay = max(int(np.floor(width * (1 - amount) + 0.5 + 1e-9)), 1)
        kept = sorted(range(width), key=lambda i: (importance[i], i))[width - stay :]
    return sorted(kept) or [int(np.argmax(importance))]


def naive(
    net: Any, x: Tensor, labels: Tensor, parts: Any, mode: str, rule: str, amount: float, reduction: str = "avg"
) -> tuple[dict[str, Found], dict[str, list[int]]]:
    """Algorithm 1, and which units of each group stay."""
    found: dict[str, Found] = {}
    kept: dict[str, list[int]] = {}
    masks: dict[str, Tensor] = {}
    for layer in net.layers:
        with torch.no_grad():
            phi = net.naive(x, masks)[layer]
        found[layer] = surrogate(phi, labels, parts, reduction)
        for name, group in net.groups.items():
            if group.producers[-1] == layer:
                members = [found[producer] for producer in group.producers]
                importance = np.max([member.importance for member in members], axis=0)
                total = np.max([member.total for member in members], axis=0)
                kept[name] = kept_by(rule, amount, importance, total)
                if mode == "layer_wise":
                    masks[name] = torch.zeros(group.width, dtype=torch.float64)
                    masks[name][kept[name]] = 1
    return found, kept
