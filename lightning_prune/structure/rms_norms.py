"""Recognition of root-mean-square norms, which many networks write themselves."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure.layers import canonical, refresh

__all__ = ["rms_norms"]

#: Samples, and their magnitude, beside which the norm's ε does not count.
_SAMPLES, _MAGNITUDE = 8, 1e3
#: Largest relative error, as norms are computed in float32.
_TOLERANCE = 1e-4


def rms_norms(model: nn.Module) -> frozenset[str]:
    """Names of the modules that compute ``x / rms(x) · g(weight)`` over the last axis or over channels, at any width.

    Such a norm averages over all units. Its result after a cut is therefore that of a narrower norm, not that of the
    masked network, as with `nn.LayerNorm`. A module is recognised by its results on random numbers, with its own weight
    and with a narrower one.
    """
    candidates = [(name, module) for name, module in model.named_modules() if _has_one_weight(module)]
    found = {name for name, module in candidates if _is_rms_norm(module, 0) or _is_rms_norm(module, 2)}
    return frozenset(map(canonical, found))


def _has_one_weight(module: nn.Module) -> bool:
    own = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, _ in own] == ["weight"] and own[0][1].dim() == 1 and len(own[0][1]) > 1


def _is_rms_norm(module: nn.Module, spatial: int) -> bool:
    """Whether the results are those of a norm of units that are followed by so many axes."""
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.RMSNorm):
        return False
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad(), torch.inference_mode(False):
            own = copy.deepcopy(module).cpu().float().eval()
            width = module.get_parameter("weight").numel()
            weight = torch.randn(width, generator=draw)
            inputs = _MAGNITUDE * torch.randn(_SAMPLES, width, generator=draw)
            kept = torch.arange(0, width, 2)
            whole = _factors(own, weight, inputs, spatial)
            narrow = _factors(own, weight[kept], inputs[:, kept], spatial)
    except Exception:  # whatever a module raises for these inputs, it is another one
        return False
    expected = whole[:1]
    return all(
        torch.allclose(factors, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max()))
        for factors, wanted in ((whole, expected.expand_as(whole)), (narrow, expected[:, kept].expand_as(narrow)))
    )


def _factors(norm: Any, weight: Tensor, inputs: Tensor, spatial: int) -> Tensor:
    """What a norm with this weight multiplies every normalised input by.

    Raises:
        ValueError: If the outputs are not as many as the inputs.
    """
    shapes = {"weight": tuple(norm.weight.shape)}
    norm.weight = nn.Parameter(weight, requires_grad=False)
    refresh(norm, shapes)
    given = inputs.reshape(*inputs.shape, *[1] * spatial)
    outputs: Tensor = norm.forward(given)  # the user's hooks must not see these numbers
    if outputs.shape != given.shape:
        raise ValueError(f"expected outputs of the shape {tuple(given.shape)}, got {tuple(outputs.shape)}")
    return outputs.reshape(inputs.shape) / (inputs / inputs.square().mean(1, keepdim=True).sqrt())
