"""Selection by what the next layers can reconstruct: backward elimination on their inputs' covariance."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_prune.errors import listed
from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.data import DataPass
from lightning_prune.scoring.linear_maps import (
    as_matrices,
    by_position,
    covariance_of,
    double,
    is_transposed,
    positions_of,
    rows_of,
    scale_and_shift,
    spread,
)
from lightning_prune.scoring.statistics import ActivationStatistic, Half, Target
from lightning_prune.scoring.walk import Station, Walk, stations_of
from lightning_prune.structure.attention_calls import out_proj_called
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.layers import canonical

__all__ = ["Reconstruction", "ReconstructionStatistic"]

# Scores grow by this share at least from one removal to the next, so that ties keep the order of elimination.
_GROWTH = 1e-10
# Batches for the variance of the values that outputs are added to.
_STREAM_BATCHES = 4


@final
class ReconstructionStatistic(ActivationStatistic):
    """Covariance of the inputs of a group's next layers, and the variance of what their outputs become.

    Args:
        structure: The network's groups.
        criterion: The settings.
    """

    evidence = "an extra pass"

    def __init__(self, structure: Structure, criterion: Reconstruction) -> None:
        super().__init__(structure)
        self.criterion = criterion
        self.declare("seen", "sum", per_unit=False)
        self._weights: dict[str, Tensor] = {}  # of each layer, (groups, outputs, inputs · taps)
        self._places: dict[tuple[str, int], tuple[str, Tensor]] = {}  # layer and inputs of each source of a group
        self._taps: dict[str, int] = {}
        self._scales: dict[str, Tensor] = {}  # of the batch norms after these layers, (groups · outputs,)
        self._names: Mapping[nn.Module, str] = {}
        self._lost: Mapping[str, str] = {}

    @override
    def unhookable(self, model: nn.Module) -> dict[str, str]:
        names = {module: name for name, module in model.named_modules()}
        large: dict[str, str] = {}
        for layer, targets in self.targets(model).items():
            inputs = _inputs(layer)
            if inputs > self.criterion.max_inputs:
                reason = f"{names[layer]} has {inputs} inputs, more than max_inputs={self.criterion.max_inputs}"
                large |= dict.fromkeys((target.group for target in targets), reason)
        return super().unhookable(model) | large

    @override
    def collect(self, model: nn.Module, data: DataPass) -> None:
        """Run the network on the data, in eval mode."""
        self._names = {module: name for name, module in model.named_modules()}
        self._lost = self.unhookable(model)
        self._is_collecting = True
        handles = self.attach(model)
        self._half = 0  # moments of halves would take twice the memory
        try:
            data.run(model)
        finally:
            self._is_collecting = False
            self._names = {}
            for handle in handles:
                handle.remove()
        self._warn_of_few_rows(data.world_size)
        with out_proj_called(model):
            self._see_streams(model, data)

    def _warn_of_few_rows(self, processes: int) -> None:
        counts = {name: int(getattr(self, _moments(name))[0, -1, -1]) * processes for name in self._weights}
        few = [
            f"{name} ({count} rows for {self._weights[name].shape[2]} inputs)"
            for name, count in counts.items()
            if 0 < count < self._weights[name].shape[2]
        ]
        if few:
            warnings.warn(
                f"Reconstruction sees fewer rows than inputs, whose units seem to replace one another: {listed(few)}. "
                "Give more `batches` or `rows`.",
                stacklevel=3,
            )

    def _see_streams(self, model: nn.Module, data: DataPass) -> None:
        """Add what the outputs of the layers become: after their batch norms, and added to a residual stream."""
        calls = Counter(place.layer for place in stations_of(model, data.batch(0), point="output", call=data.call))
        names = {canonical(name): name for name in self._weights if calls[canonical(name)] == 1}
        if not names:
            return
        modules = {canonical(name): module for name, module in model.named_modules()}
        walk = Walk(model, data, [Station(layer, "output") for layer in names])
        for visit in walk.visits(range(min(_STREAM_BATCHES, len(data.batch_sizes)))):
            layer = visit.station.layer
            name, norm = names[layer], walk.consumer(layer).batch_norm(modules)
            scale, shift = scale_and_shift(norm)
            self._scales[name] = scale
            for batch in visit:
                value = by_position(modules[layer], double(batch.value))
                value = value * scale.to(value) + shift.to(value)
                if batch.stream is not None:
                    value = value + by_position(modules[layer], double(batch.stream))
                value = value[value.isfinite().all(1)]
                sums = torch.stack([value.new_full(value.shape[1:], len(value)), value.sum(0), value.square().sum(0)])
                self._add(_streams(name), sums)

    @override
    def observe(self, model: nn.Module) -> Iterator[RemovableHandle]:
        return super().observe(model) if self._is_collecting else iter(())

    @override
    def see(self, layer: nn.Module, activation: Tensor, output: Tensor, targets: Sequence[Target]) -> None:
        wanted = [target for target in targets if target.group not in self._lost]
        if not wanted:
            return
        name, chosen = self._names[layer], spread(positions_of(layer, output), self.criterion.rows)
        rows = double(rows_of(layer, activation.detach(), output, chosen.to(output.device)))
        if name not in self._weights:
            self._weights[name] = as_matrices(layer)
            self._taps[name] = 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)  # type: ignore[arg-type]
            groups, _, inputs = self._weights[name].shape
            self._add(_moments(name), rows.new_zeros(groups, inputs + 1, inputs + 1))
        rows = rows.reshape(len(rows), len(self._weights[name]), -1).transpose(0, 1)
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)  # sums and counts beside the products
        products = rows.mT @ rows
        is_finite = products.isfinite().all()
        self._add(_moments(name), torch.where(is_finite, products, 0))
        for group, source, inputs_of_units in wanted:
            self._places[group, source] = name, inputs_of_units.cpu()
            self.record(group, source, len(chosen), seen=torch.where(is_finite, 0.0, torch.nan))

    @override
    def estimate(self, name: str, half: Half = None) -> Tensor:
        """What removing each unit costs when it is its turn, averaged over the layers that take it."""
        sources = [(name, source) for source in range(len(self.sources[name]))]
        places = [self._places[source] for source in sources if source in self._places]
        problems = [problem for layer, inputs in places for problem in self._problems(layer, inputs)]
        return _eliminated(problems, self.structure.group(name).width) / len(places)

    def _problems(self, layer: str, inputs: Tensor) -> list[_Elimination]:
        """One for each group of a convolution."""
        weight, moments = self._weights[layer], getattr(self, _moments(layer)).cpu()
        moments = moments / moments[:, -1:, -1:]
        mean = moments[:, -1, :-1]
        covariance = covariance_of(moments[:, :-1, :-1], mean)
        # Every output counts as part of what the next layers see: normalised, and on a residual stream.
        gain, power = torch.ones(1), float(((weight @ covariance) * weight).sum())
        if layer in self._scales:
            count, sums, squares = getattr(self, _streams(layer)).cpu()
            variance = covariance_of((squares / count)[:, None, None], (sums / count)[:, None])
            gain, power = self._scales[layer].cpu(), float(variance.sum())
        gain = gain.expand(weight.shape[:2].numel()).reshape(len(weight), -1, 1)
        scale = covariance.diagonal(dim1=1, dim2=2).mean(1)
        # Constant inputs lose nothing that a bias cannot make up for.
        varies = scale[:, None, None] > 0
        weight = torch.where(varies, weight * gain / math.sqrt(power), 0) if power > 0 else torch.zeros_like(weight)
        strength = torch.where(scale > 0, self.criterion.strength * scale, 1.0)[:, None, None]
        penalized = covariance + strength * torch.eye(covariance.shape[1], dtype=covariance.dtype)
        channels = weight.shape[2] // self._taps[layer]
        found = []
        for group in range(len(weight)):
            here = inputs // channels == group
            units = here.any(1).nonzero()[:, 0]
            if len(units):
                within = inputs[here].reshape(len(units), -1) % channels
                columns = within[:, :, None] * self._taps[layer] + torch.arange(self._taps[layer])
                found.append(_Elimination(weight[group], penalized[group], units, columns.flatten(1)))
        return found

    def _add(self, name: str, value: Tensor) -> None:
        """Add to a state that processes sum up, and that is in no checkpoint: it is collected where it is used."""
        if name not in self._defaults:
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum", persistent=False)
            setattr(self, name, torch.zeros_like(value))
        state = getattr(self, name)
        state += value


class _Elimination:
    """Backward elimination of the inputs of a linear map, by the exact increase of its penalized squared error.

    Args:
        weight: Shape ``(outputs, inputs)``; the error of each output is weighed already.
        penalized: Covariance of the inputs with the penalty on its diagonal.
        units: Units that enter here.
        columns: Inputs of each of them, shape ``(units, k)``.
    """

    def __init__(self, weight: Tensor, penalized: Tensor, units: Tensor, columns: Tensor) -> None:
        self.weight, self.units, self.columns = weight.clone(), units, columns
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(penalized))

    def costs(self) -> Tensor:
        """Increase of the error if one of the remaining units goes and the others take over what they can."""
        blocks = self.inverse[self.columns[:, :, None], self.columns[:, None]]
        weights = self.weight.T[self.columns]
        costs: Tensor = (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))
        return costs

    def remove(self, unit: int) -> None:
        """Let a unit go."""
        row = (self.units == unit).nonzero()[:, 0]
        for columns in self.columns[row]:
            shares = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns])
            self.weight -= self.weight[:, columns] @ shares
            self.inverse -= self.inverse[:, columns] @ shares
        stays = self.units != unit
        self.units, self.columns = self.units[stays], self.columns[stays]


def _eliminated(problems: Sequence[_Elimination], width: int) -> Tensor:
    """Scores: the error that each unit adds when it goes, as the cheapest of those left; never less than before."""
    scores, left, least = torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.bool), 0.0
    for _ in range(width):
        costs = torch.zeros(width, dtype=torch.float64)
        for problem in problems:
            costs.index_add_(0, problem.units, problem.costs())
        unit = int(costs.masked_fill(~left, torch.inf).argmin())
        least = max(float(costs[unit]), least * (1 + _GROWTH), 0.0)
        scores[unit], left[unit] = least, False
        for problem in problems:
            problem.remove(unit)
    return scores


def _inputs(layer: Any) -> int:
    """Number of inputs that an output is computed from."""
    if is_transposed(layer):
        return int(layer.weight.numel() // layer.weight.shape[1] // layer.groups)
    return int(layer.weight[0].numel())


def _moments(layer: str) -> str:
    return f"moments of {layer}"


def _streams(layer: str) -> str:
    return f"streams of {layer}"


@final
@dataclass(frozen=True)
class Reconstruction(ObservingCriterion):
    r"""What the next layers lose if a unit goes and the other units take over what they can.

    With :math:`\Sigma` the covariance of the next layer's inputs, :math:`W` its weights and
    :math:`A = \Sigma + \lambda I`, taking out the inputs :math:`k` of a unit raises the least squared error by

    .. math:: \mathrm{tr}\big(D \, W_k \, ((A^{-1})_{kk})^{-1} \, W_k^\top \, D\big) / P

    where the diagonal matrix :math:`D` has the scales :math:`\gamma / \sigma` of a batch norm after the layer (1
    without one), and :math:`P` is the variance, summed over channels, of what the outputs become after the norm, added
    to the residual stream if there is one. The unit with the lowest value goes first; then the weights of the others
    are refitted, :math:`W \leftarrow W - W_k ((A^{-1})_{kk})^{-1} (A^{-1})_{k\cdot}`, and the next one is chosen
    (backward elimination, as of "optimal brain surgeon": Hassibi and Stork, 1993, by units). The score of a unit is the
    value at its turn, or the highest one before it: the share of the variance on the stream (of the layer's outputs,
    if there is none) that is lost with it. So scores of different groups are comparable. Which weights stay is for a
    repair: `Ridge` or `SequentialRidge`.

    Several next layers are averaged. A constant that outputs lose is taken to be made up for by a bias or a norm.
    Computed in an extra pass over training data, in eval mode; no labels are needed. The elimination takes time
    :math:`O(m N^2)` for :math:`m` units and :math:`N` inputs (channels times kernel elements), and :math:`8 N^2` bytes.

    Args:
        batches: Batches of training data; together with ``rows`` at least as many rows as inputs, else a warning names
            the layers.
        strength: λ relative to the mean variance of the inputs, above 0.
        rows: Patches (tokens, samples) per batch and layer, spread evenly where there are more.
        max_inputs: Groups that enter a layer with more inputs (of a group of its channels) are not scored.

    Raises:
        ValueError: If a setting is out of range.
    """

    comparable: ClassVar[bool] = True

    batches: int = 16
    strength: float = 0.01
    rows: int = 1024
    max_inputs: int = 4608

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batches", "strength", "rows", "max_inputs"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Reconstruction: expected `{name}` above 0, got {getattr(self, name)}.")

    @property
    @override
    def waived(self) -> Mapping[str, str]:
        return {"merges": "second moments are collected where they are used, and are not part of a saved state"}

    @property
    @override
    def amount(self) -> Mapping[str, int]:
        return {"batches": self.batches}

    def statistic(self, structure: Structure) -> ReconstructionStatistic:
        """The covariance of the next layers' inputs."""
        return ReconstructionStatistic(structure, self)
