"""Passes of our own: the network run once more before scores are taken, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.structure.tracing import Call

__all__ = ["outputs_of", "positive_response", "undisturbed"]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, after which modes and random states are what they were."""
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(devices, key=str)):
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def outputs_of(result: Any) -> list[Tensor]:
    """The floating-point tensors that a network gave out.

    Raises:
        TypeError: If there is none.
    """
    found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not found:
        raise TypeError(f"expected the network to give out floating-point tensors, got {type(result).__name__}")
    return found


@torch.enable_grad()
def positive_response(model: nn.Module, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
    """What all outputs add up to in a network of absolute weights that is shown nothing but ones; and these weights.

    In double precision, since the response grows exponentially with depth. Norms keep their variance, and their mean is
    taken as 0, so that nothing is negative. Both results are fit for ``torch.autograd.grad``; the network itself has no
    part in it.
    """
    dtype = torch.float32 if any(p.device.type == "mps" for p in model.parameters()) else torch.float64
    weights = {name: p.detach().abs().to(dtype).requires_grad_() for name, p in model.named_parameters()}
    buffers = {
        name: b.detach().clone().to(dtype) if b.is_floating_point() else b.detach().clone()
        for name, b in model.named_buffers()
    }
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            buffers[f"{name}.running_mean".lstrip(".")].zero_()

    def ones(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return torch.ones_like(leaf, dtype=dtype) if floating else leaf

    with undisturbed(model):
        args, kwargs = tree_map(ones, (call.args, dict(call.kwargs)))
        outputs = outputs_of(functional_call(model, {**weights, **buffers}, args, kwargs))
    return torch.stack([output.sum() for output in outputs]).sum(), weights
