"""Removing layers from a chain: they become identities, and the layers after them are re-created."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from lightning_prune.structure.bypass import Bypasses
from lightning_prune.structure.stubs import Empty
from lightning_prune.surgery.depth import layer
from lightning_prune.surgery.specs import LayerSpec, spec_of

__all__ = ["bypassed"]


def bypassed(
    model: nn.Module, bypasses: Bypasses, gone: Collection[str], widths: Mapping[str, int]
) -> dict[str, LayerSpec]:
    """Replacements of modules when groups are removed from chains, for ``Transaction.replace``.

    The layers after them are re-created with new weights: for networks that are trained from scratch.

    Args:
        model: The network, after all other cuts.
        bypasses: Groups that can be removed.
        gone: Groups to remove.
        widths: Current widths by group.

    Raises:
        ValueError: If a layer to re-create cannot be described by a spec (a subclass, for instance).
    """
    specs = {name: LayerSpec("Identity") for name in bypasses.modules(gone)}
    for name, (group, size) in bypasses.consumers(gone).items():
        module = layer(model, name)
        assert module is not None
        if isinstance(module, Empty):  # it has vanished with its branch, whatever it would read
            continue
        option = "in_features" if isinstance(module, nn.Linear) else "in_channels"
        specs[name] = spec_of(module, **{option: size * widths[group]})
    return specs
