"""Runs on real numbers: what a masked network must compute to have the data-dependent sizes of its cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.structure.tracing.operators import Operator, flat_tensors, memory_of

__all__ = ["STATISTICS", "DiscreteResults", "norm_of_kept"]

#: Operators by which networks write norms over units.
STATISTICS = frozenset(("mean", "std", "std_mean", "var", "var_mean"))

#: Operators that return floating-point numbers which jump where their inputs change a little.
_ROUNDED = frozenset(("round", "floor", "ceil", "trunc", "sign", "remainder", "floor_divide"))


class DiscreteResults:
    """Results that may differ though the inputs are equal up to rounding: comparisons, orders, places, chosen boxes.

    A masked network and its cut compute the same numbers up to rounding, which decides between equal scores. The
    results of the masked network are therefore recorded, and its cut takes them wherever its inputs are equal up to
    rounding.
    """

    def __init__(self) -> None:
        self._recorded: list[tuple[str, list[Tensor], list[Tensor]] | None] = []
        self._next: int | None = None  # the one to give next; None while they are recorded

    def give(self) -> None:
        """Give the recorded results to the next run."""
        self._next = 0

    def result(
        self, operator: Operator, inputs: Sequence[Tensor], out: Any, has_units: Callable[[Tensor], bool]
    ) -> Any:
        """The result of an operator: its own, or the recorded one.

        Args:
            operator: The operator.
            inputs: Its tensors.
            out: Its own result.
            has_units: Whether an axis of a tensor can shrink, so that the cut has other results.
        """
        results = flat_tensors(out)
        if operator.writes or not _is_discrete(operator, inputs, results):
            return out
        if self._next is None:
            is_view = {memory_of(x) for x in inputs} & {memory_of(y) for y in results}
            other = is_view or any(map(has_units, inputs))
            self._recorded.append(None if other else (operator.name, _copies(inputs), _copies(results)))
            return out
        known = self._recorded[self._next] if self._next < len(self._recorded) else None
        self._next += 1
        if known is None or known[0] != operator.name or not _are_equal(inputs, known[1]):
            return out
        return known[2][0] if isinstance(out, Tensor) else type(out)(known[2])


def _is_discrete(operator: Operator, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
    """Whether results jump where inputs change a little."""
    if any(tensor.layout is not torch.strided for tensor in (*inputs, *results)):
        return False
    jumps = operator.name in _ROUNDED or any(not (y.is_floating_point() or y.is_complex()) for y in results)
    return jumps and any(x.is_floating_point() for x in inputs)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _are_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors are equal, floating-point numbers in half of their digits."""
    return len(found) == len(expected) and all(map(_is_equal, found, expected))


def _is_equal(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(found, expected)
    largest = float(expected.abs().nan_to_num(0, 0, 0).max())
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * largest
    return torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)


def norm_of_kept(operator: Operator, args: Any, kwargs: Any, kept: Mapping[int, Tensor], *, is_own: bool) -> Any:
    """A norm over units in a masked network, with the statistics of the units that are kept.

    Args:
        operator: The operator.
        args: Its arguments, of which the first is the input of the norm.
        kwargs: Its keyword arguments.
        kept: Positions that are kept along the input's dimensions of which some are not.
        is_own: Whether statistics are those of a norm which the network writes itself.

    Returns:
        The result, zero for the other units, or `NotImplemented` if none are left out of its statistics.
    """
    x, rank, is_layer_norm = args[0], args[0].dim(), operator.name == "native_layer_norm"
    if is_layer_norm:
        over = [rank - len(args[1]) + d for d in range(len(args[1]))]
    elif operator.name == "native_group_norm":
        over = [1] if args[6] < x.shape[1] else []
    else:
        over = [d % rank for d in args[1]] if is_own else []
    kept = {d: kept[d] for d in over if d in kept}
    if not kept:
        return NotImplemented
    narrow = _taken(x, kept)
    if operator.name in STATISTICS:
        return operator.func(narrow, *args[1:], **kwargs)
    weights = [
        None if weight is None else _taken(weight, {d - over[0]: places for d, places in kept.items()})
        for weight in (args[2:4] if is_layer_norm else args[1:3])
    ]
    if is_layer_norm:
        out = operator.func(narrow, list(narrow.shape[over[0] :]), *weights, *args[4:], **kwargs)
    else:
        out = operator.func(narrow, *weights, args[3], narrow.shape[1], *args[5:], **kwargs)
    whole = out[0]
    for dim, places in kept.items():
        shape = [x.shape[d] if d == dim else n for d, n in enumerate(whole.shape)]
        whole = whole.new_zeros(shape).index_copy(dim, places, whole)
    return whole, *out[1:]


def _taken(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for dim, places in kept.items():
        tensor = tensor.index_select(dim, places)
    return tensor
