"""XGB pruning (Ratajczyk and Horzyk, 2024): removes filters that a surrogate on a layer's features does not use.

The output of each layer, after norm and activation, is pooled to one number per channel, from which a surrogate
(gradient-boosted trees) predicts the labels. Its score on held-out samples is μ of the layer; its feature importances
are those of the channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_prune.scoring.contributions import LINEAR_LAYERS
from lightning_prune.scoring.statistics import unit_inputs
from lightning_prune.scoring.surrogates import Metric, Parts, Surrogate
from lightning_prune.scoring.walk import Station, Walk
from lightning_prune.structure.graph import Group, Member

__all__ = [
    "LayerScore",
    "LayerScorer",
    "ScoreStore",
    "Usage",
    "consumer_masks",
    "end_station",
    "group_usage",
    "log_importance",
    "score_layers",
    "score_layers_in_turn",
    "unit_axes",
    "unmaskable",
    "unscorable",
]

FloatArray = npt.NDArray[np.float64]

# The paper's ε, added to importances before the logarithm.
_EPSILON = 1e-16


@dataclass(frozen=True, eq=False)
class LayerScore:
    """Result of the surrogate of one layer.

    Attributes:
        station: The layer, and the point at which its features were taken.
        score: μ, the metric on held-out samples.
        importance: I, importance of each channel, shape ``(channels,)``, with sum 1 (or all 0).
        share: Each channel's share of the surrogate's total gain, with sum 1 (or all 0).
        seconds: Time to fit the surrogate.
    """

    station: Station
    score: float
    importance: FloatArray
    share: FloatArray
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Usage:
    """Importance of the units of a group: the maximum over all layers and channels that produce a unit.

    Attributes:
        importance: I, shape ``(width,)``; sums to 1 per layer.
        share: Share of the surrogate's total gain, shape ``(width,)``; sums to 1 per layer.
    """

    importance: FloatArray
    share: FloatArray


class ScoreStore(Protocol):
    """Persistent store of scores."""

    def get(self, station: Station) -> LayerScore | None:
        """The stored score of a layer, or None."""

    def put(self, found: LayerScore) -> None:
        """Store a score."""


class LayerScorer:
    """Fits a surrogate to the features of one layer after another, unless the score is stored or features are equal.

    Args:
        surrogate: The surrogate to fit.
        labels: Labels of all samples, in the order of the features, shape ``(n,)``.
        parts: Split of the samples.
        metric: Metric μ; by default accuracy, or R².
        memory: Store of earlier scores.
        on_rank_zero: Computes a result on rank zero and broadcasts it; by default for a single process.
        see: Called with every result.
    """

    def __init__(
        self,
        surrogate: Surrogate,
        labels: npt.NDArray[Any],
        parts: Parts,
        metric: Metric | None = None,
        memory: ScoreStore | None = None,
        on_rank_zero: Callable[[Callable[[], LayerScore]], LayerScore] = lambda make: make(),
        see: Callable[[LayerScore], None] = lambda _: None,
    ) -> None:
        self.surrogate, self.labels, self.parts, self.metric = surrogate, labels, parts, metric
        self.memory, self._on_rank_zero, self._see = memory, on_rank_zero, see
        self._seen: dict[str, LayerScore] = {}  # by the content of the features

    def get(self, station: Station) -> LayerScore | None:
        """The stored score of a layer, or None."""
        return None if self.memory is None else self.memory.get(station)

    def score(self, station: Station, features: Tensor) -> LayerScore:
        """Fit the surrogate to a layer and store the score.

        Args:
            station: The layer.
            features: Features of the samples of all processes, shape ``(n, channels)``.

        Raises:
            FloatingPointError: If features are NaN or infinite.
            ValueError: If labels or samples are unsuitable.
        """
        found = self._on_rank_zero(lambda: self._fitted(station, features))
        if self.memory is not None:
            self.memory.put(found)
        self._see(found)
        return found

    def _fitted(self, station: Station, features: Tensor) -> LayerScore:
        began = perf_counter()
        table = np.ascontiguousarray(features.detach().to("cpu", torch.float32).numpy())
        content = hashlib.sha256(table.tobytes()).hexdigest()
        if content in self._seen:
            return replace(self._seen[content], station=station, seconds=0.0)
        try:
            fitted = self.surrogate.fit(table, self.labels, self.parts, self.metric)
        except (FloatingPointError, ValueError) as error:
            raise type(error)(f"layer '{station.layer}': {error}") from error
        found = LayerScore(station, fitted.score, fitted.importance, fitted.share, perf_counter() - began)
        self._seen[content] = found
        return found


def score_layers(
    scorer: LayerScorer,
    stations: Sequence[Station],
    features: Callable[[Sequence[Station]], Iterable[tuple[Station, Tensor]]],
) -> dict[Station, LayerScore]:
    """Score all layers of the unpruned network (the paper's one-shot mode).

    Args:
        scorer: Scores a layer.
        stations: The layers, in the order of execution.
        features: Computes the features of several layers, in their order, by one pass over all samples; not called if
            all scores are stored.
    """
    known = {station: scorer.get(station) for station in stations}
    left = [station for station, found in known.items() if found is None]
    new = {station: scorer.score(station, table) for station, table in (features(left) if left else ())}
    return {station: new[station] if found is None else found for station, found in known.items()}


def score_layers_in_turn(
    walk: Walk,
    order: Sequence[Station],
    groups: Sequence[Group],
    scorer: LayerScorer,
    features: Callable[[Any], Tensor],
    decide: Callable[[Group, Usage], Sequence[int]],
) -> dict[Station, LayerScore]:
    """Score every layer after the layers before it were pruned (the paper's layer-wise mode).

    A group is decided at the last layer that produces its units; from then on, its consumers read 0 for removed units.

    Args:
        walk: Walk over the stations of the layers to score.
        order: All convolutions and linear layers in the order of execution, including those that are not scored.
        groups: Groups that may be pruned.
        scorer: Scores a layer.
        features: Computes the features of the samples of all processes at a visit.
        decide: Returns the units of a group to keep.
    """
    found: dict[Station, LayerScore] = {}
    units = [station for station in walk.stations if station.point == "activation"]
    last = {group.name: [station for station in units if station.layer in group.producers][-1] for group in groups}
    for visit in walk:
        known = scorer.get(visit.station)
        found[visit.station] = scorer.score(visit.station, features(visit)) if known is None else known
        for group in (group for group in groups if last[group.name] == visit.station):
            masks = consumer_masks(walk.model, group, decide(group, group_usage([group], found)[group.name]))
            for reader in order[order.index(visit.station) + 1 :]:
                if reader.layer in masks:
                    visit.mask(masks[reader.layer], at=[Station(reader.layer, "input", reader.call)])
    return found


def end_station(layers: Collection[str], order: Sequence[Station], *, is_layer: bool) -> Station:
    """Station with the output of a backbone that is truncated after some convolutions.

    Args:
        layers: The remaining convolutions.
        order: All convolutions and linear layers in the order of execution.
        is_layer: Whether the output is that of the last of these convolutions; otherwise (a residual sum or a
            concatenation) it is the input of the next layer.

    Raises:
        ValueError: If no layer follows.
    """
    last = max(place for place, station in enumerate(order) if station.layer in layers)
    if is_layer:
        return order[last]
    if last + 1 == len(order):
        raise ValueError(f"expected a convolution or linear layer behind '{order[last].layer}', found none")
    return Station(order[last + 1].layer, "input", order[last + 1].call)


def unit_axes(group: Group) -> dict[str, list[Member]]:
    """Layers that produce a group's units, with the members of their output axes."""
    stations: dict[str, list[Member]] = {}
    for member in group.members:
        if member.role == "out":
            stations.setdefault(member.layer, []).append(member)
    return stations


def unscorable(groups: Iterable[Group], stations: Iterable[Station]) -> dict[str, str]:
    """Groups without features, with reasons."""
    layers = {station.layer for station in stations}
    return {
        group.name: "no convolution or linear layer that is called as a module gives its units"
        for group in groups
        if layers.isdisjoint(group.producers)
    }


def unmaskable(model: nn.Module, groups: Iterable[Group]) -> dict[str, str]:
    """Groups whose units cannot be masked at their consumers, with reasons."""
    layers = dict(model.named_modules())
    return {
        group.name: f"its units enter {member.layer}, no plain convolution or Linear, and cannot be masked there"
        for group in groups
        for member in group.members
        if member.role == "in" and _inputs(layers, member) is None
    }


def group_usage(groups: Iterable[Group], found: Mapping[Station, LayerScore]) -> dict[str, Usage]:
    """Importance of the units of groups: the maximum over the scored layers.

    Args:
        groups: Groups with at least one scored layer.
        found: Scores; for a network truncated in depth, those of the layers that stay.
    """
    use: dict[str, Usage] = {}
    for group in groups:
        importance, share = np.zeros(group.width), np.zeros(group.width)
        members = unit_axes(group)
        for station, score in found.items():
            for member in members.get(station.layer, ()) if station.point == "activation" else ():
                importance = np.maximum(importance, score.importance[member.index].max(1))
                share = np.maximum(share, score.share[member.index].max(1))
        use[group.name] = Usage(importance, share)
    return use


def consumer_masks(model: nn.Module, group: Group, kept: Sequence[int]) -> dict[str, Tensor]:
    """Input masks of the layers that consume a group's units, by layer: 0 for inputs of removed units.

    Raises:
        ValueError: If a consumer is not a plain convolution or linear layer.
    """
    layers = dict(model.named_modules())
    masks: dict[str, Tensor] = {}
    gone = np.setdiff1d(np.arange(group.width), np.asarray(kept, dtype=np.int64))
    for member in group.members:
        if member.role != "in":
            continue
        inputs = _inputs(layers, member)
        if inputs is None:
            raise ValueError("; ".join(unmaskable(model, [group]).values()))
        layer: Any = layers[member.layer]
        width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        mask = masks.setdefault(member.layer, torch.ones(width))
        mask[inputs[gone].reshape(-1)] = 0
    return masks


def _inputs(layers: Mapping[str, nn.Module], member: Member) -> Tensor | None:
    """Inputs of a layer by unit; None if it is not a plain convolution or linear layer."""
    layer = layers.get(member.layer)
    return unit_inputs(layer, member) if isinstance(layer, LINEAR_LAYERS) else None


def log_importance(importance: FloatArray) -> FloatArray:
    r""":math:`\Lambda = \ln(I + 10^{-16})`, whose histogram determines the threshold."""
    return np.asarray(np.log(importance + _EPSILON))
