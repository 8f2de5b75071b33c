"""Refitting the layers after a cut: from their inputs in the cut network to their outputs in the dense network."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import listed
from lightning_prune.scoring import DataPass
from lightning_prune.scoring.linear_maps import (
    as_matrices,
    by_position,
    covariance_of,
    double,
    from_matrices,
    is_transposed,
    rows_of,
    scale_and_shift,
    spread,
)
from lightning_prune.scoring.walk import Consumer, Station, StationBatch, Walk, stations_of
from lightning_prune.structure.attention_calls import out_proj_called
from lightning_prune.structure.graph import Axes, Factors
from lightning_prune.surgery.repairs.linear import input_dim, joined, tied_layers
from lightning_prune.surgery.repairs.repair import Repair, require_positive
from lightning_prune.surgery.repairs.ridge import FoldMean
from lightning_prune.surgery.tensors import canonical, rescaled

__all__ = ["SequentialRidge"]

# A layer whose outputs differ by less, relative to the largest one, is left unchanged.
_UNCHANGED = 1e-4
# Minimum number of rows per input: with fewer, weights are not determined and become large; and the largest number
# that is used, because more take time (depthwise convolutions have few inputs) and change nothing.
_ROWS_PER_INPUT, _MOST_ROWS_PER_INPUT = 4, 512
# Minimum scale γ/σ of a batch norm to compensate a stream: with less, the weights would become large.
_SMALLEST_GAIN = 1e-3
# Further solutions for outputs that are clipped, and the largest number of inputs that are kept for them.
_CLIP_STEPS = 10
_KEPT_INPUTS = 2**26


@final
@dataclass(frozen=True)
class SequentialRidge(Repair):
    r"""Refits every layer after a cut, so that the cut network computes what the dense one did.

    Layers are fitted in the order of the forward pass. For each, :math:`x` are its inputs in the cut network, whose
    earlier layers are already fitted, and :math:`y` its outputs in the dense one. Weights and bias become

    .. math:: \arg\min_{W, b} \; \mathbb{E}\,\lVert W x + b - y \rVert^2 + \lambda \lVert W - W_0 \rVert^2

    with the weights :math:`W_0` after the cut: least squares on second moments, where :math:`\lambda` is relative to
    the mean variance of the inputs. If the outputs are added to a residual stream, directly or after a batch norm with
    scale :math:`\gamma` and deviation :math:`\sigma`, the target also compensates the previous error of the stream:
    :math:`y + (s_{dense} - s_{cut}) \, \sigma / \gamma`. For a layer without a bias before a batch norm, the constant
    is subtracted from the norm's running mean; without a norm, it is fitted without a constant. Layers whose outputs
    did not change are left unchanged.

    If a ReLU, ReLU6 or another clamp follows (after the norm and the stream), outputs that it sets to the same value in
    both networks have no error, as in Zhang et al., "Accelerating Very Deep Convolutional Networks", 2016. The least
    squares are solved ten more times, each with the targets of such outputs at their present values, which lowers this
    error every time.

    A convolution is treated as a linear layer on its patches (channels times kernel elements); grouped, depthwise and
    transposed convolutions are supported. For layers with more than ``max_inputs`` inputs per group, or with fewer than
    four rows (patches, tokens, samples) per input, only the constant is fitted. Layers that lose all inputs return
    their mean output (`FoldMean`). Layers that share a weight, are called several times, or are not called as modules
    are left unchanged.

    Right after a cut, this is better than `Ridge`. After gradual unfreezing, EfficientNet-Lite0 was not better than
    with `Ridge`, and worse at a high learning rate (``docs/evidence/transfer``), because the fitted weights are larger.

    All batches pass once through the dense and once through the cut network (`Walk`). If a network does not support
    this, it is run once per layer, and residual streams are not compensated; a warning says so.

    Args:
        batches: Batches of training data.
        strength: λ, above 0.
        rows: Patches (tokens, samples) per batch and layer, spread evenly if there are more.
        max_inputs: Largest number of inputs of a layer; the matrices take its square in memory.
    """

    batches: int = 32
    strength: float = 0.1
    rows: int = 1024
    max_inputs: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def before(self, model: nn.Module, axes: Axes, run: Any) -> dict[str, Tensor]:
        """The shifted biases of layers that lose all inputs."""
        emptied = {name: dims for name, dims in axes.items() if any(not len(kept) for kept in dims.values())}
        return FoldMean(self.batches).before(model, emptied, run) if emptied else {}

    def between(
        self, dense: nn.Module, narrow: nn.Module, axes: Axes, data: DataPass, factors: Factors
    ) -> dict[str, Tensor]:
        """The refitted weights, biases and running means; also sets them in the narrow network."""
        with out_proj_called(dense), out_proj_called(narrow):
            return self._between(dense, narrow, axes, data, factors)

    def _between(
        self, dense: nn.Module, narrow: nn.Module, axes: Axes, data: DataPass, factors: Factors
    ) -> dict[str, Tensor]:
        batches = range(min(self.batches, len(data.batch_sizes)))
        modules = {canonical(name): module for name, module in narrow.named_modules()}
        names, problems = _layers(dense, narrow, data)
        contents: dict[str, Tensor] = {}
        short: list[str] = []
        if names:
            targets = Walk(dense, data, [Station(name, "output") for name in names])
            inputs = Walk(narrow, data, [Station(name, "input") for name in names], plain=targets.is_plain)
            if inputs.is_plain and (added := [name for name in names if inputs.consumer(name).stream is not None]):
                warnings.warn(
                    f"SequentialRidge does not compensate errors of the residual stream in {listed(added)}, since the "
                    "network is run as a whole for each layer.",
                    stacklevel=5,
                )
            for given, taken in zip(targets.visits(batches), inputs.visits(batches), strict=True):
                name = taken.station.layer
                fit = _Fit(name, modules, inputs.consumer(name), axes, self, len(batches), factors)
                for target, source in zip(given, taken, strict=True):
                    fit.see(target, source)
                contents |= fit.install()
                short += [fit.shortage] * bool(fit.shortage)
        if short:
            warnings.warn(
                f"SequentialRidge fits only the constant of {listed(short)}. A weight needs at least "
                f"{_ROWS_PER_INPUT} rows per input, and at most max_inputs={self.max_inputs} inputs.",
                stacklevel=6,
            )
        if problems:
            warnings.warn(f"SequentialRidge leaves some layers unchanged: {'; '.join(problems)}", stacklevel=6)
        return contents


def _layers(dense: nn.Module, narrow: nn.Module, data: DataPass) -> tuple[list[str], list[str]]:
    """Layers that can be fitted, in the order of the forward pass, and why others cannot."""
    there = {canonical(name) for name, layer in dense.named_modules() if input_dim(layer) is not None}
    found = ((canonical(name), layer) for name, layer in narrow.named_modules())
    linear = {name for name, layer in found if input_dim(layer) is not None and name in there}
    shared = tied_layers(narrow)
    calls = Counter(station.layer for station in stations_of(dense, data.batch(0), point="output", call=data.call))
    once = [name for name, times in calls.items() if times == 1 and name in linear and name not in shared]
    problems = [f"{name} shares a weight or bias with another layer" for name in sorted(linear & shared)]
    problems += [f"{name} was never called as a module" for name in sorted(linear - shared - calls.keys())]
    problems += [f"{name} is called {n} times" for name, n in calls.items() if n > 1 and name in linear - shared]
    return once, problems


class _Fit:
    """Least squares for one layer, on sums over batches.

    Args:
        name: The layer.
        modules: Modules of the cut network, by name.
        consumer: What follows the layer.
        axes: Positions that the cut keeps.
        ridge: The settings.
        batches: Number of batches that will be seen.
        factors: What rows of tensors were multiplied by in the cut.
    """

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        consumer: Consumer,
        axes: Axes,
        ridge: SequentialRidge,
        batches: int,
        factors: Factors,
    ) -> None:
        self.name = name
        self.layer: Any = modules[name]
        self.norm: Any = consumer.batch_norm(modules)
        self.clip = consumer.clip if consumer.norm is None or self.norm is not None else None
        self.strength = ridge.strength
        self.tensors = {part: joined(name, part) for part in ("weight", "bias")}
        if self.norm is not None:
            self.tensors["mean"] = joined(consumer.norm or "", "running_mean")
        dims = {"bias": 0, "mean": 0, "weight": 1 if is_transposed(self.layer) else 0}
        found = [axes.get(self.tensors[part], {}).get(dim) for part, dim in dims.items() if part in self.tensors]
        kept = next((positions for positions in found if positions is not None), None)
        self.kept = slice(None) if kept is None else torch.from_numpy(np.array(kept))
        self.weight = as_matrices(self.layer)
        self.factors = rescaled(torch.ones(self.weight.shape[:2].numel()), factors.get(self.tensors["weight"]))
        scale, self.shift = scale_and_shift(self.norm)
        self.scale = torch.where(scale.abs() > _SMALLEST_GAIN, scale, 0.0).expand(self.weight.shape[:2].numel())
        self.is_constant_only = self.weight.shape[2] > ridge.max_inputs
        self.rows_per_batch = min(ridge.rows, -(-_MOST_ROWS_PER_INPUT * self.weight.shape[2] // batches))
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        self.rows: list[tuple[Tensor, ...]] = []  # inputs, wanted outputs, and the range that is as good
        self.largest = self.change = 0.0
        self.shortage = ""  # why only the constant was fitted

    @property
    def has_constant(self) -> bool:
        """Whether a constant can be added to the outputs."""
        return self.layer.bias is not None or self.norm is not None

    def see(self, dense: StationBatch, narrow: StationBatch) -> None:
        """Add a batch: outputs of the layer in the dense network, and its inputs in the cut network."""
        outputs = by_position(self.layer, dense.value)
        chosen = spread(len(outputs), self.rows_per_batch).to(outputs.device)
        if not len(chosen):
            return
        wanted = double(outputs[chosen][:, self.kept])
        wanted = wanted * self.factors.to(wanted)
        scale, added = self.scale.to(wanted), self.shift.to(wanted).expand_as(wanted)
        before, after = dense.stream, narrow.stream
        if before is not None and after is not None:
            stream = double(by_position(self.layer, after)[chosen])
            lost = double(by_position(self.layer, before)[chosen][:, self.kept]) - stream
            wanted = wanted + torch.where(scale == 0, 0, lost / scale)
            added = added + stream
        inputs = double(rows_of(self.layer, narrow.value, dense.value, chosen))
        x, y = self._by_group(inputs), self._by_group(wanted)
        given = x @ self.weight.to(x).mT
        if self.layer.bias is not None:
            given = given + double(self.layer.bias).reshape(len(x), 1, -1)
        self.largest = max(self.largest, float(y.abs().max()))
        self.change = max(self.change, float((y - given).abs().max()))
        self.count += len(chosen)
        self._add(x=x.sum(1), y=y.sum(1))
        if not self.is_constant_only:
            self._add(xx=x.mT @ x, yx=y.mT @ x)
            if self.clip is not None and sum(rows[0].numel() for rows in self.rows) < _KEPT_INPUTS:
                bounds = (self._by_group(bound) for bound in self._bounds(wanted, scale, added))
                self.rows.append(tuple(part.float() for part in (x, y, *bounds)))

    def install(self) -> dict[str, Tensor]:
        """Fit, set the new values in the cut network, and return them by name."""
        if not self.count or self.change <= _UNCHANGED * self.largest:
            return {}
        found: dict[str, Tensor] = {}
        inputs = self.weight.shape[2]
        if not self.is_constant_only and self.count >= _ROWS_PER_INPUT * inputs:
            weight, constant = self._solve()
            found["weight"] = from_matrices(self.layer, weight)
        else:
            constant = self._mean("y") - _applied(self.weight, self._mean("x"))
            self.shortage = f"{self.name} ({self.count} rows for {inputs} inputs)"
        if self.layer.bias is not None:
            found["bias"] = constant.flatten()
        elif self.norm is not None:  # a contribution that is no longer added must not be subtracted
            found["mean"] = double(self.norm.running_mean).cpu() - constant.flatten()
        with torch.no_grad():
            for part, content in found.items():
                tensor = self.norm.running_mean if part == "mean" else getattr(self.layer, part)
                tensor.copy_(content)
        return {self.tensors[part]: content for part, content in found.items()}

    def _solve(self) -> tuple[Tensor, Tensor]:
        """Weight and constant from penalised least squares, repeated for outputs that are clipped."""
        x, y, square, cross = (self._mean(name) for name in ("x", "y", "xx", "yx"))
        x = x if self.has_constant else torch.zeros_like(x)
        square = covariance_of(square, x)
        scale = square.diagonal(dim1=1, dim2=2).mean(1)
        strength = torch.where(scale > 0, self.strength * scale, 1.0)[:, None, None]
        factors = torch.linalg.lu_factor(square + strength * torch.eye(square.shape[1], dtype=square.dtype))

        def solved(cross: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            cross = cross - y[:, :, None] * x[:, None] + strength * self.weight
            weight = torch.linalg.lu_solve(*factors, cross.mT).mT
            return weight, y * self.has_constant - _applied(weight, x)

        weight, constant = solved(cross, y)
        if self.rows:
            inputs, wanted, lowest, highest = (torch.cat(parts, 1) for parts in zip(*self.rows, strict=True))
            for _ in range(_CLIP_STEPS):
                given = torch.baddbmm(constant.to(inputs)[:, None], inputs, weight.to(inputs).mT)
                change = given.clamp_(lowest, highest).sub_(wanted)
                moments = double(change.mT @ inputs).cpu() / inputs.shape[1]
                weight, constant = solved(cross + moments, y + double(change.mean(1)).cpu())
        return weight, constant

    def _bounds(self, wanted: Tensor, scale: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """The range of outputs that are as good as the wanted ones, because they are clipped to the same value."""
        low, high = self.clip or (-torch.inf, torch.inf)
        goal = wanted * scale + added  # what is clipped
        lowest = torch.where(goal <= low, -torch.inf, goal.clamp(max=high))
        highest = torch.where(goal >= high, torch.inf, goal.clamp(min=low))
        is_clipped = (lowest < highest) & (scale != 0)
        ends = torch.where(is_clipped, (torch.stack([lowest, highest]) - added) / scale, wanted)
        return ends.amin(0), ends.amax(0)

    def _by_group(self, rows: Tensor) -> Tensor:
        """Rows of all groups of a convolution as ``(groups, rows, channels of a group)``."""
        return rows.reshape(len(rows), len(self.weight), -1).transpose(0, 1)

    def _add(self, **parts: Tensor) -> None:
        for name, part in parts.items():
            self.sums[name] = part + self.sums[name] if name in self.sums else part

    def _mean(self, name: str) -> Tensor:
        return (self.sums[name] / self.count).cpu()


def _applied(weight: Tensor, x: Tensor) -> Tensor:
    """Outputs of the groups of a layer for one row of inputs."""
    return (weight @ x[:, :, None])[:, :, 0]
