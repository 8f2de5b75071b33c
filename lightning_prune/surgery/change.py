"""Reversible changes of a live network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_prune.errors import PruningError
from lightning_prune.structure.sharding import assign_sharded, is_sharded

__all__ = ["Change", "CutError", "undo_on_error", "writable"]


class CutError(PruningError, RuntimeError):
    """Raised when a cut fails; the network is unchanged."""


@contextmanager
def writable() -> Iterator[None]:
    """Disable inference mode and gradients, so that new tensors can be trained later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def undo_on_error(change: Change) -> Iterator[None]:
    """Undo ``change`` if anything is raised within the context, including KeyboardInterrupt."""
    try:
        yield
    except BaseException:
        change.undo()
        raise


class Change:
    """A log of changes to a network that can be undone.

    As a context manager, it is undone on exit. It keeps the replaced tensors in memory. Undoing restores every bit if
    nothing was trained in between; training of tensors that were not changed is kept.
    """

    def __init__(self) -> None:
        self._done: list[tuple[_Place, Any]] = []

    def undo(self) -> None:
        """Undo everything; a second call does nothing."""
        self._undo()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Undo everything within the context and redo it on exit; it stays undone if anything is raised."""
        again = self._undo()
        yield
        with writable(), undo_on_error(self):
            for place, new in reversed(again):
                self._done.append((place, place.read()))
                place.write(new)

    def __enter__(self) -> Change:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    # Each step is logged before it is applied, so that an interrupt in between is undone too.

    def assign(self, tensor: Tensor, data: Tensor, grad: Tensor | None) -> bool:
        """Set the data and gradient of a parameter or buffer, possibly of another shape; the object stays the same.

        Returns:
            Whether an autograd graph with the old shape is still alive.
        """
        place = _Content(tensor)
        self._done.append((place, place.read()))
        return place.write((data, grad))

    def overwrite(self, tensor: Tensor, content: Tensor) -> None:
        """Copy values of the same shape into a tensor."""
        place = _Values(tensor)
        self._done.append((place, place.read()))
        with writable():
            place.write(content)

    def replace_entries(self, entries: dict[Any, Any], new: Mapping[Any, Any]) -> None:
        """Replace the entries of a dictionary; the object stays the same."""
        place = _Entries(entries)
        self._done.append((place, place.read()))
        place.write(new)

    def set_attributes(self, module: nn.Module, values: Mapping[str, Any]) -> None:
        """Set plain attributes of ``module``."""
        self.edit_attributes(module, lambda: vars(module).update(values))

    def edit_attributes(self, module: nn.Module, edit: Callable[[], None]) -> None:
        """Run an ``edit`` that sets plain attributes of ``module``."""
        place = _Attributes(module)
        old = place.read()
        self._done.append((place, old))
        edit()
        # Only what the edit has changed is undone, not later changes by others (such as `training`).
        now = place.read()
        place.names = {name for name in now.keys() | old.keys() if now.get(name) is not old.get(name)}

    def drop_cached(self, module: nn.Module) -> None:
        """Drop what ``module`` keeps of its parameters in eval mode, now and when this is undone or redone."""
        place = _Cached(module)
        self._done.append((place, None))
        place.write(None)

    def also(self, back: Callable[[], object]) -> None:
        """Call ``back`` once when this is undone; :meth:`undone` does not redo it."""
        self._done.append((_Callback(back), None))

    def _undo(self) -> list[tuple[_Place, Any]]:
        """Undo everything and return what is needed to redo it, the last step first."""
        again: list[tuple[_Place, Any]] = []
        with writable():
            while self._done:
                place, old = self._done[-1]
                new = place.read()
                place.write(old)
                self._done.pop()
                again.append((place, new))
        return again


class _Place(Protocol):
    """A piece of state that can be read and written."""

    def read(self) -> Any: ...

    def write(self, content: Any) -> Any: ...


class _Content:
    """Data and gradient of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def read(self) -> tuple[Tensor, Tensor | None]:
        return self.tensor.data, self.tensor.grad

    def write(self, content: tuple[Tensor, Tensor | None]) -> bool:
        return _assign(self.tensor, *content)


class _Values:
    """The values in a tensor's memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def read(self) -> Tensor:
        return self.tensor.detach().clone()

    def write(self, content: Tensor) -> None:
        self.tensor.copy_(content)


class _Entries:
    """The entries of a dictionary."""

    def __init__(self, entries: dict[Any, Any]) -> None:
        self.entries = entries

    def read(self) -> dict[Any, Any]:
        return dict(self.entries)

    def write(self, content: Mapping[Any, Any]) -> None:
        new = dict(content)
        self.entries.clear()
        self.entries.update(new)


class _Attributes:
    """Plain attributes of a module and its class: all of them, or those of some ``names``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names: set[str] | None = None

    def read(self) -> dict[str, Any]:
        return {**vars(self.module), "__class__": type(self.module)}

    def write(self, content: Mapping[str, Any]) -> None:
        attributes = vars(self.module)
        for name in attributes.keys() | content.keys() if self.names is None else self.names:
            if name == "__class__":
                self.module.__class__ = content[name]
            elif name in content:
                attributes[name] = content[name]
            else:
                attributes.pop(name, None)


class _Cached:
    """What a module computes from its parameters once and keeps in eval mode; its own `train` drops it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def read(self) -> None: ...

    def write(self, _: None) -> None:
        modes = [(part, part.training) for part in self.module.modules()]
        self.module.train()
        self.module.train(modes[0][1])
        for part, training in modes:
            part.training = training


class _Callback:
    """A function to call on undo."""

    def __init__(self, back: Callable[[], object]) -> None:
        self.back = back

    def read(self) -> None: ...

    def write(self, _: None) -> None:
        self.back()


def _assign(tensor: Tensor, data: Tensor, grad: Tensor | None) -> bool:
    if is_sharded(tensor):
        assign_sharded(tensor, data, grad)
        return False
    # The gradient must have the tensor's shape, so it is set after the data.
    tensor.grad = None
    tensor.data = data
    stale = tensor.requires_grad and _shape_in_graph(tensor) != data.shape
    if stale or not tensor.requires_grad:
        # While an old graph is alive, so is the tensor's AccumulateGrad node, which has the old shape and makes the
        # next # backward pass fail. Autograd discards the node when the dtype of the data changes. The node of a frozen
        # tensor # cannot be inspected, but the tensor may be unfrozen later.
        tensor.data = data.new_empty(0, dtype=torch.float16 if data.dtype == torch.float32 else torch.float32)
        tensor.data = data
    tensor.grad = grad
    return stale


def _shape_in_graph(tensor: Tensor) -> tuple[int, ...]:
    return tuple(get_gradient_edge(tensor).node._input_metadata[0].shape)
