"""The XGB pruner (Ratajczyk and Horzyk, 2024): filters that a surrogate on a layer's features never uses.

Of every layer what the next one reads, its output after norm and activation, is reduced to one number per channel; a
surrogate (gradient-boosted trees) predicts the labels from them. Its score on samples that were held back is μ of the
layer, and how much it uses a channel is the channel's importance.
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
    "Memory",
    "Use",
    "consumer_masks",
    "end_station",
    "log_importance",
    "score_layers",
    "score_layers_in_turn",
    "unit_axes",
    "unmaskable",
    "unscorable",
    "use_of_groups",
]

FloatArray = npt.NDArray[np.float64]

# The source's ε: what an importance of 0 becomes before its logarithm is taken.
_EPSILON = 1e-16


@dataclass(frozen=True, eq=False)
class LayerScore:
    """What the surrogate of one layer has found.

    Attributes:
        station: The layer, and where its features were taken.
        score: μ, the metric on the held-back part of the samples.
        importance: I, how much each channel is used, shape ``(channels,)``, with sum 1 (or all 0).
        share: Each channel's share of everything that the surrogate has gained, with sum 1 (or all 0).
        seconds: Time that the surrogate took.
    """

    station: Station
    score: float
    importance: FloatArray
    share: FloatArray
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Use:
    """How much the units of a group are used: the maximum over all layers and channels that give a unit.

    Attributes:
        importance: I, shape ``(width,)``; of each layer with sum 1.
        share: Share of everything that a surrogate has gained, shape ``(width,)``; of each layer with sum 1.
    """

    importance: FloatArray
    share: FloatArray


class Memory(Protocol):
    """What was found before, and where what is found is written down."""

    def recall(self, station: Station) -> LayerScore | None:
        """What is known of a layer."""

    def note(self, found: LayerScore) -> None:
        """Write down what was found."""


class LayerScorer:
    """Fits a surrogate to one layer's features after the other's; what is remembered is not fitted again.

    Nor is a table that is the same, number by number, as one before it.

    Args:
        surrogate: What is fitted.
        labels: Of all samples, in the order of the features, shape ``(n,)``.
        parts: Which samples are for what.
        metric: What μ is; by default accuracy, or R².
        memory: What was found before.
        together: Makes a result in one process and gives it to all; by default there is one.
        see: Told every result.
    """

    def __init__(
        self,
        surrogate: Surrogate,
        labels: npt.NDArray[Any],
        parts: Parts,
        metric: Metric | None = None,
        memory: Memory | None = None,
        together: Callable[[Callable[[], LayerScore]], LayerScore] = lambda make: make(),
        see: Callable[[LayerScore], None] = lambda _: None,
    ) -> None:
        self.surrogate, self.labels, self.parts, self.metric = surrogate, labels, parts, metric
        self.memory, self._together, self._see = memory, together, see
        self._seen: dict[str, LayerScore] = {}  # by the content of the features

    def recall(self, station: Station) -> LayerScore | None:
        """What is remembered of a layer."""
        return None if self.memory is None else self.memory.recall(station)

    def score(self, station: Station, features: Tensor) -> LayerScore:
        """Fit the surrogate to a layer, and write down what it has found.

        Args:
            station: The layer.
            features: One row per sample of all processes, shape ``(n, channels)``.

        Raises:
            FloatingPointError: If features are NaN or infinite.
            ValueError: If labels or samples do not suit.
        """
        found = self._together(lambda: self._fitted(station, features))
        if self.memory is not None:
            self.memory.note(found)
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
    """Score all layers of the network as it is (the source's one-shot mode).

    Args:
        scorer: What scores a layer.
        stations: The layers, in the order of execution.
        features: Features of several layers, in their order, from one pass over all samples; not asked for if nothing
            is left to do.
    """
    known = {station: scorer.recall(station) for station in stations}
    left = [station for station, found in known.items() if found is None]
    new = {station: scorer.score(station, table) for station, table in (features(left) if left else ())}
    return {station: new[station] if found is None else found for station, found in known.items()}


def score_layers_in_turn(
    walk: Walk,
    order: Sequence[Station],
    groups: Sequence[Group],
    scorer: LayerScorer,
    features: Callable[[Any], Tensor],
    decide: Callable[[Group, Use], Sequence[int]],
) -> dict[Station, LayerScore]:
    """Score every layer on what the decisions before it have left (the source's layer-wise mode).

    A group is decided at the last of the layers that give its units, and stays whole until then: layers that take its
    units later see those that go as 0.

    Args:
        walk: Goes through the stations of the layers that are scored.
        order: All convolutions and linear layers in the order of execution, those that are not scored too.
        groups: Those that may be pruned.
        scorer: What scores a layer.
        features: Features of all samples of all processes at a visit.
        decide: Which units of a group stay.
    """
    found: dict[Station, LayerScore] = {}
    units = [station for station in walk.stations if station.point == "activation"]
    last = {group.name: [station for station in units if station.layer in group.producers][-1] for group in groups}
    for visit in walk:
        known = scorer.recall(visit.station)
        found[visit.station] = scorer.score(visit.station, features(visit)) if known is None else known
        for group in (group for group in groups if last[group.name] == visit.station):
            masks = consumer_masks(walk.model, group, decide(group, use_of_groups([group], found)[group.name]))
            for reader in order[order.index(visit.station) + 1 :]:
                if reader.layer in masks:
                    visit.mask(masks[reader.layer], at=[Station(reader.layer, "input", reader.call)])
    return found


def end_station(layers: Collection[str], order: Sequence[Station], *, is_layer: bool) -> Station:
    """Where to look at what a backbone gives that ends behind some convolutions.

    Args:
        layers: The convolutions that are left.
        order: All convolutions and linear layers in the order of execution.
        is_layer: Whether all of it comes from the last of these convolutions. Elsewhere, behind a residual sum or a
            concatenation, it is what enters the next layer.

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
    """Layers that give a group's units, and on which axes of their outputs."""
    stations: dict[str, list[Member]] = {}
    for member in group.members:
        if member.role == "out":
            stations.setdefault(member.layer, []).append(member)
    return stations


def unscorable(groups: Iterable[Group], stations: Iterable[Station]) -> dict[str, str]:
    """Groups that have no features, and why."""
    layers = {station.layer for station in stations}
    return {
        group.name: "no convolution or linear layer that is called as a module gives its units"
        for group in groups
        if layers.isdisjoint(group.producers)
    }


def unmaskable(model: nn.Module, groups: Iterable[Group]) -> dict[str, str]:
    """Groups whose units cannot be masked on their way through the network, and why."""
    layers = dict(model.named_modules())
    return {
        group.name: f"its units enter {member.layer}, no plain convolution or Linear, and cannot be masked there"
        for group in groups
        for member in group.members
        if member.role == "in" and _inputs(layers, member) is None
    }


def use_of_groups(groups: Iterable[Group], found: Mapping[Station, LayerScore]) -> dict[str, Use]:
    """How much the units of groups are used: the maximum over the layers that were scored.

    Args:
        groups: Groups with at least one layer that was scored.
        found: Scores; of a network that is cut in depth those of the layers that stay.
    """
    use: dict[str, Use] = {}
    for group in groups:
        importance, share = np.zeros(group.width), np.zeros(group.width)
        members = unit_axes(group)
        for station, score in found.items():
            for member in members.get(station.layer, ()) if station.point == "activation" else ():
                importance = np.maximum(importance, score.importance[member.index].max(1))
                share = np.maximum(share, score.share[member.index].max(1))
        use[group.name] = Use(importance, share)
    return use


def consumer_masks(model: nn.Module, group: Group, kept: Sequence[int]) -> dict[str, Tensor]:
    """What layers that take a group's units as input are to see of it, by layer: 0 for the inputs of units that go.

    Raises:
        ValueError: If a layer that takes them is no plain convolution or linear layer.
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
    """Inputs of a layer that each unit is; None if it is no plain convolution or linear layer."""
    layer = layers.get(member.layer)
    return unit_inputs(layer, member) if isinstance(layer, LINEAR_LAYERS) else None


def log_importance(importance: FloatArray) -> FloatArray:
    r""":math:`\Lambda = \ln(I + 10^{-16})`, by whose histogram a threshold is chosen."""
    return np.asarray(np.log(importance + _EPSILON))
