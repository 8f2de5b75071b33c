"""Running a network once on fake tensors while following every index of every axis."""

from __future__ import annotations

import copy
import logging
import math
import random
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import is_not
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.structure.atoms import Atoms, IndexArray, MismatchError, NumberError
from lightning_prune.structure.hooks import REGISTERS, held_by, is_container, put_on, reachable, remembered, taking_part
from lightning_prune.structure.layers import canonical, loosen, refresh, tensors
from lightning_prune.structure.shapes import SHORTCUTS

__all__ = [
    "WILD",
    "AxisLabel",
    "Blocks",
    "Call",
    "Decision",
    "FakeCopy",
    "IndexArray",
    "Kind",
    "MacsRecord",
    "Picked",
    "SplitKey",
    "Tracer",
    "Value",
    "flat_tensors",
    "forked_rng",
    "output_tensors",
]

#: Atoms along one dimension; None: an axis of fixed size; a string WILD: the same content at every index (expanded).
AxisLabel = IndexArray | None | str
WILD = "wild"
Kind = Literal["meta", "fake", "real"]
#: Runs of old and new dimensions with the same number of elements, in order.
Blocks = list[tuple[list[int], list[int]]]
#: Length of an axis and of the parts that a view splits it into.
SplitKey = tuple[int, tuple[int, ...]]
#: The part of a split that keeps the units apart, if any does, and the lengths of the others.
Decision = tuple[int | None, tuple[int, ...]]
#: Types that hold no tensor and are their own copy.
_CONSTANT = frozenset((bool, int, float, str, type(None)))

#: A run under the tracer changes two classes of PyTorch for its time, so that threads run theirs one after the other.
_TRACING = threading.RLock()

# What may stand in an output, and holds tensors that are none of it.
_HOLDS_NO_OUTPUT = (int, float, str, type(None), bytes, type, nn.Module, ModuleType, FunctionType, MethodType)


@dataclass(frozen=True)
class Call:
    """One way in which the network is run: ``getattr(model, method)(*args, **kwargs)`` in train or eval mode."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    method: str = "forward"
    training: bool = False


class Value(NamedTuple):
    """What is known about a tensor.

    Attributes:
        axes: A label per dimension.
        zero: Whether the slices of removed units are exactly zero in the masked network.
        source: For a parameter seen directly or transposed: its name and its own dimension behind each dimension.
        constant: Whether it is computed from parameters and buffers alone, once for all samples.
    """

    axes: tuple[AxisLabel, ...]
    zero: bool = False
    source: tuple[str, tuple[int, ...]] | None = None
    constant: bool = False


@dataclass(frozen=True)
class MacsRecord:
    """MACs of one operator, or bytes of a tensor: ``factor`` × the product of the lengths of the labelled axes.

    Attributes:
        once: Whether that is for all samples of a batch together, since it does not depend on them.
    """

    factor: float
    axes: tuple[IndexArray, ...]
    layer: str
    once: bool


@dataclass(frozen=True, eq=False)
class Picked:
    """Indices of an axis that an operator took by their positions."""

    axis: IndexArray
    part: IndexArray

    def leaves(self, other: Picked) -> bool:
        """Whether the other pick, from what is left of the axis, is what is left of this one."""
        return np.array_equal(self.part[np.isin(self.part, other.axis)], other.part)


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that labels every tensor's axes with atoms by the rule of each operator.

    Args:
        atoms: The classes, shared between several traces of one network.
        rules: Operator name (``"convolution"``) → rule.
        fallback: The rule for all others.

    Attributes:
        meta: Whether the network runs on the meta device.
        script: Operators of a run, with the numbers that enter them and the lengths of the axes of fixed size.
        expected: The script of the first trace, which a trial must follow.
        units: Number of the atoms of parameters and buffers; those born later are constants.
        choices: For splits of an axis, by its length and those of its parts: which part keeps the units apart.
        whole_groups: Of grouped convolutions by the name of the weight: whether whole groups go, as the first trace met
            them.
        splits: The splits that were met, with the parts that could keep them and the units.
        decisions: The part chosen at each split of a run, and the lengths of the others.
        views: The old and new dimensions that belong together in each view of a run, None where they stay.
        decided: The decisions of the first trace, which a trial must follow.
        decided_views: And its views.
        trail: Arguments of the latest operators: where to look when one fails.
    """

    def __init__(self, atoms: Atoms, rules: Mapping[str, Callable[..., None]], fallback: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.atoms = atoms
        self.rules = rules
        self.fallback = fallback
        self.stack: list[str] = []
        self.roles: dict[tuple[str, int], str] = {}
        self.order: dict[str, int] = {}
        self.seen: set[str] = set()
        self.macs: list[MacsRecord] = []
        self.written: list[MacsRecord] = []
        self.counting = False
        self.batch = 1  # samples in the example, as far as its shape tells
        self.samples: int | None = None  # as the first convolution saw them
        self.constant = True  # whether what is being computed does not depend on the network's inputs
        self.meta = False
        self.script: list[tuple[Any, ...]] = []
        self.expected: list[tuple[Any, ...]] | None = None
        self.compares_lengths = True
        self.units = len(atoms)
        self.choices: Mapping[SplitKey, int] = {}
        self.whole_groups: dict[str, bool] = {}
        self.splits: dict[SplitKey, tuple[list[int], list[IndexArray]]] = {}
        self.decisions: list[Decision] = []
        self.views: list[Blocks | None] = []
        self.decided: list[Decision] | None = None
        self.decided_views: list[Blocks | None] = []
        self.trail: deque[tuple[Any, Any]] = deque(maxlen=8)
        self._rule_of: dict[Any, Callable[..., None]] = {}
        self._values: dict[int, tuple[torch.Tensor, Value]] = {}
        self._latest: list[tuple[torch.Tensor, Value]] = []
        self._by_storage: dict[tuple[Any, ...], Value] = {}
        self._by_home: dict[int, set[tuple[int, tuple[Any, ...]]]] = {}
        self._noted: list[Any] = []
        self._wild: set[int] = set()

    # -- labels ---------------------------------------------------------------------------------------------------

    def value(self, tensor: torch.Tensor) -> Value:
        """What is known about a tensor; one that came from nowhere has axes of fixed size."""
        known = self._values.get(id(tensor))
        if known is not None:
            return known[1]
        self._note_places()
        return self._by_storage.get(_storage_key(tensor)) or Value((None,) * tensor.dim())

    def label(self, tensor: torch.Tensor, axes: Sequence[AxisLabel], *, zero: bool = False, source: Any = None) -> None:
        """Write down a tensor's labels."""
        known = tensor, Value(tuple(axes), zero, source, self.constant)
        if str in map(type, axes):
            self._wild.add(_home(tensor))
        self._values[id(tensor)] = known  # the tensor is kept so that its id stays its own
        self._latest.append(known)

    def _note_places(self) -> None:
        """Make what was labelled known by its place in memory too: autograd wraps some results in new objects."""
        for tensor, value in self._latest:
            key = _storage_key(tensor)
            self._by_storage[key] = value
            self._by_home.setdefault(key[0], set()).add((id(tensor), key))
        self._latest.clear()

    def forget(self) -> None:
        """Drop every tensor of a finished run."""
        self._values.clear()
        self._latest.clear()
        self._by_storage.clear()
        self._by_home.clear()
        self._wild.clear()
        self._noted = []
        self.script, self.decisions, self.views = [], [], []

    def meet(self, a: AxisLabel, b: AxisLabel, where: str) -> AxisLabel:
        """Unite two axes of equal length; the label of what comes out."""
        if isinstance(a, str):
            return b
        if isinstance(b, str):
            return a
        if a is b:
            return a
        if a is None or b is None:
            self.freeze([a, b], f"meets an axis of fixed size in {where}")
            return None
        self.atoms.unite(a, b)
        return a

    def freeze(self, axes: Sequence[AxisLabel], reason: str) -> None:
        """Freeze every labelled axis among ``axes``."""
        for axis in axes:
            if isinstance(axis, np.ndarray):
                self.atoms.freeze(axis, reason)

    def choose(self, label: IndexArray, sizes: Sequence[int], parts: list[int]) -> int | None:
        """Which part of a split axis keeps its units apart, so that those of the other parts go in step.

        Args:
            label: Atoms of the axis.
            sizes: Lengths of the parts.
            parts: The parts along which the atoms differ; the innermost is chosen if nothing else is known.

        Returns:
            A part, or None if the atoms differ along none.
        """
        part: int | None
        if self.decided is None:
            key = len(label), tuple(sizes)
            if parts:
                self.splits.setdefault(key, (parts, []))[1].append(label)
            part = self.choices.get(key, parts[-1]) if parts else None
        elif len(self.decisions) < len(self.decided):
            part = self.decided[len(self.decisions)][0]
        else:
            raise MismatchError("an axis is split that was not split before")
        others = tuple(n for k, n in enumerate(sizes) if k != part)
        if self.decided is not None and others != self.decided[len(self.decisions)][1]:
            raise MismatchError("the parts of a split do not follow its units")
        self.decisions.append((part, others))
        return part

    def assigned(self, tensor: torch.Tensor, given: torch.Tensor) -> None:
        """Follow ``tensor.data = given``: what a parameter or buffer holds from now on lies on its own units."""
        own, value = self.value(tensor), self.value(given)
        axes = value.axes
        if own.source is not None and tensor.shape == given.shape:
            axes = tuple(self.meet(*pair, "an assignment to `data`") for pair in zip(own.axes, axes, strict=True))
        elif own.source is not None:
            self.freeze([*own.axes, *axes], "an assignment to `data` changes its shape")
        self.label(tensor, axes, zero=value.zero, source=own.source or value.source)

    def role(self, value: Value, dim: int, role: str) -> None:
        """Note that a parameter's axis produces or consumes."""
        if value.source is not None:
            name, dims = value.source
            self.roles.setdefault((name, dims[dim]), role)
            self.seen.add(name)
            self.order.setdefault(name, len(self.order))

    def repeated(self, times: Iterable[int]) -> None:
        """Something is made or repeated so many times along its axes: if as often as there are samples, for each."""
        if self.batch in times:
            self.constant = False

    def where(self, func: Any) -> str:
        """An operator and its place, for messages."""
        place = f" in `{self.stack[-1]}`" if self.stack and self.stack[-1] else ""
        return f"`{_name(func)}`{place}"

    def note(self, *numbers: float | Picked | None) -> None:
        """Put what else an operator's result depends on into its line of the script."""
        self._noted += numbers

    def note_lengths(self, lengths: Sequence[int], axes: Sequence[AxisLabel]) -> None:
        """Note the lengths of axes with the same content at every index, where they are counted."""
        self._noted += [n for n, axis in zip(lengths, axes, strict=True) if isinstance(axis, str)]

    def picked(self, axis: IndexArray, part: IndexArray) -> None:
        """Note which indices of an axis are taken by their positions."""
        constant = self.units  # atoms born later have other numbers in every run
        self._noted.append(Picked(np.minimum(axis, constant), np.minimum(part, constant)))

    def finish(self) -> None:
        """At the end of a trial: has all been run that was expected?

        Raises:
            NumberError: If not.
        """
        if self.expected is not None and len(self.script) < len(self.expected):
            raise NumberError("fewer operators run than before: a loop or a branch depends on a width")

    def count(self, factor: float, axes: Sequence[AxisLabel], lengths: Sequence[int]) -> None:
        """Record the MACs of a contraction; axes without label enter the factor."""
        if not self.counting:
            return
        for axis, length in zip(axes, lengths, strict=True):
            if not isinstance(axis, np.ndarray):
                factor *= length
        labelled = tuple(axis for axis in axes if isinstance(axis, np.ndarray))
        self.macs.append(MacsRecord(factor, labelled, self.stack[-1] if self.stack else "", self.constant))

    # -- dispatch -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = _OPERATORS.get(func)
        if operator is None:
            operator = _OPERATORS[func] = _Operator(func)
        if self.meta and "device" in kwargs:  # constants join the network where it runs
            kwargs = {**kwargs, "device": "meta"}
        self.trail.append((args, kwargs))
        out = operator.shortcut(*args, **kwargs) if self.meta and operator.shortcut else NotImplemented
        if out is NotImplemented:
            out = func(*args, **kwargs)
        if operator.asks:
            return out
        self._see(args, kwargs)
        rule = self._rule_of.get(func)
        if rule is None:
            rule = self._rule_of[func] = self._rule(operator)
        rule(self, func, args, kwargs, out)
        self._compare(operator, args, kwargs, out)
        self._note_memory((args, kwargs), out)
        if operator.writes and isinstance(out, torch.Tensor):
            self._written(out)
        return out

    def _see(self, args: Any, kwargs: Any) -> None:
        """Note the parameters and buffers that enter an operator, and whether nothing else does."""
        self.constant = True
        for tensor in flat_tensors(args, kwargs):
            known = self._values.get(id(tensor))
            value = known[1] if known else self.value(tensor)
            if known is None and self._is_constant(tensor):  # made in Python, from a width perhaps
                self._noted += tensor.flatten().tolist()
            self.constant = self.constant and value.constant
            if value.source is not None:
                self.seen.add(value.source[0])

    def _is_constant(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor came from nowhere, with a content that is not too long to compare."""
        real = type(tensor) is torch.Tensor and not tensor.is_meta and tensor.layout is torch.strided
        return real and tensor.numel() <= _SMALL and _storage_key(tensor) not in self._by_storage

    def _compare(self, operator: _Operator, args: Any, kwargs: Any, out: Any) -> None:
        """Keep what a run computes with, or compare it with the first trace.

        A number that a network computes from a width (a scale ``width ** -0.5``) reaches no rule, but is another one in
        the trial; so are the operators where a branch or loop depends on a width, and the length of an axis that is
        taken to be of fixed size.
        """
        if operator.name in _LAYOUT:
            return
        lengths = self._fixed_lengths(out) if self.compares_lengths else ()
        line = (*operator.numbers(args, kwargs), *self._noted, *lengths)
        self._noted = []
        if self.expected is not None:
            at = len(self.script)
            if at >= len(self.expected) or self.expected[at][0] != line[0]:
                raise NumberError(f"other operators run, {self.where(operator.func)} for one: a width decides it")
            if not _same_line(self.expected[at], line):
                raise NumberError(f"a number that depends on a width enters {self.where(operator.func)}")
        self.script.append(line)

    def _fixed_lengths(self, out: Any) -> list[int | None]:
        """Lengths of a result's axes, None where they may follow a width; of several results, those of equal parts."""
        results = out if type(out) is list else [out[0] if type(out) is tuple and out else out]
        lengths: list[int | None] = []
        for result in results:
            known = self._values.get(id(result))
            if known is not None:
                lengths += [n if a is None else None for n, a in zip(result.shape, known[1].axes, strict=True)]
        return lengths

    def _note_memory(self, inputs: Any, out: Any) -> None:
        """Write down the bytes of the tensors that an operator makes; a view of an input is no new one."""
        if not self.counting:
            return
        given = {_home(tensor) for tensor in flat_tensors(inputs)}
        for tensor in flat_tensors(out):
            if _home(tensor) not in given:
                fixed, labelled = tensor.element_size(), []
                for axis, length in zip(self.value(tensor).axes, tensor.shape, strict=True):
                    if isinstance(axis, np.ndarray):
                        labelled.append(axis)
                    else:
                        fixed *= length
                self.written.append(
                    MacsRecord(fixed, tuple(labelled), self.stack[-1] if self.stack else "", self.constant)
                )

    def _written(self, out: torch.Tensor) -> None:
        """After a write in place, correct what is known about other views of the same memory.

        They are no longer known to be zero where units left, and where they had the same content at every index they
        have that of the written view along the axes that both have in common.
        """
        own, home = self.value(out), _home(out)
        unclear = not own.zero and any(isinstance(axis, np.ndarray) for axis in own.axes)
        if not unclear and home not in self._wild:
            return
        self._note_places()
        common = dict(zip(zip(out.stride(), out.shape, strict=True), own.axes, strict=True))

        def after(value: Value, shape: Sequence[int], stride: Sequence[int]) -> Value:
            axes = tuple(
                common.get((step, n)) if isinstance(axis, str) and step and n > 1 else axis
                for axis, n, step in zip(value.axes, shape, stride, strict=True)
            )
            return value._replace(axes=axes, zero=value.zero and not unclear)

        for number, key in self._by_home.get(home, ()):
            tensor, value = self._values[number]
            if tensor is not out and _home(tensor) == home:
                self._values[number] = (tensor, after(value, tensor.shape, tensor.stride()))
            if len(key) > 1:
                self._by_storage[key] = after(self._by_storage[key], key[2], key[3])
        self._by_storage[_storage_key(out)] = own

    def _rule(self, operator: _Operator) -> Callable[..., None]:
        """The rule of an operator; of an in-place one that of its twin."""
        for candidate in (operator.name, operator.name.removesuffix("_")):
            if candidate in self.rules:
                return self.rules[candidate]
        return self.rules["pointwise"] if operator.pointwise else self.fallback


class _Operator:
    """What is the same at every call of an operator.

    Attributes:
        name: Its name without namespace and overload.
        shortcut: Makes its result on the meta device, or None.
        asks: It asks for a device or a layout and makes no tensor.
        pointwise: It works element by element.
        writes: It works in place.
        bare: Its line of the script if no number enters it.
        sizes: Arguments whose numbers may follow a width.
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
        """A call's line of the script, which is compared with the trial's."""
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


#: Arguments of operators that are the sizes of what goes in or comes out, and may follow a width: those of all, and
#: those of some. How far a size may follow is compared by the lengths of the result's axes.
_SIZES = frozenset(("size", "split_size", "split_sizes", "normalized_shape", "repeats"))
_SIZES_OF = {
    **dict.fromkeys(("slice", "slice_copy"), frozenset(("start", "end"))),
    **dict.fromkeys(("convolution", "cudnn_convolution", "mkldnn_convolution", "_convolution"), frozenset(("groups",))),
    **dict.fromkeys(("empty_strided", "new_empty_strided", "_reshape_alias"), frozenset(("stride",))),
    **dict.fromkeys(("as_strided", "as_strided_"), frozenset(("stride", "storage_offset"))),
    "native_group_norm": frozenset(("N", "C", "HxW", "group")),
}
#: Operators that depend on how a tensor lies in memory; what they do to lengths shows in what follows.
_LAYOUT = frozenset(("view", "_unsafe_view", "_reshape_alias", "clone", "alias", "detach", "contiguous"))
#: The longest constant whose content is compared.
_SMALL = 10_000
_OPERATORS: dict[Any, _Operator] = {}


def flat_tensors(*trees: Any) -> list[torch.Tensor]:
    """Every tensor in an operator's arguments or results."""
    found: list[torch.Tensor] = []
    _collect(trees, found)
    return found


def _collect(trees: Iterable[Any], found: list[torch.Tensor]) -> None:
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            found.append(tree)
        elif type(tree) in _CONSTANT:
            continue
        elif isinstance(tree, (list, tuple)):
            if tree and type(tree[0]) is not int:
                _collect(tree, found)
        elif isinstance(tree, dict):
            _collect(tree.values(), found)


def _same_line(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether the same numbers entered the same operator; NaN is itself."""
    return first == second or (len(first) == len(second) and all(map(_same_number, first, second)))


def _same_number(a: Any, b: Any) -> bool:
    if a is None or b is None:  # a length that may follow a width
        return True
    if isinstance(a, float) and isinstance(b, float):
        # Numbers computed from data are rounded; those computed from a width differ by far more in a trial.
        return math.isclose(a, b, rel_tol=1e-5) or (a != a and b != b)
    if isinstance(a, Picked) and isinstance(b, Picked):
        return a.leaves(b)
    return bool(a == b)


def _name(func: Any) -> str:
    operator = _OPERATORS.get(func)
    return operator.name if operator else str(func._schema.name).removeprefix("aten::")


def _home(tensor: torch.Tensor) -> int:
    """The memory that a tensor lies in."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _storage_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return (_home(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


class FakeCopy:
    """A copy of a network that runs without memory or arithmetic, and can be cut and restored cheaply.

    Args:
        model: The network; left untouched. Its forward hooks that take part in what it computes run on the copy, and
            store what they store there; the others do not.
        memo: Objects of the network that the copy shall not copy: ``{id(object): replacement}``.
        prepare: Called with the copy, to replace what must not run on fake tensors (metrics, loggers).
        kind: ``"meta"`` is fastest; ``"fake"`` tensors also know their device, and constants mix with them;
            ``"real"`` ones are for steps whose operators depend on data.
        with_hooks: Whether hooks run on the copy.

    Attributes:
        hooks: Those that do.
        notes: Remarks about hooks that were left out.
    """

    def __init__(
        self,
        model: nn.Module,
        memo: Mapping[int, Any] | None = None,
        prepare: Callable[[nn.Module], None] | None = None,
        *,
        kind: Kind = "fake",
        with_hooks: bool = True,
    ) -> None:
        self.kind = kind
        self.mode = FakeTensorMode(allow_non_fake_inputs=True) if kind == "fake" else None
        self.stack: list[str] = []
        self.asked: set[type] | None = None
        self.watched = False
        self.named: dict[str, torch.Tensor] = {}
        hooks, held = taking_part(model) if with_hooks else {}, held_by(model)
        twins = self._twins(model, memo or {}, held)
        self.module = _copied(model, twins)
        self.hooks, self.notes = put_on(hooks, model, twins)
        self._held = [twins[id(thing)] for thing in held if id(thing) in twins]
        if prepare is not None:
            prepare(self.module)
        self._slots: dict[int, list[tuple[nn.Module, str]]] = {}
        self._homes: list[dict[Any, Any]] = []
        for module in self.module.modules():
            self._homes += vars(module), module._buffers, *(getattr(module, register) for register in REGISTERS)
            loosen(module)
            for name, tensor in tensors(module).items():
                self._slots.setdefault(id(tensor), []).append((module, name))

    def _twins(self, model: nn.Module, memo: Mapping[int, Any], held: Iterable[Any]) -> dict[int, Any]:
        """What stands in the copy for the tensors and hooks of the network: ``{id(object): stand-in}``."""
        twins = dict(memo)
        for prefix, module in model.named_modules():
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                twins[id(getattr(module, hooks))] = _structural(getattr(module, hooks))
            for name, tensor in tensors(module).items():
                if id(tensor) not in twins:
                    twin = self._twin(tensor)
                    twins[id(tensor)] = twin
                    self.named[canonical(f"{prefix}.{name}" if prefix else name)] = twin
        for thing in held:
            if isinstance(thing, torch.Tensor):
                twins.setdefault(id(thing), self._own(thing))
        return twins

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.mode is not None:
            return self.mode.from_tensor(tensor, static_shapes=True)
        twin = self._own(tensor)
        return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("meta") if self.kind == "meta" else tensor.detach().clone()

    @contextmanager
    def cut(self, axes: Mapping[str, Mapping[int, IndexArray]]) -> Iterator[None]:
        """Within the context the copy is narrower: ``{tensor: {dim: kept positions}}``."""
        whole = dict(self.named)
        owners = {id(module): module for name in axes for module, _ in self._slots[id(whole[name])]}
        before = [(m, _plain(m), {n: tuple(t.shape) for n, t in tensors(m).items()}) for m in owners.values()]
        try:
            for name, kept in axes.items():
                self.named[name] = self._narrow(whole[name], kept)
                self._put(whole[name], self.named[name])
            for module, _, shapes in before:
                refresh(module, shapes)
            yield
        finally:
            for name in axes:
                self._put(whole[name], whole[name])
            for module, plain, _ in before:
                for name in _plain(module).keys() - plain.keys():
                    delattr(module, name)
                vars(module).update(plain)
            self.named = whole

    def _put(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """Put a tensor into every place that `place` had at first."""
        for module, slot in self._slots[id(place)]:
            home = module._parameters if slot in module._parameters else module._buffers
            home[slot] = tensor  # type: ignore[assignment]  # without the checks of `__setattr__`

    def _narrow(self, tensor: torch.Tensor, kept: Mapping[int, IndexArray]) -> torch.Tensor:
        with ExitStack() as stack:
            if self.mode is not None:
                stack.enter_context(self.mode)
            shape = [len(kept[d]) if d in kept else n for d, n in enumerate(tensor.shape)]
            make = torch.zeros if self.kind == "fake" else torch.empty
            narrow = make(shape, dtype=tensor.dtype, device=tensor.device)
            if self.kind == "real":
                narrow = tensor.detach()
                for dim, positions in kept.items():
                    narrow = narrow.index_select(dim, torch.from_numpy(positions).to(narrow.device))
            return nn.Parameter(narrow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else narrow

    @contextmanager
    def masked(self, axes: Mapping[str, Mapping[int, IndexArray]]) -> Iterator[None]:
        """Within the context the slices that a cut removes are zero."""
        whole = {name: self.named[name].detach().clone() for name in axes}
        try:
            for name, kept in axes.items():
                tensor = self.named[name].detach()
                for dim, positions in kept.items():
                    gone = np.setdiff1d(np.arange(tensor.shape[dim]), positions)
                    tensor.index_fill_(dim, torch.from_numpy(gone).to(tensor.device), 0)
            yield
        finally:
            for name, content in whole.items():
                self.named[name].detach().copy_(content)

    @property
    def mode_matters(self) -> bool:
        """Whether the latest run could have gone otherwise in the other mode, as far as its structure is concerned."""
        return self.asked is None or not self.asked <= _ALIKE_IN_BOTH_MODES

    def run(self, tracer: Tracer, call: Call, labels: Mapping[str, Sequence[AxisLabel]]) -> Any:
        """Run the copy under the tracer.

        Args:
            tracer: Follows the indices.
            call: What to run.
            labels: Label of every axis of every parameter and buffer.
        """
        self._watch()
        self.module.train(call.training)
        tracer.stack = self.stack
        tracer.meta = self.kind == "meta"
        with ExitStack() as stack:
            stack.enter_context(_TRACING)
            stack.enter_context(_fastpath_off())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # what the network has to say it says in the user's own run
            stack.enter_context(_log_held())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(forked_rng())
            if self.kind == "real":
                stack.enter_context(_contents_restored(self.module.buffers()))
            args, kwargs = self._inputs((call.args, dict(call.kwargs)))
            if self.mode is not None:
                stack.enter_context(self.mode)
            tracer.constant = True
            for name, tensor in self.named.items():
                tracer.label(tensor, labels[name], zero=True, source=(name, tuple(range(tensor.dim()))))
            self.asked = stack.enter_context(_who_asks_for_the_mode(self.module, self.stack))
            stack.enter_context(_assignments_followed(tracer))
            left = stack.enter_context(self._state_restored())
            stack.enter_context(remembered(self._stores()))
            stack.enter_context(tracer)
            run = self.module if call.method == "forward" else getattr(self.module, call.method)
            out = run(*args, **kwargs)
            if call.method == "forward" and left():  # a second call may go on from there
                counting, tracer.counting = tracer.counting, False
                stack.callback(setattr, tracer, "counting", counting)
                out = out, run(*args, **kwargs)
            return out

    def _stores(self) -> list[Any]:
        """What a run may store something in besides the attributes of modules."""
        if not self.hooks:
            return [thing for thing in self._held if is_container(thing)]
        own = {id(tensor) for tensor in self.named.values()}
        found = reachable([*self.hooks, *self._held], into_modules=False)
        return [thing for thing in found if not isinstance(thing, nn.Module) and id(thing) not in own]

    @contextmanager
    def _state_restored(self) -> Iterator[Callable[[], bool]]:
        """Put back what a run assigns to the modules; tells whether it has left tensors there."""
        before = [(home, home.copy()) for home in self._homes]

        def changed() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
            return (
                pair for pair in before if len(pair[0]) != len(pair[1]) or any(map(is_not, *map(dict.values, pair)))
            )

        def left() -> bool:
            new = (value for home, old in changed() for name, value in home.items() if value is not old.get(name))
            return any(map(output_tensors, new))

        try:
            yield left
        finally:
            for home, old in changed():
                home.clear()
                home.update(old)

    def _inputs(self, tree: Any) -> Any:
        def twin(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            own = self._own(leaf)  # an inference tensor becomes an ordinary one
            return own if self.mode is None else self.mode.from_tensor(own, static_shapes=True)

        return tree_map(twin, tree)

    def _watch(self) -> None:
        """From now on the name of the module that runs lies on top of the stack."""
        if self.watched:
            return
        self.watched = True
        for name, module in self.module.named_modules():
            vars(module)["forward"] = _named_while_running(module.forward, name, self.stack)


#: Layers that work on the same units in train as in eval mode.
_ALIKE_IN_BOTH_MODES = frozenset(
    [
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    ]
)


@contextmanager
def _who_asks_for_the_mode(root: nn.Module, running: Sequence[str]) -> Iterator[set[type] | None]:
    """Collect the types of the modules that read their attribute `training`; None if that cannot be seen.

    The attribute is hidden, so that Python asks `nn.Module.__getattr__` for it. A module that is asked while another
    one is `running`, or whose `forward` is not that of its type, counts as of unknown type.
    """
    modules = {id(module): (module, name) for name, module in root.named_modules()}
    original = nn.Module.__getattr__
    if not all(map(_hides_nothing, {type(module) for module, _ in modules.values()})):
        yield None
        return
    modes = {number: vars(module).pop("training") for number, (module, _) in modules.items()}
    asked: set[type] = set()

    def answer(self: nn.Module, name: str) -> Any:
        if name == "training" and id(self) in modes:
            own = getattr(vars(self)["forward"].__wrapped__, "__func__", None) is type(self).forward
            asked.add(type(self) if own and running and running[-1] == modules[id(self)][1] else object)
            return modes[id(self)]
        return original(self, name)

    nn.Module.__getattr__ = answer  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        nn.Module.__getattr__ = original  # type: ignore[method-assign]
        for number, (module, _) in modules.items():
            vars(module).setdefault("training", modes[number])


@contextmanager
def _contents_restored(buffers: Iterable[torch.Tensor]) -> Iterator[None]:
    """Put back what a run writes into buffers: a count of batches may enter what the next run computes with."""
    before = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for buffer, content in before:
            buffer.copy_(content)


@contextmanager
def _fastpath_off() -> Iterator[None]:
    """Attention by its parts: the fused kernel of whole encoder layers hides them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _log_held() -> Iterator[None]:
    """Nothing in PyTorch's log of an operator that fails on tensors without content: the error says it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def _assignments_followed(tracer: Tracer) -> Iterator[None]:
    """Tell the tracer of assignments to `data`, which reach no operator; at the end they are taken back.

    Those of other threads are none of its business.
    """
    data: Any = torch._C.TensorBase.data
    thread = threading.get_ident()
    before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def assign(tensor: torch.Tensor, given: torch.Tensor) -> None:
        if threading.get_ident() == thread:
            before.append((tensor, data.__get__(tensor)))
            tracer.assigned(tensor, given)
        data.__set__(tensor, given)

    torch.Tensor.data = property(data.__get__, assign)  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.data
        for tensor, old in reversed(before):
            data.__set__(tensor, old)


def _hides_nothing(kind: type[nn.Module]) -> bool:
    """Whether modules of this type keep their mode in the attribute `training` and look attributes up as all do."""
    return (
        (kind.train, kind.eval, kind.__getattr__) == (nn.Module.train, nn.Module.eval, nn.Module.__getattr__)
        and kind.__getattribute__ is object.__getattribute__
        and not issubclass(kind, torch.jit.ScriptModule)
    )


def _named_while_running(forward: Callable[..., Any], name: str, stack: list[str]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        stack.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            stack.pop()

    run.__wrapped__ = forward  # type: ignore[attr-defined]  # its signature is what `inspect` reports
    return run


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What `copy.deepcopy(model, memo)` makes, without its detours for modules that are plain objects.

    What `torch.compile` put around a module is left out: the copy runs as written.
    """
    twins = []
    for module in model.modules():
        kind = type(module)
        if id(module) not in memo and _is_plain(kind):
            memo[id(module)] = twin = kind.__new__(kind)
            twins.append((module, twin))
    for module in model.modules():
        if isinstance(module, OptimizedModule):
            memo[id(module)] = _twin_of(module._orig_mod, memo)
    for module, twin in twins:
        state = {name: value for name, value in vars(module).items() if name != "_compiled_call_impl"}
        for value in state.values():
            if type(value) in (dict, OrderedDict, set, list) and not value:
                memo.setdefault(id(value), type(value)())
        copied = {k: v if type(v) in _CONSTANT else _twin_of(v, memo) for k, v in state.items()}
        twin.__setstate__(copied)  # type: ignore[no-untyped-call]
    whole: nn.Module = _twin_of(model, memo)
    return whole


def _twin_of(thing: Any, memo: dict[int, Any]) -> Any:
    return memo[id(thing)] if id(thing) in memo else copy.deepcopy(thing, memo)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether a copy of a module of this type is a new object with a copy of its state."""
    hooks = ("__reduce_ex__", "__reduce__", "__deepcopy__", "__new__")
    same = all(getattr(kind, hook, None) is getattr(object, hook, None) for hook in hooks)
    return same and getattr(kind, "__getstate__", None) is getattr(nn.Module, "__getstate__", None)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes in which a layer may have written down its widths."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, tuple))}


def _structural(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """The hooks that PyTorch itself builds a layer with (weight_norm); a user's hooks must not see fake tensors."""
    kept = {k: h for k, h in hooks.items() if type(h).__module__.startswith("torch.nn.utils")}
    return OrderedDict((k, copy.copy(h)) for k, h in kept.items())


@contextmanager
def forked_rng() -> Iterator[None]:
    """Leave every random generator as it was found."""
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


def output_tensors(out: Any) -> list[torch.Tensor]:
    """Every tensor in a nested output: in containers of any kind, and in what objects hold as attributes."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()

    def walk(thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            found.append(thing)
            return
        if id(thing) in seen or isinstance(thing, _HOLDS_NO_OUTPUT):
            return
        seen.add(id(thing))
        leaves = tree_leaves(thing)  # of whatever has been registered with PyTorch
        if not (len(leaves) == 1 and leaves[0] is thing):
            parts = leaves
        elif isinstance(thing, Mapping):
            parts = [*thing.keys(), *thing.values()]
        elif isinstance(thing, (Sequence, Set)):
            parts = list(thing)
        else:
            slots = (name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ()))
            parts = [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name, None) for name in slots)]
        for part in parts:
            walk(part)

    walk(out)
    return found
