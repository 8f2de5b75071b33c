"""Networks whose layers compute with numbers of a configuration that they share."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import inspect, load, load_by_shapes, prune, rebuild, save, strip
from lightning_prune.structure import Structure, TracedModel, trace
from lightning_prune.structure.module_configs import names_read
from lightning_prune.surgery import history_of
from lightning_prune.surgery.restore import match_checkpoint_shapes
from lightning_prune.surgery.shrink import cut, mask

WIDTH, FEATURES = 10, 6
X = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@dataclasses.dataclass
class Sizes:
    heads: int
    keys: int
    causal: bool = True

    @property
    def shared(self) -> int:
        return self.heads // self.keys


class Attention(nn.Module):
    """As in Phi-3: one layer makes queries, keys and values, which slices take at bounds computed from a number.

    Args:
        config: The configuration.
        held: The name under which the layer holds it.
    """

    def __init__(self, config: Any, held: str = "config") -> None:
        super().__init__()
        setattr(self, held, config)
        self.held, self.features = held, FEATURES
        self.qkv = nn.Linear(WIDTH, (config.heads + 2 * config.keys) * FEATURES)
        self.out = nn.Linear(config.heads * FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        config = getattr(self, self.held)
        queries, keys = config.heads * self.features, config.keys * self.features
        qkv = self.qkv(x)
        q, k, v = qkv[..., :queries], qkv[..., queries : queries + keys], qkv[..., queries + keys :]
        q, k, v = (part.unflatten(-1, (-1, self.features)).transpose(1, 2) for part in (q, k, v))
        times = q.shape[1] // k.shape[1]
        k, v = (part[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=config.causal)
        return x + self.out(out.transpose(1, 2).flatten(2))


def _network(heads: int = 8, keys: int = 4, kind: Any = Sizes, held: str = "config") -> nn.Sequential:
    torch.manual_seed(0)
    config = kind(heads=heads, keys=keys, causal=True)
    layers = [Attention(config, held) for _ in range(3)]
    network = nn.Sequential(*layers, nn.Linear(WIDTH, 2)).double()
    network.config = config
    return network


def _structure(network: nn.Module) -> Structure:
    return trace(TracedModel.of(network, X))


def _numbers(network: nn.Sequential, held: str = "config") -> list[tuple[int, int]]:
    configs = [getattr(layer, held) for layer in network[:3]]
    return [(config.heads, config.keys) for config in configs]


@pytest.mark.parametrize("kind", [Sizes, argparse.Namespace, SimpleNamespace])
@pytest.mark.parametrize("held", ["config", "args", "cfg"])
def test_each_layer_loses_heads_of_its_own(kind: Any, held: str) -> None:
    network = _network(kind=kind, held=held)
    structure, config, masked = _structure(network), network.config, copy.deepcopy(network)
    heads = {f"{n}.qkv": 4 for n in range(3)}
    assert {name: width for name, width in structure.widths.items() if "#" not in name} == heads
    (group, *_) = structure.groups
    assert {size.tensor: size.index.shape for size in group.sizes} == {
        f"0.{held}[heads]": (4, 2),
        f"0.{held}[keys]": (4, 1),
    }
    axes = structure.axes({"0.qkv": (1, 3), "1.qkv": (0, 2, 3)})
    mask(masked, axes)
    change = cut(network, axes)
    assert _numbers(network, held) == [(4, 2), (6, 3), (8, 4)]
    assert (config.heads, config.keys) == (8, 4)
    assert isinstance(getattr(network[0], held), kind)
    torch.testing.assert_close(network(X), masked(X), rtol=1e-12, atol=1e-12)
    change.undo()
    assert all(getattr(layer, held) is config for layer in network[:3])


@pytest.mark.parametrize(("heads", "keys"), [(8, 4), (6, 6), (6, 3), (9, 3), (8, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_cuts_equal_the_masked_network(heads: int, keys: int, seed: int) -> None:
    network, draw = _network(heads, keys), np.random.default_rng(seed)
    structure = _structure(network)
    assert structure.widths == {
        f"{n}.qkv{suffix}": width for n in range(3) for suffix, width in (("", keys), ("#head_dim", FEATURES))
    }
    kept = {
        group.name: tuple(sorted(draw.permutation(group.width)[: max(group.width - 1 - n % 2, 2)].tolist()))
        for n, group in enumerate(structure.groups)
    }
    masked, axes, factors = copy.deepcopy(network), structure.axes(kept), structure.factors(kept)
    cut(network, axes, factors=factors)
    mask(masked, axes)
    assert _numbers(network) == [
        (heads // keys * left, left) for left in (len(kept[f"{number}.qkv"]) for number in range(3))
    ]
    torch.testing.assert_close(network(X), masked(X), rtol=1e-12, atol=1e-12)
    again = _structure(network)
    assert {g.name: g for g in again.groups} == {g.name: g for g in structure.take(kept).groups}


def test_a_later_change_of_the_configuration_reaches_every_layer() -> None:
    network = _network()
    prune(network, X, pruning_ratio=0.5)
    other = copy.deepcopy(network)
    network.config.causal = False
    assert [layer.config.causal for layer in network[:3]] == [False] * 3
    network[0].config.causal = True  # as in the dense network, whose layers have one configuration
    assert [layer.config.causal for layer in network[:3]] == [True] * 3
    network[0].config.causal = False
    assert not torch.allclose(network(X), other(X))
    assert all(layer.config.causal for layer in other[:3])


def test_copies_share_one_configuration() -> None:
    network = _network()
    prune(network, X, pruning_ratio=0.5)
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(again(X), network(X))
        assert _numbers(again) == _numbers(network) == [(4, 2)] * 3
        again.config.causal = False
        assert not any(layer.config.causal for layer in again[:3])
    assert network.config.causal


def test_files_and_checkpoints(tmp_path: Path) -> None:
    network = _network()
    prune(network, X, pruning_ratio={"0.qkv": 0.5, "1.qkv": 0.75}, layers="?.qkv")
    prune(network, X, pruning_ratio={"0.qkv": 0.75, "2.qkv": 0.25}, layers="?.qkv")
    assert _numbers(network) == [(2, 1), (2, 1), (6, 3)]
    save(network, tmp_path / "small.safetensors")
    rebuild(network, tmp_path / "small.py")
    defined: dict[str, Any] = {}
    exec((tmp_path / "small.py").read_text(), defined)
    by_file = load(_network(), tmp_path / "small.safetensors")
    rebuilt = defined["load"](_network(), str(tmp_path / "small.safetensors"))
    with pytest.warns(UserWarning, match="whole heads are taken to be removed where they can be"):
        by_shapes = load_by_shapes(_network(), network.state_dict(), X)
    for again in (by_file, rebuilt, by_shapes):
        assert _numbers(again) == _numbers(network)
        assert torch.equal(again(X), network(X))
        again.config.causal = False
        assert not any(layer.config.causal for layer in again[:3])
    with pytest.raises(ValueError, match=r"0.config is {'heads': 4, 'keys': 4} instead of {'heads': 8, 'keys': 4}"):
        defined["narrow"](_network(4, 4))
    history, config = history_of(network), network.config
    match_checkpoint_shapes(network, {}, None)
    assert all(layer.config is config for layer in network[:3])
    match_checkpoint_shapes(network, {}, history)
    assert _numbers(network) == [(2, 1), (2, 1), (6, 3)]


def test_strip_refuses_numbers_that_stand_in_for_those_of_a_configuration() -> None:
    network = _network()
    prune(network, X, pruning_ratio={"0.qkv": 0.5}, layers="?.qkv")
    with pytest.raises(ValueError, match=r"numbers of lightning_prune in 0\.config: layers that share"):
        strip(network)
    assert history_of(network) is not None


class Whole(nn.Module):
    """A network that saves its configuration, and computes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(heads=4)
        self.qkv, self.out = nn.Linear(WIDTH, 72), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.config.heads, FEATURES)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Saving(Whole):
    def save_pretrained(self, folder: str) -> None:
        """Saves the configuration."""


def test_the_configuration_that_a_network_is_saved_with_stays() -> None:
    assert trace(TracedModel.of(Whole().double(), X)).widths["qkv"] == 4
    network = Saving().double()
    assert not trace(TracedModel.of(network, X)).widths
    assert type(network.config) is SimpleNamespace
    assert "qkv" in str(inspect(network, X))


class Other(Attention):
    """Has numbers of its own, and reads none of the configuration but in its constructor."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.heads, self.keys = config.heads, config.keys

    def forward(self, x: Tensor) -> Tensor:
        """In a helper."""
        return self._attended(x)

    def _attended(self, x: Tensor) -> Tensor:
        queries, keys = self.heads * self.features, self.keys * self.features
        q, k, v = self.qkv(x).split([queries, keys, keys], -1)
        q, k, v = (part.unflatten(-1, (-1, self.features)).transpose(1, 2) for part in (q, k, v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_numbers_that_a_layer_does_not_read_are_no_candidates() -> None:
    config = Sizes(6, 6)
    assert {"heads", "keys"} <= names_read(Attention(config))
    assert not {"heads", "keys"} & names_read(Other(config))
    (group, *_) = trace(TracedModel.of(nn.Sequential(Other(config), nn.Linear(WIDTH, 2)).double(), X)).groups
    assert {size.tensor for size in group.sizes} == {"0.heads", "0.keys"}


def test_torch_compile_reads_the_numbers() -> None:
    network = _network()
    prune(network, X, pruning_ratio={"0.qkv": 0.5}, layers="?.qkv")
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), network(X), rtol=1e-12, atol=1e-12)
