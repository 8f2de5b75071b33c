"""Sites at which units are masked: the inputs of all their consumers, or the output of one producer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.scoring.statistics import is_linear_layer, unit_inputs
from lightning_prune.scoring.walk import Station
from lightning_prune.structure.graph import Group
from lightning_prune.structure.layers import canonical, named

__all__ = ["Site", "sites_of_groups", "sites_of_layers"]


@dataclass(frozen=True, eq=False)
class Site:
    """Stations at which the same units are masked together.

    Attributes:
        name: Name of the group or layer.
        width: Number of units.
        channels: Channels of each unit at each station, in the order of execution: shape ``(width, k)``.
    """

    name: str
    width: int
    channels: Mapping[Station, Tensor]

    @property
    def first(self) -> Station:
        """First station of the forward pass."""
        return next(iter(self.channels))

    def masks(self, station: Station, bundles: Sequence[Sequence[int]], total: int) -> Tensor:
        """Masks of shape ``(bundles, total)``, 0 at the channels of each bundle.

        Args:
            station: One of the stations.
            bundles: Units that are masked together.
            total: Number of channels at the station.
        """
        masks = torch.ones(len(bundles), total)
        for row, units in zip(masks, bundles, strict=True):
            row[self.channels[station][list(units)].flatten()] = 0
        return masks


def sites_of_groups(
    model: nn.Module, groups: Iterable[Group], stations: Sequence[Station]
) -> tuple[dict[str, Site], dict[str, str]]:
    """Sites at the consumers of each group, where masking equals removing.

    Args:
        model: The network.
        groups: Groups of units.
        stations: All stations of the network, in the order of execution.

    Returns:
        Sites by group, and reasons for the groups that cannot be masked.
    """
    readers = _readers(model)
    tensors = named(model)
    sites, refused = {}, {}
    for group in groups:
        channels: dict[str, Tensor] = {}
        closed = [] if any(member.role == "in" for member in group.members) else ["no layer"]
        for member in (member for member in group.members if member.role == "in"):
            taken = tensors.get(member.tensor)
            layers = readers.get(id(taken), {})
            closed += [] if layers else [member.layer]
            for name, layer in layers.items():
                inputs = unit_inputs(layer, member)
                if inputs is not None:  # else they go through it each by itself, to the next layer
                    channels[name] = torch.cat([channels[name], inputs], 1) if name in channels else inputs
        called = {station.layer for station in stations if station.point == "input"}
        closed += [layer for layer in channels if layer not in called]
        if closed:
            places = ", ".join(dict.fromkeys(closed))
            refused[group.name] = f"its units enter {places}, which is no plain layer that is called"
        else:
            at = [station for station in stations if station.point == "input" and station.layer in channels]
            sites[group.name] = Site(group.name, group.width, {station: channels[station.layer] for station in at})
    return sites, refused


def _readers(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """HookEngine layers by the identity of their weight, which tied ones share, and by name."""
    readers: dict[int, dict[str, nn.Module]] = {}
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight") if is_linear_layer(layer) else None
        if weight is not None:
            readers.setdefault(id(weight), {})[canonical(name)] = layer
    return readers


def sites_of_layers(groups: Iterable[Group], stations: Sequence[Station]) -> tuple[dict[str, Site], dict[str, str]]:
    """Sites at the output of each layer, after its norm and activation and before any sum.

    Args:
        groups: Groups of units.
        stations: All stations of the network, in the order of execution.

    Returns:
        Sites by layer, and reasons for the layers that cannot be masked.
    """
    behind: dict[str, list[Station]] = {}
    for station in stations:
        if station.point == "activation":
            behind.setdefault(station.layer, []).append(station)
    sites, refused = {}, {}
    for group in groups:
        for member in group.members:
            if member.role != "out" or member.layer in sites:
                continue
            layer = canonical(member.layer)
            if layer in behind:
                channels = torch.as_tensor(member.index)
                sites[layer] = Site(layer, group.width, dict.fromkeys(behind[layer], channels))
            else:
                refused[layer] = "it is no plain Linear, Conv or ConvTranspose that is called"
    return sites, refused
