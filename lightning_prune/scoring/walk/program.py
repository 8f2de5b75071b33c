"""A recorded forward pass that can be run from any station, for any batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from lightning_prune.scoring.contexts import preserved_state
from lightning_prune.scoring.data import Batch, Forward, forward
from lightning_prune.scoring.walk.chains import with_activations
from lightning_prune.scoring.walk.recording import (
    PLACES,
    Constant,
    Input,
    Recording,
    Size,
    Step,
    Value,
    Weight,
    leaves,
    map_places,
    record,
    storage_of,
)
from lightning_prune.scoring.walk.station import Station, scaled
from lightning_prune.structure.layers import named

__all__ = ["Context", "NotReplayable", "Program", "Rows", "Work", "take_rows", "weights_of"]


class NotReplayable(Exception):  # noqa: N818  # handled internally
    """The recorded operators cannot be replayed for other samples."""


class Rows(NamedTuple):
    """Batch dimension of a value.

    Attributes:
        dim: The dimension.
        each: Consecutive positions per sample.
    """

    dim: int
    each: int


class Work(NamedTuple):
    """Steps to run.

    Attributes:
        steps: Positions, in order.
        needs: Values that must be given.
        drops: Values that are not read after a step, by its position.
    """

    steps: tuple[int, ...]
    needs: frozenset[int]
    drops: Mapping[int, tuple[int, ...]]


@dataclass(eq=False)
class Context:
    """Inputs of steps other than values.

    Attributes:
        weights: Parameters and buffers by name.
        inputs: Leaves of the arguments of ``forward``.
        samples: Number of samples.
        masks: Masks by station.
        dims: Dimension of the channels by station.
    """

    weights: Mapping[str, Tensor]
    inputs: Sequence[Any]
    samples: int
    masks: Mapping[Station, Tensor]
    dims: Mapping[Station, int]


@final
class Program:
    """The operators of a forward pass, merged from two recordings with different batch sizes.

    Args:
        model: The network, recorded in eval mode and not changed.
        batch: Samples to record with.
        call: Runs the network on a batch.
        first: The first of two samples to record with.

    Attributes:
        steps: Steps in the order of execution.
        output: The output, with placeholders for tensors.
        at: Position of every station's marker step.
        shapes: Shape of each value for two samples.
        rows: Batch dimension of each value, or None.
        depends: Whether each value depends on the inputs.

    Raises:
        NotReplayable: With the reason.
    """

    def __init__(self, model: nn.Module, batch: Batch, call: Forward = forward, first: int = 0) -> None:
        # One sample is repeated, to detect operators that mix samples.
        pair = [first, first + 1, first + 1]
        two, three = (_recorded(model, batch, rows, call) for rows in (pair[:2], pair))
        if two.problems:
            raise NotReplayable("; ".join(dict.fromkeys(two.problems)))
        self.read = two.read
        self.steps = [_merged(one, other) for one, other in _pairs(two, three)]
        self.output = map_places(_merged_leaf, two.output, three.output)
        self.shapes = [tuple(value.shape) for value in two.values]
        self.at = {step.station: index for index, step in enumerate(self.steps) if step.station is not None}
        self.depends = self._dependent()
        several = len(batch) > 1
        self.rows = [
            _rows_of(one.detach(), other.detach()) if several and depends else None
            for one, other, depends in zip(two.values, three.values, self.depends, strict=True)
        ]
        self.produced = {out: i for i, step in enumerate(self.steps) for out in step.outs if out is not None}
        self._readers: dict[int, list[int]] = {}
        for index, step in enumerate(self.steps):
            for number in step.reads():
                self._readers.setdefault(number, []).append(index)
        for number in self.outputs:
            self._readers.setdefault(number, []).append(len(self.steps))
        self._resolve = [_compiled(step) for step in self.steps]
        self.segment = cache(self._segment)
        self.dependents = cache(self._dependents)

    @property
    def outputs(self) -> list[int]:
        """Numbers of the output values."""
        return [place.number for place in leaves(self.output) if isinstance(place, Value)]

    @property
    def gives_tensors(self) -> bool:
        """Whether all outputs are computed from the inputs."""
        return all(isinstance(place, Value) and self.depends[place.number] for place in leaves(self.output))

    def fits(self, batch: Batch) -> bool:
        """Whether the network runs these steps on a batch: it reads the recorded numbers out of its inputs."""
        if not self.read:
            return True
        context = Context({}, tree_leaves((batch.args, dict(batch.kwargs))), len(batch), {}, {})
        wanted = [place.number for place, _ in self.read if isinstance(place, Value)]
        with torch.no_grad():
            found = self.run(self.work(range(len(self.steps)), wanted), {}, context)
        return all(_resolved(place, found, context).item() == number for place, number in self.read)

    def value_at(self, position: int) -> int:
        """Number of the value at a marker."""
        number = self.steps[position].outs[0]
        assert number is not None
        return number

    def live(self, position: int) -> frozenset[int]:
        """Values that depend on the inputs and are read after a marker, including the value at the marker."""
        found = {
            number
            for number, made in self.produced.items()
            if made <= position and self.depends[number] and self._last_reader(number) > position
        }
        return frozenset(found | {self.value_at(position)})

    def _segment(self, start: int, stop: int) -> Work:
        """The steps after ``start`` (-1 for the inputs) up to ``stop``, for the values that are live there."""
        return self.work(range(start + 1, stop + 1), self.live(stop))

    def _dependents(self, starts: frozenset[int]) -> frozenset[int]:
        """Positions of the steps that depend on markers, including the later markers."""
        first = min(starts)
        changed, found = {self.value_at(first)}, set()
        for index in range(first + 1, len(self.steps)):
            step = self.steps[index]
            if index in starts or not changed.isdisjoint(step.reads()):
                found.add(index)
                changed.update(out for out in step.outs if out is not None)
        return frozenset(found)

    def work(self, among: Iterable[int], wanted: Iterable[int]) -> Work:
        """The steps to run for the wanted values, from ``among`` and from those that do not depend on the inputs."""
        allowed, chosen = set(among), set[int]()
        needs = set[int]()
        pending = list(wanted)
        while pending:
            number = pending.pop()
            position = self.produced[number]
            if position in chosen:
                continue
            if position in allowed or not self.depends[number]:
                chosen.add(position)
                pending += self.steps[position].reads()
            else:
                needs.add(number)
        steps = tuple(sorted(chosen))
        return Work(steps, frozenset(needs), self._drops(steps, set(wanted)))

    def run(
        self,
        work: Work,
        values: Mapping[int, Tensor],
        context: Context,
        *,
        out_of_order: bool = False,
        instead: Mapping[int, Callable[..., Any]] | None = None,
    ) -> dict[int, Tensor]:
        """Run steps.

        Args:
            work: The steps.
            values: The needed values, which are not modified.
            context: Other inputs of the steps.
            out_of_order: Whether skipped steps are run later, so that no value may be modified in place.
            instead: Replacements of operators, by position.

        Returns:
                The remaining values.
        """
        found = dict(values)
        foreign = {storage_of(value) for value in values.values()} | {
            storage_of(leaf) for leaf in context.inputs if isinstance(leaf, Tensor)
        }
        for index in work.steps:
            step = self.steps[index]
            args, kwargs = self._resolve[index](found, context)
            if step.func is None:
                out = self._marked(step, args[0], context)
            else:
                operator = step.func if instead is None else instead.get(index, step.func)
                out = operator(*self._unshared(step, args, None if out_of_order else foreign), **kwargs)
            self._keep(step, out, found)
            for number in work.drops.get(index, ()):
                found.pop(number, None)
        return found

    def output_of(self, values: Mapping[int, Tensor], context: Context) -> Any:
        """Output of the network, from the remaining values."""
        return map_places(lambda leaf: _resolved(leaf, values, context), self.output)

    def macs(self, steps: Iterable[int], samples: int) -> int:
        """Multiply-accumulates of steps, which were counted for two samples."""
        return sum(self.steps[index].macs for index in steps) * samples // 2

    # -- internals
    # -------------------------------------------------------------------------------------------------------

    def _marked(self, step: Step, value: Tensor, context: Context) -> Tensor:
        station = step.station
        assert station is not None
        mask = context.masks.get(station)
        return value if mask is None else scaled(value, mask, context.dims[station])

    def _unshared(self, step: Step, args: tuple[Any, ...], foreign: set[int] | None) -> tuple[Any, ...]:
        """The arguments of a step; one that is modified in place is copied if it is shared."""
        if step.writes is None:
            return args
        place = step.args[step.writes]
        own = isinstance(place, Value) and self.depends[place.number]
        target = args[step.writes]
        if own and foreign is not None and storage_of(target) not in foreign:
            return args
        return (*args[: step.writes], target.clone(), *args[step.writes + 1 :])

    def _keep(self, step: Step, out: Any, found: dict[int, Tensor]) -> None:
        parts = [out] if isinstance(out, Tensor) else tree_flatten(out)[0]
        pairs = zip(step.outs, parts, strict=True)
        found.update((number, part) for number, part in pairs if number is not None)

    def _last_reader(self, number: int) -> int:
        return max(self._readers.get(number, [-1]))

    def _drops(self, steps: Sequence[int], wanted: set[int]) -> dict[int, tuple[int, ...]]:
        last: dict[int, int] = {}
        for index in steps:
            for number in (*self.steps[index].reads(), *(out for out in self.steps[index].outs if out is not None)):
                last[number] = index
        drops: dict[int, list[int]] = {}
        for number, index in last.items():
            if number not in wanted:
                drops.setdefault(index, []).append(number)
        return {index: tuple(numbers) for index, numbers in drops.items()}

    def _dependent(self) -> list[bool]:
        depends: dict[int, bool] = {}
        for step in self.steps:
            places = leaves((step.args, dict(step.kwargs)))
            own = any(isinstance(p, Input) or (isinstance(p, Value) and depends[p.number]) for p in places)
            # Tensors created with the batch size belong to the samples.
            own = own or any(isinstance(p, Size) for p in places)
            depends |= {out: own for out in step.outs if out is not None}
        return [depends[number] for number in range(len(depends))]


def take_rows(value: Tensor, rows: Rows, numbers: Tensor) -> Tensor:
    """Select samples of a value."""
    if rows.each == 1:
        return value.index_select(rows.dim, numbers)
    shape = (*value.shape[: rows.dim], -1, rows.each, *value.shape[rows.dim + 1 :])
    return value.reshape(shape).index_select(rows.dim, numbers).flatten(rows.dim, rows.dim + 1)


def _recorded(model: nn.Module, batch: Batch, rows: Sequence[int], call: Forward) -> Recording:
    part = batch.rows([row % len(batch) for row in rows])
    with preserved_state(model):
        return with_activations(record(model, part, call))


def _pairs(two: Recording, three: Recording) -> Iterable[tuple[Step, Step]]:
    if len(two.steps) != len(three.steps):
        raise NotReplayable("the number of operators depends on the samples")
    return zip(two.steps, three.steps, strict=True)


def _merged(one: Step, other: Step) -> Step:
    """Merge the steps of batches of two and three samples into one for any batch size."""
    if one.func is not other.func or one.outs != other.outs or one.station != other.station:
        raise NotReplayable(f"other operators run for other samples: `{one.func}` and `{other.func}`")
    args, kwargs = map_places(_merged_leaf, (one.args, dict(one.kwargs)), (other.args, dict(other.kwargs)))
    return Step(one.func, args, kwargs, one.outs, one.writes, one.macs, one.station)


def _merged_leaf(one: Any, other: Any) -> Any:
    if isinstance(one, Constant) and isinstance(other, Constant):
        same = one.tensor.shape == other.tensor.shape and torch.equal(one.tensor, other.tensor)
        if not same:
            raise NotReplayable("a tensor that no operator makes depends on the samples")
        return one
    if type(one) is not type(other):
        raise NotReplayable("an argument of an operator depends on the samples")
    if type(one) is int and one != other:
        slope = other - one
        return Size(slope, one - 2 * slope)
    if one != other and not (one != one and other != other):  # NaN
        raise NotReplayable(f"an argument of an operator depends on the samples: {one!r} and {other!r}")
    return one


def _rows_of(two: Tensor, three: Tensor) -> Rows | None:
    """Batch dimension of a value, by shape, and by content for a repeated second sample."""
    differ = [dim for dim, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    if len(differ) != 1:
        return None
    dim = differ[0]
    each = three.shape[dim] - two.shape[dim]
    if each < 1 or two.shape[dim] != 2 * each:
        return None
    expected = take_rows(two, Rows(dim, each), torch.tensor([0, 1, 1], device=two.device))
    if not two.is_floating_point():
        return Rows(dim, each) if torch.equal(three, expected) else None
    scale = float(two[two.isfinite()].abs().max()) if two.isfinite().any() else 0.0
    same = torch.allclose(three, expected, rtol=1e-2, atol=1e-3 * scale, equal_nan=True)
    return Rows(dim, each) if same else None


# -- arguments --------------------------------------------------------------------------------------------------------

Resolve = Callable[[Mapping[int, Tensor], Context], tuple[tuple[Any, ...], dict[str, Any]]]


def _compiled(step: Step) -> Resolve:
    """A function that resolves the arguments of a step."""
    args = [_getter(arg) for arg in step.args]
    kwargs = {name: _getter(arg) for name, arg in step.kwargs.items()}

    def resolve(values: Mapping[int, Tensor], context: Context) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (
            tuple(get(values, context) for get in args),
            {name: get(values, context) for name, get in kwargs.items()},
        )

    return resolve


def _getter(arg: Any) -> Callable[[Mapping[int, Tensor], Context], Any]:
    if isinstance(arg, Value):
        number = arg.number
        return lambda values, _: values[number]
    if isinstance(arg, PLACES):
        return lambda values, context: _resolved(arg, values, context)
    if not any(isinstance(leaf, PLACES) for leaf in leaves(arg)):
        return lambda *_: arg
    return lambda values, context: map_places(lambda leaf: _resolved(leaf, values, context), arg)


def _resolved(leaf: Any, values: Mapping[int, Tensor], context: Context) -> Any:
    if isinstance(leaf, Value):
        return values[leaf.number]
    if isinstance(leaf, Weight):
        return context.weights[leaf.name]
    if isinstance(leaf, Input):
        return context.inputs[leaf.leaf]
    if isinstance(leaf, Constant):
        return leaf.tensor
    return leaf.per_sample * context.samples + leaf.fixed if isinstance(leaf, Size) else leaf


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Current parameters and buffers, by canonical name."""
    return {name: tensor.detach() for name, tensor in named(model).items()}
