"""Finding the activation of a layer: its output after the following norms and activation functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import activation, batchnorm, instancenorm, normalization

from lightning_prune.scoring.walk.recording import ModuleCall, Recording, Step, Value, leaves, map_places
from lightning_prune.scoring.walk.station import Station, is_layer

__all__ = [
    "BATCH_NORMS",
    "CHANNELWISE",
    "ActivationSite",
    "activations",
    "operator_name",
    "readers_of",
    "with_activations",
]

_NORMS: tuple[type[nn.Module], ...] = (
    *(batchnorm._NormBase, instancenorm._InstanceNorm),
    *(normalization.GroupNorm, normalization.LayerNorm, normalization.RMSNorm),
)
#: Modules of `torch.nn.modules.activation` that are not elementwise.
_NO_ACTIVATIONS = {"MultiheadAttention", "GLU", "Softmax", "Softmax2d", "LogSoftmax", "Softmin"}
_ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    getattr(activation, name) for name in activation.__all__ if name not in _NO_ACTIVATIONS
)
#: Elementwise operators.
_UNARY = frozenset(
    (
        *("relu", "hardtanh", "silu", "gelu", "hardswish", "hardsigmoid", "leaky_relu", "elu", "mish", "softplus"),
        *("sigmoid", "tanh", "clamp", "clamp_min", "clamp_max", "threshold", "softshrink", "hardshrink", "exp", "abs"),
        *("square", "sqrt", "log_sigmoid_forward", "_prelu_kernel", "rrelu_with_noise"),
    )
)
BATCH_NORMS = frozenset(
    (
        *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
        *("_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm"),
    )
)
_NORM_OPERATORS = BATCH_NORMS | {"native_group_norm", "native_layer_norm", "_fused_rms_norm"}
#: Operators that are elementwise if the other argument is a number.
_WITH_NUMBER = frozenset(("add", "sub", "mul", "div", "pow"))
#: Operators whose output channels depend only on the same channel of the input, if the first two dimensions are kept.
CHANNELWISE = frozenset(
    (
        *_UNARY,
        *BATCH_NORMS,
        *("add", "sub", "mul", "div", "clone"),
        *("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "max_unpool2d", "upsample_nearest2d"),
        *("upsample_bilinear2d", "mean", "view", "_unsafe_view"),
    )
)


class ActivationSite(NamedTuple):
    """An activation in a recording.

    Attributes:
        value: Number of the value.
        after: Number of steps after which the value exists.
    """

    value: int
    after: int


def activations(recording: Recording) -> dict[Station, ActivationSite]:
    """Find the value after the norms and activations of each call of a layer, up to where anything else reads it."""
    readers = readers_of(recording)
    calls: dict[int, list[ModuleCall]] = {}
    for call in recording.calls:
        if call.entered is not None and isinstance(call.module, (*_NORMS, *_ACTIVATIONS)):
            calls.setdefault(call.entered, []).append(call)
    layers = {call.name for call in recording.calls if is_layer(call.module)}
    found = {}
    for index, step in enumerate(recording.steps):
        if step.station is not None and step.station.point == "output" and step.station.layer in layers:
            here = ActivationSite(step.outs[0] or 0, index + 1)
            later: ActivationSite | None = here
            while later is not None:
                here, later = later, _next(recording, later, readers.get(later.value, []), calls)
            found[replace(step.station, point="activation")] = here
    return found


def with_activations(recording: Recording) -> Recording:
    """The recording with a marker step at every activation."""
    marks: dict[int, list[tuple[Station, int]]] = {}
    for station, behind in activations(recording).items():
        marks.setdefault(behind.after, []).append((station, behind.value))
    values, steps = list(recording.values), list[Step]()
    renamed: dict[int, int] = {}

    def current(place: Any) -> Any:
        return Value(renamed.get(place.number, place.number)) if isinstance(place, Value) else place

    for index in range(len(recording.steps) + 1):
        for station, value in marks.get(index, ()):
            steps.append(Step(None, (Value(value),), {}, (len(values),), station=station))
            renamed[value] = len(values)
            values.append(values[value])
        if index < len(recording.steps):
            step = recording.steps[index]
            args, kwargs = map_places(current, (step.args, dict(step.kwargs)))
            steps.append(replace(step, args=args, kwargs=kwargs))
    output = map_places(current, recording.output)
    return replace(recording, steps=steps, output=output, values=values)


def readers_of(recording: Recording) -> dict[int, list[int]]:
    """Steps that read each value; the output counts as one more step."""
    readers: dict[int, list[int]] = {}
    for index, step in enumerate(recording.steps):
        for number in step.reads():
            readers.setdefault(number, []).append(index)
    for place in leaves(recording.output):
        if isinstance(place, Value):
            readers.setdefault(place.number, []).append(len(recording.steps))
    return readers


def _next(
    recording: Recording, here: ActivationSite, readers: Sequence[int], calls: Mapping[int, Sequence[ModuleCall]]
) -> ActivationSite | None:
    """The value after one more norm or activation; None if anything else reads it."""
    for call in calls.get(here.value, ()):
        if call.left not in (None, here.value) and all(call.first <= reader < call.last for reader in readers):
            return ActivationSite(call.left or 0, call.last)
    if len(readers) == 1 and readers[0] < len(recording.steps):
        return _through(recording.steps[readers[0]], readers[0], here.value)
    return _through_gate(recording, here, sorted(set(readers))) if len(readers) == 2 else None


def _through(step: Step, index: int, value: int) -> ActivationSite | None:
    """The output of a step if it is a norm or an activation of the value."""
    name = operator_name(step)
    known = name in _UNARY or name in _NORM_OPERATORS or (step.station is not None and step.station.point == "output")
    first = step.args[0] if step.args else None
    if known and first == Value(value) and step.outs[0] is not None:
        return ActivationSite(step.outs[0], index + 1)
    return None


def _through_gate(recording: Recording, here: ActivationSite, readers: Sequence[int]) -> ActivationSite | None:
    """The product ``x · f(x)`` of a gate that is written out: one reader starts f, the other multiplies."""
    if len(readers) != 2 or readers[1] >= len(recording.steps):
        return None
    product = recording.steps[readers[1]]
    factors = [place.number for place in product.args[:2] if isinstance(place, Value)]
    if operator_name(product) != "mul" or len(factors) != 2 or here.value not in factors:
        return None
    other = factors[0] if factors[1] == here.value else factors[1]
    wanted, own = other, readers_of(recording)
    for index in range(readers[1] - 1, readers[0] - 1, -1):
        step = recording.steps[index]
        if wanted in step.outs:
            alone = len(own.get(wanted, ())) == 1 and len(step.reads()) == 1
            if not alone or (operator_name(step) not in _UNARY and operator_name(step) not in _WITH_NUMBER):
                return None
            wanted = step.reads()[0]
    return (
        ActivationSite(product.outs[0], readers[1] + 1)
        if wanted == here.value and product.outs[0] is not None
        else None
    )


def operator_name(step: Step) -> str:
    """Name of a step's operator without the in-place underscore; empty for a marker."""
    if step.func is None:
        return ""
    name: str = step.func._overloadpacket.__name__
    return name.removesuffix("_")
