"""Averaged copies of the network in Lightning's weight averaging callbacks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from lightning_prune.packages import both
from lightning_prune.structure.sharding import whole

__all__ = ["ManualAverages", "averages", "count_from", "counts", "validation_weights"]

# Elements of each parameter that are compared.
_COMPARED = 64


def averages(trainer: Trainer) -> tuple[nn.Module, ...]:
    """The averaged copies, in the order of their callbacks."""
    models = [(callback, callback._average_model) for callback in _averaging(trainer)]
    return tuple(model.module if isinstance(callback, both(WeightAveraging)) else model for callback, model in models)


def counts(trainer: Trainer) -> list[int]:
    """Number of averaged networks of each copy."""
    return [0 if (count := _count(callback)) is None else int(count) for callback in _averaging(trainer)]


def count_from(trainer: Trainer, numbers: Sequence[int]) -> None:
    """Set the number of averaged networks of each copy."""
    for callback, number in zip(_averaging(trainer), numbers, strict=True):
        count = _count(callback)
        if count is not None:  # else SWA has not started
            count.fill_(number)


def _averaging(trainer: Trainer) -> list[Any]:
    kinds: tuple[type[Any], ...] = (*both(WeightAveraging), *both(StochasticWeightAveraging))
    found = [callback for callback in trainer.callbacks if isinstance(callback, kinds)]  # type: ignore[attr-defined]
    return [callback for callback in found if callback._average_model is not None]


def _count(callback: Any) -> torch.Tensor | None:
    inside = isinstance(callback, both(WeightAveraging))
    return cast(torch.Tensor | None, (callback._average_model if inside else callback).n_averaged)


@contextmanager
def validation_weights(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Give the network the weights that are validated, averaged ones if Lightning averages, within the context.

    Lightning saves the other ones with ``weights_only``.
    """
    swapping = [callback for callback in _averaging(trainer) if isinstance(callback, both(WeightAveraging))]
    for callback in swapping:
        callback._swap_models(module)
    try:
        yield
    finally:
        for callback in reversed(swapping):
            callback._swap_models(module)


class ManualAverages:
    """Detects averages that the user's code keeps inside the module, which cannot be cut.

    An average mirrors a trained part of the network and changes although no optimizer steps it (unlike a teacher).

    Args:
        trainer: The run.
        module: The LightningModule.
        cut: Names of the parameters that cuts change.

    Attributes:
        step: Number of optimizer steps at creation.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, cut: Collection[str]) -> None:
        self._trainer, self.step = trainer, trainer.global_step
        self._mirrors = _mirrors(trainer, module, cut)  # parts that may be averages
        self._parts = {name: module.get_submodule(name) for name in self._mirrors}
        self._before = {name: _sample(part) for name, part in self._parts.items()}

    @property
    def suspects(self) -> str:
        """Description of the parts that may be averages, and what they mirror; empty if there are none."""
        return self._describe(self._mirrors)

    def found(self) -> str:
        """Description of the parts that have changed since, and what they mirror; empty if there are none."""
        stepped = _stepped(self._trainer)
        moved = [
            name
            for name, part in self._parts.items()
            if not any(id(p) in stepped for p in part.parameters())
            and any(not torch.equal(now, then) for now, then in zip(_sample(part), self._before[name], strict=True))
        ]
        return self._describe(moved)

    def _describe(self, names: Collection[str]) -> str:
        return ", ".join(f"`{name}` (of `{self._mirrors[name]}`)" for name in names)


def _mirrors(trainer: Trainer, module: nn.Module, cut: Collection[str]) -> dict[str, str]:
    """Parts that no optimizer steps, each with a trained part of the same names and shapes."""
    stepped, found = _stepped(trainer), dict[str, str]()
    trained: dict[tuple[tuple[str, torch.Size], ...], str] = {}
    parts = {name: dict(part.named_parameters()) for name, part in module.named_modules() if name}
    for name, parameters in parts.items():
        if any(id(p) in stepped for p in parameters.values()) and any(f"{name}.{own}" in cut for own in parameters):
            trained.setdefault(_form(parameters), name)
    for name, parameters in parts.items():
        is_inside = any(name.startswith(f"{other}.") for other in found)
        if not is_inside and _form(parameters) in trained and not any(id(p) in stepped for p in parameters.values()):
            found[name] = trained[_form(parameters)]
    return found


def _stepped(trainer: Trainer) -> set[int]:
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return {id(parameter) for group in groups for parameter in group["params"] if parameter.requires_grad}


def _form(parameters: dict[str, nn.Parameter]) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, parameter.shape) for name, parameter in parameters.items())


def _sample(part: nn.Module) -> list[torch.Tensor]:
    return [whole(parameter.detach()).flatten()[:_COMPARED].clone() for parameter in part.parameters()]
