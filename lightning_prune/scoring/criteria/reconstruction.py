"""Selection by what the next layers can reconstruct: backward elimination on their inputs' covariance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_prune.scoring.criterion import ObservingCriterion
from lightning_prune.scoring.data import DataPass
from lightning_prune.scoring.linear_maps import as_matrices, double, is_transposed, positions_of, rows_of, spread
from lightning_prune.scoring.statistics import ActivationStatistic, Half, Target
from lightning_prune.structure.graph import Structure

__all__ = ["Reconstruction", "ReconstructionStatistic"]

# Scores grow by this share at least from one removal to the next, so that ties keep the order of elimination.
_GROWTH = 1e-10
# Outputs with less of the largest variance count as constant.
_CONSTANT = 1e-12


@final
class ReconstructionStatistic(ActivationStatistic):
    """Covariance of the inputs of the layers that take a group's units, and what removing each unit costs them.

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
            self._add_moments(name, rows.new_zeros(groups, inputs + 1, inputs + 1))
        rows = rows.reshape(len(rows), len(self._weights[name]), -1).transpose(0, 1)
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)  # sums and counts beside the products
        products = rows.mT @ rows
        is_finite = products.isfinite().all()
        moments = getattr(self, _moments(name))
        moments += torch.where(is_finite, products, 0)
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
        covariance = moments[:, :-1, :-1] - mean[:, :, None] * mean[:, None]
        # Every output counts by the share of its variance that is lost.
        variance = ((weight @ covariance) * weight).sum(2)
        counts = torch.where(variance > _CONSTANT * variance.max(), 1 / variance, 0.0)
        weight = weight * (counts / (counts > 0).sum().clamp(min=1)).sqrt()[:, :, None]
        scale = covariance.diagonal(dim1=1, dim2=2).mean(1)
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

    def _add_moments(self, layer: str, zeros: Tensor) -> None:
        """A state that processes sum up, and that is in no checkpoint: it is collected where it is used."""
        self.add_state(_moments(layer), torch.zeros(()), dist_reduce_fx="sum", persistent=False)
        setattr(self, _moments(layer), zeros)


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


@final
@dataclass(frozen=True)
class Reconstruction(ObservingCriterion):
    r"""What the next layers lose if a unit goes and the other units take over what they can.

    With :math:`\Sigma` the covariance of the next layer's inputs, :math:`W` its weights, each row divided by the
    standard deviation of its output, and :math:`A = \Sigma + \lambda I`, taking out the inputs :math:`k` of a unit
    raises the least squared error by

    .. math:: \mathrm{tr}\big(W_k \, ((A^{-1})_{kk})^{-1} \, W_k^\top\big) / n

    for :math:`n` outputs. The unit with the lowest value goes first; then the weights of the others are refitted,
    :math:`W \leftarrow W - W_k ((A^{-1})_{kk})^{-1} (A^{-1})_{k\cdot}`, and the next one is chosen (backward
    elimination, as of "optimal brain surgeon": Hassibi and Stork, 1993, by units). The score of a unit is the value
    at its turn, or the highest one before it: the share of the next layer's output variance that is lost with it.
    So scores of different groups are comparable. Which weights stay is for a repair: `Ridge` or
    `SequentialRidge`.

    Several next layers are averaged. A constant that outputs lose is taken to be made up for by a bias or a norm.
    Computed in an extra pass over training data, in eval mode; no labels are needed. The elimination takes time
    :math:`O(m N^2)` for :math:`m` units and :math:`N` inputs (channels times kernel elements), and :math:`8 N^2` bytes.

    Args:
        batches: Batches of training data; together with ``rows`` more rows than inputs.
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
