"""Context managers for running a network without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_prune.structure.tracing import forked_rng

__all__ = ["preserved_state", "seeded_rng"]


@contextmanager
def seeded_rng(seed: int = 0) -> Iterator[None]:
    """Seed the random generators within the context and restore them afterwards."""
    with forked_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def preserved_state(model: nn.Module, *, keep_modes: bool = False, seed: int = 0) -> Iterator[None]:
    """Set eval mode within the context; restore modes, buffers, gradients and random states on exit.

    Args:
        model: The network.
        keep_modes: Keep train and eval modes instead of setting eval mode.
        seed: Seed of the random generators within the context.
    """
    modes = [(module, module.training) for module in model.modules()]
    registers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    contents = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with seeded_rng(seed):
            for parameter, _ in gradients:
                parameter.grad = None
            if not keep_modes:
                model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for register, buffers in registers:
            register.clear()
            register.update(buffers)
        with torch.no_grad():
            for buffer, content in contents:
                if not torch.equal(buffer, content):  # any in-place write would break a pending backward pass
                    buffer.copy_(content)
        for parameter, gradient in gradients:
            parameter.grad = gradient
