"""Cost of ranking by masking: parts ``macs`` and ``seconds`` of `benchmarks.spvr`.

VGG16-BN as trained there, and the pretrained ResNet-56 (option A), whose 55 layers are ranked separately, with all
their channels, even those that its zero padding keeps from being removed. Images are from CIFAR-10's training set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.spvr_networks import balanced, cifar10, resnet56, vgg16
from lightning_prune.scoring import DataPass, stations_of
from lightning_prune.scoring.spvr import class_scores, prediction_change
from lightning_prune.scoring.spvr.sites import Site, sites_of_groups, sites_of_layers
from lightning_prune.scoring.spvr.walk_ranking import Ranking, RankingOptions, rank
from lightning_prune.structure import TracedModel, trace

__all__ = ["NETWORKS", "Row", "data_of", "macs", "seconds", "sites_of"]

Row = dict[str, Any]
NETWORKS: dict[str, Callable[[Path], nn.Module]] = {"VGG16-BN": vgg16, "ResNet-56": lambda _: resnet56()}


def data_of(per_class: int, dtype: torch.dtype = torch.float32) -> DataPass:
    """Training images."""
    x, y = balanced(cifar10(train=True), per_class)
    return DataPass([(x.to(dtype), y)], batch_size=50)


def sites_of(model: nn.Module, data: DataPass) -> Mapping[str, Site]:
    """Of a chain where groups enter the next layer; else behind every layer, with all its channels."""
    batch = next(iter(data))
    structure = trace(TracedModel.of(model, batch.args[0][:2]))
    if all(len(group.producers) == 1 for group in structure.groups):
        return sites_of_groups(model, structure.groups, stations_of(model, batch, point="input"))[0]
    found, _ = sites_of_layers(structure.groups, stations_of(model, batch))
    whole = {}
    for name, site in found.items():
        channels = torch.arange(len(model.get_submodule(name).get_parameter("weight")))[:, None]
        whole[name] = Site(name, len(channels), dict.fromkeys(site.channels, channels))
    return whole


def macs(name: str, d: int, work: Path) -> Row:
    """Counted multiply-accumulates; and in float64, on fewer images, whether ranks are those of full forward passes."""

    def ranked(per_class: int, count: int | None = None, **options: Any) -> Ranking:
        model, data = NETWORKS[name](work).double(), data_of(per_class, torch.float64)
        data = data if count is None else DataPass([(data_rows(data, count))])
        return rank(model, data, sites_of(model, data), RankingOptions(group_size=d, **options))

    fast = ranked(1)
    first = fast.macs_naive // (_count(fast) + 1)
    row: Row = {"groups": _count(fast), "macs": fast.macs, "naive": fast.macs_naive}
    row |= {
        "ratio": fast.macs_naive / fast.macs,
        "without_first_pass": (fast.macs_naive - first) / (fast.macs - first),
    }
    plain, again = ranked(1, 4, plain=True, fast=False), ranked(1, 4)
    differences = [float((plain.scores[key] - again.scores[key]).abs().max()) for key in plain.scores]
    row["ranks_equal"] = _order(plain) == _order(again) and plain.bundles == again.bundles
    return row | {"difference": max(differences)}


def data_rows(data: DataPass, count: int) -> tuple[Tensor, Tensor]:
    """The first samples."""
    batch = next(iter(data))
    assert batch.labels is not None
    return batch.args[0][:count], batch.labels[:count]


def _count(ranking: Ranking) -> int:
    return sum(map(len, ranking.bundles.values()))


def _order(ranking: Ranking) -> list[tuple[int, int]]:
    """All groups of the network from the least; ties (to nine decimals) by index."""
    keyed = [
        (round(score, 9), site, number)
        for site, scores in enumerate(ranking.scores.values())
        for number, score in enumerate(scores.tolist())
    ]
    return [key[1:] for key in sorted(keyed)]


def seconds(name: str, d: int, work: Path, per_class: int = 5, chosen: int = 50) -> Row:
    """Processor seconds of the ranking, and of both rivals, from random groups of the network."""
    model, data = NETWORKS[name](work), data_of(per_class)
    sites = sites_of(model, data)
    began = time.process_time()
    found = rank(model, data, sites, RankingOptions(group_size=d))
    ours = time.process_time() - began
    names = [(key, number) for key, bundles in found.bundles.items() for number in range(len(bundles))]
    some = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:chosen].tolist()
    groups = [(names[i][0], found.bundles[names[i][0]][names[i][1]]) for i in some]
    (batch,) = data
    x = batch.args[0]
    full, scores = _full(model, x, groups)
    agree = [abs(float(found.scores[names[i][0]][names[i][1]]) - score) for i, score in zip(some, scores, strict=True)]
    expanded = {rows: _expanded(model, x, groups, rows) * len(x) * len(names) for rows in (64, 256)}
    row: Row = {"groups": len(names), "images": len(x), "ours": ours, "full": full / len(groups) * len(names)}
    return row | {"expanded": expanded, "largest_difference": max(agree)}


def _full(model: nn.Module, x: Tensor, groups: Sequence[tuple[str, Sequence[int]]]) -> tuple[float, list[float]]:
    """Seconds for one forward pass of all images per group, and what it finds."""
    reading, whole = _read(model, x)
    began, scores = time.process_time(), []
    for layer, units in groups:
        out = _masked(model, layer, [units], x)
        scores.append(float(prediction_change(whole, reading.log_probabilities(out)).sum()))
    return time.process_time() - began, scores


def _expanded(model: nn.Module, x: Tensor, groups: Sequence[tuple[str, Sequence[int]]], rows: int) -> float:
    """Seconds per group and image of a batch with one image, and other masks of a layer in each of its elements.

    Groups of a layer that has fewer than ``rows`` are counted as if it had more.
    """
    reading, whole = _read(model, x[:1])
    began, batches = time.process_time(), 5
    for layer, units in groups[:batches]:
        out = _masked(model, layer, [units] * rows, x[:1].expand(rows, *x.shape[1:]))
        prediction_change(whole, reading.log_probabilities(out)[:, None]).sum(1)
    return (time.process_time() - began) / (rows * batches)


@torch.no_grad()
def _read(model: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    out = model(x)
    reading = class_scores(out, None)
    return reading, reading.log_probabilities(out)


@torch.no_grad()
def _masked(model: nn.Module, layer: str, units: Sequence[Sequence[int]], x: Tensor) -> Tensor:
    """The network with some channels 0 behind a layer's norm, in all samples or others in each."""
    norm = model.get_submodule(_norm(layer))
    masks = torch.ones(len(units), len(norm.get_parameter("weight")), 1, 1)
    for mask, found in zip(masks, units, strict=True):
        mask[list(found)] = 0
    with _hooked(norm, masks):
        out: Tensor = model(x)
    return out


def _norm(layer: str) -> str:
    """The norm behind a convolution of either network."""
    before, _, last = layer.rpartition(".")
    return f"{before}.{int(last) + 1}" if last.isdigit() else layer.replace("conv", "bn")


@contextmanager
def _hooked(norm: nn.Module, masks: Tensor) -> Iterator[None]:
    handle = norm.register_forward_hook(lambda _, __, out: out * masks)
    try:
        yield
    finally:
        handle.remove()
