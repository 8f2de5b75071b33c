"""The modules of a network's backbone, to count its parameters separately."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_prune.structure.backbone import Backbone
from lightning_prune.structure.layers import canonical, is_within, tensors
from lightning_prune.surgery import Replace, history_of

__all__ = ["backbone_modules", "layer_parameters"]


def backbone_modules(model: nn.Module, head: str | Iterable[str] | None = None) -> frozenset[str] | None:
    """Names of the modules with parameters that belong to the backbone; ``None`` if no head is known.

    The head consists of modules that were replaced by a new head (a `Replace` with ``new_dense``) and of those that
    `Backbone` finds: the names in ``head``, else everything after the last of several convolutions. A single
    convolution is assumed to be the patch embedding of a transformer.

    Args:
        model: The network.
        head: Names or globs of the head's modules.
    """
    history = history_of(model)
    edits = () if history is None else history.edits
    new = {name for edit in edits if isinstance(edit, Replace) and edit.new_dense for name in edit.modules}
    layers = Backbone.of(model, head).layers
    if len(layers) > 1 or (layers and head is not None):
        names = {name for layer in layers for name in layer.modules}
    else:
        names = {canonical(name) for name, module in model.named_modules() if tensors(module)}
    names -= {name for name in names if is_within(name, new)}
    behind = (module for name, module in model.named_modules() if canonical(name) not in names)
    has_head = any(parameter is not None for module in behind for parameter in module._parameters.values())
    return frozenset(names) if names and has_head else None


def layer_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of every convolutional layer of a backbone (see `Backbone`), in order.

    A shared parameter is counted for the first of its layers.
    """
    seen: set[nn.Parameter] = set()
    counts = {}
    for layer in Backbone.of(model).layers:
        own = set(layer.parameters.values()) - seen
        counts[layer.name] = sum(parameter.numel() for parameter in own)
        seen |= own
    return counts
