"""Base class and statistic of the criteria that mask bundles of units."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.data import Batch, DataPass
from lightning_prune.scoring.spvr.grouping import correlation, group_units
from lightning_prune.scoring.spvr.importance import Measure
from lightning_prune.scoring.spvr.outputs import Task, class_scores, labels_of
from lightning_prune.scoring.spvr.ranking import (
    Place,
    importance_of_groups,
    unmasked,
)
from lightning_prune.scoring.statistics import ConsumerStatistic, Half, Statistic, is_linear_layer
from lightning_prune.structure.attention_calls import out_proj_called
from lightning_prune.structure.graph import Group, Structure
from lightning_prune.structure.layers import canonical

__all__ = ["MaskingCriterion", "MaskingStatistic"]


@dataclass(frozen=True)
class MaskingCriterion(ObservingCriterion):
    """Base class of criteria that mask bundles of units one by one and compare the network's outputs.

    Units are bundled by the correlation of their activations, and masked and removed together; every unit has the score
    of its bundle. Coupled units (a residual stream) are masked together at the inputs of the next layers: after norm,
    activation and pooling.

    Args:
        group_size: Units per bundle, d.
        samples_per_class: Number of samples of each class; for dense prediction, of images that contain the class.
        task: Kind of classification; inferred by default, see `class_scores`.
        normalized: Whether the outputs are probabilities; inferred by default.

    Raises:
        ValueError: If a number is below 1.
    """

    group_size: int = 1
    samples_per_class: int = 50
    task: Task | None = None
    normalized: bool | None = None

    comparable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("group_size", "samples_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{type(self).__name__}: expected `{name}` to be at least 1, got {getattr(self, name)}."
                )

    @property
    def waived(self) -> Mapping[str, str]:
        """Properties that bundles of several units do not have."""
        if self.group_size == 1:
            return {}
        shared = "a unit has the score of its group, and groups form in the order of the units"
        return {"dead_is_lowest": shared, "equivariant": shared, "merges": "each half of the data has its own groups"}

    @property
    def amount(self) -> Mapping[str, int]:
        """Number of samples of every class."""
        return {"per_class": self.samples_per_class}

    @abstractmethod
    def statistic(self, structure: Structure) -> MaskingStatistic:
        """Scores of bundles."""

    def bundles(self, group: Group, statistic: Statistic | None) -> Sequence[Sequence[int]] | None:
        """Bundles of units; before data was seen, consecutive units."""
        if self.group_size == 1:
            return None
        found = statistic.bundles.get(group.name) if isinstance(statistic, MaskingStatistic) else None
        if found is not None:
            return found
        return [range(i, min(i + self.group_size, group.width)) for i in range(0, group.width, self.group_size)]


@final
class MaskingStatistic(ConsumerStatistic):
    """Change of the outputs when bundles of units are masked one by one.

    Args:
        structure: The network's groups.
        measure: Measure of the change.
        settings: The criterion.

    Attributes:
        bundles: Units that were masked together, by group.
    """

    evidence = "outputs, in an extra pass per bundle of units"

    def __init__(self, structure: Structure, measure: Measure, settings: MaskingCriterion) -> None:
        super().__init__(structure)
        self.measure, self.settings = measure, settings
        self.bundles: dict[str, list[tuple[int, ...]]] = {}
        self.declare("score", "sum")

    def unhookable(self, model: nn.Module) -> dict[str, str]:
        """Groups whose units enter a layer that cannot be masked, with reasons."""
        modules = {canonical(name): module for name, module in model.named_modules()}
        partly = {}
        for name, places in self.sources.items():
            closed = [place for place in dict.fromkeys(places) if not is_linear_layer(modules.get(place, model))]
            if closed:
                partly[name] = f"its units enter {', '.join(closed)}, which is no plain Linear, Conv or ConvTranspose"
        return partly | super().unhookable(model)

    def collect(self, model: nn.Module, data: DataPass | Sequence[Batch]) -> None:
        """Bundle the units and mask each bundle: one forward pass over the data per bundle, and two in advance.

        Args:
            model: The network, which is not changed.
            data: The samples, with labels if available.
        """
        self.follow(model)
        with out_proj_called(model):
            self._rank(model, data)

    def _rank(self, model: nn.Module, data: DataPass | Sequence[Batch]) -> None:
        places = self._places(model)
        scores, features = unmasked(model, data, places)
        reading = class_scores(scores, labels_of(data), self.settings.task, self.settings.normalized)
        size = self.settings.group_size
        for name, matrices in features.items():
            groups = group_units(torch.stack([correlation(rows) for rows in matrices]).mean(0), size)
            self.bundles[name] = groups
            importance = importance_of_groups(model, data, places[name], groups, reading, self.measure)
            score = importance.new_empty(self.structure.group(name).width)
            for units, value in zip(groups, importance, strict=True):
                score[list(units)] = value
            self.record(name, 0, sum(map(len, data)), score=score.to(self.device))

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """Scores summed over samples."""
        return self.read("score", name, half)[0]

    def _places(self, model: nn.Module) -> dict[str, list[Place]]:
        places: dict[str, list[Place]] = {}
        for layer, targets in self.targets(model).items():
            for target in targets:
                places.setdefault(target.group, []).append(Place(layer, target.inputs))
        excluded = self.unhookable(model)
        return {name: found for name, found in places.items() if name not in excluded}
