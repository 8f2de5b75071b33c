"""Engine that replays the recorded operators of a network between stations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.scoring.data import Batch, Forward, forward
from lightning_prune.scoring.spool import Spool, Stored
from lightning_prune.scoring.walk.delta import Delta, Partial, Shares
from lightning_prune.scoring.walk.hook_engine import Place
from lightning_prune.scoring.walk.output_cache import OutputCache
from lightning_prune.scoring.walk.program import Context, NotReplayable, Program, Work, take_rows, weights_of
from lightning_prune.scoring.walk.recording import Input, leaves
from lightning_prune.scoring.walk.station import Station, scaled
from lightning_prune.scoring.walk.variants import Variants, product, stacked

__all__ = ["ReplayEngine"]

Masks = Mapping[Station, Tensor]


@dataclass(eq=False)
class _Here:
    """Cached values of a batch at a station.

    Attributes:
        number: Index of the batch.
        samples: Batch size.
        inputs: Leaves of the arguments of ``forward``.
        sides: Values that do not depend on the station, by the other masked stations.
        dense: Values with the station unmasked, for differences.
        masks: Id of the masks for which the values are valid.
    """

    number: int
    samples: int
    inputs: list[Any]
    sides: dict[frozenset[int], dict[int, Tensor]] = field(default_factory=dict)
    dense: dict[int, Tensor] = field(default_factory=dict)
    masks: int | None = None


@final
class ReplayEngine:
    """Runs a `Program` segment by segment.

    Args:
        model: The network.
        program: Recorded operators of the network.
        places: Stations of the network.
        limit: Bytes of live tensors to keep in memory.
        most_rows: Maximum number of rows (samples × variants) per run; one variant is always run as a whole.

    Attributes:
        macs: Multiply-accumulates so far.
        spool: Store of the live tensors.
    """

    def __init__(
        self, model: nn.Module, program: Program, places: Mapping[Station, Place], limit: int, most_rows: int
    ) -> None:
        self.model, self.program = model, program
        self.dims = {station: place.dim for station, place in places.items()}
        self.limit, self.most_rows = limit, most_rows
        self.macs = 0
        self.spool = Spool(limit)
        self._kept = OutputCache(program, self.spool)
        self._live: dict[int, dict[int, Stored]] = {}
        self._at: dict[int, Station] = {}
        self._here: _Here | None = None
        self._works: dict[tuple[int, frozenset[int]], Work] = {}
        self._deltas: dict[tuple[int, frozenset[int]], Delta] = {}

    def check(self, batch: Batch, call: Forward = forward) -> None:
        """Check that the program returns the same output as the network.

        Raises:
            NotReplayable: If not.
        """
        wanted = call(self.model, batch)
        context = self._context(batch, {})
        work = self.program.work(range(len(self.program.steps)), self.program.outputs)
        found = self.program.output_of(self.program.run(work, {}, context), context)
        for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
            if not _same(one, other):
                raise NotReplayable("its operators, run one by one, give another output")

    def start(self) -> None:
        """Start a walk at the inputs."""
        for live in self._live.values():
            for stored in live.values():
                stored.free()
        self._live, self._at, self._here = {}, {}, None

    def run_all(self, number: int, batch: Batch, stations: Sequence[Station]) -> tuple[Any, dict[Station, Tensor]]:
        """Output of the network and values at stations; outputs of layers are cached."""
        program = self.program
        seen = {station: program.value_at(program.at[station]) for station in stations}
        work = program.work(range(len(program.steps)), [*program.outputs, *seen.values()])
        context = self._context(batch, {})
        self._kept.forget(number)
        found = program.run(work, {}, context, instead=self._kept.recorders(number))
        self.macs += program.macs(work.steps, len(batch))
        return program.output_of(found, context), {station: found[number] for station, number in seen.items()}

    def move(self, number: int, batch: Batch, station: Station, masks: Masks) -> None:
        """Move a batch to a station and free values that are no longer read."""
        program, live, before = self.program, self._live.get(number, {}), self._at.get(number)
        stop = program.at[station]
        start = -1 if before is None else program.at[before]
        work = program.segment(start, stop)
        values = {name: stored.get() for name, stored in live.items()}
        if before is not None and before in masks:
            own = program.value_at(start)
            values[own] = scaled(values[own], masks[before], self.dims[before])
            live.pop(own).free()
        context = self._context(batch, {name: mask for name, mask in masks.items() if name != station})
        values = self._run_batch(work, values, context, number)
        self._kept.forget(number, up_to=stop)
        wanted = program.live(stop)
        for name in live.keys() - wanted:
            live.pop(name).free()
        # Sorted, so that the same tensors are spooled in every run.
        for name in sorted(wanted - live.keys()):
            live[name] = self.spool.put(values[name])
        self._live[number], self._at[number], self._here = live, station, None

    def value(self, number: int, batch: Batch, station: Station, masks: Masks) -> Tensor:  # noqa: ARG002
        """Value at the station, before its own mask."""
        return self._live[number][self.program.value_at(self.program.at[station])].get().clone()

    def other(self, number: int, value: int) -> Tensor | None:
        """Another live value of a batch."""
        return self._live[number][value].get()

    def rest(self, number: int, batch: Batch, station: Station, value: Tensor, masks: Masks, also: Masks) -> Any:
        """Output of the network with another value at the station."""
        here, start = self._at_batch(number, batch), self.program.at[station]
        values = {**self._other_values(here, start, masks, also), self.program.value_at(start): value}
        context = self._context(batch, product(masks, also))
        work = self._work(start, self._marks(also))
        self.macs += self.program.macs(work.steps, here.samples)
        return self.program.output_of(self.program.run(work, values, context), context)

    def variants(self, asked: Variants) -> Any:
        """Outputs of the network with masked channels, many variants as one batch."""
        start, marks = self.program.at[asked.station], self._marks(asked.also)
        if not self._is_separable(start, marks):
            rest = partial(self.rest, asked.number, asked.batch, asked.station, masks=asked.masks)
            return stacked(asked, lambda value, also: rest(value, also=also))
        here = self._at_batch(asked.number, asked.batch)
        per_chunk = max(1, self.most_rows // here.samples)
        firsts = range(0, len(asked.several), per_chunk)
        chunks = [self._chunk(here, asked, slice(first, first + per_chunk)) for first in firsts]
        ran = [chunk for chunk in chunks if chunk is not None]
        return _assembled(tree_map(lambda *parts: torch.cat(parts), *ran) if ran else None, asked)

    # -- internals
    # -------------------------------------------------------------------------------------------------------

    def _run_batch(
        self, work: Work, values: Mapping[int, Tensor], context: Context, number: int, *, out_of_order: bool = False
    ) -> dict[int, Tensor]:
        """Run work on a whole batch, using cached outputs of a first pass if nothing is masked."""
        known = {} if context.masks else self._kept.known(number, work.steps)
        found = self.program.run(work, values, context, out_of_order=out_of_order, instead=known)
        self.macs += self.program.macs((index for index in work.steps if index not in known), context.samples)
        return found

    def _chunk(self, here: _Here, asked: Variants, part: slice) -> Any:
        """Outputs of the samples that must be run, by variant; None if there are none."""
        alive, several = asked.alive[part].to(asked.value.device), asked.several[part].to(asked.value.device)
        variant, sample = alive.nonzero(as_tuple=True)
        if not len(sample):
            return None
        program, start, marks = self.program, self.program.at[asked.station], self._marks(asked.also)
        own, work = program.value_at(start), self._work(start, marks)
        others = self._other_values(here, start, asked.masks, asked.also)
        values = {number: self._taken(number, others[number], sample) for number in work.needs - {own}}
        values[own] = scaled(asked.value.index_select(0, sample), several[variant], asked.dim)
        rows = {station: mask[part].to(several.device)[variant] for station, mask in asked.also.items()}
        inputs = [_rows(leaf, sample, here.samples) for leaf in here.inputs] if self._reads_inputs(work) else []
        context = Context(weights_of(self.model), inputs, len(sample), product(asked.masks, rows), self.dims)
        instead: dict[int, Partial] = {}
        if asked.delta and asked.dim == 1:
            channels = [(mask == 0).nonzero()[:, 0] for mask in several]
            shares = Shares(alive.sum(1).tolist(), channels, sample)
            delta = self._delta(start, marks)
            instead = delta.instead(self._dense(here, asked, delta), shares)
        found = program.run(work, values, context, instead=instead)
        self.macs += program.macs(work.steps, len(sample)) - sum(layer.macs_saved for layer in instead.values())
        return program.output_of(found, context)

    def _at_batch(self, number: int, batch: Batch) -> _Here:
        """Cached values of the batch."""
        if self._here is None or self._here.number != number:
            self._here = _Here(number, len(batch), tree_leaves((batch.args, dict(batch.kwargs))))
        return self._here

    def _other_values(self, here: _Here, start: int, masks: Masks, also: Masks) -> dict[int, Tensor]:
        """All other values that the rest of the network reads, computed once per batch."""
        marks = self._marks(also)
        if here.masks != id(masks):
            here.sides.clear()
            here.dense.clear()
            here.masks = id(masks)
        if marks not in here.sides:
            program = self.program
            rest, own = self._work(start, marks), program.value_at(start)
            between = set(range(start + 1, len(program.steps))) - program.dependents(marks | {start})
            work = program.work(between, rest.needs - {own})
            live = {number: stored.get() for number, stored in self._live[here.number].items()}
            context = Context(weights_of(self.model), here.inputs, here.samples, masks, self.dims)
            here.sides[marks] = self._run_batch(work, live, context, here.number, out_of_order=True)
        return here.sides[marks]

    def _dense(self, here: _Here, asked: Variants, delta: Delta) -> dict[int, Tensor]:
        """Inputs and outputs of the following layers in the unmasked network, computed once per batch."""
        if not here.dense and delta.wanted:
            program, start = self.program, self.program.at[asked.station]
            work = program.work(program.dependents(self._marks(asked.also) | {start}), delta.wanted)
            values = {**self._other_values(here, start, asked.masks, asked.also), program.value_at(start): asked.value}
            context = Context(weights_of(self.model), here.inputs, here.samples, asked.masks, self.dims)
            found = self._run_batch(work, values, context, here.number, out_of_order=True)
            here.dense = {number: found[number] for number in delta.wanted}
        return here.dense

    def _marks(self, also: Masks) -> frozenset[int]:
        return frozenset(self.program.at[station] for station in also)

    def _work(self, start: int, marks: frozenset[int]) -> Work:
        """The steps that depend on a station or on other masked stations, for the output."""
        key = start, marks
        if key not in self._works:
            program = self.program
            self._works[key] = program.work(program.dependents(marks | {start}), program.outputs)
        return self._works[key]

    def _delta(self, start: int, marks: frozenset[int]) -> Delta:
        key = start, marks
        if key not in self._deltas:
            self._deltas[key] = Delta(self.program, start, self._work(start, marks).steps, marks)
        return self._deltas[key]

    def _is_separable(self, start: int, marks: frozenset[int]) -> bool:
        """Whether samples can be batched differently from the station on."""
        program, work = self.program, self._work(start, marks)
        read = {number for index in work.steps for number in program.steps[index].reads()} | work.needs
        first = {program.value_at(position) for position in (start, *marks)} | set(program.outputs)
        apart = all(program.rows[number] is not None for number in read | first if program.depends[number])
        return apart and all(program.rows[number] == (0, 1) for number in first) and program.gives_tensors

    def _reads_inputs(self, work: Work) -> bool:
        steps = (self.program.steps[index] for index in work.steps)
        return any(isinstance(place, Input) for step in steps for place in leaves((step.args, dict(step.kwargs))))

    def _taken(self, number: int, value: Tensor, sample: Tensor) -> Tensor:
        rows = self.program.rows[number]
        return value if rows is None else take_rows(value, rows, sample)

    def _context(self, batch: Batch, masks: Masks) -> Context:
        inputs = tree_leaves((batch.args, dict(batch.kwargs)))
        return Context(weights_of(self.model), inputs, len(batch), masks, self.dims)


def _rows(leaf: Any, sample: Tensor, samples: int) -> Any:
    has_rows = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == samples
    return leaf.index_select(0, sample) if has_rows else leaf


def _assembled(rows: Any, asked: Variants) -> Any:
    """Combine the outputs of samples that were run with those of the others, by variant."""
    if asked.output is None:
        return tree_map(lambda leaf: leaf.unflatten(0, asked.alive.shape), rows)
    if rows is None:
        return tree_map(lambda whole: whole.expand(len(asked.alive), *whole.shape).clone(), asked.output)

    def put(whole: Tensor, part: Tensor) -> Tensor:
        found = whole.expand(len(asked.alive), *whole.shape).clone()
        found[asked.alive.to(whole.device)] = part
        return found

    return tree_map(put, asked.output, rows)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if one.device.type == "cpu":
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    # On other devices, another algorithm may be chosen for the same operator.
    return torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)
