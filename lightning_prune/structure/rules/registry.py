"""The table of rules: how each ATen operator passes on the indices of its inputs.

A rule sees the operator's inputs and outputs and does three things: unite indices that can only be removed together,
freeze those for which removing is not the same as setting to zero, and label the outputs. An operator without a rule
freezes what flows into it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lightning_prune.structure.tracing import AxisLabel, Tracer, flat_tensors

__all__ = ["RULES", "argument", "dimensions", "labelled", "rigid", "rule", "unknown"]

Rule = Callable[[Tracer, Any, tuple[Any, ...], dict[str, Any], Any], None]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the ATen operators ``names``, in-place twins included."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def argument(func: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str, default: Any = None) -> Any:
    """An operator's argument by its name in the schema, wherever it was passed."""
    position, without = _places(func).get(name, (None, None))
    if position is None:
        return default
    if position < len(args):
        return args[position]
    return kwargs.get(name, default if without is None else without)


@functools.cache
def _places(func: Any) -> dict[str, tuple[int, Any]]:
    """Position and default of each of an operator's arguments."""
    return {
        argument.name: (position, argument.default_value if argument.has_default_value() else None)
        for position, argument in enumerate(func._schema.arguments)
    }


def dimensions(dims: Any, ndim: int) -> list[int]:
    """Normalised list of dimensions; None or empty means all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(ndim))
    return [d % ndim if ndim else 0 for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def labelled(axes: Sequence[AxisLabel]) -> list[int]:
    """Dimensions whose indices are followed."""
    return [d for d, axis in enumerate(axes) if isinstance(axis, np.ndarray)]


def unknown(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """No rule: nothing that flows in may change its width."""
    for tensor in flat_tensors(args, kwargs):
        t.freeze(t.value(tensor).axes, f"no rule for the operator {t.where(func)}")
    rigid(t, out)


def rigid(t: Tracer, out: Any) -> None:
    """Outputs of fixed size."""
    for tensor in flat_tensors(out):
        t.label(tensor, (None,) * tensor.dim())
