"""Recognition of norms over units that many networks write themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure.layers import canonical, refresh

__all__ = ["own_norms"]

#: Samples, and their magnitude, beside which the norm's ε does not count.
_SAMPLES, _MAGNITUDE = 8, 1e3
#: Height and width of images.
_IMAGE = (2, 3)
#: Largest relative error, as norms are computed in float32.
_TOLERANCE = 1e-4


def own_norms(model: nn.Module) -> frozenset[str]:
    """Names of the modules that are root-mean-square or global response norms, at any width.

    - Root-mean-square norm, over the last axis or over channels: ``x / rms(x) · g(weight)``.
    - Global response norm (`ConvNeXt V2 <https://arxiv.org/abs/2301.00808>`_) of images, with channels last or second:
      ``x + scale · x · n + shift``, where n is the norm of each channel over all positions, divided by the mean of all
      channels.

    Such a norm averages over all units. Its result after a cut is therefore that of a narrower norm, not that of the
    masked network, as with `nn.LayerNorm`. A module is recognised by its results on random numbers, with its own
    weights and with narrower ones.
    """
    kinds = ((_has_one_weight, _is_rms_norm), (_has_scale_and_shift, _is_response_norm))
    found = {
        name
        for name, module in model.named_modules()
        for fits, is_norm in kinds
        if fits(module) and (is_norm(module, channels_last=True) or is_norm(module, channels_last=False))
    }
    return frozenset(map(canonical, found))


def _vectors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, if each has one axis that is longer than one."""
    own = dict([*module.named_parameters(), *module.named_buffers()])
    return own if all(tensor.numel() == max(tensor.shape, default=0) > 1 for tensor in own.values()) else {}


def _has_one_weight(module: nn.Module) -> bool:
    own = _vectors(module)
    return list(own) == ["weight"] and own["weight"].dim() == 1


def _has_scale_and_shift(module: nn.Module) -> bool:
    own = _vectors(module)
    return len(own) == 2 and len({tensor.numel() for tensor in own.values()}) == 1


def _is_rms_norm(module: nn.Module, *, channels_last: bool) -> bool:
    """Whether the results are those of a norm of units that are last, or followed by two more axes."""
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.RMSNorm):
        return False
    ones = () if channels_last else (1, 1)

    def factors(norm: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
        """What the norm multiplies every normalised input by."""
        outputs = _results(norm, {"weight": weight}, inputs.reshape(*inputs.shape, *ones))
        return outputs.reshape(inputs.shape) / (inputs / inputs.square().mean(1, keepdim=True).sqrt())

    def compare(own: nn.Module, draw: torch.Generator) -> bool:
        width = module.get_parameter("weight").numel()
        weight = torch.randn(width, generator=draw)
        inputs = _MAGNITUDE * torch.randn(_SAMPLES, width, generator=draw)
        kept = torch.arange(0, width, 2)
        whole = factors(own, weight, inputs)
        narrow = factors(own, weight[kept], inputs[:, kept])
        expected = whole[:1]
        return _are_close(whole, expected.expand_as(whole)) and _are_close(narrow, expected[:, kept].expand_as(narrow))

    return _holds(module, compare)


def _is_response_norm(module: nn.Module, *, channels_last: bool) -> bool:
    """Whether the results are those of a global response norm."""
    if type(module).__module__.startswith("torch.nn."):
        return False
    names = list(_vectors(module))

    def compare(own: nn.Module, draw: torch.Generator) -> bool:
        width = _vectors(module)[names[0]].numel()
        first, second = torch.randn(2, width, generator=draw)
        inputs = torch.randn(_SAMPLES, *_IMAGE, width, generator=draw)
        expected = [_response_norm(inputs, *pair) for pair in ((first, second), (second, first))]
        found = _of_images(own, dict(zip(names, (first, second), strict=True)), inputs, channels_last)
        order = next((k for k, one in enumerate(expected) if _are_close(found, one)), None)
        if order is None:
            return False
        first, second, inputs = (numbers[..., ::2] for numbers in (first, second, inputs))
        narrow = _of_images(own, dict(zip(names, (first, second), strict=True)), inputs, channels_last)
        return _are_close(narrow, _response_norm(inputs, *((first, second), (second, first))[order]))

    return _holds(module, compare)


def _response_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return x + scale * x * norms / norms.mean(-1, keepdim=True) + shift


def _of_images(norm: nn.Module, weights: dict[str, Tensor], x: Tensor, channels_last: bool) -> Tensor:
    """The results for images with channels last, in this order."""
    if channels_last:
        return _results(norm, weights, x)
    return _results(norm, weights, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _holds(module: nn.Module, compare: Callable[[nn.Module, torch.Generator], bool]) -> bool:
    try:
        with torch.no_grad(), torch.inference_mode(False):
            return compare(copy.deepcopy(module).cpu().float().eval(), torch.Generator().manual_seed(0))
    except Exception:  # whatever a module raises for these inputs, it is another one
        return False


def _are_close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max()))


def _results(norm: Any, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """The outputs of a norm with these weights, each along the longest axis of its own.

    Raises:
        ValueError: If the outputs are not as many as the inputs.
    """
    shapes = {name: tuple(getattr(norm, name).shape) for name in weights}
    for name, weight in weights.items():
        shape = [1 if n == 1 else -1 for n in shapes[name]]
        setattr(norm, name, nn.Parameter(weight.reshape(shape), requires_grad=False))
    refresh(norm, shapes)
    outputs: Tensor = norm.forward(inputs)  # the user's hooks must not see these numbers
    if outputs.shape != inputs.shape:
        raise ValueError(f"expected outputs of the shape {tuple(inputs.shape)}, got {tuple(outputs.shape)}")
    return outputs
