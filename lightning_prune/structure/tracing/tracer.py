"""Following every index of every axis through the operators of one run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.structure.atoms import Atoms, IndexArray, MismatchError, NumberError
from lightning_prune.structure.tracing.labels import AxisLabel, Blocks, Decision, MacsRecord, Picked, SplitKey, Value
from lightning_prune.structure.tracing.operators import (
    LAYOUT,
    OPERATORS,
    Operator,
    flat_tensors,
    memory_of,
    operator_name,
    same_line,
    storage_key,
)

__all__ = ["Tracer"]

#: The longest constant whose content is compared.
_SMALL = 10_000


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
        return self._by_storage.get(storage_key(tensor)) or Value((None,) * tensor.dim())

    def label(self, tensor: torch.Tensor, axes: Sequence[AxisLabel], *, zero: bool = False, source: Any = None) -> None:
        """Write down a tensor's labels."""
        known = tensor, Value(tuple(axes), zero, source, self.constant)
        if str in map(type, axes):
            self._wild.add(memory_of(tensor))
        self._values[id(tensor)] = known  # the tensor is kept so that its id stays its own
        self._latest.append(known)

    def _note_places(self) -> None:
        """Make what was labelled known by its place in memory too: autograd wraps some results in new objects."""
        for tensor, value in self._latest:
            key = storage_key(tensor)
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
        return f"`{operator_name(func)}`{place}"

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
        operator = OPERATORS.get(func)
        if operator is None:
            operator = OPERATORS[func] = Operator(func)
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
        return real and tensor.numel() <= _SMALL and storage_key(tensor) not in self._by_storage

    def _compare(self, operator: Operator, args: Any, kwargs: Any, out: Any) -> None:
        """Keep what a run computes with, or compare it with the first trace.

        A number that a network computes from a width (a scale ``width ** -0.5``) reaches no rule, but is another one in
        the trial; so are the operators where a branch or loop depends on a width, and the length of an axis that is
        taken to be of fixed size.
        """
        if operator.name in LAYOUT:
            return
        lengths = self._fixed_lengths(out) if self.compares_lengths else ()
        line = (*operator.numbers(args, kwargs), *self._noted, *lengths)
        self._noted = []
        if self.expected is not None:
            at = len(self.script)
            if at >= len(self.expected) or self.expected[at][0] != line[0]:
                raise NumberError(f"other operators run, {self.where(operator.func)} for one: a width decides it")
            if not same_line(self.expected[at], line):
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
        given = {memory_of(tensor) for tensor in flat_tensors(inputs)}
        for tensor in flat_tensors(out):
            if memory_of(tensor) not in given:
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
        own, home = self.value(out), memory_of(out)
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
            if tensor is not out and memory_of(tensor) == home:
                self._values[number] = (tensor, after(value, tensor.shape, tensor.stride()))
            if len(key) > 1:
                self._by_storage[key] = after(self._by_storage[key], key[2], key[3])
        self._by_storage[storage_key(out)] = own

    def _rule(self, operator: Operator) -> Callable[..., None]:
        """The rule of an operator; of an in-place one that of its twin."""
        for candidate in (operator.name, operator.name.removesuffix("_")):
            if candidate in self.rules:
                return self.rules[candidate]
        return self.rules["pointwise"] if operator.pointwise else self.fallback
