"""Savings of races, and whether their decisions equal those of the full ranking.

Part ``race`` of `benchmarks.spvr`: groups of eight channels of ResNet-56 with projection shortcuts (the pretrained
network's function), 20 training images of every class of CIFAR-10, in parts of at least 16, as in `SPvRPruning`. The
plan removes the least important groups of all layers, each separately, until a share of all channels' parameters
remains (a layer's filters, and for inner layers the weights that consume them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from time import process_time

import torch
from torch import Tensor, nn

from benchmarks.spvr_networks import resnet56_projection
from benchmarks.spvr_speed import Row, data_of
from lightning_prune.scoring import DataPass, stations_of
from lightning_prune.scoring.spvr.racing import Decides, Race, RaceKind, rank_by_race
from lightning_prune.scoring.spvr.sites import Site, sites_of_layers
from lightning_prune.scoring.spvr.walk_ranking import Ranking, RankingOptions, rank
from lightning_prune.structure import TracedModel, trace

__all__ = ["SHARES", "race"]

SHARES = (0.1, 0.3, 0.5, 0.7)
OPTIONS = RankingOptions(group_size=8)
Bundles = Mapping[str, Sequence[Sequence[int]]]
Scores = Mapping[str, Tensor]


def race(share: float, kind: RaceKind, per_class: int, samples: int) -> Row:
    """Multiply-accumulates and processor time of a race, and the groups that it decides unlike the full ranking."""
    model, data, sites, whole, used = _full(per_class)
    decides, began = _layers(model, share), process_time()
    found = rank_by_race(model, data, sites, OPTIONS, Race(kind, decides, samples=samples))
    row: Row = {"processor": process_time() - began, "processor_full": used}
    mine, wanted = (decides(one.bundles, one.scores) for one in (found, whole))
    groups = sum(map(len, wanted.values()))
    row |= {"groups": groups, "ratio": found.macs_naive / found.macs, "full": whole.macs_naive / whole.macs}
    return row | {
        "decisive": sum(int(one.sum()) for one in wanted.values()) / groups,
        "otherwise": sum(int((mine[name] != one).sum()) for name, one in wanted.items()) / groups,
    }


@cache
def _full(per_class: int) -> tuple[nn.Module, DataPass, Mapping[str, Site], Ranking, float]:
    model, data = resnet56_projection(), data_of(per_class)
    batch = next(iter(data))
    sites, _ = sites_of_layers(trace(TracedModel.of(model, batch.args[0][:2])).groups, stations_of(model, batch))
    began = process_time()
    found = rank(model, data, sites, OPTIONS)
    return model, data, sites, found, process_time() - began


def _layers(model: nn.Module, share: float) -> Decides:
    weights = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    params = {name: weight[0].numel() for name, weight in weights.items()}
    for name in params:
        if name.endswith(".conv1"):
            params[name] += weights[name.replace("conv1", "conv2")][:, 0].numel()

    def decides(bundles: Bundles, scores: Scores) -> dict[str, Tensor]:
        taken = {name: torch.zeros(len(found), dtype=torch.bool) for name, found in bundles.items()}
        left = whole = sum(params[name] * sum(map(len, found)) for name, found in bundles.items())
        keyed = ((float(score), k, i) for k, name in enumerate(bundles) for i, score in enumerate(scores[name]))
        names = [*bundles]
        for _, k, i in sorted(keyed):
            if left <= share * whole:
                break
            taken[names[k]][i] = True
            left -= params[names[k]] * len(bundles[names[k]][i])
        return taken

    return decides
