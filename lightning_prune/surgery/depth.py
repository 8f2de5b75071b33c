"""Taking whole layers out of a live network, and putting them back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.structure.layers import tensors
from lightning_prune.structure.standins import stand_in
from lightning_prune.surgery.change import Change
from lightning_prune.surgery.optimizers import unwrap
from lightning_prune.surgery.tensors import canonical

__all__ = ["drop", "layer", "restore", "stays", "template"]


def layer(model: nn.Module, name: str) -> nn.Module | None:
    """The module of this name as it reads without ``torch.compile``, or ``None``."""
    return next((module for prefix, module in model.named_modules() if canonical(prefix) == name), None)


def drop(
    change: Change, models: Iterable[nn.Module], drops: Mapping[str, str], optimizers: Iterable[Optimizer] = ()
) -> None:
    """Take layers out of networks that are alike; their parameters leave the optimizers, with their state.

    Args:
        change: Writes down the way back.
        models: The network and copies of it.
        drops: What takes the place of each layer, by name (`Removal.modules`).
        optimizers: Every optimizer that steps one of the parameters. Their groups stay, empty if need be.

    Raises:
        ValueError: If there is no such layer, or nothing can take its place.
    """
    models = tuple(models)
    before = {id(parameter) for model in models for parameter in model.parameters()}
    for model in models:
        for name, kind in drops.items():
            found = layer(model, name)
            if found is None or not name:
                raise ValueError(f"the network (or one of its copies) has no layer {name!r} to take out")
            _put(change, model, name, stand_in(kind, found))
    # What an optimizer steps beside these networks is none of our business.
    gone = before - {id(parameter) for model in models for parameter in model.parameters()}
    for optimizer in map(unwrap, optimizers):
        for group in optimizer.param_groups:
            left = [parameter for parameter in group["params"] if id(parameter) not in gone]
            if len(left) < len(group["params"]):
                change.replace_entries(group, {**group, "params": left})
        state = {key: value for key, value in optimizer.state.items() if id(key) not in gone}
        if len(state) < len(optimizer.state):
            change.replace_entries(optimizer.state, state)


def stays(tensor: str, drops: Mapping[str, str]) -> bool:
    """Whether a parameter or buffer is still there, with its meaning, without these layers: of a constant its bias."""
    owner, _, own = tensor.rpartition(".")
    return owner not in drops or (drops[owner] == "constant" and own == "bias")


def template(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...] | None], attributes: Mapping[str, Any]
) -> nn.Module:
    """What it takes to build a layer anew: a copy without content, in its dense widths.

    Args:
        module: The layer, dense or narrow.
        shapes: Dense shapes of its own tensors, by local name; those that were not cut may be missing or ``None``.
        attributes: Its dense configuration, where it was cut.
    """
    bare = copy.deepcopy(module, {id(t): _empty(t, shapes.get(n)) for n, t in tensors(module).items()})
    vars(bare).update(attributes)
    return bare


def restore(change: Change, model: nn.Module, templates: Mapping[str, nn.Module]) -> None:
    """Put layers back, dense and zero, where others stand now."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    for name, bare in templates.items():
        module = copy.deepcopy(bare).to_empty(device=device)
        for tensor in tensors(module).values():
            tensor.detach().zero_()
        now = layer(model, name)
        _put(change, model, name, module.train(now.training if now is not None else model.training))


def _put(change: Change, model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, own = name.rpartition(".")
    parent = layer(model, parent_name)
    assert parent is not None
    change.replace_entries(parent._modules, {**parent._modules, own: module})


def _empty(tensor: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    bare = torch.empty(tensor.shape if shape is None else shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
