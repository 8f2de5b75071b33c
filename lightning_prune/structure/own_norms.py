"""Recognition of norms over units that many networks write themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure.layers import canonical, refresh

__all__ = ["own_layer_norms", "own_norms"]

#: Samples, and their magnitude, beside which the norm's ε does not count.
_SAMPLES, _MAGNITUDE = 8, 1e3
#: Height and width of images.
_IMAGE = (2, 3)
#: Largest relative error, as norms are computed in float32.
_TOLERANCE = 1e-4


def own_norms(model: nn.Module) -> frozenset[str]:
    """Names of the modules that are layer norms, root-mean-square norms or global response norms, at any width.

    - Layer norm and root-mean-square norm, over the last axis or over channels: inputs divided by their deviation or by
      their root mean square, with the mean subtracted or not, times g(weight), plus a bias if there is one.
    - Global response norm (`ConvNeXt V2 <https://arxiv.org/abs/2301.00808>`_) of images, with channels last or second:
      ``x + scale · x · n + shift``, where n is the norm of each channel over all positions, divided by the mean of all
      channels.

    Such a norm averages over all units. Its result after a cut is therefore that of a narrower norm, not that of the
    masked network, as with `nn.LayerNorm`. A module is recognised by its results on random numbers, with its own
    weights and with narrower ones.
    """
    return _that_are(model, _is_response_norm) | own_layer_norms(model)


def own_layer_norms(model: nn.Module) -> frozenset[str]:
    """Those of them that are layer norms or root-mean-square norms."""
    return _that_are(model, _is_layer_norm)


def _that_are(model: nn.Module, is_norm: Callable[[nn.Module, bool], bool]) -> frozenset[str]:
    names = (name for name, module in model.named_modules() if is_norm(module, True) or is_norm(module, False))
    return frozenset(map(canonical, names))


def _vectors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, if each has one axis that is longer than one."""
    own = dict([*module.named_parameters(), *module.named_buffers()])
    return own if all(tensor.numel() == max(tensor.shape, default=0) > 1 for tensor in own.values()) else {}


#: What a norm over units makes of its inputs, before its weight.
_NORMALISED: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x / x.square().mean(1, keepdim=True).sqrt(),
    lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True),
    lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
    lambda x: x / x.std(1, correction=0, keepdim=True),
)


def _is_layer_norm(module: nn.Module, channels_last: bool) -> bool:
    """Whether the results are those of a norm of units that are last, or followed by two more axes."""
    own = _vectors(module)
    if len({tensor.numel() for tensor in own.values()}) != 1 or len(own) > 2:
        return False
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.RMSNorm):
        return False
    ones, names, width = () if channels_last else (1, 1), list(own), next(iter(own.values())).numel()

    def compare(norm: nn.Module, draw: torch.Generator) -> bool:
        weights = torch.randn(len(names), width, generator=draw)
        inputs, kept = _MAGNITUDE * torch.randn(_SAMPLES, width, generator=draw), torch.arange(0, width, 2)

        def odd_and_even(weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            """The parts of the results that change their sign with the inputs, and that do not: the bias."""
            both = torch.cat([x, -x]).reshape(2 * len(x), -1, *ones)
            out, of_minus = _results(norm, dict(zip(names, weights, strict=True)), both).reshape(2, *x.shape)
            return (out - of_minus) / 2, (out + of_minus) / 2

        (odd, even), (narrow, bias) = odd_and_even(weights, inputs), odd_and_even(weights[:, kept], inputs[:, kept])
        largest = float(odd.abs().max())
        if not (_are_close(even, even[:1], largest) and _are_close(bias, even[:1, kept], largest)):
            return False
        for normalised in _NORMALISED:
            whole = normalised(inputs)
            factors = (odd * whole).sum(0) / whole.square().sum(0)
            left = factors[kept] * normalised(inputs[:, kept])
            if _are_close(odd, factors * whole, largest) and _are_close(narrow, left, largest):
                return True
        return False

    return _holds(module, compare)


def _is_response_norm(module: nn.Module, channels_last: bool) -> bool:
    """Whether the results are those of a global response norm."""
    own = _vectors(module)
    if type(module).__module__.startswith("torch.nn.") or len(own) != 2:
        return False
    if len({tensor.numel() for tensor in own.values()}) != 1:
        return False
    names = list(own)

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


def _are_close(found: Tensor, expected: Tensor, largest: float | None = None) -> bool:
    """Whether numbers are equal up to rounding, relative to the largest of them."""
    largest = float(expected.abs().max()) if largest is None else largest
    return torch.allclose(found, expected.expand_as(found), rtol=_TOLERANCE, atol=_TOLERANCE * largest)


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
