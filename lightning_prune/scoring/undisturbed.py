"""Contexts in which a network is run without a trace: modes, buffers, gradients and random states come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_prune.structure.tracing import forked_rng

__all__ = ["own_random_state", "undisturbed"]


@contextmanager
def own_random_state(seed: int = 0) -> Iterator[None]:
    """Draw the same random numbers every time; afterwards those of the training go on as if none had been drawn."""
    with forked_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def undisturbed(model: nn.Module, *, keep_modes: bool = False, seed: int = 0) -> Iterator[None]:
    """Eval mode, after which modes, buffers, gradients and random states are what they were.

    Args:
        model: The network.
        keep_modes: Leave every module in the mode it is in.
        seed: Of the random numbers within the context.
    """
    modes = [(module, module.training) for module in model.modules()]
    registers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    contents = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with own_random_state(seed):
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
                if not torch.equal(buffer, content):  # a write, even of the same, would fail a backward pass that waits
                    buffer.copy_(content)
        for parameter, gradient in gradients:
            parameter.grad = gradient
