"""Walks of samples through a network, station by station."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.contexts import preserved_state
from lightning_prune.scoring.data import Batch, DataPass, Forward, forward
from lightning_prune.scoring.spool import Spool, Stored
from lightning_prune.scoring.walk.consumers import Consumer, ConsumerFinder
from lightning_prune.scoring.walk.decision_cache import DecisionCache, key_of
from lightning_prune.scoring.walk.hook_engine import Change, HookEngine, Place, marked, places_of
from lightning_prune.scoring.walk.program import NotReplayable, Program
from lightning_prune.scoring.walk.recording import Recording, record
from lightning_prune.scoring.walk.replay_engine import ReplayEngine
from lightning_prune.scoring.walk.station import Point, Station, is_layer, pooled
from lightning_prune.scoring.walk.variants import Variants
from lightning_prune.structure.layers import canonical

__all__ = ["StationBatch", "Visit", "Walk", "WalkProgress", "feature_tables", "pooled_features", "stations_of"]

Masks = Mapping[Station, Tensor]


@dataclass(frozen=True)
class WalkProgress:
    """Progress of a walk.

    Attributes:
        station: The station that was just finished.
        index: Its index.
        total: Number of stations.
        seconds: Elapsed time.
        seconds_left: Estimated remaining time.
    """

    station: Station
    index: int
    total: int
    seconds: float
    seconds_left: float


class _Engine(Protocol):
    """Computes values at stations and the rest of the network."""

    macs: int

    def start(self) -> None: ...

    def run_all(self, number: int, batch: Batch, stations: Sequence[Station]) -> tuple[Any, dict[Station, Tensor]]: ...

    def move(self, number: int, batch: Batch, station: Station, masks: Masks) -> None: ...

    def value(self, number: int, batch: Batch, station: Station, masks: Masks) -> Tensor: ...

    def other(self, number: int, value: int) -> Tensor | None: ...

    def rest(self, number: int, batch: Batch, station: Station, value: Tensor, masks: Masks, also: Masks) -> Any: ...

    def variants(self, asked: Variants) -> Any: ...


#: Largest number of pairs of samples that are tried for recording the operators of a network.
_MOST_PAIRS = 8


def stations_of(
    model: nn.Module,
    batch: Batch,
    layers: Sequence[str] | None = None,
    point: Point = "activation",
    call: Forward = forward,
) -> list[Station]:
    """Stations of the convolutions and linear layers that are called as modules, in the order of execution.

    Args:
        model: The network, which is not changed.
        batch: A batch, of which the first two samples are run.
        layers: Names of layers; for ``"output"``, of any modules that return one tensor. All layers by default.
        point: Point at the layer.
        call: Runs the network on the batch.

    Raises:
        ValueError: If a layer is not called.
    """
    places, _ = _places(_recorded(model, batch, call), model)
    found = [place.station for place in places if place.station.point == point]
    if layers is None:
        modules = {canonical(name): module for name, module in model.named_modules()}
        return [station for station in found if is_layer(modules[station.layer])]
    missing = sorted(set(layers) - {station.layer for station in found})
    if missing:
        raise ValueError(
            f"expected layers that are convolutions or linear layers and called as modules, got {', '.join(missing)}. "
            f"There are: {', '.join(dict.fromkeys(station.layer for station in found))}."
        )
    return [station for station in found if station.layer in layers]


def pooled_features(
    model: nn.Module, data: DataPass, stations: Sequence[Station], reduction: str = "avg", *, absolute: bool = False
) -> dict[Station, Tensor]:
    """Features pooled over positions at several stations, from one forward pass.

    Args:
        model: The network, which is not changed.
        data: The samples of this process.
        stations: The stations.
        reduction: Pooling over positions, ``"avg"`` or ``"max"``.
        absolute: Whether to pool absolute values.

    Returns:
        Tables of shape ``(samples, channels)`` by station, on the CPU, in the order of ``data.labels``.

    Raises:
        ValueError: If a station is not in the network.
    """
    return dict(feature_tables(model, data, stations, reduction, absolute=absolute, memory_limit=sys.maxsize))


def feature_tables(
    model: nn.Module,
    data: DataPass,
    stations: Sequence[Station],
    reduction: str = "avg",
    *,
    absolute: bool = False,
    memory_limit: int,
) -> Iterator[tuple[Station, Tensor]]:
    """Like `pooled_features`, but yields one station at a time, so that not all tables must be in memory.

    The forward pass is run immediately.

    Args:
        model: See `pooled_features`.
        data: See `pooled_features`.
        stations: See `pooled_features`.
        reduction: See `pooled_features`.
        absolute: See `pooled_features`.
        memory_limit: Bytes of tables to keep in memory; the rest is kept in temporary files.
    """
    places = _select(_places(_recorded(model, next(iter(data)), data.call), model)[0], stations)
    spool = Spool(memory_limit)
    tables: dict[Station, list[Stored]] = {place.station: [] for place in places}

    def see(place: Place) -> Change:
        def change(value: Tensor) -> Tensor:
            tables[place.station].append(spool.put(pooled(value, place.dim, reduction, absolute).cpu()))
            return value

        return change

    def call(model: nn.Module, batch: Batch) -> Any:
        with marked(model, {place: see(place) for place in places}):
            return data.call(model, batch)

    data.run(model, call=call)

    def handed_out() -> Iterator[tuple[Station, Tensor]]:
        for station in stations:
            parts = tables.pop(station)
            yield station, torch.cat([part.get() for part in parts])
            for part in parts:
                part.free()

    return handed_out()


@final
class Walk:
    """Iterator that moves samples through a network, one station after the other.

    At each station, the value of every batch can be read and masked, and the rest of the network can be run from there
    with another value. The network is not changed. Its weights are read when a segment is run, so that replaced weights
    take effect from then on: two walks in parallel, ``zip(Walk(dense, ...), Walk(cut, ...))``, give the features of the
    cut network and the targets of the dense one.

    Args:
        model: The network; the ``forward`` of a LightningModule.
        data: The samples of this process.
        stations: Stations to stop at, in any order; see `stations_of`.
        memory_limit: Bytes of live tensors to keep in memory; the rest is kept in memory-mapped temporary files.
        folder: Folder in which `Visit.once` stores decisions; nothing is stored if None.
        options: Other settings that decisions depend on; part of the key under which they are stored.
        progress: Called when a station is finished.
        plain: Run the whole network with hooks for every value: slow, with equal results. This is also done, with a
            warning, if the network cannot be replayed from a station, for instance because its operators depend on the
            data.
        most_rows: Maximum number of rows (samples × variants) that `StationBatch.rest_masked` runs as one batch; one
            variant is always run as a whole.
        agree: Reduces a boolean over all processes to whether it holds on all; by default for a single process.

    Attributes:
        model: The network.
        data: The samples.
        stations: Stations in the order of execution.
        forward_macs: Multiply-accumulates (1 MAC = 2 FLOPs) of one sample's forward pass.
        is_plain: Whether the whole network is run for every value.

    Raises:
        ValueError: If there is no station, or one is not in the network.

    Example:
        >>> import torch
        >>> from lightning_prune.scoring import DataPass, Walk, stations_of
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> data = DataPass([torch.ones(5, 3)])
        >>> walk = Walk(net, data, stations_of(net, next(iter(data))))
        >>> [(str(visit.station), tuple(visit.features().shape)) for visit in walk]
        [('0 (activation)', (5, 4)), ('2 (activation)', (5, 2))]
    """

    def __init__(
        self,
        model: nn.Module,
        data: DataPass,
        stations: Sequence[Station],
        *,
        memory_limit: int = 2**30,
        folder: str | Path | None = None,
        options: Any = None,
        progress: Callable[[WalkProgress], None] | None = None,
        plain: bool = False,
        most_rows: int = 256,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        recording = _recorded(model, next(iter(data)), data.call)
        places, forward_macs = _places(recording, model)
        chosen = _select(places, stations)
        self.model, self.data, self.forward_macs = model, data, forward_macs
        self._recording = recording
        self.stations = [place.station for place in chosen]
        self.places = {place.station: place for place in places}
        self.agree = agree
        self._progress = progress
        self._masks: dict[Station, Tensor] = {}
        self.is_plain = plain
        self._engine: _Engine = (
            HookEngine(model, self.places, forward_macs, data.call) if plain else self._live(memory_limit, most_rows)
        )
        key = None if folder is None else key_of(model, data, self.stations, options)
        self.cache = None if folder is None or key is None else DecisionCache(Path(folder) / key)

    @property
    def macs(self) -> int:
        """Multiply-accumulates so far."""
        return self._engine.macs

    @property
    def macs_naive(self) -> int:
        """Multiply-accumulates of running the whole network once per station."""
        return len(self.stations) * len(self.data) * self.forward_macs

    @cached_property
    def _consumers(self) -> ConsumerFinder:
        return ConsumerFinder(self._recording)

    def consumer(self, layer: str) -> Consumer:
        """The consumer of the output of a layer that is called once."""
        return self._consumers.of(layer)

    def first_pass(self, stations: Sequence[Station]) -> Iterator[tuple[Any, dict[Station, Tensor]]]:
        """Run the whole network once, before the walk.

        Outputs of layers are cached while half of ``memory_limit`` is free, and the following walk reuses them for
        unmasked samples. Weights must not change in between.

        Args:
            stations: Any stations of the network.

        Yields:
            For every batch, the output and the values at the stations.
        """
        for number, batch in enumerate(self.data):
            with self.quiet():
                found = self._engine.run_all(number, batch, stations)
            yield found

    def __iter__(self) -> Iterator[Visit]:
        """Iterate over the stations; each walk starts at the inputs, without masks."""
        return self.visits()

    def visits(self, batches: Sequence[int] | None = None) -> Iterator[Visit]:
        """Iterate over the stations with a part of the batches.

        Args:
            batches: Indices of batches; all by default.
        """
        self._masks.clear()
        self._engine.start()
        began = perf_counter()
        for index, station in enumerate(self.stations):
            with self.quiet():
                for number, batch in self._batches(batches):
                    self._engine.move(number, batch, station, self._masks)
            visit = Visit(self, index, self._engine, self._masks, batches)
            yield visit
            self._masks |= visit.later
            if self._progress is not None:
                seconds, done = perf_counter() - began, index + 1
                left = seconds / done * (len(self.stations) - done)
                self._progress(WalkProgress(station, index, len(self.stations), seconds, left))

    def _batches(self, numbers: Sequence[int] | None) -> Iterator[tuple[int, Batch]]:
        if numbers is None:
            return enumerate(self.data)
        return ((number, self.data.batch(number)) for number in numbers)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Context for running the network, or its operators, without side effects."""
        untouched = preserved_state(self.model, seed=self.data.seed) if self.is_plain else nullcontext()
        with untouched, torch.inference_mode(False), torch.no_grad():
            yield

    def _program(self, batch: Batch) -> Program:
        """The operators of the network, recorded with two samples on which it decides as on all batches.

        Raises:
            NotReplayable: If there are none, or the operators cannot be replayed.
        """
        for first in range(0, min(max(len(batch), 1), 2 * _MOST_PAIRS), 2):
            program = Program(self.model, batch, self.data.call, first)
            if program.fits(batch):
                break
        if not program.read or all(program.fits(other) for other in self.data):
            return program
        raise NotReplayable(
            "it reads a number out of its inputs that differs between batches (whether a mask is all ones, say)"
        )

    def _live(self, memory_limit: int, most_rows: int) -> _Engine:
        """The replay engine, or the hook engine with a warning if the network cannot be replayed."""
        first = next(iter(self.data))
        try:
            program = self._program(first)
            live = ReplayEngine(self.model, program, self.places, memory_limit, most_rows)
            with preserved_state(self.model, seed=self.data.seed), torch.inference_mode(False), torch.no_grad():
                live.check(first, self.data.call)
            return live
        except NotReplayable as problem:
            self.is_plain = True
            warnings.warn(
                f"{type(self.model).__name__} is run as a whole for each layer, which is slow: its computation "
                f"cannot be continued from a layer on, because {problem}",
                stacklevel=3,
            )
            return HookEngine(self.model, self.places, self.forward_macs, self.data.call)


@final
class Visit:
    """All samples at one station; iterates over its batches."""

    def __init__(
        self, walk: Walk, index: int, engine: _Engine, masks: Masks, batches: Sequence[int] | None = None
    ) -> None:
        self.batches = batches
        self.walk, self.index, self.station = walk, index, walk.stations[index]
        self.place = walk.places[self.station]
        self.engine, self.masks = engine, dict(masks)
        self.later: dict[Station, Tensor] = {}

    @property
    def channels(self) -> int:
        """Number of channels at the station."""
        return self.place.channels

    def __iter__(self) -> Iterator[StationBatch]:
        """Iterate over the batches, in the order of the data."""
        for number, batch in self.walk._batches(self.batches):
            yield StationBatch(self, number, batch)

    def features(self, reduction: str = "avg", *, absolute: bool = False) -> Tensor:
        """Features pooled over positions, of shape ``(samples, channels)``, on the CPU.

        Args:
            reduction: Pooling over positions, ``"avg"`` or ``"max"``.
            absolute: Whether to pool absolute values.
        """
        return torch.cat([pooled(here.value, self.place.dim, reduction, absolute).cpu() for here in self])

    def mask(self, mask: Tensor, at: Sequence[Station] | None = None) -> None:
        """Multiply the value by a mask from here on.

        Args:
            mask: One number per channel.
            at: Stations with the same channels to mask instead of this one, for instance the inputs of a group's
                consumers, whether the walk stops there or not.

        Raises:
            ValueError: If the mask has another shape, or a station is before this one.
        """
        for station in (self.station,) if at is None else at:
            place = self.walk.places.get(station)
            if place is None:
                raise ValueError(f"expected a station of the network, got {station}")
            if mask.shape != (place.channels,):
                raise ValueError(
                    f"{station}: expected a mask of shape ({place.channels},), got {tuple(mask.shape)}. Give one "
                    "number per channel."
                )
            if place.order < self.place.order:
                raise ValueError(f"expected a station not before {self.station}, got {station}")
            self.later[station] = mask * self.later.get(station, self.masks.get(station, torch.ones_like(mask)))

    def once(self, decide: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Compute the decision at this station, or load it if an interrupted walk has stored it.

        Args:
            decide: Returns tensors, numbers, strings, and lists and dicts of them.

        Returns:
            The result of ``decide``, of this walk or an earlier one.
        """
        cache = self.walk.cache
        if cache is None:
            return dict(decide())
        found = cache.read(self.index)
        # If it is missing on one process, all compute it, as it may use collectives.
        if not self.walk.agree(found is not None) or found is None:
            found = dict(decide())
            cache.write(self.index, found)
        return found


@final
class StationBatch:
    """A batch at a station.

    Attributes:
        batch: The samples.
    """

    def __init__(self, visit: Visit, number: int, batch: Batch) -> None:
        self.visit, self.number, self.batch = visit, number, batch
        self._value: Tensor | None = None
        self._output: Any = None

    @property
    def value(self) -> Tensor:
        """Value at the station: ``(samples, channels, *positions)``; channels are last for a linear layer."""
        if self._value is None:
            visit = self.visit
            with visit.walk.quiet():
                self._value = visit.engine.value(self.number, self.batch, visit.station, visit.masks)
        return self._value

    @property
    def stream(self) -> Tensor | None:
        """The residual stream that the layer's output (after its norm) is added to; None if not computed yet."""
        visit = self.visit
        stream = visit.walk.consumer(visit.station.layer).stream
        return None if stream is None else visit.engine.other(self.number, stream)

    @property
    def output(self) -> Any:
        """Output of the network with the current value."""
        if self._output is None:
            self._output = self.rest(self.value)
        return self._output

    def rest(self, value: Tensor, also: Masks | None = None) -> Any:
        """Output of the network with another value at this station.

        Args:
            value: Replacement in the shape of ``self.value``.
            also: Masks at later stations, one number per channel.
        """
        visit = self.visit
        self._require_later(also or {})
        with visit.walk.quiet():
            return visit.engine.rest(self.number, self.batch, visit.station, value, visit.masks, also or {})

    def rest_masked(
        self, masks: Tensor, also: Masks | None = None, *, delta: bool = False, skip: bool = False, output: Any = None
    ) -> Any:
        """Outputs of the network with masked channels, in several variants.

        Variants are run as one batch, so results may differ by rounding from those of single runs.

        Args:
            masks: Masks of the variants, ``(variants, channels)``; 0 removes a channel.
            also: Masks of the same variants at later stations, ``(variants, channels)``.
            delta: Compute the following convolutions and linear layers incrementally from the masked channels, or
                from the others if these are fewer (for masks of 0 and 1): faster, and equal up to rounding.
            skip: Reuse the output for samples whose masked channels are all 0: exact. Ignored with ``also``.
            output: Output with the current value, if known; else ``skip`` uses ``self.output``.

        Returns:
            The network's output, where every tensor has a first dimension for the variants.

        Raises:
            ValueError: If masks have another shape.
        """
        visit, value = self.visit, self.value
        if masks.dim() != 2 or masks.shape[1] != visit.channels or not len(masks):
            raise ValueError(
                f"{visit.station}: expected masks of shape (variants, {visit.channels}), got {tuple(masks.shape)}."
            )
        self._require_later(also or {})
        alive = torch.ones(len(masks), len(self.batch), dtype=torch.bool)
        if skip and not also:
            alive = self._alive(masks)
        if alive.all():
            output = None
        elif output is None:
            output = self.output
        asked = Variants(
            *(self.number, self.batch, visit.station, visit.place.dim, value, masks),
            *(visit.masks, also or {}, alive, output, delta),
        )
        with visit.walk.quiet():
            return visit.engine.variants(asked)

    def _alive(self, masks: Tensor) -> Tensor:
        """Whether a sample has nonzero values in the masked channels of a variant: ``(variants, samples)``."""
        seen = self.value.movedim(self.visit.place.dim, 1).flatten(2) if self.value.dim() > 2 else self.value[..., None]
        changed = (masks != 1).to(seen.device)
        return ((seen != 0).any(2)[None] & changed[:, None]).any(2).cpu()

    def _require_later(self, also: Masks) -> None:
        for station in also:
            place = self.visit.walk.places.get(station)
            if place is None or place.order <= self.visit.place.order:
                raise ValueError(f"expected masks at stations behind {self.visit.station}, got one at {station}")


def _recorded(model: nn.Module, batch: Batch, call: Forward = forward) -> Recording:
    """Record a forward pass of two samples, as some operators treat a batch of one specially."""
    with preserved_state(model):
        return record(model, batch.rows([0, min(1, len(batch) - 1)]), call)


def _places(recording: Recording, model: nn.Module) -> tuple[list[Place], int]:
    """The stations of a network, and the multiply-accumulates of its forward pass per sample."""
    return places_of(recording, model, 2), sum(step.macs for step in recording.steps) // 2


def _select(places: Sequence[Place], stations: Sequence[Station]) -> list[Place]:
    """The places of the given stations, in the order of execution."""
    if not stations:
        raise ValueError("expected at least one station, got none")
    missing = sorted(str(station) for station in set(stations) - {place.station for place in places})
    if missing:
        raise ValueError(
            f"expected stations of the network, got {', '.join(missing)}. `stations_of(model, batch)` gives them."
        )
    return [place for place in places if place.station in set(stations)]
