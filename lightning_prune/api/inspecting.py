"""What can be pruned in any network, from an example."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_prune.api.lightning_module import is_lightning_module
from lightning_prune.reporting import Inspection
from lightning_prune.structure import TracedModel, trace
from lightning_prune.structure.examples import Arguments, forward_calls
from lightning_prune.structure.traced_model import require_network
from lightning_prune.surgery import with_history

__all__ = ["inspect", "traced_model_for"]


def inspect(model: nn.Module, example: Any = None) -> Inspection:
    """Show what can be pruned in a network, and what cannot and why; print the result, or display it in a notebook.

    Args:
        model: A LightningModule or any module. It is not modified.
        example: What ``forward`` takes: a tensor, a tuple of arguments or a dict of keywords, or a training batch (its
            inputs are found by trying). By default the module's ``example_input_array``.

    Raises:
        StructureError: If there is no example, or the network fails on it.

    Example:
        >>> import torch
        >>> from lightning_prune import inspect
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> inspect(net, torch.zeros(2, 4)).structure.widths
        {'0': 8}
    """
    traced = traced_model_for(model, example)
    return Inspection(with_history(trace(traced), traced))


def traced_model_for(model: nn.Module, example: Any = None) -> TracedModel:
    """Build the `TracedModel` of any network from an example input.

    Raises:
        StructureError: If there is no example that ``forward`` accepts.
    """
    require_network(model)
    if isinstance(example, (tuple, list)):
        example = Arguments(example)  # meant as arguments; a training batch is a later guess
    if is_lightning_module(model):
        from lightning_prune.callbacks.traced_models import traced_model_of

        return traced_model_of(model, example, step=False, own_example=example is None)
    return TracedModel(model, forward_calls(model, example, None))
