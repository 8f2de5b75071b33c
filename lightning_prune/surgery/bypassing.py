"""Layers that vanish from a chain: identities in their place, and the layers behind built for what now reaches them."""

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
    """What takes the place of modules when groups vanish from chains, for ``Transaction.replace``.

    The layers behind are new and have weights of their own: for networks that are trained from scratch.

    Args:
        model: The network, already as narrow as it will be otherwise.
        bypasses: How groups vanish.
        gone: Those that do.
        widths: Present widths by group.

    Raises:
        ValueError: If a layer behind is of a kind that cannot be described (a subclass, say).
    """
    specs = {name: LayerSpec("Identity") for name in bypasses.modules(gone)}
    for name, (group, size) in bypasses.consumers(gone).items():
        module = layer(model, name)
        assert module is not None  # it was found in this network
        if isinstance(module, Empty):  # it has vanished with its branch, whatever it would read
            continue
        option = "in_features" if isinstance(module, nn.Linear) else "in_channels"
        specs[name] = spec_of(module, **{option: size * widths[group]})
    return specs
