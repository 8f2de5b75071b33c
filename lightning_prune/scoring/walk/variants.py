"""Variants of a batch at a station with different masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_prune.scoring.data import Batch
from lightning_prune.scoring.walk.station import Station, scaled

__all__ = ["Variants", "product", "stacked"]


@dataclass(frozen=True, eq=False)
class Variants:
    """Variants to run.

    Attributes:
        number: Index of the batch.
        batch: The samples.
        station: The station.
        dim: Dimension of its channels.
        value: Value at the station.
        several: Masks, ``(variants, channels)``.
        masks: Masks at other stations for all variants.
        also: Masks at later stations per variant, ``(variants, channels)``.
        alive: Samples that must be run, ``(variants, samples)``.
        output: Output for the other samples; None if all are run.
        delta: Whether later layers may be computed as differences.
    """

    number: int
    batch: Batch
    station: Station
    dim: int
    value: Tensor
    several: Tensor
    masks: Mapping[Station, Tensor]
    also: Mapping[Station, Tensor]
    alive: Tensor
    output: Any
    delta: bool


def product(masks: Mapping[Station, Tensor], others: Mapping[Station, Tensor]) -> dict[Station, Tensor]:
    """Combine masks; those of the same station are multiplied."""
    together = dict(masks)
    for station, mask in others.items():
        together[station] = mask * together[station].to(mask) if station in together else mask
    return together


def stacked(asked: Variants, rest: Callable[[Tensor, Mapping[Station, Tensor]], Any]) -> Any:
    """Outputs of the variants, one run after the other.

    Args:
        asked: The variants.
        rest: Returns the output for a value at the station and masks at later stations.
    """
    found = []
    for index, mask in enumerate(asked.several):
        if not asked.alive[index].any():
            found.append(asked.output)
            continue
        own = {station: part[index] for station, part in asked.also.items()}
        found.append(rest(scaled(asked.value, mask, asked.dim), own))
    return tree_map(lambda *parts: torch.stack(parts) if isinstance(parts[0], Tensor) else parts[0], *found)
