"""Costs of a network as functions of its widths: parameters, MACs, activation memory and latency."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Axis", "CostModel", "LatencyTable", "LayerTimes", "Term"]


@dataclass(frozen=True)
class Axis:
    """Length of an axis as a function of the widths: ``fixed + Σ repeat[g] · width[g]``.

    Attributes:
        fixed: Positions that no group has.
        repeat: Groups with the number of positions that each of their units has.
        inner: Of the features of attention heads: their share of the length above, as an axis and its full length.
    """

    fixed: int
    repeat: tuple[tuple[str, int], ...] = ()
    inner: tuple[Axis, int] | None = None

    def length(self, widths: Mapping[str, int]) -> int:
        """Number of positions when group ``g`` has ``widths[g]`` units."""
        outer = self.fixed + sum(k * widths[g] for g, k in self.repeat)
        return outer if self.inner is None else outer * self.inner[0].length(widths) // self.inner[1]

    def counts(self) -> tuple[tuple[str, int], ...]:
        """All groups that the length depends on, with a number of positions of one unit at the widths in `repeat`."""
        return self.repeat if self.inner is None else (*self.repeat, *self.inner[0].repeat)

    def to_plain(self) -> dict[str, Any]:
        """Dicts and numbers."""
        plain: dict[str, Any] = {"fixed": self.fixed, "repeat": dict(self.repeat)}
        return plain if self.inner is None else {**plain, "inner": self.inner[0].to_plain(), "of": self.inner[1]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Axis:
        """Read what `to_plain` wrote."""
        inner = (cls.from_plain(plain["inner"]), _multiple(plain["of"])) if "inner" in plain else None
        return cls(plain["fixed"], tuple(plain["repeat"].items()), inner)

    def without(self, groups: Collection[str]) -> Axis:
        """The axis when ``groups`` have no units."""
        inner = None if self.inner and any(name in groups for name, _ in self.inner[0].repeat) else self.inner
        return Axis(self.fixed, tuple((name, k) for name, k in self.repeat if name not in groups), inner)


@dataclass(frozen=True)
class Term:
    """A product ``factor · Π length(axis)``: elements or bytes of a tensor, or MACs of one operator for one sample."""

    factor: float
    axes: tuple[Axis, ...]
    layer: str = ""

    def value(self, widths: Mapping[str, int]) -> float:
        """The product at these widths."""
        return self.factor * math.prod(axis.length(widths) for axis in self.axes)


def _multiple(value: object) -> int:
    """A number of units read from a file."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected a multiple of at least 1, got {value!r}")
    return value


@dataclass(frozen=True)
class LayerTimes:
    """Measured time of one convolution or matrix product, by the first two dimensions of its weight.

    Attributes:
        axes: Lengths of the two dimensions as functions of the widths.
        grid: Lengths at which it was measured, ascending, per dimension.
        ms: Milliseconds, one row per length of the first dimension; non-decreasing in both.
        steps: Multiples in which times rise, per dimension: a length takes as long as the next multiple.
    """

    axes: tuple[Axis, Axis]
    grid: tuple[tuple[int, ...], tuple[int, ...]] = ((1,), (1,))
    ms: tuple[tuple[float, ...], ...] = ((0.0,),)
    steps: tuple[int, int] = (1, 1)

    def value(self, widths: Mapping[str, int]) -> float:
        """Milliseconds at these widths, linear between the multiples of `steps`; 0 for a layer without units."""
        first, second = (
            -(-axis.length(widths) // step) * step for axis, step in zip(self.axes, self.steps, strict=True)
        )
        if not first or not second:
            return 0.0
        return float(np.interp(first, self.grid[0], [np.interp(second, self.grid[1], row) for row in self.ms]))

    def to_plain(self) -> dict[str, Any]:
        """Dicts, lists, numbers and strings only."""
        return {
            "axes": [axis.to_plain() for axis in self.axes],
            "grid": [list(points) for points in self.grid],
            "ms": [list(row) for row in self.ms],
            "steps": list(self.steps),
        }

    def scaled(self, factor: float) -> LayerTimes:
        """The layer with all times multiplied by ``factor``."""
        return replace(self, ms=tuple(tuple(factor * ms for ms in row) for row in self.ms))

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> LayerTimes:
        """Read what `to_plain` wrote."""
        first, second = map(Axis.from_plain, plain["axes"])
        rows, columns = (tuple(points) for points in plain["grid"])
        by_row, by_column = map(_multiple, plain.get("steps", (1, 1)))  # earlier versions know none
        return cls((first, second), (rows, columns), tuple(tuple(row) for row in plain["ms"]), (by_row, by_column))


@dataclass(frozen=True)
class LatencyTable:
    r"""Latency of one sample's forward pass, measured on one device.

    .. math:: t = a + b \cdot \text{memory} + \sum_\text{layers} t_\text{layer}(\text{widths})

    Attributes:
        fixed: a, milliseconds that do not depend on the widths.
        per_byte: b, milliseconds per byte of activations, for all other operators (norms, activations, additions).
        layers: Convolutions and matrix products.
        about: Device, runtime, threads and versions that it was measured with, where they are known.
        multiple: Widths that are no multiples of this are slower than the table says.
        error: Largest relative error of the times of the network that the table was fitted to.
    """

    fixed: float
    per_byte: float
    layers: tuple[LayerTimes, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    multiple: int = 1
    error: float = 0.0

    @property
    def device(self) -> str:
        """Device and runtime, for messages."""
        about = self.about
        return f"{about.get('device')} ({about.get('runtime')})" if about else "a device that was not noted"

    def value(self, widths: Mapping[str, int], memory: int) -> float:
        """Milliseconds at these widths with ``memory`` bytes of activations."""
        return self.fixed + self.per_byte * memory + sum(layer.value(widths) for layer in self.layers)

    def steps(self) -> dict[str, int]:
        """Multiples in which the latency rises with the units of a group, those of all of its layers."""
        found: dict[str, int] = {}
        for layer in self.layers:
            for axis, step in zip(layer.axes, layer.steps, strict=True):
                for name, repeat in axis.counts():
                    found[name] = math.lcm(found.get(name, 1), step // math.gcd(step, repeat))
        return found

    def without(self, groups: Collection[str]) -> LatencyTable:
        """The table without the units of ``groups``: layers without inputs or outputs take no time."""
        layers = (replace(t, axes=(t.axes[0].without(groups), t.axes[1].without(groups))) for t in self.layers)
        return replace(self, layers=tuple(t for t in layers if all(axis.fixed or axis.repeat for axis in t.axes)))

    def to_plain(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, for checkpoints and other processes."""
        return {
            "fixed": self.fixed,
            "per_byte": self.per_byte,
            "layers": [layer.to_plain() for layer in self.layers],
            **({"about": dict(self.about), "multiple": self.multiple, "error": self.error} if self.about else {}),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> LatencyTable:
        """What `to_plain` wrote."""
        layers = tuple(LayerTimes.from_plain(layer) for layer in plain["layers"])
        about, multiple, error = plain.get("about", {}), _multiple(plain.get("multiple", 1)), plain.get("error", 0.0)
        return cls(plain["fixed"], plain["per_byte"], layers, dict(about), multiple, float(error))


@dataclass(frozen=True)
class CostModel:
    """Costs of a network at any widths, for one sample's forward pass in eval mode.

    Attributes:
        parameters: One term per parameter; tied parameters count once.
        macs_terms: One term per convolution or matrix product (multiply-accumulates; 1 MAC = 2 FLOPs).
        shapes: Current shape of every parameter and buffer.
        memory_terms: One term, in bytes, per tensor that an operator allocates.
        latency_table: Latencies, if measured.
    """

    parameters: tuple[Term, ...]
    macs_terms: tuple[Term, ...]
    shapes: Mapping[str, tuple[int, ...]]
    memory_terms: tuple[Term, ...] = ()
    latency_table: LatencyTable | None = None

    def params(self, widths: Mapping[str, int], layers: Collection[str] | None = None) -> int:
        """Number of parameters, trainable or not, without buffers.

        Args:
            widths: Units by group.
            layers: Names of the modules whose own parameters are counted; by default all.
        """
        counted = (term for term in self.parameters if layers is None or term.layer in layers)
        return round(sum(term.value(widths) for term in counted))

    def macs(self, widths: Mapping[str, int]) -> int:
        """Multiply-accumulates of one sample's forward pass."""
        return round(sum(term.value(widths) for term in self.macs_terms))

    def memory(self, widths: Mapping[str, int]) -> int:
        """Bytes of all activations of one sample: every tensor that an operator allocates (no views, nothing in-place).

        Tensors are not assumed to be freed: times the batch size, it bounds what training keeps for the backward pass.
        """
        return round(sum(term.value(widths) for term in self.memory_terms))

    def latency(self, widths: Mapping[str, int]) -> float:
        """Milliseconds of one sample's forward pass, from the measured table.

        Raises:
            ValueError: If nothing was measured.
        """
        table = self.latency_table
        if table is None:
            raise ValueError("the latency of this network was not measured: expected a cost model with a table")
        return table.value(widths, self.memory(widths))

    def amount(self, quantity: str, widths: Mapping[str, int]) -> float:
        """The cost in ``"params"``, ``"macs"``, ``"memory"``, ``"latency"`` or ``"latency_ms"`` at these widths."""
        cost: float = getattr(self, quantity.removesuffix("_ms"))(widths)
        return cost

    def without(self, groups: Collection[str], layers: Mapping[str, str]) -> CostModel:
        """The cost model without the units of ``groups`` and without ``layers`` (`Removal.modules`)."""
        if not layers:
            return self
        silent = {name for name, kind in layers.items() if kind != "constant"}

        def rest(terms: tuple[Term, ...]) -> tuple[Term, ...]:
            left = (replace(t, axes=tuple(a.without(groups) for a in t.axes)) for t in terms if t.layer not in silent)
            return tuple(term for term in left if all(axis.fixed or axis.repeat for axis in term.axes))

        table = self.latency_table and self.latency_table.without(groups)
        shapes = {
            name: (*shape[:1], 0) if kind == "constant" and name.endswith(".weight") else shape
            for name, shape in self.shapes.items()
            if (kind := layers.get(name.rpartition(".")[0])) in (None, "constant")
        }
        return CostModel(rest(self.parameters), rest(self.macs_terms), shapes, rest(self.memory_terms), table)

    def take(self, axes: Mapping[str, Mapping[int, npt.NDArray[np.int64]]]) -> CostModel:
        """The cost model of the network after a cut that keeps the positions ``axes``."""
        shapes = {
            name: tuple(len(axes.get(name, {}).get(dim, range(n))) for dim, n in enumerate(shape))
            for name, shape in self.shapes.items()
        }
        return replace(self, shapes=shapes)
