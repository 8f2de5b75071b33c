"""Argument checks in constructors, so that a wrong type is found immediately and not at the first cut."""

from __future__ import annotations

import collections.abc
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from inspect import get_annotations
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["Settings", "require_names", "require_type"]


class Settings:
    """Base class of settings: dataclasses whose values are checked against the annotations of their fields.

    A subclass with its own checks calls ``super().__post_init__()`` first. Annotations that cannot be evaluated,
    because a name is imported for type checkers only, are not checked.
    """

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            TypeError: If a value does not have the type of its field.
            ValueError: If a value is not one of the field's literals, or is a number that is not finite.
        """
        if not is_dataclass(self):
            return
        for field in fields(self):
            if field.init:
                hint = _evaluated(type(self), field.name, field.type)
                require_type(type(self).__name__, field.name, getattr(self, field.name), hint)


def require_type(owner: str, name: str, value: object, hint: Any) -> None:
    """Refuse an argument that does not match its annotation.

    A bool does not count as a number, and numbers must be finite: ``every_n_batches=True`` and ``strength=nan`` are
    mistakes.

    Args:
        owner: Class or function that has the argument.
        name: The argument.
        value: The given value.
        hint: The annotation: numbers, strings, literals, lists and tuples, mappings, classes, and unions of them.

    Raises:
        TypeError: If the value is of another type.
        ValueError: If it is not one of the literals in ``hint``, or is a number that is not finite.
    """
    if _fits(value, hint):
        return
    # The type is right, but the literal is not in the list, or the number is not finite.
    right = any(_fits(value, type(word)) for word in _words(hint)) or (
        isinstance(value, float) and not math.isfinite(value) and _fits(0.5, hint)
    )
    got = repr(value) if right or value is None else f"{value!r} ({type(value).__name__})"
    raise (ValueError if right else TypeError)(f"{owner}: expected `{name}` to be {_described(hint)}, got {got}.")


def require_names(asker: str, **arguments: object) -> None:
    """Check that arguments are a name of layers, several names, or None.

    Args:
        asker: Name of the callback or function, for the message.
        arguments: The arguments by name.

    Raises:
        TypeError: If one has another type.
    """
    for name, value in arguments.items():
        several = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        if not all(isinstance(one, str) for one in several):
            raise TypeError(
                f"{asker}: expected `{name}` to be a layer's name or glob or a list, got {value!r}. "
                "`inspect(model)` shows the names."
            )


def _evaluated(owner: type, name: str, hint: Any) -> Any:
    """An annotation as a type; `Any` if its names do not exist at run time."""
    if not isinstance(hint, str):
        return hint
    home = next(base for base in owner.__mro__ if name in get_annotations(base))
    try:
        return eval(hint, vars(sys.modules[home.__module__]))
    except (NameError, TypeError):
        return Any


def _parts(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _words(hint: Any) -> list[Any]:
    return [word for part in _parts(hint) if get_origin(part) is Literal for word in get_args(part)]


def _fits(value: object, hint: Any) -> bool:
    return any(_fits_one(value, part) for part in _parts(hint))


def _fits_one(value: object, hint: Any) -> bool:
    if hint in _PLAIN:
        return _PLAIN[hint][1](value)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in args)
    kind = hint if origin is None else origin
    if not isinstance(kind, type):
        return True  # a type variable, or another form that is not checked
    if origin is collections.abc.Callable:
        return callable(value)
    if issubclass(kind, Mapping):
        return isinstance(value, kind) and _each_fits(value, args[:1]) and _each_fits(value.values(), args[1:])
    if issubclass(kind, Sequence):
        return _is_list(value, args)
    return isinstance(value, kind)


def _is_list(value: object, args: tuple[Any, ...]) -> bool:
    """Lists are accepted for tuples, too, because YAML has no tuples."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        return False
    if not args or args[-1] is Ellipsis or len(args) == 1:
        return _each_fits(value, args[:1])
    return len(value) == len(args) and all(_fits(one, hint) for one, hint in zip(value, args, strict=True))


def _each_fits(values: Any, hints: tuple[Any, ...]) -> bool:
    return not hints or all(_fits(value, hints[0]) for value in values)


def _described(hint: Any) -> str:
    parts = _parts(hint)
    return " or ".join(_described_one(part) for part in parts if not (part is int and float in parts))


def _described_one(hint: Any) -> str:
    if hint in _PLAIN:
        return _PLAIN[hint][0]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        *words, last = (f'"{word}"' if isinstance(word, str) else repr(word) for word in args)
        return f"{', '.join(words)} or {last}" if words else last
    kind = hint if origin is None else origin
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return f"a mapping of {_described(args[0])} to {_described(args[1])}" if args else "a mapping"
    if isinstance(kind, type) and issubclass(kind, Sequence):
        inner = [_described(one) for one in args if one is not Ellipsis]
        if issubclass(kind, tuple) and len(inner) == len(args):
            return f"({', '.join(inner)})"
        return f"a list of {inner[0]}" if inner else "a list"
    return f"an instance of {getattr(kind, '__name__', kind)}"


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


#: Simple annotations: their description in messages, and the values that match.
_PLAIN: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    Any: ("anything", lambda _: True),
    None: ("None", lambda value: value is None),
    types.NoneType: ("None", lambda value: value is None),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    float: ("a finite number", _is_finite),
    str: ("a string", lambda value: isinstance(value, str)),
}
