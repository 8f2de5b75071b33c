"""Consumers of a layer's output: a batch norm, and a residual stream that it is added to."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, final

from lightning_prune.scoring.walk.chains import BATCH_NORMS, operator_name, readers_of, with_activations
from lightning_prune.scoring.walk.recording import Recording, Value, Weight
from lightning_prune.scoring.walk.station import Station

__all__ = ["Consumer", "ConsumerFinder"]


class Consumer(NamedTuple):
    """The only consumer of a layer's output.

    Attributes:
        norm: Name of the batch norm, or None.
        stream: Number of the value that the output (after the norm) is added to, if it is computed before the layer
            runs; else None.
    """

    norm: str | None = None
    stream: int | None = None


@final
class ConsumerFinder:
    """Finds the consumers of layers in a recorded forward pass in eval mode.

    Attributes:
        of: Returns the consumer of a layer that is called once, by name.
    """

    def __init__(self, recording: Recording) -> None:
        recording = with_activations(recording)  # for the same value numbers as in a `Program`
        self._steps, self._readers = recording.steps, readers_of(recording)
        self.of = cache(self._of)
        self._at = {step.station: index for index, step in enumerate(self._steps) if step.station is not None}

    def _of(self, layer: str) -> Consumer:
        """The consumer of a layer that is called once."""
        before = self._at[Station(layer, "input")]
        value, norm = self._steps[self._at[Station(layer, "output")]].outs[0], None
        while value is not None:
            readers = self._readers.get(value, [])
            if len(readers) != 1 or readers[0] == len(self._steps):
                break
            step = self._steps[readers[0]]
            name = operator_name(step)
            if name in BATCH_NORMS and norm is None and step.args[0] == Value(value):
                mean = step.args[3]
                if not isinstance(mean, Weight):
                    break
                norm = mean.name.removesuffix("running_mean").removesuffix(".")
            elif name == "add" and len(step.args) == 2 and not step.kwargs:
                others = [place.number for place in step.args if isinstance(place, Value) and place.number != value]
                known = {out for earlier in self._steps[:before] for out in earlier.outs}
                return Consumer(norm, others[0] if len(others) == 1 and others[0] in known else None)
            elif step.func is not None:
                break
            value = step.outs[0]
        return Consumer(norm)
