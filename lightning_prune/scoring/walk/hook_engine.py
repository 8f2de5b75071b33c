"""Engine that runs whole forward passes with hooks: the reference, and the fallback if replaying is impossible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, final

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune.scoring.data import Batch, Forward, forward
from lightning_prune.scoring.walk.chains import activations
from lightning_prune.scoring.walk.recording import Recording
from lightning_prune.scoring.walk.station import Station, channel_dim, scaled
from lightning_prune.scoring.walk.variants import Variants, product, stacked
from lightning_prune.structure.layers import canonical

__all__ = ["Change", "HookEngine", "Place", "marked", "places_of"]

#: Maps the value at a station to its replacement.
Change = Callable[[Tensor], Tensor]


class Place(NamedTuple):
    """A station in a forward pass.

    Attributes:
        station: The station.
        order: Position among all stations.
        dim: Dimension of the channels.
        channels: Number of channels.
        macs: Multiply-accumulates per sample up to the station.
        behind: For an activation, the operators between it and the layer's output.
    """

    station: Station
    order: int
    dim: int
    channels: int
    macs: int
    behind: tuple[Any, ...] = ()


def places_of(recording: Recording, model: nn.Module, samples: int) -> list[Place]:
    """All stations of a recording, in the order of execution.

    Args:
        recording: The recorded forward pass.
        model: The network.
        samples: Batch size of the recording.
    """
    layers = {canonical(name): module for name, module in model.named_modules()}
    macs = [0, *accumulate(step.macs for step in recording.steps)]
    found: list[tuple[int, Place]] = []
    outputs: dict[tuple[str, int], int] = {}

    def add(station: Station, value: Tensor, after: int, behind: tuple[Any, ...] = ()) -> None:
        dim = channel_dim(layers[station.layer], value)
        if dim >= value.dim():  # for instance the scalar of a metric
            return
        found.append((after, Place(station, 0, dim, value.shape[dim], macs[after] // samples, behind)))

    for index, step in enumerate(recording.steps):
        if step.station is not None:
            add(step.station, recording.values[step.outs[0] or 0], index + 1)
            outputs[step.station.layer, step.station.call] = index + 1
    for station, behind in activations(recording).items():
        steps = recording.steps[outputs[station.layer, station.call] : behind.after]
        operators = tuple(step.func for step in steps if step.func is not None)
        add(station, recording.values[behind.value], behind.after, operators)
    found.sort(key=lambda entry: entry[0])  # stable: outputs before activations
    return [place._replace(order=order) for order, (_, place) in enumerate(found)]


@contextmanager
def marked(model: nn.Module, changes: Mapping[Place, Change]) -> Iterator[None]:
    """Observe and replace the values at stations in forward passes within the context.

    Raises:
        ValueError: If other operators run after a layer than in the recording.
    """
    by_layer: dict[str, list[tuple[Place, Change]]] = {}
    for place, change in changes.items():
        by_layer.setdefault(place.station.layer, []).append((place, change))
    watch = _Watch()
    handles = []
    for name, layer in model.named_modules():
        if canonical(name) in by_layer:
            hooks = _Hooks(by_layer[canonical(name)], watch)
            handles.append(layer.register_forward_pre_hook(hooks.before, with_kwargs=True))
            handles.append(layer.register_forward_hook(hooks.after))
    try:
        with watch if watch.needed(changes) else _nothing():
            yield
    finally:
        for handle in handles:
            handle.remove()


@final
class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the operators from the outputs of layers to their activations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._awaited: list[tuple[Place, int, Change]] = []
        self._paused = False

    @staticmethod
    def needed(changes: Mapping[Place, Change]) -> bool:
        """Whether any of the stations requires it."""
        return any(place.behind for place in changes)

    def expect(self, place: Place, change: Change) -> None:
        """Start to follow the output of a layer."""
        self._awaited.append((place, 0, change))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore operators within the context."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._paused or not self._awaited:
            return out
        awaited, self._awaited = self._awaited, []
        for place, done, change in awaited:
            if place.behind[done] is not func:
                raise ValueError(
                    f"{place.station}: expected `{place.behind[done]}` to run behind the layer, as in the first pass, "
                    f"got `{func}`. The network's operators depend on the data: look at the layer's `output`."
                )
            if done + 1 < len(place.behind):
                self._awaited.append((place, done + 1, change))
                continue
            value = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
            new = change(value)
            if new is not value:
                value.copy_(new)
        return out


class _Hooks:
    """Forward hooks of one layer."""

    def __init__(self, changes: list[tuple[Place, Change]], watch: _Watch) -> None:
        self.changes, self.watch, self.call = changes, watch, -1

    def _here(self, *points: str) -> Iterator[tuple[Place, Change]]:
        for place, change in self.changes:
            if place.station.call == self.call and place.station.point in points:
                yield place, change

    def before(self, __: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the input."""
        self.call += 1
        name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
        with self.watch.paused():
            for _, change in self._here("input"):
                if args:
                    args = (change(args[0]), *args[1:])
                elif name is not None:
                    kwargs = {**kwargs, name: change(kwargs[name])}
        return args, kwargs

    def after(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        """Replace the output, or follow it to its activation."""
        for place, change in self._here("output", "activation"):
            if place.behind:
                self.watch.expect(place, change)
            else:
                with self.watch.paused():
                    output = change(output)
        return output


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Reached(BaseException):
    """Aborts a forward pass; a BaseException, so that the network does not catch it."""


@final
class HookEngine:
    """Runs the whole network for every value: slow, but exact for every network.

    Args:
        model: The network.
        places: Stations of the network.
        macs: Multiply-accumulates of the forward pass per sample.
        call: Runs the network on a batch.

    Attributes:
        macs: Multiply-accumulates so far.
    """

    def __init__(self, model: nn.Module, places: Mapping[Station, Place], macs: int, call: Forward = forward) -> None:
        self.model, self.places, self.forward_macs, self._call = model, places, macs, call
        self.macs = 0

    def start(self) -> None:
        """Start a walk: nothing to do."""

    def run_all(self, number: int, batch: Batch, stations: Sequence[Station]) -> tuple[Any, dict[Station, Tensor]]:  # noqa: ARG002
        """Output of the network and values at stations."""
        found: dict[Station, Tensor] = {}

        def see(station: Station, value: Tensor) -> Tensor:
            found[station] = value.clone()
            return value

        self.macs += len(batch) * self.forward_macs
        return self._run(batch, {self.places[station]: partial(see, station) for station in stations}), found

    def move(self, number: int, batch: Batch, station: Station, masks: Mapping[Station, Tensor]) -> None:
        """Move a batch to a station: nothing to do."""

    def value(self, number: int, batch: Batch, station: Station, masks: Mapping[Station, Tensor]) -> Tensor:  # noqa: ARG002
        """Value at a station, before its own mask."""
        found: list[Tensor] = []

        def see(value: Tensor) -> Tensor:
            found.append(value.clone())
            raise _Reached

        try:
            self._run(batch, {**self._masked(masks, without=station), self.places[station]: see})
        except _Reached:
            self.macs += len(batch) * self.places[station].macs
        return found[0]

    def other(self, number: int, value: int) -> Tensor | None:  # noqa: ARG002
        """None: values are not kept."""
        return None

    def rest(
        self,
        number: int,  # noqa: ARG002
        batch: Batch,
        station: Station,
        value: Tensor,
        masks: Mapping[Station, Tensor],
        also: Mapping[Station, Tensor],
    ) -> Any:
        """Output of the network with another value at a station."""
        masked = self._masked(product(masks, also), without=station)
        self.macs += len(batch) * self.forward_macs
        return self._run(batch, {**masked, self.places[station]: lambda _: value})

    def variants(self, asked: Variants) -> Any:
        """Outputs of the network with masked channels, one variant after the other."""
        number, batch, station, masks = asked.number, asked.batch, asked.station, asked.masks
        return stacked(asked, lambda value, also: self.rest(number, batch, station, value, masks, also))

    def _masked(self, masks: Mapping[Station, Tensor], without: Station) -> dict[Place, Change]:
        places = ((self.places[station], mask) for station, mask in masks.items() if station != without)
        return {place: partial(scaled, mask=mask, dim=place.dim) for place, mask in places}

    def _run(self, batch: Batch, changes: Mapping[Place, Change]) -> Any:
        with marked(self.model, changes):
            return self._call(self.model, batch)
