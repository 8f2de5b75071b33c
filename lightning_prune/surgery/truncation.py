"""A network without the tail of its backbone, as replacements."""

from __future__ import annotations

from torch import nn

from lightning_prune.structure.boundaries import Boundary
from lightning_prune.surgery.depth import layer
from lightning_prune.surgery.specs import LayerSpec, spec_of

__all__ = ["truncated"]


def truncated(model: nn.Module, boundary: Boundary) -> dict[str, LayerSpec]:
    """What takes the place of modules when a network ends at a boundary, for ``Transaction.replace``.

    Args:
        model: The network, as wide as it was when the boundary was found.
        boundary: Where it ends.

    Returns:
        Identities for the tail, and a new first layer of the head with as many inputs as there are then and as many
        outputs as before, its weights drawn anew.

    Raises:
        ValueError: If the first layer of the head cannot be described (a subclass, say).
    """
    specs = {name: LayerSpec("Identity") for name in boundary.tail}
    for name, inputs in boundary.readers.items():
        module = layer(model, name)
        if module is None:
            raise ValueError(f"expected the layer {name!r} that the boundary names, found none in the network")
        option = "in_features" if isinstance(module, nn.Linear) else "in_channels"
        specs[name] = spec_of(module, **{option: inputs})
    return specs
