"""Dispatch mode that follows every index of every axis through the operators of a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
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
from lightning_prune.structure.tracing.real_runs import STATISTICS, DiscreteResults, norm_of_kept

__all__ = ["MEETS_FIXED", "Tracer"]

#: Why an axis is frozen that an operator aligns with one of fixed size.
MEETS_FIXED = "meets an axis of fixed size"
#: Largest number of elements of a constant whose content is compared.
_SMALL = 10_000

#: Operators that may be part of a norm over units.
_NORMS = STATISTICS | {"native_layer_norm", "native_group_norm"}

#: What a slice may take, in place of the part of a split that carries the units.
_EQUAL_PART, _AFTER_BOUND = 0, 1


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that labels every tensor's axes with atoms by the rule of each operator.

    Args:
        atoms: Classes of atoms, shared between all traces of a network.
        rules: Rules by operator name (``"convolution"``).
        fallback: Rule for all other operators.

    Attributes:
        meta: Whether the network runs on the meta device.
        axes: Axes of parameters by their first atom: name, dimension, length.
        script: Operators of a run, with the numbers that enter them and the lengths of axes of fixed size.
        expected: Script of the first trace, which a trial must reproduce.
        units: Number of atoms of parameters and buffers; later atoms are constants.
        choices: The part that carries the units, for splits of an axis, by its length and those of its parts.
        whole_groups: Whether whole groups of a grouped convolution are removed, by the name of its weight.
        splits: Splits of the run, with the parts that could carry the units, and the atoms.
        split_in: The modules in which they run.
        attentions: The modules that take a softmax.
        decisions: The part chosen at each split of a run, and the lengths of the other parts.
        views: Old and new dimensions that correspond in each view of a run; None where they are unchanged.
        first_decisions: Decisions of the first trace, which a trial must reproduce.
        first_views: Views of the first trace.
        of_features: Whether features of attention heads are the units rather than heads.
        bounds_follow: Whether bounds of slices may follow units on both sides, which trials decide.
        bounds: Atoms that bounds of slices froze, by module.
        crossed: Whether the other parts of a split may have become shorter.
        query_widths: Features of each query of a run whose attention computes its scale from their number.
        first_query_widths: Those of the first trace.
        own_scales: Atoms of these features, by module, where they are the units.
        products: Atoms of the features of queries and keys that a module multiplies, where these are the units.
        halves: Axes of which slices took halves, where features are the units.
        trail: Arguments of the latest operators, to locate a failure.
        zeros: Storages (`memory_of`) of the tensors of zeros that were made and not written to.
        own_norms: Names of the modules that are norms over units which the network writes itself.
        removed: Whether each atom is removed, where the masked network of a cut runs; norms leave these out.
        discrete: Results of a masked network on real numbers, which are recorded or given to its cut.
    """

    def __init__(self, atoms: Atoms, rules: Mapping[str, Callable[..., None]], fallback: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.atoms = atoms
        self.rules = rules
        self.fallback = fallback
        self.stack: list[str] = []
        self.axes: dict[int, tuple[str, int, int]] = {}
        self.roles: dict[tuple[str, int], str] = {}
        self.order: dict[str, int] = {}
        self.seen: set[str] = set()
        self.macs: list[MacsRecord] = []
        self.written: list[MacsRecord] = []
        self.counting = False
        self.batch = 1  # batch size of the example, from its shape
        self.samples: int | None = None  # batch size of the first convolution or recurrent layer
        self.time_first = False  # whether the first dimension of the example is that of time steps
        self.constant = True  # whether the current operator does not depend on the network's inputs
        self.meta = False
        self.script: list[tuple[Any, ...]] = []
        self.expected: list[tuple[Any, ...]] | None = None
        self.compares_lengths = True
        self.units = len(atoms)
        self.choices: Mapping[SplitKey, int] = {}
        self.whole_groups: dict[str, bool] = {}
        self.splits: dict[SplitKey, tuple[list[int], list[IndexArray]]] = {}
        self.split_in: dict[SplitKey, set[str]] = {}
        self.attentions: set[str] = set()
        self.decisions: list[Decision] = []
        self.views: list[Blocks | None] = []
        self.first_decisions: list[Decision] | None = None
        self.first_views: list[Blocks | None] = []
        self.of_features = False
        self.bounds_follow = False
        self.bounds: dict[str, list[IndexArray]] = {}
        self.crossed = False
        self.query_widths: list[int] = []
        self.first_query_widths: list[int] | None = None
        self.own_scales: dict[str, list[IndexArray]] = {}
        self.products: list[tuple[str, IndexArray]] = []
        self.halves: list[IndexArray] = []
        self.zeros: set[int] = set()
        self.own_norms: frozenset[str] = frozenset()
        self.removed: npt.NDArray[np.bool_] | None = None
        self.discrete: DiscreteResults | None = None
        self.trail: deque[tuple[Any, Any]] = deque(maxlen=8)
        self.module = ""  # the module of the latest operator
        self._rule_of: dict[Any, Callable[..., None]] = {}
        self._values: dict[int, tuple[torch.Tensor, Value]] = {}
        self._latest: list[tuple[torch.Tensor, Value]] = []
        self._by_storage: dict[tuple[Any, ...], Value] = {}
        self._by_memory: dict[int, set[tuple[int, tuple[Any, ...]]]] = {}
        self._noted: list[Any] = []
        self._wild: set[int] = set()

    # -- labels ---------------------------------------------------------------------------------------------------

    def value(self, tensor: torch.Tensor) -> Value:
        """The label of a tensor; an unknown tensor has axes of fixed size."""
        known = self._values.get(id(tensor))
        if known is not None:
            return known[1]
        self._note_places()
        return self._by_storage.get(storage_key(tensor)) or Value((None,) * tensor.dim())

    def label(self, tensor: torch.Tensor, axes: Sequence[AxisLabel], *, zero: bool = False, source: Any = None) -> None:
        """Set the label of a tensor."""
        known = tensor, Value(tuple(axes), zero, source, self.constant)
        if str in map(type, axes):
            self._wild.add(memory_of(tensor))
        self._values[id(tensor)] = known  # keeps the tensor alive, so that its id is not reused
        self._latest.append(known)

    def settle(self, tensor: torch.Tensor, axes: Sequence[AxisLabel]) -> None:
        """Label those axes of a tensor that had the same content at every index by what they have met, from the right.

        The tensor has one length for all that it meets: zeros that several layers add to their heads tie these.
        """
        value = self.value(tensor)
        met = axes[len(axes) - tensor.dim() :]
        own = tuple(
            new if isinstance(old, str) and isinstance(new, np.ndarray) and n == len(new) > 1 else old
            for old, new, n in zip(value.axes, met, tensor.shape, strict=True)
        )
        if any(old is not new for old, new in zip(value.axes, own, strict=True)):
            self._note_places()
            self._values[id(tensor)] = tensor, value._replace(axes=own)
            self._by_storage[storage_key(tensor)] = value._replace(axes=own)

    def _note_places(self) -> None:
        """Register new labels by storage too, as autograd wraps some results in new objects."""
        for tensor, value in self._latest:
            key = storage_key(tensor)
            self._by_storage[key] = value
            self._by_memory.setdefault(key[0], set()).add((id(tensor), key))
        self._latest.clear()

    def forget(self) -> None:
        """Drop all state of a finished run."""
        self._values.clear()
        self._latest.clear()
        self._by_storage.clear()
        self._by_memory.clear()
        self._wild.clear()
        self.zeros.clear()
        self._noted = []
        self.script, self.decisions, self.views, self.query_widths = [], [], [], []

    def meet(self, a: AxisLabel, b: AxisLabel, where: str) -> AxisLabel:
        """Unite two axes of equal length and return the label of the result."""
        if isinstance(a, str):
            return b
        if isinstance(b, str):
            return a
        if a is b:
            return a
        if a is None or b is None:
            self.freeze([a, b], f"{MEETS_FIXED} in {where}")
            return None
        self.atoms.unite(a, b)
        return a

    def freeze(self, axes: Sequence[AxisLabel], reason: str) -> None:
        """Freeze every labelled axis among ``axes``."""
        for axis in axes:
            if isinstance(axis, np.ndarray):
                self.atoms.freeze(axis, reason)

    def choose(self, label: IndexArray, sizes: Sequence[int], parts: list[int]) -> int | None:
        """Choose the part of a split axis that carries its units; the other parts are removed in step.

        Args:
            label: Atoms of the axis.
            sizes: Lengths of the parts.
            parts: The parts along which the atoms differ; the innermost is the default.

        Returns:
            A part, or None if the atoms differ along none.
        """
        part: int | None
        first = self._first_decision()
        if first is None:
            key = len(label), tuple(sizes)
            if parts:
                self.splits.setdefault(key, (parts, []))[1].append(label)
                self.split_in.setdefault(key, set()).add(self.module)
            chosen, default = self.choices.get(key), parts[-1:]
            if self.of_features and len(parts) > 1 and sizes[parts[-1]] == 2:  # pairs that rotary embeddings turn
                default = parts[-2:-1]
            part = chosen if chosen in parts else default[0] if default else None  # another axis may be split alike
        else:
            part = first[0]
        others = tuple(n for k, n in enumerate(sizes) if k != part)
        if first is not None and others != first[1] and not self.crossed:
            raise MismatchError("the parts of a split do not follow its units")
        self.decisions.append((part, others))
        return part

    def takes_equal_part(self, label: IndexArray, start: int, length: int) -> bool:
        """Whether a slice takes one of equal parts, which lose the same units, rather than what lies after a bound.

        Both are tried where it could, under the key ``(length of the axis, (length of the part,))``.
        """
        is_part = 0 < length < len(label) and start % length == 0 and len(label) % length == 0
        key = len(label), (length,)
        if is_part and self.first_decisions is None:
            self.splits.setdefault(key, ([_EQUAL_PART, _AFTER_BOUND], []))[1].append(label)
            self.split_in.setdefault(key, set()).add(self.module)
        is_half = self.of_features and 2 * length == len(label)  # as rotary embeddings take features
        default = _EQUAL_PART if is_half else _AFTER_BOUND
        chosen = self.decide(self.choices.get(key, default) if is_part else _AFTER_BOUND)
        return chosen == _EQUAL_PART and is_part

    def decide(self, now: int) -> int:
        """What held in the first trace, where lengths may be equal by chance in a trial."""
        first = self._first_decision()
        part = now if first is None else first[0] or 0
        self.decisions.append((part, ()))
        return part

    def _first_decision(self) -> Decision | None:
        """What the first trace decided at this point; None in the first trace itself."""
        if self.first_decisions is None:
            return None
        if len(self.decisions) >= len(self.first_decisions):
            raise MismatchError("an axis is split that was not split before")
        return self.first_decisions[len(self.decisions)]

    def assigned(self, tensor: torch.Tensor, given: torch.Tensor) -> None:
        """Follow ``tensor.data = given``: the axes of both are united."""
        own, value = self.value(tensor), self.value(given)
        axes = value.axes
        if own.source is not None and tensor.shape == given.shape:
            axes = tuple(self.meet(*pair, "an assignment to `data`") for pair in zip(own.axes, axes, strict=True))
        elif own.source is not None:
            self.freeze([*own.axes, *axes], "an assignment to `data` changes its shape")
        self.label(tensor, axes, zero=value.zero, source=own.source or value.source)

    def role(self, value: Value, dim: int, role: str) -> None:
        """Record the role of a parameter's axis, also where a weight is computed from the parameter."""
        place = None
        if value.source is not None:
            place = value.source[0], value.source[1][dim]
        elif value.constant:
            place = self._own_axis(value.axes[dim])
        if place is not None:
            self.roles.setdefault(place, role)
            self.seen.add(place[0])
            self.order.setdefault(place[0], len(self.order))

    def _own_axis(self, axis: AxisLabel) -> tuple[str, int] | None:
        """The axis of a parameter of two dimensions or more whose atoms, in order, are those of a label."""
        if not isinstance(axis, np.ndarray) or not len(axis) or int(axis[0]) not in self.axes:
            return None
        name, dim, length = self.axes[int(axis[0])]
        return (name, dim) if len(axis) == length and (np.diff(axis) == 1).all() else None

    def repeated(self, times: Iterable[int]) -> None:
        """Record that a tensor is repeated this often per axis: once per sample makes it depend on the batch."""
        if self.batch in times:
            self.constant = False

    def where(self, func: Any) -> str:
        """An operator and the module it runs in, for messages."""
        place = f" in `{self.stack[-1]}`" if self.stack and self.stack[-1] else ""
        return f"`{operator_name(func)}`{place}"

    @property
    def is_own_norm(self) -> bool:
        """Whether the current operator runs in a norm over units which the network writes itself."""
        return bool(self.stack) and self.stack[-1] in self.own_norms

    def note(self, *numbers: float | Picked | None) -> None:
        """Add numbers to the script entry of the current operator."""
        self._noted += numbers

    def note_lengths(self, lengths: Sequence[int], axes: Sequence[AxisLabel]) -> None:
        """Add the lengths of axes with the same content at every index to the script entry."""
        self._noted += [n for n, axis in zip(lengths, axes, strict=True) if isinstance(axis, str)]

    def picked(self, axis: IndexArray, part: IndexArray) -> None:
        """Add indices selected by position to the script entry."""
        constant = self.units  # later atoms have other numbers in every run
        self._noted.append(Picked(np.minimum(axis, constant), np.minimum(part, constant)))

    def finish(self) -> None:
        """Check at the end of a trial that all operators of the first trace have run.

        Raises:
            NumberError: If not.
        """
        if self.expected is not None and len(self.script) < len(self.expected):
            raise NumberError("fewer operators run than before: a loop or a branch depends on a width")

    def count(self, factor: float, axes: Sequence[AxisLabel], lengths: Sequence[int]) -> None:
        """Record the MACs of a contraction; axes without a label are part of the factor."""
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
        if self.meta and "device" in kwargs:  # constants are created on the meta device too
            kwargs = {**kwargs, "device": "meta"}
        self.trail.append((args, kwargs))
        self.module = self.stack[-1] if self.stack else ""
        out = self._computed(operator, args, kwargs)
        if operator.asks:
            return out
        self._mark_used(operator, args, kwargs)
        rule = self._rule_of.get(func)
        if rule is None:
            rule = self._rule_of[func] = self._rule(operator)
        if operator.name in ("_softmax", "_safe_softmax") or "scaled_dot_product" in operator.name:
            self.attentions.add(self.module)
        rule(self, func, args, kwargs, out)
        self._compare(operator, args, kwargs, out)
        self._note_memory((args, kwargs), out)
        if operator.writes and isinstance(out, torch.Tensor):
            self._written(out)
        return out

    def _computed(self, operator: Operator, args: Any, kwargs: Any) -> Any:
        """The result of an operator."""
        out = operator.shortcut(*args, **kwargs) if self.meta and operator.shortcut else NotImplemented
        if self.removed is not None and operator.name in _NORMS:
            out = norm_of_kept(operator, args, kwargs, self._kept(args[0], self.removed), is_own=self.is_own_norm)
        if out is NotImplemented:
            out = operator.func(*args, **kwargs)
        if self.discrete is not None:
            out = self.discrete.result(operator, flat_tensors(args, kwargs), out, self._has_units)
        return out

    def _mark_used(self, operator: Operator, args: Any, kwargs: Any) -> None:
        """Mark the parameters and buffers that enter an operator as used, and check whether all inputs are constant.

        Their names are part of the script: a number that depends on a width must not select others.
        """
        self.constant = True
        for tensor in flat_tensors(args, kwargs):
            known = self._values.get(id(tensor))
            value = known[1] if known else self.value(tensor)
            if known is None and self._is_constant(tensor):  # made in Python, from a width perhaps
                self._noted += tensor.flatten().tolist()
            self.constant = self.constant and value.constant
            if value.source is not None:
                self.seen.add(value.source[0])
                if operator.name not in LAYOUT:
                    self._noted.append(value.source[0])

    def _kept(self, tensor: torch.Tensor, removed: npt.NDArray[np.bool_]) -> dict[int, torch.Tensor]:
        """Positions that are kept along the dimensions of which some are not."""
        kept = {}
        for dim, axis in enumerate(self.value(tensor).axes):
            if isinstance(axis, np.ndarray):
                roots = self.atoms.find(axis)
                places = np.flatnonzero((roots >= len(removed)) | ~removed[np.minimum(roots, len(removed) - 1)])
                if len(places) < len(axis):
                    kept[dim] = torch.from_numpy(places).to(tensor.device)
        return kept

    def _has_units(self, tensor: torch.Tensor) -> bool:
        """Whether an axis of a tensor can shrink."""
        axes = self.value(tensor).axes
        return any(isinstance(axis, np.ndarray) and not self.atoms.are_frozen(axis) for axis in axes)

    def _is_constant(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is an unknown constant that is small enough to compare."""
        real = type(tensor) is torch.Tensor and not tensor.is_meta and tensor.layout is torch.strided
        return real and tensor.numel() <= _SMALL and storage_key(tensor) not in self._by_storage

    def _compare(self, operator: Operator, args: Any, kwargs: Any, out: Any) -> None:
        """Append an entry to the script, or compare it with the first trace.

        A number that the network computes from a width (a scale ``width ** -0.5``) is not seen by any rule, but differs
        in a trial. So do the operators if a branch or loop depends on a width, and the length of a supposedly fixed
        axis.
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
        """Lengths of the results' axes, None where they may depend on a width."""
        results = out if type(out) is list else [out[0] if type(out) is tuple and out else out]
        lengths: list[int | None] = []
        for result in results:
            known = self._values.get(id(result))
            if known is not None:
                fixed = [a is None and not self.crossed for a in known[1].axes]
                lengths += [n if same else None for n, same in zip(result.shape, fixed, strict=True)]
        return lengths

    def _note_memory(self, inputs: Any, out: Any) -> None:
        """Record the bytes of the tensors that an operator allocates."""
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
        """Update the labels of all views of a storage after an in-place write.

        They are no longer known to be zero for removed units, and take the written view's labels along axes that had
        the same content at every index.
        """
        own, memory = self.value(out), memory_of(out)
        self.zeros.discard(memory)
        unclear = not own.zero and any(isinstance(axis, np.ndarray) for axis in own.axes)
        if not unclear and memory not in self._wild:
            return
        self._note_places()
        common = dict(zip(zip(out.stride(), out.shape, strict=True), own.axes, strict=True))

        def after(value: Value, shape: Sequence[int], stride: Sequence[int]) -> Value:
            axes = tuple(
                common.get((step, n)) if isinstance(axis, str) and step and n > 1 else axis
                for axis, n, step in zip(value.axes, shape, stride, strict=True)
            )
            return value._replace(axes=axes, zero=value.zero and not unclear)

        for number, key in self._by_memory.get(memory, ()):
            tensor, value = self._values[number]
            if tensor is not out and memory_of(tensor) == memory:
                self._values[number] = (tensor, after(value, tensor.shape, tensor.stride()))
            if len(key) > 1:
                self._by_storage[key] = after(self._by_storage[key], key[2], key[3])
        self._by_storage[storage_key(out)] = own

    def _rule(self, operator: Operator) -> Callable[..., None]:
        """The rule of an operator; an in-place operator shares that of its out-of-place variant."""
        for candidate in (operator.name, operator.name.removesuffix("_")):
            if candidate in self.rules:
                return self.rules[candidate]
        return self.rules["pointwise"] if operator.pointwise else self.fallback
