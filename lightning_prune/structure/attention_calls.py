"""Running PyTorch's attention so that all of its layers are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from lightning_prune.structure.attention import attention

__all__ = ["fastpath_disabled", "out_proj_called"]


@contextmanager
def out_proj_called(model: nn.Module) -> Iterator[None]:
    """Within the context, attention of PyTorch calls its ``out_proj`` as a module, so that the hooks of that run.

    PyTorch's computes with the weight alone. A subclass with a ``forward`` of its own stays as it is.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and "forward" not in vars(module)
    ]
    with fastpath_disabled():  # it computes whole layers at once
        for layer in layers:
            layer.forward = partial(attention, layer)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


@contextmanager
def fastpath_disabled() -> Iterator[None]:
    """Without the fused kernel for whole attention and encoder layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
