"""Users' forward hooks: which of them take part in what a network computes, and how a copy gets its own."""

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

__all__ = ["REGISTERS", "forgotten", "held_by", "is_container", "put_on", "reachable", "remembered", "taking_part"]

#: Attributes of a module that hold its forward hooks.
REGISTERS = ("_forward_pre_hooks", "_forward_hooks")
#: Attributes of every module, which hold nothing that a hook stores.
_OWN = frozenset(vars(nn.Module()))
# Packages whose hooks observe, or build a layer, and whose objects hold no part of a network.
_LIBRARIES = frozenset(
    ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "lightning_prune")
)
_CONTAINERS = (dict, list, set, deque)
#: Types of attributes that most modules have, and that store nothing.
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


def taking_part(model: nn.Module) -> dict[int, Callable[..., Any]]:
    """The forward hooks that what a network computes may depend on, by their number.

    These are hooks that reach what the network reaches (they store an output where its ``forward`` reads it), that
    write to the module they are given, or that may return another input or output. Those that only look on are left
    out: loggers, counters, and the hooks of PyTorch, Lightning and this package.
    """
    hooked = [
        (module, number, hook)
        for module in model.modules()
        for register in REGISTERS
        for number, hook in getattr(module, register).items()
        if not _is_of_library(_function_of(hook) or type(hook))
    ]
    if not hooked:
        return {}
    held = {id(thing) for thing in reachable(_roots(model)) if _is_changeable(thing)}
    return {
        number: hook
        for module, number, hook in hooked
        if any(id(thing) in held for thing in reachable([hook])) or _writes(hook, module) or _returns(hook)
    }


def put_on(
    hooks: Mapping[int, Callable[..., Any]], model: nn.Module, memo: dict[int, Any]
) -> tuple[list[Callable[..., Any]], list[str]]:
    """Register the hooks of a network at its copy, with the copy in the place of the network wherever they reach it.

    Args:
        hooks: Those of its hooks that the copy gets, by their number.
        model: The network.
        memo: What stands in the copy for the objects of the network, as `copy.deepcopy` fills it.

    Returns:
        The hooks of the copy, and a note for each one that could not be copied.
    """
    made: list[Callable[..., Any]] = []
    notes: list[str] = []
    rebound = _Rebound(memo)
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


def held_by(model: nn.Module) -> list[Any]:
    """Containers, objects and tensors in the attributes of a network's modules."""
    values = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if not (type(value) in _PLAIN or name in _OWN or (type(value) is tuple and {*map(type, value)} <= _PLAIN))
    ]
    return [thing for thing in reachable(values, into_modules=False) if not isinstance(thing, nn.Module)]


def is_container(thing: Any) -> bool:
    """Whether it is a list, dict, set or deque."""
    return isinstance(thing, _CONTAINERS)


# -- what can be reached ----------------------------------------------------------------------------------------------


def reachable(things: Iterable[Any], *, into_modules: bool = True) -> Iterator[Any]:
    """Objects that can be reached from others: through functions, containers and objects, not through libraries.

    Args:
        things: Where to begin; they are among what is found.
        into_modules: Go through modules, too.
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
    return *getattr(thing, "__dict__", {}).values(), _called(thing)


def _state(module: nn.Module) -> dict[str, Any]:
    """What a module holds: parameters, buffers and modules, and the attributes that are not every module's."""
    own = {name: value for name, value in vars(module).items() if name not in _OWN}
    return {**module._parameters, **module._buffers, **module._modules, **own}


def _roots(model: nn.Module) -> list[Any]:
    """A network, and the functions of its classes."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if not _is_of_library(kind)}
    return [model, *(value for kind in kinds for value in vars(kind).values() if isinstance(value, FunctionType))]


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """The names outside of a function that its code reads, and what they stand for."""
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
    """Whether something can be stored in it: no function, and no constant."""
    if isinstance(thing, (torch.Tensor, CellType, ContextVar, nn.Module, *_CONTAINERS)):
        return True
    return hasattr(thing, "__dict__") and not isinstance(thing, (FunctionType, MethodType, partial))


def _is_of_library(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).partition(".")[0] in _LIBRARIES


# -- what a hook does, by its code ------------------------------------------------------------------------------------


def _function_of(hook: Any) -> FunctionType | None:
    """The function that runs when a hook is called; None if it is not written in Python."""
    while isinstance(hook, (partial, MethodType)):
        hook = hook.func if isinstance(hook, partial) else hook.__func__
    hook = hook if isinstance(hook, FunctionType) else _called(hook)
    return hook if isinstance(hook, FunctionType) else None


def _called(thing: Any) -> Any:
    """What runs when an object is called."""
    return getattr(type(thing), "__call__", None)  # noqa: B004  # not whether it can be


def _writes(hook: Any, module: nn.Module) -> bool:
    """Whether a hook may write to the module that it is given."""
    function = _function_of(hook)
    if function is None or not _uses_its_module(hook, function.__code__):
        return False
    codes = [code for thing in reachable([hook]) if isinstance(thing, FunctionType) for code in _codes(thing.__code__)]
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
    """Whether a hook may return another input or output."""
    function = _function_of(hook)
    return function is None or _may_return(function, set())


def _may_return(function: FunctionType, asked: set[CodeType]) -> bool:  # noqa: C901  # a case for each way
    """Whether the code of a function may return anything but None.

    Where what a call gives is returned (``lambda *_: seen.append(1)``), it depends on what is called: functions in
    Python are looked into, PyTorch's and methods of the arguments give something, those of other objects do not.
    """
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
                if _gives(function, steps[begin:place], asked):
                    return True
            elif not (last.opname == "LOAD_CONST" and last.argval is None):
                return True
        if step.opname.startswith(("STORE", "POP", "RETURN", "DELETE")):
            begin = place + 1
    return False


def _gives(function: FunctionType, call: list[dis.Instruction], asked: set[CodeType]) -> bool:
    """Whether a call may give anything but None; the first name in it is what is called, or what its method is of."""
    loads = [place for place, step in enumerate(call) if step.opname.startswith("LOAD") and step.argval is not None]
    if not loads or call[loads[0]].opname.startswith("LOAD_FAST"):
        return True
    called = {**vars(builtins), **function.__globals__, **_free(function)}.get(call[loads[0]].argval)
    following = call[loads[0] + 1 : loads[0] + 2]
    if isinstance(called, ModuleType) and following and following[0].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        called = getattr(called, str(following[0].argval), None)
    if isinstance(called, FunctionType) and not _is_of_library(called):
        return called.__code__ not in asked and _may_return(called, asked)
    return isinstance(called, (nn.Module, type)) or _is_of_library(called)


def _free(function: FunctionType) -> dict[str, Any]:
    """What the closure of a function holds, by name."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: value for name, cell in cells for value in _contents(cell)}


# -- a copy's own hooks -----------------------------------------------------------------------------------------------


class _Rebound:
    """Makes of what reaches a network what reaches its copy in the same way; everything else stays what it is."""

    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo

    def __call__(self, thing: Any) -> Any:
        if id(thing) in self.memo:
            return self.memo[id(thing)]
        if not any(id(found) in self.memo for found in reachable([thing])):
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
        around = {n: v for n, v in self._each(_globals_of(function)).items() if v is not function.__globals__[n]}
        known = {**function.__globals__, **around} if around else function.__globals__
        rebound = FunctionType(function.__code__, known, function.__name__, defaults, cells)
        rebound.__kwdefaults__ = self._each(function.__kwdefaults__ or {})
        vars(rebound).update(vars(function))
        return rebound


# -- what is stored ---------------------------------------------------------------------------------------------------


@contextmanager
def forgotten(hooks: Iterable[Callable[..., Any]], model: nn.Module) -> Iterator[None]:
    """Put back what hooks of a network store within the context, in its modules or elsewhere."""
    hooks = list(hooks)
    names = _names_in(hooks) - _OWN
    modules = [vars(module) for module in model.modules()] if hooks else []
    before = [{name: own[name] for name in names & own.keys()} for own in modules]
    things = reachable([*hooks, *(value for own in before for value in own.values())], into_modules=False)
    own_tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    try:
        with remembered([t for t in things if not isinstance(t, nn.Module) and id(t) not in own_tensors]):
            yield
    finally:
        for own, values in zip(modules, before, strict=True):
            for name in names & own.keys() - values.keys():
                del own[name]
            own.update(values)


def _names_in(hooks: Iterable[Callable[..., Any]]) -> set[str]:
    """Names of attributes that hooks read or write, as far as their code tells."""
    functions = (thing for thing in reachable(hooks, into_modules=False) if isinstance(thing, FunctionType))
    found: set[str] = set()
    for code in (code for function in functions for code in _codes(function.__code__)):
        found.update(code.co_names)
        if "setattr" in code.co_names:
            found.update(constant for constant in code.co_consts if isinstance(constant, str))
    return found


@contextmanager
def remembered(things: Iterable[Any]) -> Iterator[None]:
    """Put back what is stored within the context in containers, closures, objects and tensors."""
    ways_back = [_way_back(thing) for thing in things]
    try:
        yield
    finally:
        for way_back in ways_back:
            way_back()


def _way_back(thing: Any) -> Callable[[], None]:
    if isinstance(thing, CellType):
        contents = _contents(thing)
        return lambda: setattr(thing, "cell_contents", contents[0]) if contents else None
    if isinstance(thing, torch.Tensor):
        version, content = thing._version, thing.detach().clone()
        return lambda: None if thing._version == version else _write(thing, content)
    if isinstance(thing, FunctionType):
        steps = (step for code in _codes(thing.__code__) for step in dis.get_instructions(code))
        around = thing.__globals__
        outside = {s.argval: around[s.argval] for s in steps if s.opname == "STORE_GLOBAL" and s.argval in around}
        return lambda: around.update(outside)
    if _is_of_library(type(thing)):
        return lambda: None
    own = thing if isinstance(thing, _CONTAINERS) else getattr(thing, "__dict__", {})
    items = dict(own) if isinstance(own, dict) else list(own)

    def back() -> None:
        if len(own) == len(items) and all(map(is_, _flat(own), _flat(items))):
            return
        own.clear()
        (own.extend if isinstance(own, (list, deque)) else own.update)(items)

    return back


def _flat(own: Any) -> list[Any]:
    return [*own.keys(), *own.values()] if isinstance(own, dict) else list(own)


def _write(tensor: torch.Tensor, content: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(content)
