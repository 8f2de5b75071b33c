"""Importance of bundles of units by masking: one forward pass per bundle, as in the paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.scoring.contexts import preserved_state
from lightning_prune.scoring.data import Batch, forward
from lightning_prune.scoring.spvr.importance import MEASURES, Measure
from lightning_prune.scoring.spvr.outputs import ClassScores, score_tensor
from lightning_prune.scoring.statistics import per_unit

__all__ = ["Place", "importance_of_groups", "masked", "unmasked"]


class Place(NamedTuple):
    """A layer that consumes units, and its inputs (channels, features) of each unit, shape ``(width, k)``."""

    layer: nn.Module
    inputs: Tensor


@contextmanager
def masked(places: Iterable[Place], units: Sequence[int]) -> Iterator[None]:
    """Set units to 0 at the inputs of layers within the context."""
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
    r"""Scores of the unmasked network and pooled inputs of layers, for `correlation`, from one pass over the samples.

    Scalars are taken as they are; feature maps are pooled by (eq. 4)

    .. math:: S_{pq} = \sum_{r,t} \lvert S_{pqrt} \rvert.

    Args:
        model: The network.
        batches: The samples.
        places: Layers that consume the units, per group.

    Returns:
        Scores of all samples, and per group a matrix ``(calls · samples, units)`` for each place. Groups with a place
        that was never called are omitted, as they cannot be masked.
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
        with preserved_state(model):
            scores = torch.cat([score_tensor(forward(model, batch)) for batch in batches])
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
    """Change of outputs by masking each bundle, summed over samples (eq. 2): one forward pass per batch and bundle.

    Args:
        model: The network.
        batches: The samples.
        places: Layers that consume the units.
        groups: Units that are masked together.
        reading: Interpretation of the outputs.
        measure: Measure of the change.

    Returns:
        Shape ``(groups,)``, in float64 on the CPU.
    """
    found = torch.zeros(len(groups), dtype=torch.float64)
    with preserved_state(model):
        for batch in batches:
            whole = reading.log_probabilities(score_tensor(forward(model, batch)))
            for number, units in enumerate(groups):
                with masked(places, units):
                    outputs = score_tensor(forward(model, batch))
                change = MEASURES[measure](whole, reading.log_probabilities(outputs))
                found[number] += change.to("cpu", torch.float64).sum()
    return found


def _zero(layer: nn.Module, inputs: Tensor, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The arguments of a layer with some of its inputs set to 0."""
    x = args[0] if args else kwargs["input"]
    channel = -1 if isinstance(layer, nn.Linear) else 1 - layer.get_parameter("weight").dim()
    x = x.index_fill(channel, inputs, 0)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})
