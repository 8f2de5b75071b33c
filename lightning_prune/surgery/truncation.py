"""Truncation of a network's backbone."""

from __future__ import annotations

from torch import nn

from lightning_prune.structure.boundaries import Boundary
from lightning_prune.surgery.depth import layer
from lightning_prune.surgery.specs import LayerSpec, spec_of

__all__ = ["truncated"]


def truncated(model: nn.Module, boundary: Boundary) -> dict[str, LayerSpec]:
    """Replacements of modules that truncate a network at a boundary, for ``Transaction.replace``.

    Args:
        model: The network, with the widths for which the boundary was found.
        boundary: The boundary.

    Returns:
        Identities for the tail, and a re-initialized first layer of the head with the new number of inputs.

    Raises:
        ValueError: If the first layer of the head cannot be described by a spec (a subclass, for instance).
    """
    specs = {name: LayerSpec("Identity") for name in boundary.tail}
    for name, inputs in boundary.readers.items():
        module = layer(model, name)
        if module is None:
            raise ValueError(f"expected the layer {name!r} that the boundary names, found none in the network")
        option = "in_features" if isinstance(module, nn.Linear) else "in_channels"
        specs[name] = spec_of(module, **{option: inputs})
    return specs
