"""Registry of the rules for ATen operators.

A rule unites indices that can only be removed together, freezes those for which removing differs from setting to zero,
and labels the outputs. An operator without a rule freezes all its inputs.
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
    """Register a rule for the ATen operators ``names`` and their in-place variants."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def argument(func: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str, default: Any = None) -> Any:
    """An operator's argument by its name in the schema, positional or by keyword."""
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
    """Dimensions with atoms."""
    return [d for d, axis in enumerate(axes) if isinstance(axis, np.ndarray)]


def unknown(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Freeze all inputs of an operator without a rule."""
    for tensor in flat_tensors(args, kwargs):
        t.freeze(t.value(tensor).axes, f"no rule for the operator {t.where(func)}")
    rigid(t, out)


def rigid(t: Tracer, out: Any) -> None:
    """Label outputs as axes of fixed size."""
    for tensor in flat_tensors(out):
        t.label(tensor, (None,) * tensor.dim())
