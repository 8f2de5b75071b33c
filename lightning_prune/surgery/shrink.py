"""Cutting a live network and its optimizers in place: whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_prune.structure.graph import Axes, IndexArray
from lightning_prune.structure.layers import loosen, refresh, tensors
from lightning_prune.surgery.depth import drop
from lightning_prune.surgery.masks import narrowed
from lightning_prune.surgery.optimizers import UnsliceableStateError, migrate, refuse, unwrap
from lightning_prune.surgery.tensors import canonical, named, take, zero

__all__ = ["Change", "CutError", "check", "cut", "cut_and_check", "forget", "mask", "silent", "take"]


class CutError(RuntimeError):
    """A cut that could not be made or did not pass its check; the network is as it was before."""


class Change:
    """What was done to a network, and the way back.

    As a context manager it is undone at the end of the block. It holds the memory of what was replaced until it is
    dropped. Going back is bit for bit if nothing was trained in between; of what has not been cut, later training
    stays.
    """

    def __init__(self) -> None:
        self._back: list[Callable[[], object]] = []

    def undo(self) -> None:
        """Put everything back; a second call does nothing."""
        with _writable():
            while self._back:
                self._back[-1]()
                self._back.pop()

    def __enter__(self) -> Change:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    # Each step is written down before it is done, so that an interrupt in between is undone too.

    def assign(self, tensor: Tensor, data: Tensor, grad: Tensor | None) -> bool:
        """Give a parameter or buffer another content, perhaps of another shape; the object stays.

        Returns:
            Whether an autograd graph that knows the old shape is still alive.
        """
        old_data, old_grad = tensor.data, tensor.grad
        self._back.append(lambda: _assign(tensor, old_data, old_grad))
        return _assign(tensor, data, grad)

    def replace_entries(self, entries: dict[Any, Any], new: Mapping[Any, Any]) -> None:
        """Give a dictionary other entries; the object stays."""
        old = dict(entries)
        self._back.append(lambda: _refill(entries, old))
        _refill(entries, new)

    def set_attributes(self, module: nn.Module, values: Mapping[str, Any]) -> None:
        """Set plain attributes of ``module``."""
        self.edit_attributes(module, lambda: vars(module).update(values))

    def edit_attributes(self, module: nn.Module, edit: Callable[[], None]) -> None:
        """Run an ``edit`` that sets plain attributes of ``module``."""
        attributes, old = vars(module), dict(vars(module))
        self._back.append(lambda: _restore(attributes, old, attributes.keys() | old.keys()))
        edit()
        # From here on only what the edit has changed goes back, not what others change later (`training`, say).
        changed = {name for name in attributes.keys() | old.keys() if attributes.get(name) is not old.get(name)}
        self._back[-1] = lambda: _restore(attributes, old, changed)


def cut(
    model: nn.Module,
    axes: Axes,
    optimizers: Iterable[Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    drops: Mapping[str, str] | None = None,
) -> Change:
    """Make a network physically narrower, in place, with everything that follows it.

    Parameters, their gradients, buffers and the optimizers' state are sliced, and the layers' width attributes set.
    All objects stay the same, so parameter groups, schedulers, tied weights, hooks and averaged copies live on.

    Args:
        model: The network.
        axes: What to keep, by name of parameter or buffer and dimension (``structure.axes(kept)``).
        optimizers: Every optimizer that steps one of its parameters.
        copies: Modules of the same structure (averaged weights) that are cut alike.
        drops: Layers that are taken out whole, after that, by name (``structure.drops(kept)``).

    Returns:
        The handle that undoes it.

    Raises:
        CutError: If ``axes`` do not fit the network.
        OptimizerRefusedError: If an optimizer cannot follow.

    Whatever is raised, by this function or inside it, the network is then as it was.
    """
    change = Change()
    _cut(change, model, axes, tuple(optimizers), tuple(copies), drops or {})
    return change


def mask(model: nn.Module, axes: Axes) -> Change:
    """Set to zero all that :func:`cut` would remove from parameters and buffers, in place; the same errors."""
    change = Change()
    with _writable(), _whole(change):
        for piece in _pieces([model], axes):
            change.assign(piece.tensor, _apply(zero, piece, piece.tensor.data), piece.tensor.grad)
    return change


def forget(change: Change, optimizers: Iterable[Optimizer]) -> None:
    """Clear the state of optimizers, as part of a ``change``: they step as if for the first time."""
    for optimizer in map(unwrap, optimizers):
        change.replace_entries(optimizer.state, {})


def cut_and_check(
    model: nn.Module,
    axes: Axes,
    optimizers: Iterable[Optimizer],
    copies: Iterable[nn.Module],
    run: Callable[[], Any],
    drops: Mapping[str, str] | None = None,
) -> Change:
    """:func:`cut`, then :func:`check`; undone whole if anything fails.

    Args:
        model: The network.
        axes: What to keep.
        optimizers: Every optimizer that steps one of its parameters.
        copies: Modules of the same structure that are cut alike.
        run: A forward pass of the network on an example, in the mode and precision that training uses.
        drops: Layers that are taken out whole.

    Raises:
        CutError: If the cut or the check fails; the text says why, and the network is as it was.
    """
    optimizers, copies = tuple(optimizers), tuple(copies)
    change = Change()
    try:
        _cut(change, model, axes, optimizers, copies, drops or {})
        if not check(run, model):
            # A network may have infinite values by design, or have diverged before: only what is new speaks
            # against the cut.
            change.undo()
            if check(run, model):
                raise CutError("the outputs or gradients are no longer finite, before the cut they were")
            _cut(change, model, axes, optimizers, copies, drops or {})
        return change
    except Exception as error:
        change.undo()
        raise CutError(f"The cut failed and was taken back, nothing has changed: {error}") from error
    except BaseException:
        change.undo()
        raise


def check(run: Callable[[], Any], model: nn.Module) -> bool:
    """Run the network forward and backward once and leave no trace.

    Random states, buffers and gradients are put back, the users' hooks stay silent. Where no output is differentiable
    (a ``forward`` that returns classes) only the forward pass is run.

    Args:
        run: A forward pass; what it returns may be nested in lists, tuples, mappings and dataclasses.
        model: The network it runs.

    Returns:
        Whether all outputs and gradients are finite.

    Raises:
        CutError: If one of the passes fails.
    """
    with _undisturbed(model):
        try:
            outputs = [out for out in _leaves(run()) if out.is_floating_point() or out.is_complex()]
        except Exception as error:
            raise CutError(f"the forward pass fails with {type(error).__name__}: {error}") from error
        values = [out.detach() for out in outputs]
        differentiable = [out.real.mean() for out in outputs if out.requires_grad and out.numel()]
        if differentiable:
            try:
                # Not `autograd.grad`: re-entrant gradient checkpointing refuses it.
                torch.autograd.backward(differentiable)
            except Exception as error:
                raise CutError(f"the backward pass fails with {type(error).__name__}: {error}") from error
        values += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return all(_is_finite(value) for value in values)


@dataclass(frozen=True)
class _Piece:
    """A tensor that is cut and what is kept of it."""

    name: str
    tensor: Tensor
    kept: Mapping[int, IndexArray]


def _cut(
    change: Change,
    model: nn.Module,
    axes: Axes,
    optimizers: Iterable[Optimizer],
    copies: Iterable[nn.Module],
    drops: Mapping[str, str],
) -> None:
    optimizers, modules = [unwrap(optimizer) for optimizer in optimizers], [model, *copies]
    refuse(optimizers)
    pieces = _pieces(modules, axes)
    touched = {id(piece.tensor) for piece in pieces}
    # A dict: a module in a copy and in the model counts once.
    owners = {
        owner: {name: tensor.shape for name, tensor in tensors(owner).items()}
        for module in modules
        for owner in module.modules()
        if any(id(tensor) in touched for tensor in tensors(owner).values())
    }
    with _writable(), _whole(change):
        # First all that takes memory and time; what follows it are assignments.
        narrow = [(_apply(take, piece, piece.tensor.data), _narrow_grad(piece)) for piece in pieces]
        states: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for optimizer in optimizers:
            for piece in pieces:
                states += _narrow_state(optimizer, piece)
        alive = [change.assign(piece.tensor, *new) for piece, new in zip(pieces, narrow, strict=True)]
        for entries, new_entries in states:
            change.replace_entries(entries, new_entries)
        for owner, old_shapes in owners.items():
            change.edit_attributes(owner, lambda owner=owner, old=old_shapes: refresh(owner, old))  # type: ignore[misc]
        _loosen(change, modules)
        try:
            drop(change, modules, drops, optimizers)
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


def _loosen(change: Change, modules: Iterable[nn.Module]) -> None:
    for part in (part for module in modules for part in module.modules() if isinstance(part, nn.Unflatten)):
        change.edit_attributes(part, lambda part=part: loosen(part))  # type: ignore[misc]


def _pieces(modules: list[nn.Module], axes: Axes) -> list[_Piece]:
    """What has to be cut, tied tensors once."""
    shapes = {name: tensor.shape for name, tensor in named(modules[0]).items() if not is_lazy(tensor)}
    pieces: dict[int, _Piece] = {}
    for module in modules:
        found = named(module)
        for name, kept in axes.items():
            tensor = found.get(canonical(name))
            _require_cuttable(name, tensor, shapes.get(canonical(name)), kept)
            assert tensor is not None
            first = pieces.setdefault(id(tensor), _Piece(name, tensor, kept))
            if first.kept is not kept and not _same(first.kept, kept):
                raise CutError(
                    f"{first.name} and {name} are one tensor (tied), but are to be cut differently: {first.kept} and "
                    f"{kept}. Nothing has changed. Give both the same axes, or leave one out."
                )
    return list(pieces.values())


def _require_cuttable(
    name: str, tensor: Tensor | None, shape: torch.Size | None, kept: Mapping[int, IndexArray]
) -> None:
    problem = ""
    if tensor is None:
        problem = "the network (or one of its copies) has no such parameter or buffer"
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
    return None if piece.tensor.grad is None else _apply(take, piece, piece.tensor.grad)


def _narrow_state(optimizer: Optimizer, piece: _Piece) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The entries that an optimizer keeps for a tensor and what they become: one pair or none."""
    if piece.tensor not in optimizer.state:
        return
    entries = optimizer.state[piece.tensor]
    try:
        yield entries, migrate(entries, tuple(piece.tensor.shape), piece.kept)
    except UnsliceableStateError as error:
        warnings.warn(
            f"{type(optimizer).__name__} starts anew for {piece.name}: its state cannot follow the cut, {error}.",
            stacklevel=4,
        )
        # An empty state is what every optimizer of PyTorch takes as "not begun".
        yield entries, {}


def _assign(tensor: Tensor, data: Tensor, grad: Tensor | None) -> bool:
    # A gradient must have its tensor's shape when it is set, and not longer when the data change.
    tensor.grad = None
    tensor.data = data
    stale = tensor.requires_grad and _shape_in_graph(tensor) != data.shape
    if stale or not tensor.requires_grad:
        # As long as an old graph lives, so does the tensor's node of gradient accumulation, which remembers the old
        # shape and makes the next backward fail. Autograd forgets the node when the type of the data changes. A frozen
        # tensor cannot be asked for its node, but may be unfrozen later.
        tensor.data = data.new_empty(0, dtype=torch.float16 if data.dtype == torch.float32 else torch.float32)
        tensor.data = data
    tensor.grad = grad
    return stale


def _shape_in_graph(tensor: Tensor) -> tuple[int, ...]:
    return tuple(get_gradient_edge(tensor).node._input_metadata[0].shape)


def _refill(entries: dict[str, Any], new: Mapping[str, Any]) -> None:
    entries.clear()
    entries.update(new)


def _restore(attributes: dict[str, Any], old: Mapping[str, Any], names: Set[str]) -> None:
    for name in names:
        if name in old:
            attributes[name] = old[name]
        else:
            attributes.pop(name, None)


@contextmanager
def _writable() -> Iterator[None]:
    """Tensors made here can be trained later, also if we are called from within inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def _whole(change: Change) -> Iterator[None]:
    try:
        yield
    except BaseException:
        change.undo()
        raise


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    accelerators = {tensor.device for tensor in named(model).values() if tensor.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in accelerators), "cuda")
    devices = sorted(device.index or 0 for device in accelerators)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices, device_type=kind),
        silent(model),
        _contents_kept(model),
    ):
        yield


@contextmanager
def silent(model: nn.Module) -> Iterator[None]:
    """Hooks of modules and parameters taken off, but for those by which PyTorch itself computes (weight_norm ...)."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    registers = [getattr(module, kind) for module in model.modules() for kind in kinds]
    registers += [p._backward_hooks for p in model.parameters() if p._backward_hooks is not None]
    registers += [p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks]
    saved = [dict(register) for register in registers]
    try:
        for register in registers:
            for key in [key for key, hook in register.items() if not _is_of_torch(hook)]:
                del register[key]
        yield
    finally:
        for register, hooks in zip(registers, saved, strict=True):
            register.clear()
            register.update(hooks)


@contextmanager
def _contents_kept(model: nn.Module) -> Iterator[None]:
    """Gradients and buffers set aside: what happens to them inside does not remain."""
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    registers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    data = [(buffer, buffer.data) for buffer in model.buffers()]
    try:
        for parameter, _ in grads:
            parameter.grad = None
        for buffer, content in data:
            buffer.data = content.clone()
        yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        for register, buffers in registers:
            register.clear()
            register.update(buffers)
        for buffer, content in data:
            buffer.data = content


def _is_of_torch(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _leaves(value: object) -> Iterator[Tensor]:
    """Every tensor in nested outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name))


def _is_finite(value: Tensor) -> bool:
    values = value.coalesce().values() if value.is_sparse else value
    return bool(values.isfinite().all())


def _same(first: Mapping[int, IndexArray], second: Mapping[int, IndexArray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[dim], second[dim]) for dim in first)
