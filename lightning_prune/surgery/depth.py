"""Removing whole layers from a live network, and restoring them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.structure.layers import is_within, tensors
from lightning_prune.structure.stubs import make_stub
from lightning_prune.surgery.change import Change
from lightning_prune.surgery.optimizers import unwrap
from lightning_prune.surgery.tensors import canonical, named

__all__ = ["drop", "layer", "put", "restore", "stays", "templates"]


def layer(model: nn.Module, name: str) -> nn.Module | None:
    """The module with this canonical name, or None."""
    return next((module for prefix, module in model.named_modules() if canonical(prefix) == name), None)


def drop(
    change: Change, models: Iterable[nn.Module], drops: Mapping[str, str], optimizers: Iterable[Optimizer] = ()
) -> None:
    """Replace layers by stubs, in a network and its copies, and remove their parameters from the optimizers.

    Args:
        change: Logs the changes.
        models: The network and copies of it.
        drops: Kind of stub of each layer, by name (`Removal.modules`).
        optimizers: All optimizers of the parameters. Their groups are kept, even if empty.

    Raises:
        ValueError: If there is no such layer, or it cannot be replaced.
    """
    models = tuple(models)
    before = {id(parameter) for model in models for parameter in model.parameters()}
    for model in models:
        for name, kind in drops.items():
            found = layer(model, name)
            if found is None or not name:
                raise ValueError(f"the network (or one of its copies) has no layer {name!r} to take out")
            put(change, model, name, make_stub(kind, found))
    # Optimizers may have other parameters.
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
    """Whether a parameter or buffer is kept when layers are removed: of a constant layer, its bias."""
    owner, _, own = tensor.rpartition(".")
    return owner not in drops or (drops[owner] == "constant" and own == "bias")


def templates(
    model: nn.Module,
    names: Iterable[str],
    known: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    attributes: Mapping[str, Mapping[str, Any]],
) -> dict[str, nn.Module]:
    """Templates from which modules can be restored after they are removed: dense copies without contents.

    Tied tensors stay tied.

    Args:
        model: The network.
        names: Modules to remove; those inside of a module that was removed before are ignored.
        known: Templates of modules that were removed before.
        shapes: Dense shapes of the dense network's tensors that were cut, by name.
        attributes: Dense configuration of layers that were cut, by name.
    """
    going = {name: found for name in names if not is_within(name, known) and (found := layer(model, name)) is not None}
    notes_on_widths = {
        id(tensor)
        for prefix, module in model.named_modules(remove_duplicate=False)
        if not is_within(canonical(prefix), going)
        for tensor in tensors(module).values()
    }
    memo: dict[int, Any] = {}
    for prefix, module in going.items():
        for name, tensor in named(module).items():
            if id(tensor) not in memo or f"{prefix}.{name}" in shapes:
                dense = shapes.get(f"{prefix}.{name}")
                memo[id(tensor)] = tensor if id(tensor) in notes_on_widths else _empty(tensor, dense)
    for tensor in (tensor for module in known.values() for tensor in named(module).values()):
        memo.setdefault(id(tensor), tensor)
    # Copied together, so that tied tensors stay tied.
    bare: dict[str, nn.Module] = copy.deepcopy({**known, **going}, memo)
    for prefix in going:
        for path, module in bare[prefix].named_modules():
            vars(module).update(attributes.get(canonical(f"{prefix}.{path}" if path else prefix), {}))
        for name in [name for name in known if is_within(name, [prefix])]:
            _put_into(bare[prefix], name.removeprefix(f"{prefix}."), bare.pop(name))
    return bare


def restore(change: Change, model: nn.Module, templates: Mapping[str, nn.Module]) -> None:
    """Restore modules from templates, dense and zero; tied tensors stay tied."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    memo: dict[int, Any] = {}
    for tensor in (tensor for bare in templates.values() for tensor in named(bare).values()):
        memo[id(tensor)] = _zeros(tensor, device) if tensor.is_meta else tensor
    for name, module in copy.deepcopy(dict(templates), memo).items():
        now = layer(model, name)
        training = model.training if now is None else now.training
        put(change, model, name, module if module.training is training else module.train(training))


def put(change: Change, model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module of this name."""
    parent = _parent(model, name)
    change.replace_entries(parent._modules, {**parent._modules, name.rpartition(".")[2]: module})


def _put_into(model: nn.Module, name: str, module: nn.Module) -> None:
    _parent(model, name)._modules[name.rpartition(".")[2]] = module


def _parent(model: nn.Module, name: str) -> nn.Module:
    parent = layer(model, name.rpartition(".")[0])
    assert parent is not None
    inner = parent._modules.get("_orig_mod")  # a compiled module wraps the one with the layers
    return parent if inner is None else inner


def _empty(tensor: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    bare = torch.empty(tensor.shape if shape is None else shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


def _zeros(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    content = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(content, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else content
