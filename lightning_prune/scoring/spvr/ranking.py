"""Importance of groups of units by masking one after the other: one forward pass each, as the paper has it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.scoring.data import Batch
from lightning_prune.scoring.spvr.importance import MEASURES, Measure
from lightning_prune.scoring.spvr.outputs import ClassScores, score_tensor
from lightning_prune.scoring.statistics import per_unit
from lightning_prune.scoring.undisturbed import undisturbed

__all__ = ["Place", "importance_of_groups", "masked", "unmasked"]


class Place(NamedTuple):
    """Where units enter a layer: which of its inputs (channels, features) each of them is, shape ``(width, k)``."""

    layer: nn.Module
    inputs: Tensor


@contextmanager
def masked(places: Iterable[Place], units: Sequence[int]) -> Iterator[None]:
    """The network without some units: 0 where they enter layers, after norm and activation, within the context."""
    handles = [
        place.layer.register_forward_pre_hook(
            partial(_zero, place.layer, place.inputs[list(units)].flatten()), with_kwargs=True
        )
        for place in places
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def unmasked(
    model: nn.Module, batches: Iterable[Batch], places: Mapping[str, Sequence[Place]]
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    r"""One pass over the samples: the network's scores as it is, and what enters layers, for `correlation`.

    Of units that are single numbers in a sample these are taken as they are, of maps (eq. 4)

    .. math:: S_{pq} = \sum_{r,t} \lvert S_{pqrt} \rvert.

    Args:
        model: The network.
        batches: The samples.
        places: Per group of coupled axes, where its units enter layers.

    Returns:
        Scores of all samples, and per group a matrix ``(calls · samples, units)`` for each place. Groups of which a
        place was never called are left out: there, units cannot be masked.
    """
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def hook(
        key: tuple[str, int], inputs: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        x = per_unit(layer, args[0] if args else kwargs["input"], inputs).flatten(2)
        pooled = x[..., 0] if x.shape[2] == 1 else x.abs().sum(2)
        seen.setdefault(key, []).append(pooled.to("cpu", torch.float64))

    handles = [
        place.layer.register_forward_pre_hook(partial(hook, (name, number), place.inputs), with_kwargs=True)
        for name, found in places.items()
        for number, place in enumerate(found)
    ]
    try:
        with undisturbed(model):
            scores = torch.cat([score_tensor(model(*batch.args, **batch.kwargs)) for batch in batches])
    finally:
        for handle in handles:
            handle.remove()
    called = {name: [(name, number) for number in range(len(found))] for name, found in places.items()}
    features = {
        name: [torch.cat(seen[key]) for key in keys]
        for name, keys in called.items()
        if all(key in seen for key in keys)
    }
    return scores, features


@torch.no_grad()
def importance_of_groups(
    model: nn.Module,
    batches: Iterable[Batch],
    places: Sequence[Place],
    groups: Sequence[Sequence[int]],
    reading: ClassScores,
    measure: Measure,
) -> Tensor:
    """What masking each group changes, summed over samples (eq. 2): one forward pass per batch and group.

    Args:
        model: The network.
        batches: The samples.
        places: Where the units enter layers.
        groups: Units that are masked together.
        reading: How outputs are read.
        measure: What is measured.

    Returns:
        Shape ``(groups,)``, in float64 on the CPU.
    """
    found = torch.zeros(len(groups), dtype=torch.float64)
    with undisturbed(model):
        for batch in batches:
            whole = reading.log_probabilities(score_tensor(model(*batch.args, **batch.kwargs)))
            for number, units in enumerate(groups):
                with masked(places, units):
                    outputs = score_tensor(model(*batch.args, **batch.kwargs))
                change = MEASURES[measure](whole, reading.log_probabilities(outputs))
                found[number] += change.to("cpu", torch.float64).sum()
    return found


def _zero(layer: nn.Module, inputs: Tensor, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What enters a layer, with some of its inputs 0."""
    x = args[0] if args else kwargs["input"]
    channel = -1 if isinstance(layer, nn.Linear) else 1 - layer.get_parameter("weight").dim()
    x = x.index_fill(channel, inputs, 0)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})
