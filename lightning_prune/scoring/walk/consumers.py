"""Consumers of a layer's output: a batch norm, a residual stream that it is added to, and a ReLU."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, NamedTuple, final

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.scoring.walk.chains import BATCH_NORMS, operator_name, readers_of, with_activations
from lightning_prune.scoring.walk.recording import Recording, Step, Value, Weight
from lightning_prune.scoring.walk.station import Station

__all__ = ["Consumer", "ConsumerFinder"]


class Consumer(NamedTuple):
    """The only consumer of a layer's output.

    Attributes:
        norm: Name of the batch norm, or None.
        stream: Number of the value that the output (after the norm) is added to, if it is computed before the layer
            runs; else None.
        clip: Lowest and highest value that the next operator keeps: (0, ∞) for a ReLU, (0, 6) for a ReLU6; None if it
            is not of this kind.
    """

    norm: str | None = None
    stream: int | None = None
    clip: tuple[float, float] | None = None

    def batch_norm(self, modules: Mapping[str, nn.Module]) -> _BatchNorm | None:
        """The norm among the modules by canonical name; None if it is not one of PyTorch's."""
        found = None if self.norm is None else modules.get(self.norm)
        return found if isinstance(found, _BatchNorm) else None


@final
class ConsumerFinder:
    """Finds the consumers of layers in a recorded forward pass in eval mode.

    Attributes:
        of: Returns the consumer of a layer that is called once, by name.
    """

    def __init__(self, recording: Recording) -> None:
        recording = with_activations(recording)  # for the same value numbers as in a `Program`
        self._steps, self._readers = recording.steps, readers_of(recording)
        self._makers = {out: step for step in self._steps for out in step.outs if out is not None}
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
                stream = self._origin(others[0], known) if len(others) == 1 else None
                return Consumer(norm) if stream is None else Consumer(norm, stream, self._clip(step.outs[0]))
            elif step.func is not None:
                return Consumer(norm, None, _clip(step))
            value = step.outs[0]
        return Consumer(norm)

    def _origin(self, value: int, known: Collection[int | None]) -> int | None:
        """The known value that this one is, through modules without an operator (`nn.Identity`)."""
        while value not in known:
            step = self._makers.get(value)
            if step is None or step.func is not None or not isinstance(step.args[0], Value):
                return None
            value = step.args[0].number
        return value

    def _clip(self, value: int | None) -> tuple[float, float] | None:
        """The range that the only reader of a value keeps."""
        while value is not None:
            readers = self._readers.get(value, [])
            if len(readers) != 1 or readers[0] == len(self._steps):
                return None
            step = self._steps[readers[0]]
            if step.func is not None:
                return _clip(step)
            value = step.outs[0]
        return None


def _clip(step: Step) -> tuple[float, float] | None:
    """The range of values that a step does not change, if it clips others to it."""
    name, bounds = operator_name(step), _bounds(step)
    if name == "relu":
        return 0.0, math.inf
    if name == "hardtanh":
        return bounds.get("min_val", -1.0), bounds.get("max_val", 1.0)
    if name in ("clamp", "clamp_min", "clamp_max") and bounds:
        return bounds.get("min", -math.inf), bounds.get("max", math.inf)
    return None


def _bounds(step: Step) -> dict[str, float]:
    """The numbers among a step's arguments, by name."""
    names = [argument.name for argument in step.func._schema.arguments] if step.func is not None else []
    given: dict[str, Any] = dict(zip(names, step.args, strict=False)) | dict(step.kwargs)
    return {name: float(value) for name, value in given.items() if isinstance(value, (int, float))}
