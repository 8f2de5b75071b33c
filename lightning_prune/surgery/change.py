"""What was done to a live network, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_prune.errors import PruningError

__all__ = ["Change", "CutError", "whole", "writable"]


class CutError(PruningError, RuntimeError):
    """A cut that could not be made or did not pass its check; the network is as it was before."""


@contextmanager
def writable() -> Iterator[None]:
    """Let tensors that are made inside be trained later, also if the caller is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def whole(change: Change) -> Iterator[None]:
    """Undo ``change`` if anything is raised inside, interrupts included."""
    try:
        yield
    except BaseException:
        change.undo()
        raise


class Change:
    """What was done to a network, and the way back.

    As a context manager it is undone at the end of the block. It holds the memory of what was replaced until it is
    dropped. Going back is bit for bit if nothing was trained in between; of what has not been cut, later training
    stays.
    """

    def __init__(self) -> None:
        self._done: list[tuple[_Place, Any]] = []

    def undo(self) -> None:
        """Put everything back; a second call does nothing."""
        self._undo()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put everything back within the context, and do it again after it; it stays undone if anything is raised."""
        again = self._undo()
        yield
        with writable(), whole(self):
            for place, new in reversed(again):
                self._done.append((place, place.read()))
                place.write(new)

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
        place = _Content(tensor)
        self._done.append((place, place.read()))
        return place.write((data, grad))

    def overwrite(self, tensor: Tensor, content: Tensor) -> None:
        """Write other values of the same shape into a tensor's own memory."""
        place = _Values(tensor)
        self._done.append((place, place.read()))
        with writable():
            place.write(content)

    def replace_entries(self, entries: dict[Any, Any], new: Mapping[Any, Any]) -> None:
        """Give a dictionary other entries; the object stays."""
        place = _Entries(entries)
        self._done.append((place, place.read()))
        place.write(new)

    def set_attributes(self, module: nn.Module, values: Mapping[str, Any]) -> None:
        """Set plain attributes of ``module``."""
        self.edit_attributes(module, lambda: vars(module).update(values))

    def edit_attributes(self, module: nn.Module, edit: Callable[[], None]) -> None:
        """Run an ``edit`` that sets plain attributes of ``module``."""
        place = _Attributes(vars(module))
        old = place.read()
        self._done.append((place, old))
        edit()
        # From here on only what the edit has changed goes back, not what others change later (`training`, say).
        now = vars(module)
        place.names = {name for name in now.keys() | old.keys() if now.get(name) is not old.get(name)}

    def also(self, back: Callable[[], object]) -> None:
        """Run ``back`` too when this is undone, once; what it undoes is not done again by :meth:`undone`."""
        self._done.append((_Elsewhere(back), None))

    def _undo(self) -> list[tuple[_Place, Any]]:
        """Put everything back; what it takes to do it again, the last step first."""
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
    """Something that holds a content, which can be read and written."""

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
    """Plain attributes of a module: all of them, or those of some ``names``."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes
        self.names: set[str] | None = None

    def read(self) -> dict[str, Any]:
        return dict(self.attributes)

    def write(self, content: Mapping[str, Any]) -> None:
        for name in self.attributes.keys() | content.keys() if self.names is None else self.names:
            if name in content:
                self.attributes[name] = content[name]
            else:
                self.attributes.pop(name, None)


class _Elsewhere:
    """What somebody else knows how to put back."""

    def __init__(self, back: Callable[[], object]) -> None:
        self.back = back

    def read(self) -> None: ...

    def write(self, _: None) -> None:
        self.back()


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
