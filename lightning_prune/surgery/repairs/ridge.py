"""Making up for removed inputs: by their mean (FoldMean), or by what those that stay tell of them (Ridge)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.structure.graph import Axes
from lightning_prune.surgery.repairs.linear import (
    Consumer,
    as_matrices,
    consumers,
    double,
    from_matrices,
    positions_of,
    rows_of,
    spread,
)
from lightning_prune.surgery.repairs.repair import Repair, Run, require_positive
from lightning_prune.surgery.tensors import canonical, named

__all__ = ["FoldMean", "Ridge"]


@final
@dataclass(frozen=True)
class FoldMean(Repair):
    r"""Adds to the next layer's bias what the removed units :math:`R` gave on average, :math:`W_R \mu_R`.

    Exact for units that are constant. A layer that loses all its inputs becomes the mean of what it gave. What counts
    is what enters the next layer, after activation and normalisation.
    Under zero padding the mean is taken over all positions, those at the border included, so that even a constant
    channel leaves an error there. A layer without a bias that is followed directly by a batch norm has its mean moved
    there; without either nothing is done, with a warning.

    It covers Linear, Conv and ConvTranspose layers that are called as modules, and also grouped convolutions.

    Args:
        batches: Batches of training data that the means are taken over.
    """

    batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:
        """The shifted biases."""
        observed = [_Mean(consumer) for consumer in consumers(model, axes)]
        return _contents(model, observed, partial(run, model, self.batches), self)


@final
@dataclass(frozen=True)
class Ridge(Repair):
    r"""Refits the next layer's weights, so that from the inputs that stay it computes what it did from all of them.

    With :math:`\Sigma` the covariance of the inputs, :math:`S` those that stay and :math:`R` those that go,
    :math:`W_S \leftarrow W_S + W_R \Sigma_{RS} (\Sigma_{SS} + \lambda I)^{-1}`, and the bias takes the difference of
    the means: least squares with a penalty :math:`\lambda \lVert W_S' - W_S \rVert^2`. Inputs that say nothing of each
    other leave the weights as they are, which is `FoldMean`. :math:`\lambda` is relative to the mean variance of the
    inputs that stay. The statistics of all layers are those of the network before the cut.

    A convolution is a linear layer on its patches, of channels times kernel elements; a grouped one is one such layer
    for each group, and a transposed one a convolution of inputs with zeros in between. Layers with more than
    ``max_inputs`` inputs (of a group) and those that lose all of them get `FoldMean` instead. A layer without a bias
    that no batch norm follows is fitted without one, on second moments in place of covariances.

    Args:
        batches: Batches of training data that covariances are taken over; more than inputs divided by ``rows`` at
            least.
        strength: λ, above 0.
        rows: Patches (tokens, samples) per batch and layer, spread evenly where there are more.
        max_inputs: Largest number of inputs of a layer (of a group); the matrices take its square in memory.
    """

    batches: int = 32
    strength: float = 0.01
    rows: int = 1024
    max_inputs: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:
        """The refitted weights and shifted biases."""
        observed = [self._observation(consumer) for consumer in consumers(model, axes)]
        return _contents(model, observed, partial(run, model, self.batches), self)

    def _observation(self, consumer: Consumer) -> _Mean | _Covariance:
        fits = consumer.inputs <= self.max_inputs and len(consumer.kept) > 0
        return _Covariance(consumer, self.strength, self.rows) if fits else _Mean(consumer)


# -- what is observed -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Mean:
    """What the removed inputs of a layer add to its outputs on average."""

    consumer: Consumer
    total: Tensor | None = None
    count: int = 0
    _part: nn.Module | None = field(default=None, repr=False)

    def see(self, x: Tensor, y: Tensor) -> None:  # noqa: ARG002
        """Add one call's inputs."""
        batch = self.consumer.batched(x)
        mean = double(batch).mean(0, keepdim=True).cpu()
        if self._part is None:
            self._part = self._removed_part()
        # A linear map of the mean is the mean of the linear map: one sample is enough.
        out = self._part.forward(mean)
        # Unlike the outputs of a Linear, those of a convolution have positions.
        out = out[0].flatten(1).mean(1) if out.ndim > 2 else out[0]
        self.total = out * len(batch) + (0 if self.total is None else self.total)
        self.count += len(batch)

    def fit(self, constant: bool) -> tuple[dict[str, Tensor], Tensor]:  # noqa: ARG002
        """New contents of the layer's own weight (none) and what its outputs lose on average, shape ``(outputs,)``."""
        assert self.total is not None
        return {}, self.total / self.count

    def _removed_part(self) -> nn.Module:
        """The layer with the inputs that go alone: without the others, bias and hooks."""
        weight = self.consumer.weight.clone()
        weight.index_fill_(self.consumer.dim, torch.from_numpy(self.consumer.kept), 0)
        part = copy.copy(self.consumer.layer)
        vars(part)["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
        return part


@dataclass(eq=False)
class _Covariance:
    """First and second moments of a layer's inputs (of a convolution: its patches), by group."""

    consumer: Consumer
    strength: float
    rows: int
    count: int = 0
    total: Tensor | None = None
    square: Tensor | None = None

    def see(self, x: Tensor, y: Tensor) -> None:
        """Add one call's inputs."""
        layer = self.consumer.layer
        chosen = spread(positions_of(layer, y), self.rows).to(y.device)
        rows = double(rows_of(layer, x, y, chosen)).reshape(len(chosen), -1, self.consumer.inputs).transpose(0, 1)
        self.total = rows.sum(1) + (0 if self.total is None else self.total)
        self.square = rows.mT @ rows + (0 if self.square is None else self.square)
        self.count += len(chosen)

    def fit(self, constant: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The refitted weight and what the outputs lose on average, shape ``(outputs,)``.

        Args:
            constant: Whether a constant can be added to the outputs; else the fit goes without one.
        """
        assert self.total is not None
        assert self.square is not None
        layer, kept = self.consumer.layer, torch.from_numpy(self.consumer.kept)
        weight = as_matrices(layer)
        mean, moment = (self.total / self.count).cpu(), (self.square / self.count).cpu()
        covariance = moment - mean[:, :, None] * mean[:, None] if constant else moment
        channels = self.consumer.weight.shape[self.consumer.dim]
        stay = torch.zeros(channels, weight.shape[2] // channels, dtype=torch.bool)
        stay[kept] = True
        stay = stay.flatten()
        inner, cross = covariance[:, stay][:, :, stay], covariance[:, ~stay][:, :, stay]
        scale = inner.diagonal(dim1=1, dim2=2).mean(1)
        # Inputs that never change tell nothing: any strength above 0 leaves the weights as they are.
        strength = torch.where(scale > 0, self.strength * scale, 1.0)[:, None, None]
        penalized = inner + strength * torch.eye(inner.shape[1], dtype=inner.dtype)
        added = torch.linalg.solve(penalized, cross.mT @ weight[:, :, ~stay].mT).mT
        fitted = weight.clone()
        fitted[:, :, stay] += added
        lost = weight[:, :, ~stay] @ mean[:, ~stay, None] - added @ mean[:, stay, None]
        return {self.consumer.tensor("weight"): from_matrices(layer, fitted)}, lost.flatten()


def _contents(
    model: nn.Module, observed: Sequence[_Mean | _Covariance], run: Callable[[], None], repair: Repair
) -> dict[str, Tensor]:
    """Observe the run and give what the repair writes."""
    followers = _Followers(model)
    with ExitStack() as hooks:
        for handle in (*followers.watch([o.consumer for o in observed]), *map(_hook, observed)):
            hooks.callback(handle.remove)
        run()
    contents: dict[str, Tensor] = {}
    problems = []
    for observation in observed:
        consumer = observation.consumer
        if observation.count == 0:
            problems.append(f"{consumer.name} was never called as a module")
            continue
        bias: Tensor | None = consumer.layer._parameters["bias"]
        norm = followers.of(consumer)
        new, lost = observation.fit(constant=bias is not None or norm is not None)
        contents |= new
        if bias is not None:
            contents[consumer.tensor("bias")] = double(bias.detach()).cpu() + lost
        elif norm is not None:
            # What no longer arrives must no longer be subtracted.
            mean = named(model)[norm]
            contents[norm] = double(mean).cpu() - lost
        elif not new:
            problems.append(f"{consumer.name} has no bias, and no batch norm follows it directly")
    if problems:
        warnings.warn(f"{type(repair).__name__} leaves some layers as they are: {'; '.join(problems)}", stacklevel=5)
    return contents


def _hook(observation: _Mean | _Covariance) -> RemovableHandle:
    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel():
            observation.see(x, output)

    return observation.consumer.layer.register_forward_hook(see, with_kwargs=True)


class _Followers:
    """Which batch norm takes exactly what a layer gives, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        self.norms = {
            canonical(name): module
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        }
        self._given: Any = WeakTensorKeyDictionary()
        self._taken: dict[str, set[str | None]] = {name: set() for name in self.norms}

    def watch(self, consumers: Sequence[Consumer]) -> Iterator[RemovableHandle]:
        """Hooks that find out, while the network runs."""
        for consumer in consumers:
            yield consumer.layer.register_forward_hook(partial(self._give, consumer.name))
        for name, norm in self.norms.items():
            yield norm.register_forward_pre_hook(partial(self._take, name))

    def of(self, consumer: Consumer) -> str | None:
        """Name of the running mean behind a layer."""
        found = [name for name, sources in self._taken.items() if sources == {consumer.name}]
        return None if not found else f"{found[0]}.running_mean" if found[0] else "running_mean"

    def _give(self, name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        self._given[output] = (name, output._version)

    def _take(self, name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        source, version = self._given.get(args[0], (None, -1))
        # The version tells whether an activation has written over it in between.
        self._taken[name].add(source if args[0]._version == version else None)
