"""ATen operators: their names, and which of their numbers are sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from lightning_prune.structure.shapes import SHORTCUTS
from lightning_prune.structure.tracing.labels import Picked

__all__ = [
    "CONSTANT",
    "LAYOUT",
    "OPERATORS",
    "Operator",
    "flat_tensors",
    "memory_of",
    "operator_name",
    "same_line",
    "storage_key",
]

#: Types that hold no tensor and are their own copy.
CONSTANT = frozenset((bool, int, float, str, type(None)))

#: Arguments of operators that are sizes and may depend on a width: of all operators, and of particular ones. The #:
#: lengths of the result's axes are compared instead.
_SIZES = frozenset(("size", "split_size", "split_sizes", "normalized_shape", "repeats"))

_SIZES_OF = {
    **dict.fromkeys(("slice", "slice_copy"), frozenset(("start", "end"))),
    **dict.fromkeys(("convolution", "cudnn_convolution", "mkldnn_convolution", "_convolution"), frozenset(("groups",))),
    **dict.fromkeys(("empty_strided", "new_empty_strided", "_reshape_alias"), frozenset(("stride",))),
    **dict.fromkeys(("as_strided", "as_strided_"), frozenset(("stride", "storage_offset"))),
    "native_group_norm": frozenset(("N", "C", "HxW", "group")),
}

#: Operators that depend on the memory format, and are therefore not compared between runs.
LAYOUT = frozenset(("view", "_unsafe_view", "_reshape_alias", "clone", "alias", "detach", "contiguous"))

OPERATORS: dict[Any, Operator] = {}


class Operator:
    """Cached properties of an ATen operator.

    Attributes:
        name: Its name without namespace and overload.
        shortcut: Fast replacement on the meta device, or None.
        asks: Whether it only queries a device or a layout.
        pointwise: Whether it is elementwise.
        writes: Whether it works in place.
        bare: Its entry in the script if no number enters it.
        sizes: Arguments whose numbers may depend on a width.
        places: Positions of the other arguments.
    """

    __slots__ = ("asks", "bare", "func", "name", "places", "pointwise", "shortcut", "sizes", "writes")

    def __init__(self, func: Any) -> None:
        self.func = func
        self.name = str(func._schema.name).removeprefix("aten::")
        self.shortcut = SHORTCUTS.get(f"{self.name}.{func._overloadname}")
        self.asks = func.namespace == "prim"
        self.pointwise = torch.Tag.pointwise in func.tags
        self.writes = bool(func._schema.is_mutable)
        self.bare = (self.name,)
        self.sizes = _SIZES | _SIZES_OF.get(self.name, frozenset())
        arguments = enumerate(func._schema.arguments)
        self.places = tuple(place for place, argument in arguments if argument.name not in self.sizes)

    def numbers(self, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """The entry of a call in the script: the name and all numbers that are not sizes."""
        numbers: list[Any] = []
        for place in self.places:
            if place < len(args):
                _collect_numbers(args[place], numbers)
        for name, value in kwargs.items():
            if name not in self.sizes:
                _collect_numbers(value, numbers)
        return (*self.bare, *numbers)


def _collect_numbers(value: Any, found: list[Any]) -> None:
    if isinstance(value, (int, float)):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        found += [n for n in value if isinstance(n, (int, float))]


def flat_tensors(*trees: Any) -> list[torch.Tensor]:
    """All tensors in an operator's arguments or results."""
    found: list[torch.Tensor] = []
    _collect(trees, found)
    return found


def _collect(trees: Iterable[Any], found: list[torch.Tensor]) -> None:
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            found.append(tree)
        elif type(tree) in CONSTANT:
            continue
        elif isinstance(tree, (list, tuple)):
            if tree and type(tree[0]) is not int:
                _collect(tree, found)
        elif isinstance(tree, dict):
            _collect(tree.values(), found)


def same_line(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether two script entries have the same operator and numbers; NaN equals NaN."""
    return first == second or (len(first) == len(second) and all(map(_same_number, first, second)))


def _same_number(a: Any, b: Any) -> bool:
    if a is None or b is None:  # a length that may depend on a width
        return True
    if isinstance(a, float) and isinstance(b, float):
        # Numbers computed from data differ by rounding; those computed from a width differ by far more in a trial.
        return math.isclose(a, b, rel_tol=1e-5) or (a != a and b != b)
    if isinstance(a, Picked) and isinstance(b, Picked):
        return a.leaves(b)
    return bool(a == b)


def operator_name(func: Any) -> str:
    """An ATen operator's name, without its namespace."""
    operator = OPERATORS.get(func)
    return operator.name if operator else str(func._schema.name).removeprefix("aten::")


def memory_of(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def storage_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A key that is equal for identical views of the same storage."""
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return (memory_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
