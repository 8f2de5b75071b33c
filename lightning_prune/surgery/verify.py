"""Verification of a network by a forward and backward pass without side effects."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure.hooks import computing_hooks, hook_stores_restored
from lightning_prune.structure.sharding import is_sharded
from lightning_prune.surgery.change import Change, CutError
from lightning_prune.surgery.tensors import named

__all__ = ["check", "hooks_removed", "verify"]


def check(run: Callable[[], Any], model: nn.Module) -> bool:
    """Run the network forward and backward once, without side effects.

    Random states, buffers and gradients are restored. Only users' hooks that affect the output run, and what they store
    is restored too. Without a differentiable output (a ``forward`` that returns classes), only the forward pass is run.

    Args:
        run: Runs a forward pass; its result may be nested in lists, tuples, mappings and dataclasses.
        model: The network.

    Returns:
        Whether all outputs and gradients are finite.

    Raises:
        CutError: If one of the passes fails.
    """
    with _state_restored(model):
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


def verify(change: Change, run: Callable[[], Any], model: nn.Module, agree: Callable[[bool], bool] = bool) -> None:
    """Verify a changed network; see :func:`check`.

    Non-finite values that existed before the change are accepted.

    Args:
        change: The change.
        run: Runs a forward pass.
        model: The network.
        agree: Whether values are finite in all processes, given whether they are in this one.

    Raises:
        CutError: If a pass fails, or outputs or gradients are no longer finite.
    """
    if not agree(check(run, model)):
        with change.undone():
            if agree(check(run, model)):
                raise CutError("the outputs or gradients are no longer finite, before the cut they were")


@contextmanager
def _state_restored(model: nn.Module) -> Iterator[None]:
    accelerators = {tensor.device for tensor in named(model).values() if tensor.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in accelerators), "cuda")
    devices = sorted(device.index or 0 for device in accelerators)
    hooks = computing_hooks(model)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices, device_type=kind),
        hooks_removed(model, hooks),
        hook_stores_restored(hooks.values(), model),
        _contents_kept(model),
    ):
        yield


@contextmanager
def hooks_removed(model: nn.Module, but: Container[int] = ()) -> Iterator[None]:
    """Remove hooks of modules and parameters within the context, except PyTorch's own (weight_norm).

    Hooks that are registered within the context stay.

    Args:
        model: The network.
        but: Ids of other hooks to keep.
    """
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    registers = [getattr(module, kind) for module in model.modules() for kind in kinds]
    registers += [p._backward_hooks for p in model.parameters() if p._backward_hooks is not None]
    registers += [p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks]
    saved = [dict(register) for register in registers]
    try:
        for register in registers:
            for key in [key for key, hook in register.items() if not (_is_of_torch(hook) or key in but)]:
                del register[key]
        yield
    finally:
        for register, hooks in zip(registers, saved, strict=True):
            new = {key: hook for key, hook in register.items() if key not in hooks}
            register.clear()
            register.update({**hooks, **new})


@contextmanager
def _contents_kept(model: nn.Module) -> Iterator[None]:
    """Restore gradients and buffers on exit."""
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
    """All tensors in a nested output."""
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
    values = value.coalesce().values() if value.is_sparse else value.to_local() if is_sharded(value) else value
    # A sum needs no memory; it may overflow where every number is finite.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
