"""Adding parameter groups to an optimizer and its schedulers during training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

__all__ = ["add_group", "without_optimizer"]

# Attributes of PyTorch's schedulers with one value per group.
_PER_GROUP = ("base_lrs", "lr_lambdas", "max_lrs", "min_lrs", "_last_lr")


def without_optimizer(trainer: Trainer, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Parameters without an optimizer, by name."""
    given = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    return {name: parameter for name, parameter in parameters.items() if id(parameter) not in given}


def add_group(trainer: Trainer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Add a parameter group to the run's only optimizer, with the current options of its first group.

    Args:
        trainer: The run.
        parameters: Parameters of the group, by name; may be empty.
    """
    (optimizer,) = trainer.optimizers
    groups = len(optimizer.param_groups)
    options = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    is_named = options.pop("param_names", None) is not None
    optimizer.add_param_group({**options, "params": list(parameters.items() if is_named else parameters.values())})
    for config in trainer.lr_scheduler_configs:
        for scheduler in _all(config.scheduler):
            if getattr(scheduler, "optimizer", None) is optimizer:
                _extend(scheduler, groups)


def _all(scheduler: Any) -> Iterator[Any]:
    """A scheduler and its nested schedulers."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _all(part)


def _extend(scheduler: Any, groups: int) -> None:
    """Extend a scheduler by a group that is treated like the first one."""
    for name in _PER_GROUP:
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == groups:
            setattr(scheduler, name, [*values, values[0]])
