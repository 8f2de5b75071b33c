"""Statistics of the inputs of layers that lose inputs, and the new contents that repairs give these layers."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import override

from lightning_prune.scoring.linear_maps import (
    as_matrices,
    covariance_of,
    double,
    from_matrices,
    positions_of,
    rows_of,
    spread,
)
from lightning_prune.structure.attention_calls import out_proj_called
from lightning_prune.surgery.repairs.linear import Consumer
from lightning_prune.surgery.tensors import canonical, named

__all__ = ["InputMean", "InputMoments", "Observation", "observed_contents"]


@dataclass(eq=False)
class Observation(ABC):
    """Statistics of one layer's inputs, and the fit of a repair to them.

    Attributes:
        consumer: The layer.
        count: Number of observed rows.
    """

    consumer: Consumer
    count: int = field(default=0, init=False)

    @abstractmethod
    def see(self, x: Tensor, y: Tensor) -> None:
        """Add the inputs of one call."""

    @abstractmethod
    def fit(self, constant: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The layer's new weight and the mean loss of its outputs, shape ``(outputs,)``.

        Args:
            constant: Whether a constant can be added to the outputs; if not, the fit has none.
        """


@dataclass(eq=False)
class InputMean(Observation):
    """The mean contribution of a layer's removed inputs to its outputs."""

    total: Tensor | None = field(default=None, init=False)
    _part: nn.Module | None = field(default=None, init=False, repr=False)

    @override
    def see(self, x: Tensor, y: Tensor) -> None:
        batch = self.consumer.batched(x)
        mean = double(batch).mean(0, keepdim=True).cpu()
        if self._part is None:
            self._part = self._removed_part()
        # The linear map of the mean is the mean of the linear map, so one sample is enough.
        out = self._part.forward(mean)
        # Outputs of a convolution have positions, unlike those of a Linear layer.
        out = out[0].flatten(1).mean(1) if out.ndim > 2 else out[0]
        self.total = out * len(batch) + (0 if self.total is None else self.total)
        self.count += len(batch)

    @override
    def fit(self, constant: bool) -> tuple[dict[str, Tensor], Tensor]:
        assert self.total is not None
        return {}, self.total / self.count

    def _removed_part(self) -> nn.Module:
        """The layer with only its removed inputs, without bias and hooks."""
        weight = self.consumer.weight.clone()
        weight.index_fill_(self.consumer.dim, torch.from_numpy(self.consumer.kept), 0)
        part = copy.copy(self.consumer.layer)
        vars(part)["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
        return part


@dataclass(eq=False)
class InputMoments(Observation):
    """First and second moments of a layer's inputs (for a convolution: its patches), by group.

    Attributes:
        rows: Rows per call, spread evenly if there are more.
    """

    rows: int
    total: Tensor | None = field(default=None, init=False)
    square: Tensor | None = field(default=None, init=False)

    @override
    def see(self, x: Tensor, y: Tensor) -> None:
        layer = self.consumer.layer
        chosen = spread(positions_of(layer, y), self.rows).to(y.device)
        rows = double(rows_of(layer, x, y, chosen)).reshape(len(chosen), -1, self.consumer.inputs).transpose(0, 1)
        self.total = rows.sum(1) + (0 if self.total is None else self.total)
        self.square = rows.mT @ rows + (0 if self.square is None else self.square)
        self.count += len(chosen)

    @override
    def fit(self, constant: bool) -> tuple[dict[str, Tensor], Tensor]:
        assert self.total is not None
        assert self.square is not None
        layer, kept = self.consumer.layer, torch.from_numpy(self.consumer.kept)
        weight = as_matrices(layer)
        mean, moment = (self.total / self.count).cpu(), (self.square / self.count).cpu()
        covariance = covariance_of(moment, mean) if constant else moment
        channels = self.consumer.weight.shape[self.consumer.dim]
        stays = torch.zeros(channels, weight.shape[2] // channels, dtype=torch.bool)
        stays[kept] = True
        stays = stays.flatten()
        added = self.added(weight[:, :, ~stays], covariance, stays)
        fitted = weight.clone()
        fitted[:, :, stays] += added
        lost = weight[:, :, ~stays] @ mean[:, ~stays, None] - added @ mean[:, stays, None]
        return {self.consumer.tensor("weight"): from_matrices(layer, fitted)}, lost.flatten()

    @abstractmethod
    def added(self, removed: Tensor, covariance: Tensor, stays: Tensor) -> Tensor:
        """The change of the remaining inputs' weights, ``(groups, outputs, remaining)``.

        Args:
            removed: Weights of the removed inputs, ``(groups, outputs, removed)``.
            covariance: Covariance of all inputs, ``(groups, inputs, inputs)``; without a constant, second moments.
            stays: Which inputs remain; channels of convolutions with all their kernel elements.
        """


def observed_contents(
    model: nn.Module, observed: Sequence[Observation], run: Callable[[], None], repair: str
) -> dict[str, Tensor]:
    """Observe a run and fit: new weights, biases and running means, by name.

    The difference of means is added to the layer's bias or to the batch norm after it; a warning names layers that
    have neither.

    Args:
        model: The network before the cut.
        observed: Statistics of each layer that loses inputs.
        run: Runs the network on the data.
        repair: Name of the repair, for the warning.
    """
    followers = _Followers(model)
    with ExitStack() as hooks:
        hooks.enter_context(out_proj_called(model))
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
            # The norm must not subtract a contribution that is no longer added.
            mean = named(model)[norm]
            contents[norm] = double(mean).cpu() - lost
        elif not new:
            problems.append(f"{consumer.name} has no bias, and no batch norm follows it directly")
    if problems:
        warnings.warn(f"{repair} leaves some layers unchanged: {'; '.join(problems)}", stacklevel=5)
    return contents


def _hook(observation: Observation) -> RemovableHandle:
    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel():
            observation.see(x, output)

    return observation.consumer.layer.register_forward_hook(see, with_kwargs=True)


class _Followers:
    """Finds the batch norm whose input is exactly a layer's output."""

    def __init__(self, model: nn.Module) -> None:
        self.norms = {
            canonical(name): module
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        }
        self._given: Any = WeakTensorKeyDictionary()
        self._taken: dict[str, set[str | None]] = {name: set() for name in self.norms}

    def watch(self, consumers: Sequence[Consumer]) -> Iterator[RemovableHandle]:
        """Hooks that record this while the network runs."""
        for consumer in consumers:
            yield consumer.layer.register_forward_hook(partial(self._give, consumer.name))
        for name, norm in self.norms.items():
            yield norm.register_forward_pre_hook(partial(self._take, name))

    def of(self, consumer: Consumer) -> str | None:
        """Name of the running mean after a layer."""
        found = [name for name, sources in self._taken.items() if sources == {consumer.name}]
        return None if not found else f"{found[0]}.running_mean" if found[0] else "running_mean"

    def _give(self, name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        self._given[output] = (name, output._version)

    def _take(self, name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        source, version = self._given.get(args[0], (None, -1))
        # The version shows whether an in-place activation has changed it in between.
        self._taken[name].add(source if args[0]._version == version else None)
