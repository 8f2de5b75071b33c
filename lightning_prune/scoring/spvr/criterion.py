"""What the criteria that mask groups of units share: their settings, and the statistic that collects their scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.data import Batch, DataPass
from lightning_prune.scoring.spvr.grouping import correlation, group_units
from lightning_prune.scoring.spvr.importance import Measure
from lightning_prune.scoring.spvr.outputs import Task, class_scores
from lightning_prune.scoring.spvr.ranking import (
    Place,
    importance_of_groups,
    unmasked,
)
from lightning_prune.scoring.statistics import ConsumerStatistic, Half, Statistic, is_linear_layer
from lightning_prune.structure.graph import Group, Structure
from lightning_prune.structure.layers import canonical

__all__ = ["MaskingCriterion", "MaskingStatistic"]


@dataclass(frozen=True)
class MaskingCriterion(ObservingCriterion):
    """A criterion that masks groups of units, one after the other, and compares the network's outputs.

    Units are grouped by the correlation of their activations and masked together; every unit has its group's score, and
    groups go whole. All that is coupled (a residual stream) is masked as one, where it enters the next layers: after
    norm, activation and pooling.

    Args:
        group_size: Units of a group, d.
        samples_per_class: Samples of each class that are looked at; of dense prediction, images that contain the class.
        task: What the outputs are scores of; by default found out, see `class_scores`.
        normalized: Whether the outputs are probabilities already; by default found out.

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
        """Of several units in a group."""
        if self.group_size == 1:
            return {}
        shared = "a unit has the score of its group, and groups form in the order of the units"
        return {"dead_is_lowest": shared, "equivariant": shared, "merges": "each half of the data has its own groups"}

    @property
    def amount(self) -> Mapping[str, int]:
        """So many samples of every class."""
        return {"per_class": self.samples_per_class}

    @abstractmethod
    def statistic(self, structure: Structure) -> MaskingStatistic:
        """Scores of groups of units."""

    def bundles(self, group: Group, statistic: Statistic | None) -> Sequence[Sequence[int]] | None:
        """The groups of units; before data was seen, as many in the order of their indices."""
        if self.group_size == 1:
            return None
        found = statistic.bundles.get(group.name) if isinstance(statistic, MaskingStatistic) else None
        if found is not None:
            return found
        return [range(i, min(i + self.group_size, group.width)) for i in range(0, group.width, self.group_size)]


@final
class MaskingStatistic(ConsumerStatistic):
    """Change of the outputs when groups of units are masked, one after the other.

    Args:
        structure: The network's groups.
        measure: What is measured.
        settings: Of the criterion.

    Attributes:
        bundles: Units that were masked together, by the name of what is coupled.
    """

    evidence = "outputs, in one more pass per group of units"

    def __init__(self, structure: Structure, measure: Measure, settings: MaskingCriterion) -> None:
        super().__init__(structure)
        self.measure, self.settings = measure, settings
        self.bundles: dict[str, list[tuple[int, ...]]] = {}
        self.declare("score", "sum")

    def unhookable(self, model: nn.Module) -> dict[str, str]:
        """Groups whose units enter a layer that cannot be masked: where a part of a unit stays, nothing is measured."""
        modules = {canonical(name): module for name, module in model.named_modules()}
        partly = {}
        for name, places in self.sources.items():
            closed = [place for place in places if not is_linear_layer(modules.get(place, model))]
            if closed:
                partly[name] = f"its units enter {', '.join(closed)}, which is no plain Linear, Conv or ConvTranspose"
        return partly | super().unhookable(model)

    def collect(self, model: nn.Module, data: DataPass | Sequence[Batch]) -> None:
        """Group the units and mask each group: one forward pass over the data for each, and two to begin with.

        Args:
            model: The network; left as it is.
            data: The samples, with labels if there are any.
        """
        self.follow(model)
        places = self._places(model)
        scores, features = unmasked(model, data, places)
        reading = class_scores(scores, _labels(data), self.settings.task, self.settings.normalized)
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
        """Sums over samples."""
        return self.read("score", name, half)[0]

    def _places(self, model: nn.Module) -> dict[str, list[Place]]:
        places: dict[str, list[Place]] = {}
        for layer, targets in self.targets(model).items():
            for target in targets:
                places.setdefault(target.group, []).append(Place(layer, target.inputs))
        silent = self.unhookable(model)
        return {name: found for name, found in places.items() if name not in silent}


def _labels(data: Iterable[Batch]) -> Tensor | None:
    """Of all samples; None where a batch has none."""
    labels = [batch.labels for batch in data]
    known = [found for found in labels if found is not None]
    return torch.cat(known) if known and len(known) == len(labels) else None
