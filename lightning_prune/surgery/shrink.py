"""Cutting a live network and its optimizers in place, atomically."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_prune.structure.attention import scale_of
from lightning_prune.structure.graph import Axes, Factors, IndexArray
from lightning_prune.structure.layers import refresh, relax_unflatten, tensors
from lightning_prune.structure.size_attributes import SizeAttribute, size_attributes
from lightning_prune.surgery.change import Change, CutError, undo_on_error, writable
from lightning_prune.surgery.depth import drop
from lightning_prune.surgery.masks import narrowed
from lightning_prune.surgery.optimizers import UnsliceableStateError, migrate, refuse, unwrap
from lightning_prune.surgery.tensors import canonical, named, rescaled, take, zero

__all__ = ["cut", "forget", "mask", "shrink"]


def cut(
    model: nn.Module,
    axes: Axes,
    optimizers: Iterable[Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    drops: Mapping[str, str] | None = None,
    factors: Factors | None = None,
) -> Change:
    """Make a network physically narrower, in place, with its optimizers.

    Parameters, gradients, buffers and optimizer state are sliced, and width attributes of layers updated. All objects
    stay the same, so parameter groups, schedulers, tied weights, hooks and averaged copies remain valid. If anything is
    raised, the network is unchanged.

    Args:
        model: The network.
        axes: Positions to keep, by name of parameter or buffer and dimension (``structure.axes(kept)``).
        optimizers: All optimizers of its parameters.
        copies: Modules of the same structure (averaged weights), which are cut too.
        drops: Layers to remove afterwards, by name (``structure.drops(kept)``).
        factors: What rows of tensors are multiplied by (``structure.factors(kept)``).

    Returns:
        The change, which can be undone.

    Raises:
        CutError: If ``axes`` do not match the network.
        OptimizerRefusedError: If an optimizer is not supported.
    """
    change = Change()
    shrink(change, model, axes, optimizers, copies, drops, factors)
    return change


def shrink(
    change: Change,
    model: nn.Module,
    axes: Axes,
    optimizers: Iterable[Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    drops: Mapping[str, str] | None = None,
    factors: Factors | None = None,
) -> None:
    """Cut a network as part of a ``change``, which is undone if it fails; see :func:`cut`."""
    optimizers, modules = [unwrap(optimizer) for optimizer in optimizers], [model, *copies]
    refuse(optimizers)
    resized = _resized(modules, axes)
    pieces = _pieces(modules, axes, factors or {})
    touched = {id(piece.tensor) for piece in pieces}
    # A module may be in both the model and a copy.
    owners = {
        owner: {name: tensor.shape for name, tensor in tensors(owner).items()}
        for module in modules
        for owner in module.modules()
        if any(id(tensor) in touched for tensor in tensors(owner).values())
    }
    with writable(), undo_on_error(change):
        # All allocations first, then only assignments.
        narrow = [
            (rescaled(_apply(take, piece, piece.tensor.data), piece.factors), _narrow_grad(piece)) for piece in pieces
        ]
        states: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for optimizer in optimizers:
            for piece in pieces:
                states += _narrow_state(optimizer, piece)
        alive = [change.assign(piece.tensor, *new) for piece, new in zip(pieces, narrow, strict=True)]
        for entries, new_entries in states:
            change.replace_entries(entries, new_entries)
        _set_widths(change, owners, resized)
        # Also in train mode: Lightning returns to it after validation without calling `train`.
        for owner in (owner for owner in owners if type(owner).train is not nn.Module.train):
            change.drop_cached(owner)
        _relax_unflatten(change, modules)
        try:
            drop(change, modules, drops or {}, optimizers)
        except ValueError as error:
            raise CutError(f"Cannot take out a layer: {error}. Nothing has changed.") from error
        for module in modules:
            change.set_attributes(module, narrowed(module, axes))
        if any(alive):
            warnings.warn(
                "An autograd graph from before the cut is still alive: is a loss or output kept without `.detach()`, "
                "or by `wandb.watch` without `log_graph=False`? Running backward through it fails from now on. A "
                "wrapper like DistributedDataParallel holds such graphs too and no longer sees the gradients: unwrap "
                "the network before a cut.",
                stacklevel=3,
            )


def mask(model: nn.Module, axes: Axes) -> Change:
    """Set all that :func:`cut` would remove from parameters and buffers to zero, in place; same errors."""
    change = Change()
    with writable(), undo_on_error(change):
        for piece in _pieces([model], axes, {}):
            change.assign(piece.tensor, _apply(zero, piece, piece.tensor.data), piece.tensor.grad)
    return change


def forget(change: Change, optimizers: Iterable[Optimizer]) -> None:
    """Clear the state of optimizers, as part of a ``change``."""
    for optimizer in map(unwrap, optimizers):
        change.replace_entries(optimizer.state, {})


@dataclass(frozen=True)
class _Piece:
    """A tensor to cut with the positions to keep, and what rows of these are multiplied by."""

    name: str
    tensor: Tensor
    kept: Mapping[int, IndexArray]
    factors: tuple[IndexArray, float] | None


def _set_widths(
    change: Change, owners: Mapping[nn.Module, Mapping[str, torch.Size]], resized: Mapping[SizeAttribute, int]
) -> None:
    """Set the attributes of layers that follow from their tensors, and sizes in other attributes."""
    for place, value in resized.items():  # first, as heads are counted by their features
        scale = {"scale": scale_of(place.module)} if isinstance(place.module, nn.MultiheadAttention) else {}
        change.set_attributes(place.module, {**scale, **place.with_value(value)})
    for owner, old_shapes in owners.items():
        change.edit_attributes(owner, lambda owner=owner, old=old_shapes: refresh(owner, old))  # type: ignore[misc]


def _relax_unflatten(change: Change, modules: Iterable[nn.Module]) -> None:
    for part in (part for module in modules for part in module.modules() if isinstance(part, nn.Unflatten)):
        change.edit_attributes(part, lambda part=part: relax_unflatten(part))  # type: ignore[misc]


def _pieces(modules: list[nn.Module], axes: Axes, factors: Factors) -> list[_Piece]:
    """Tensors to cut; tied tensors once."""
    sizes = size_attributes(modules[0], axes)
    axes = {name: kept for name, kept in axes.items() if canonical(name) not in sizes}
    shapes = {name: tensor.shape for name, tensor in named(modules[0]).items() if not is_lazy(tensor)}
    pieces: dict[int, _Piece] = {}
    for module in modules:
        found = named(module)
        for name, kept in axes.items():
            tensor = found.get(canonical(name))
            _require_cuttable(name, tensor, shapes.get(canonical(name)), kept)
            assert tensor is not None
            first = pieces.setdefault(id(tensor), _Piece(name, tensor, kept, factors.get(name)))
            if first.kept is not kept and not _same(first.kept, kept):
                raise CutError(
                    f"{first.name} and {name} are one tensor (tied), but are to be cut differently: {first.kept} and "
                    f"{kept}. Nothing has changed. Give both the same axes, or leave one out."
                )
    return list(pieces.values())


def _resized(modules: list[nn.Module], axes: Axes) -> dict[SizeAttribute, int]:
    """Sizes in attributes that the axes name, and their values after the cut."""
    names = {canonical(name): kept for name, kept in axes.items()}
    resized: dict[SizeAttribute, int] = {}
    for module in modules:
        for name, place in size_attributes(module, names).items():
            kept = names[name].get(0, np.arange(0))
            if not 0 < len(kept) <= place.value or kept[-1] >= place.value:
                raise CutError(
                    f"Cannot cut {name}: expected positions within its value, {place.value}, got {len(kept)} positions"
                    f"{f' up to {kept[-1]}' if len(kept) else ''}. Nothing has changed."
                )
            resized[place] = len(kept)
    return resized


def _require_cuttable(
    name: str, tensor: Tensor | None, shape: tuple[int, ...] | None, kept: Mapping[int, IndexArray]
) -> None:
    problem = ""
    if tensor is None:
        problem = "the network (or one of its copies) has no such parameter or buffer, nor such a whole number"
    elif is_lazy(tensor):
        problem = "it belongs to a lazy layer and has no shape yet: run one forward pass first"
    elif tensor.shape != shape:
        problem = f"a copy has shape {tuple(tensor.shape)}, the network {shape and tuple(shape)}: they must be alike"
    elif not tensor.is_leaf:
        problem = "it is the result of a differentiable computation: register it detached"
    elif any(len(positions) == 0 for positions in kept.values()):
        problem = "nothing of it would remain: keep at least one position"
    if problem:
        raise CutError(f"Cannot cut {name}: {problem}. Nothing has changed.")


def _apply(function: Callable[[Tensor, Mapping[int, IndexArray]], Tensor], piece: _Piece, tensor: Tensor) -> Tensor:
    try:
        return function(tensor, piece.kept)
    except ValueError as error:
        raise CutError(f"Cannot cut {piece.name}: {error} Nothing has changed.") from error


def _narrow_grad(piece: _Piece) -> Tensor | None:
    return None if piece.tensor.grad is None else rescaled(_apply(take, piece, piece.tensor.grad), piece.factors, -1)


def _narrow_state(optimizer: Optimizer, piece: _Piece) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """State of a tensor in an optimizer, and the sliced state: one pair or none."""
    if piece.tensor not in optimizer.state:
        return
    entries = optimizer.state[piece.tensor]
    try:
        yield entries, migrate(entries, tuple(piece.tensor.shape), piece.kept, piece.factors)
    except UnsliceableStateError as error:
        warnings.warn(
            f"{type(optimizer).__name__} starts with an empty state for {piece.name}: its state cannot be sliced, "
            f"{error}.",
            stacklevel=4,
        )
        # Every optimizer of PyTorch initialises an empty state at the next step.
        yield entries, {}


def _same(first: Mapping[int, IndexArray], second: Mapping[int, IndexArray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[dim], second[dim]) for dim in first)
