"""Several variants of a batch at a station: which channels are masked in each, and which samples have to be run."""

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
    """What is asked for.

    Attributes:
        number: Of the batch.
        batch: The samples.
        station: Where.
        dim: The dimension of its channels.
        value: What it has.
        several: Masks, ``(variants, channels)``.
        masks: What is masked at other stations anyway.
        also: What else is masked there, ``(variants, channels there)``.
        alive: Which samples of which variant have to be run, ``(variants, samples)``.
        output: What the others have; None if all are run.
        delta: Whether layers behind may be computed as differences.
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
    """Masks of both, multiplied where both have one."""
    together = dict(masks)
    for station, mask in others.items():
        together[station] = mask * together[station].to(mask) if station in together else mask
    return together


def stacked(asked: Variants, rest: Callable[[Tensor, Mapping[Station, Tensor]], Any]) -> Any:
    """Outputs of the variants, one run after the other.

    Args:
        asked: The variants.
        rest: Gives the output with another value at the station and masks at others.
    """
    found = []
    for index, mask in enumerate(asked.several):
        if not asked.alive[index].any():
            found.append(asked.output)
            continue
        own = {station: part[index] for station, part in asked.also.items()}
        found.append(rest(scaled(asked.value, mask, asked.dim), own))
    return tree_map(lambda *parts: torch.stack(parts) if isinstance(parts[0], Tensor) else parts[0], *found)
