"""What every file of `rebuild` holds below its tables: it is copied there, and needs nothing but PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.structure.attention import MultiheadAttention
from lightning_prune.structure.module_configs import ModuleConfig

__all__ = ["Constant", "Empty", "differences", "load", "narrow", "narrow_layer", "positions"]

# The tables of a file stand in for these.
NETWORK = ""
LAYERS: Mapping[str, Mapping[str, tuple[Any, Any]]] = {}
REPLACED: Mapping[str, tuple[str, Callable[[], nn.Module]]] = {}
POSITIONS: Mapping[str, Mapping[int, list[int]]] = {}
ATTENTIONS: Sequence[str] = []
TIED: Mapping[str, str] = {}


def narrow(model: nn.Module) -> nn.Module:
    """Give a newly built dense network the sizes of the narrow one, in place; its own weights stay, those in front."""
    layers = dict(model.named_modules(remove_duplicate=False))
    if found := differences(layers):
        raise ValueError(f"expected the dense {NETWORK}, built as before it was pruned: {'; '.join(found[:3])}")
    for name, axes in POSITIONS.items():
        buffer = model.get_buffer(name)
        for dim, kept in axes.items():
            buffer.data = buffer.index_select(dim, torch.tensor(kept, device=buffer.device))
    for name, parts in LAYERS.items():
        narrow_layer(layers[name], parts)
    for name in ATTENTIONS:
        layers[name].__class__ = MultiheadAttention
    like = next(model.parameters())
    for name, (_, build) in REPLACED.items():
        parent, _, own = name.rpartition(".")
        setattr(layers[parent], own, build().to(like.device, like.dtype).train(layers[name].training))
    return model


def narrow_layer(layer: nn.Module, parts: Mapping[str, tuple[Any, Any]]) -> None:
    """Set options and lengths of tensors."""
    for part, (_, now) in parts.items():
        here = getattr(layer, part, None)
        if isinstance(here, Tensor):
            here.data = here.detach()[tuple(map(slice, now))].clone()
        elif isinstance(now, dict) and not isinstance(here, dict):
            setattr(layer, part, ModuleConfig(here, now))
        else:
            setattr(layer, part, now)


def differences(layers: Mapping[str, nn.Module]) -> list[str]:
    """What is not as in the dense network."""
    found = []
    for name, parts in LAYERS.items():
        for part, (dense, _) in parts.items():
            here = getattr(layers.get(name), part, "missing")
            here = tuple(here.shape) if isinstance(here, Tensor) else here
            if isinstance(dense, dict) and not isinstance(here, dict):
                here = {number: getattr(here, number, "missing") for number in dense}
            if dense not in (None, here):
                found.append(f"{name}.{part} is {here} instead of {dense}")
    for name, (kind, _) in REPLACED.items():
        here = type(layers.get(name)).__name__
        if here != kind:
            found.append(f"{name} is of the class {here} instead of {kind}")
    return found


def load(model: nn.Module, weights: str | PathLike[str] | Mapping[str, Tensor]) -> nn.Module:
    """Narrow a newly built dense network and load its weights, in place.

    Args:
        model: The network, built as it was before it was pruned.
        weights: A safetensors file, or the tensors by name.
    """
    if not isinstance(weights, Mapping):
        from safetensors.torch import load_file

        weights = load_file(weights)
    found = {name: weights[stored] for name, stored in TIED.items() if stored in weights} | dict(weights)
    state = narrow(model).state_dict()
    if state.keys() != found.keys():
        name = min(state.keys() ^ found.keys())
        where = "the file" if name in found else "the network"
        raise ValueError(f"expected the weights of this narrow {NETWORK}, got others: only {where} has {name}")
    state.update(found)
    model.load_state_dict(state)
    return model


class Empty(nn.Module):
    """Instead of a layer without outputs: a tensor with 0 channels."""

    def __init__(self, window: tuple[tuple[int, int, int, int], ...] | None = None) -> None:
        super().__init__()
        self.window = window  # kernel, stride, padding and dilation of each dimension; None for a linear layer

    def forward(self, x: Tensor) -> Tensor:
        """``(..., inputs, *positions)`` → ``(..., 0, *positions)``."""
        if self.window is None:
            return x.new_empty((*x.shape[:-1], 0))
        return x.new_empty((*x.shape[: -len(self.window) - 1], 0, *positions(x, self.window)))


class Constant(nn.Module):
    """Instead of a layer without inputs: its bias, or zeros."""

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, outputs: int, bias: bool, window: tuple[tuple[int, int, int, int], ...] | None = None) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("weight", torch.empty(outputs, 0))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., 0, *positions)`` → ``(..., outputs, *positions)``."""
        if self.window is None:
            return F.linear(x, self.weight, self.bias)
        out = self.weight.sum(1) if self.bias is None else self.bias
        shape = (*x.shape[: -len(self.window) - 1], len(out), *positions(x, self.window))
        return out.view(-1, *[1] * len(self.window)).expand(shape).clone(memory_format=torch.contiguous_format)


def positions(x: Tensor, window: tuple[tuple[int, int, int, int], ...]) -> list[int]:
    """Lengths that a convolution with this window makes of the last dimensions."""
    lengths = x.shape[-len(window) :]
    return [(n + p - d * (k - 1) - 1) // s + 1 for n, (k, s, p, d) in zip(lengths, window, strict=True)]
