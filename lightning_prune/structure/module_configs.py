"""Configurations that modules share, where a module has some numbers of its own after a cut."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from types import CodeType
from typing import Any

from torch import nn

__all__ = ["ModuleConfig", "integers_of", "module_configs", "names_read", "own_integers", "with_integer"]

#: Names of the attributes in which modules hold a configuration.
_NAMES = frozenset({"args", "cfg", "config"})


class ModuleConfig:
    """The configuration of one module: another one, which modules share, but for some integers.

    All other attributes, such as the choice of an implementation of attention, are read from the shared configuration
    and written to it, so that later changes of it reach every module.

    Args:
        shared: The configuration.
        own: Integers of this module, by name.
    """

    def __init__(self, shared: Any, own: Mapping[str, int]) -> None:
        vars(self).update(_shared=shared, _own=dict(own))

    @property  # type: ignore[misc]  # which has no setter
    def __class__(self) -> type:
        """That of the shared configuration, for `isinstance`."""
        return type(self._shared)

    def __getattr__(self, name: str) -> Any:
        if name in ("_own", "_shared"):  # while it is made
            raise AttributeError(name)
        return self._own[name] if name in self._own else getattr(self._shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            self._own[name] = value
        else:
            setattr(self._shared, name, value)

    def __reduce__(self) -> tuple[type, tuple[Any, dict[str, int]]]:
        return ModuleConfig, (self._shared, self._own)

    def __repr__(self) -> str:
        return f"{self._shared!r} with {self._own}"


def integers_of(attribute: str, content: object) -> dict[str, int]:
    """The integers in a configuration that a module holds in an attribute of this name; none if it is none."""
    if type(content) is ModuleConfig:
        return {**integers_of(attribute, content._shared), **content._own}
    if attribute not in _NAMES or isinstance(content, (dict, type)) or not hasattr(content, "__dict__"):
        return {}
    return {name: value for name, value in vars(content).items() if type(value) is int}


def names_read(module: nn.Module) -> frozenset[str]:
    """Names that its code may read from a configuration: those of attributes that are not its own."""
    kind: Any = type(module)
    return _names_in(kind) - vars(module).keys()


@cache
def _names_in(kind: Any) -> frozenset[str]:
    """Names of attributes in the code of a module's class, but for its constructor."""
    methods = chain.from_iterable(
        vars(base).items() for base in kind.__mro__ if not base.__module__.startswith("torch.")
    )
    functions = (getattr(part, "fget", part) for name, part in methods if name != "__init__")
    codes = (getattr(inspect.unwrap(function), "__code__", None) for function in functions if callable(function))
    return frozenset(name for code in codes if code is not None for name in _names(code))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names(part)


def with_integer(config: object, name: str, value: int) -> ModuleConfig:
    """The configuration with an integer of the module's own."""
    if type(config) is ModuleConfig:
        return ModuleConfig(config._shared, {**config._own, name: value})
    return ModuleConfig(config, {name: value})


def module_configs(model: nn.Module) -> list[str]:
    """Names of the attributes of modules that have integers of their own."""
    return [
        f"{name}.{attribute}" if name else attribute
        for name, module in model.named_modules()
        for attribute, content in vars(module).items()
        if type(content) is ModuleConfig
    ]


def own_integers(before: object, now: object) -> tuple[object, object]:
    """Of a configuration before cuts and now, the integers of the module's own; anything else as it is."""
    if type(now) is not ModuleConfig:
        return before, now
    return {name: getattr(before, name) for name in now._own}, now._own
