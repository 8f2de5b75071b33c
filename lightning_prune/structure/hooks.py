"""Users' forward hooks: which of them affect the output, and how they are copied with the model."""

from __future__ import annotations

import builtins
import copy
import dis
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from functools import partial
from logging import Logger
from operator import is_
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn

__all__ = [
    "REGISTERS",
    "computing_hooks",
    "contents_restored",
    "copy_hooks",
    "hook_stores_restored",
    "is_container",
    "reachable_objects",
    "stored_objects",
]

#: Attributes of a module that hold its forward hooks.
REGISTERS = ("_forward_pre_hooks", "_forward_hooks")
#: Attributes that every `nn.Module` has.
_OWN = frozenset(vars(nn.Module()))
# Hooks of these packages only observe, or build a layer; their objects hold no part of the model.
_LIBRARIES = frozenset(
    ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "lightning_prune")
)
_CONTAINERS = (dict, list, set, deque)
#: Types of attributes that cannot hold tensors.
_PLAIN = frozenset((bool, int, float, str, type(None), type, FunctionType, BuiltinFunctionType))
_ATOMS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type,
    ModuleType,
    BuiltinFunctionType,
    CodeType,
    Enum,
    Logger,
)


def computing_hooks(model: nn.Module) -> dict[int, Callable[..., Any]]:
    """The forward hooks that may change what the model computes, by id."""
    hooked = [
        (module, number, hook)
        for module in model.modules()
        for register in REGISTERS
        for number, hook in getattr(module, register).items()
        if not _is_of_library(_function_of(hook) or type(hook))
    ]
    if not hooked:
        return {}
    held = {id(thing) for thing in reachable_objects(_roots(model)) if _is_changeable(thing)}
    return {
        number: hook
        for module, number, hook in hooked
        if any(id(thing) in held for thing in reachable_objects([hook])) or _writes(hook, module) or _returns(hook)
    }


def copy_hooks(
    hooks: Mapping[int, Callable[..., Any]], model: nn.Module, memo: dict[int, Any]
) -> tuple[list[Callable[..., Any]], list[str]]:
    """Register copies of a model's hooks on its copy, with references to the model replaced by the copy.

    Args:
        hooks: The hooks to copy, by id.
        model: The network.
        memo: The memo of `copy.deepcopy`: the copy of each object, by `id`.

    Returns:
        The hooks of the copy, and a note for each one that could not be copied.
    """
    made: list[Callable[..., Any]] = []
    notes: list[str] = []
    rebound = _Rebinder(memo)
    for name, module in model.named_modules():
        for register in REGISTERS:
            numbers = getattr(module, register)
            if not hooks.keys() & numbers.keys():
                continue
            own: dict[int, Any] = getattr(memo[id(module)], register)
            structural = dict(own)
            own.clear()
            for number in numbers:
                if number in structural:
                    own[number] = structural[number]
                elif number in hooks:
                    try:
                        own[number] = rebound(hooks[number])
                        made.append(own[number])
                    except Exception as error:
                        notes.append(
                            f"a hook of {f'`{name}`' if name else 'the network'} was left out, as it cannot be copied "
                            f"({type(error).__name__}: {error})"
                        )
    return made, notes


def stored_objects(model: nn.Module) -> list[Any]:
    """Containers, objects and tensors stored in attributes of the model's modules."""
    values = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if not (type(value) in _PLAIN or name in _OWN or (type(value) is tuple and {*map(type, value)} <= _PLAIN))
    ]
    return [thing for thing in reachable_objects(values, into_modules=False) if not isinstance(thing, nn.Module)]


def is_container(thing: Any) -> bool:
    """Whether it is a list, dict, set or deque."""
    return isinstance(thing, _CONTAINERS)


# -- reachable objects ----------------------------------------------------------------------------------------------


def reachable_objects(things: Iterable[Any], *, into_modules: bool = True) -> Iterator[Any]:
    """Iterate over all objects reachable through functions, containers and attributes, but not into libraries.

    Args:
        things: Where to start; they are yielded too.
        into_modules: Whether to follow references held by modules.
    """
    seen: set[int] = set()
    waiting = list(things)
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, _ATOMS) or id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        if into_modules or not isinstance(thing, nn.Module):
            waiting += _parts(thing)


def _parts(thing: Any) -> Iterable[Any]:  # noqa: C901  # a case for each kind of object
    if isinstance(thing, FunctionType):
        if _is_of_library(thing):
            return ()
        given = (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        return (*(thing.__closure__ or ()), *given, *_globals_of(thing).values())
    if isinstance(thing, MethodType):
        return thing.__func__, thing.__self__
    if isinstance(thing, partial):
        return thing.func, *thing.args, *thing.keywords.values()
    if isinstance(thing, CellType):
        return _contents(thing)
    if isinstance(thing, ReferenceType):
        return (thing(),)
    if isinstance(thing, dict):
        return thing.values()
    if isinstance(thing, (list, tuple, set, frozenset, deque)):
        return thing
    if isinstance(thing, torch.Tensor) or (_is_of_library(type(thing)) and not isinstance(thing, nn.Module)):
        return ()
    if isinstance(thing, nn.Module):
        return _state(thing).values()
    return *getattr(thing, "__dict__", {}).values(), _call_method(thing)


def _state(module: nn.Module) -> dict[str, Any]:
    """Parameters, buffers, submodules and own attributes of a module."""
    own = {name: value for name, value in vars(module).items() if name not in _OWN}
    return {**module._parameters, **module._buffers, **module._modules, **own}


def _roots(model: nn.Module) -> list[Any]:
    """The model and the methods of its classes."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if not _is_of_library(kind)}
    return [model, *(value for kind in kinds for value in vars(kind).values() if isinstance(value, FunctionType))]


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """Global variables that a function's code reads, by name."""
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _contents(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # nothing is in it yet
        return ()


def _is_changeable(thing: Any) -> bool:
    """Whether an object is mutable."""
    if isinstance(thing, (torch.Tensor, CellType, ContextVar, nn.Module, *_CONTAINERS)):
        return True
    return hasattr(thing, "__dict__") and not isinstance(thing, (FunctionType, MethodType, partial))


def _is_of_library(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] in _LIBRARIES


# -- bytecode of a hook ------------------------------------------------------------------------------------


def _function_of(hook: Any) -> FunctionType | None:
    """The Python function behind a hook; None if it is not written in Python."""
    while isinstance(hook, (partial, MethodType)):
        hook = hook.func if isinstance(hook, partial) else hook.__func__
    hook = hook if isinstance(hook, FunctionType) else _call_method(hook)
    return hook if isinstance(hook, FunctionType) else None


def _call_method(thing: Any) -> Any:
    """The ``__call__`` of the object's type."""
    return getattr(type(thing), "__call__", None)  # noqa: B004  # not whether it can be


def _writes(hook: Any, module: nn.Module) -> bool:
    """Whether a hook may write to the module it is called with."""
    function = _function_of(hook)
    if function is None or not _uses_its_module(hook, function.__code__):
        return False
    codes = [
        code
        for thing in reachable_objects([hook])
        if isinstance(thing, FunctionType)
        for code in _codes(thing.__code__)
    ]
    if any(step.opname in ("STORE_ATTR", "DELETE_ATTR") for code in codes for step in dis.get_instructions(code)):
        return True
    names = {name for code in codes for name in code.co_names}
    held = {name for name, value in _state(module).items() if _is_changeable(value)} - module._parameters.keys()
    return bool(names & ({"setattr", "delattr", "register_buffer", "__dict__"} | held))


def _uses_its_module(hook: Any, code: CodeType) -> bool:
    place = 0
    while isinstance(hook, (partial, MethodType)):
        place += len(hook.args) if isinstance(hook, partial) else 1
        hook = hook.func if isinstance(hook, partial) else hook.__func__
    place += not isinstance(hook, FunctionType)  # `self` of an object that is called
    if place >= code.co_argcount:  # among `*args`
        return True
    name = code.co_varnames[place]
    read = (step.argval for step in dis.get_instructions(code) if step.opname.startswith("LOAD_FAST"))
    return name in code.co_cellvars or any(name == value or (type(value) is tuple and name in value) for value in read)


def _returns(hook: Any) -> bool:
    """Whether a hook may replace the input or output."""
    function = _function_of(hook)
    return function is None or _may_return(function, set())


def _may_return(function: FunctionType, asked: set[CodeType]) -> bool:  # noqa: C901  # a case for each way
    """Whether a function may return anything but None."""
    asked.add(function.__code__)
    steps = [step for step in dis.get_instructions(function.__code__) if step.opname not in ("CACHE", "RESUME", "NOP")]
    begin = 0  # of the present statement
    for place, step in enumerate(steps):
        if step.opname == "RETURN_CONST":
            if step.argval is not None:
                return True
        elif step.opname == "RETURN_VALUE":
            last = steps[place - 1]
            if step.is_jump_target:  # of a conditional expression
                return True
            if last.opname.startswith("CALL"):
                if _call_may_return(function, steps[begin:place], asked):
                    return True
            elif not (last.opname == "LOAD_CONST" and last.argval is None):
                return True
        if step.opname.startswith(("STORE", "POP", "RETURN", "DELETE")):
            begin = place + 1
    return False


def _call_may_return(function: FunctionType, call: list[dis.Instruction], asked: set[CodeType]) -> bool:
    """Whether a call may return anything but None; its first name is the function, or the owner of the method."""
    loads = [place for place, step in enumerate(call) if step.opname.startswith("LOAD") and step.argval is not None]
    if not loads or call[loads[0]].opname.startswith("LOAD_FAST"):
        return True
    called = {**vars(builtins), **function.__globals__, **_closure_of(function)}.get(call[loads[0]].argval)
    following = call[loads[0] + 1 : loads[0] + 2]
    if isinstance(called, ModuleType) and following and following[0].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        called = getattr(called, str(following[0].argval), None)
    if isinstance(called, FunctionType) and not _is_of_library(called):
        return called.__code__ not in asked and _may_return(called, asked)
    return isinstance(called, (nn.Module, type)) or _is_of_library(called)


def _closure_of(function: FunctionType) -> dict[str, Any]:
    """Closure variables of a function, by name."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: value for name, cell in cells for value in _contents(cell)}


# -- hooks of a copy -----------------------------------------------------------------------------------------------


class _Rebinder:
    """Copies objects that refer to the model so that they refer to its copy; all others are returned unchanged."""

    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo

    def __call__(self, thing: Any) -> Any:
        if id(thing) in self.memo:
            return self.memo[id(thing)]
        if not any(id(found) in self.memo for found in reachable_objects([thing])):
            return thing
        if isinstance(thing, FunctionType):
            return self._function(thing)
        if isinstance(thing, MethodType):
            return MethodType(self(thing.__func__), self(thing.__self__))
        if isinstance(thing, partial):
            return partial(self(thing.func), *map(self, thing.args), **self._each(thing.keywords))
        if isinstance(thing, ReferenceType):
            return ref(self(thing()))
        if isinstance(thing, CellType):
            self.memo[id(thing)] = cell = CellType()
            cell.cell_contents = self(thing.cell_contents)
            return cell
        return copy.deepcopy(thing, self.memo)

    def _each(self, things: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self(value) for name, value in things.items()}

    def _function(self, function: FunctionType) -> FunctionType:
        cells, defaults = (
            things and tuple(map(self, things)) for things in (function.__closure__, function.__defaults__)
        )
        outside = {n: v for n, v in self._each(_globals_of(function)).items() if v is not function.__globals__[n]}
        known = {**function.__globals__, **outside} if outside else function.__globals__
        rebound = FunctionType(function.__code__, known, function.__name__, defaults, cells)
        rebound.__kwdefaults__ = self._each(function.__kwdefaults__ or {})
        vars(rebound).update(vars(function))
        return rebound


# -- restoring state ---------------------------------------------------------------------------------------------------


@contextmanager
def hook_stores_restored(hooks: Iterable[Callable[..., Any]], model: nn.Module) -> Iterator[None]:
    """Restore on exit whatever the hooks store within the context, in the model's modules or elsewhere."""
    hooks = list(hooks)
    names = _names_in(hooks) - _OWN
    modules = [vars(module) for module in model.modules()] if hooks else []
    before = [{name: own[name] for name in names & own.keys()} for own in modules]
    things = reachable_objects([*hooks, *(value for own in before for value in own.values())], into_modules=False)
    own_tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    try:
        with contents_restored([t for t in things if not isinstance(t, nn.Module) and id(t) not in own_tensors]):
            yield
    finally:
        for own, values in zip(modules, before, strict=True):
            for name in names & own.keys() - values.keys():
                del own[name]
            own.update(values)


def _names_in(hooks: Iterable[Callable[..., Any]]) -> set[str]:
    """Names of attributes that hooks read or write, according to their bytecode."""
    functions = (thing for thing in reachable_objects(hooks, into_modules=False) if isinstance(thing, FunctionType))
    found: set[str] = set()
    for code in (code for function in functions for code in _codes(function.__code__)):
        found.update(code.co_names)
        if "setattr" in code.co_names:
            found.update(constant for constant in code.co_consts if isinstance(constant, str))
    return found


@contextmanager
def contents_restored(things: Iterable[Any]) -> Iterator[None]:
    """Restore the contents of containers, closures, objects and tensors on exit."""
    restorers = [_restorer_of(thing) for thing in things]
    try:
        yield
    finally:
        for restore in restorers:
            restore()


def _restorer_of(thing: Any) -> Callable[[], None]:
    if isinstance(thing, CellType):
        contents = _contents(thing)
        return lambda: setattr(thing, "cell_contents", contents[0]) if contents else None
    if isinstance(thing, torch.Tensor):
        version, content = thing._version, thing.detach().clone()
        return lambda: None if thing._version == version else _write(thing, content)
    if isinstance(thing, FunctionType):
        steps = (step for code in _codes(thing.__code__) for step in dis.get_instructions(code))
        scope = thing.__globals__
        stored = {s.argval: scope[s.argval] for s in steps if s.opname == "STORE_GLOBAL" and s.argval in scope}
        return lambda: scope.update(stored)
    if _is_of_library(type(thing)):
        return lambda: None
    own = thing if isinstance(thing, _CONTAINERS) else getattr(thing, "__dict__", {})
    items = dict(own) if isinstance(own, dict) else list(own)

    def restore() -> None:
        if len(own) == len(items) and all(map(is_, _flat(own), _flat(items))):
            return
        own.clear()
        (own.extend if isinstance(own, (list, deque)) else own.update)(items)

    return restore


def _flat(own: Any) -> list[Any]:
    return [*own.keys(), *own.values()] if isinstance(own, dict) else list(own)


def _write(tensor: torch.Tensor, content: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(content)
