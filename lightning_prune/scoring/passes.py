"""Helpers for extra passes: inputs of layers, outputs, and the response to ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.scoring.contexts import preserved_state
from lightning_prune.scoring.statistics import Target
from lightning_prune.structure.layers import canonical
from lightning_prune.structure.tracing import Call

__all__ = ["entering", "outputs_of", "positive_response"]

#: One call of a layer that consumes units: the layer, its input, and the inputs of each unit.
Entered = tuple[nn.Module, Tensor, list[Target]]


@contextmanager
def entering(targets: Mapping[nn.Module, list[Target]]) -> Iterator[list[Entered]]:
    """Record the inputs of layers, call by call, within the context, for ``torch.autograd.grad``.

    The gradient of a recorded input is the one through that call of that layer alone.
    """
    entered: list[Entered] = []

    def hook(where: list[Target], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        alias = x.view_as(x)
        if torch.is_grad_enabled() and not alias.requires_grad:
            alias.requires_grad_()
        entered.append((layer, alias, where))
        return ((alias, *args[1:]), kwargs) if args else (args, {**kwargs, "input": alias})

    handles = [
        layer.register_forward_pre_hook(partial(hook, where), with_kwargs=True) for layer, where in targets.items()
    ]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def outputs_of(result: Any) -> list[Tensor]:
    """Floating-point tensors in the output of a network.

    Raises:
        TypeError: If there is none.
    """
    found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not found:
        raise TypeError(f"expected the network to give out floating-point tensors, got {type(result).__name__}")
    return found


class _ScaleAndShift(TorchFunctionMode):
    """Reduces norms that compute mean and variance from their input to scale and shift.

    Such norms are invariant to the scale of their input, so that the weights before them would have no effect.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = {
            F.layer_norm: True,
            F.rms_norm: True,
            F.group_norm: True,
            F.instance_norm: kwargs.get("use_input_stats", True),
            F.batch_norm: kwargs.get("training", False),
        }
        if not own.get(function, False):
            return function(*args, **kwargs)
        x, scale, shift = args[0], kwargs.get("weight"), kwargs.get("bias")
        if function not in (F.layer_norm, F.rms_norm):  # channels are not last
            scale, shift = (v if v is None else v.view(-1, *[1] * (x.dim() - 2)) for v in (scale, shift))
        x = x if scale is None else x * scale
        return x if shift is None else x + shift


@torch.enable_grad()
def positive_response(model: nn.Module, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Sum of all outputs of the network with absolute weights on inputs of ones, and these weights.

    Computed in float64, since the response grows exponentially with depth. Batch norms keep their variance, with a mean
    of 0 so that nothing is negative; layer and group norms only scale and shift. Both results can be differentiated by
    ``torch.autograd.grad``; the network is not changed.
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

    with preserved_state(model), _ScaleAndShift():
        args, kwargs = tree_map(ones, (call.args, dict(call.kwargs)))
        outputs = outputs_of(functional_call(model, {**weights, **buffers}, args, kwargs))
    return torch.stack([output.sum() for output in outputs]).sum(), {canonical(n): w for n, w in weights.items()}
