"""Learning-rate schedules of a recipe for a run of another length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from lightning_prune.study.recipe import Config, get, set_value

__all__ = ["stretched"]


def stretched(recipe: Config, ratio: float, keys: Sequence[str] = ()) -> Config:
    """The recipe for a run that is ``ratio`` times as long, with the ``lr_scheduler`` stretched alike.

    A cosine that ended with the run still does, a step after half of it still comes after half.

    Args:
        recipe: The recipe; unchanged.
        ratio: New length over old length, above 0.
        keys: Further keys with lengths: numbers or lists of numbers.

    Raises:
        ValueError: If the scheduler is not known, or a key has no length.
    """
    config = deepcopy(recipe)
    scheduler = config.get("lr_scheduler")
    if scheduler is not None:
        name = str(scheduler["class_path"] if isinstance(scheduler, Mapping) else scheduler).rpartition(".")[2]
        if name not in _LENGTHS:
            raise ValueError(
                f"controls: expected an `lr_scheduler` that can be stretched to another length, got {name}. Known are "
                f"{', '.join(_LENGTHS)}. Use one of these, or let the module's `configure_optimizers` take the length "
                "from the trainer."
            )
        for argument, change in _LENGTHS[name].items():
            value = get(config, f"lr_scheduler.{argument}")
            if value is not None:
                set_value(config, f"lr_scheduler.{argument}", change(value, ratio))
    for key in keys:
        value = get(config, key)
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
            raise ValueError(f"--stretch {key}: expected a number or a list of numbers in the recipe, got {value!r}.")
        set_value(config, key, _longer(value, ratio))
    return config


def _longer(value: Any, ratio: float) -> Any:
    if isinstance(value, list):
        return [_longer(one, ratio) for one in value]
    return max(round(value * ratio), 1 if value else 0) if isinstance(value, int) else value * ratio


def _slower(gamma: float, ratio: float) -> float:
    """The factor for each of more steps that come to the same."""
    return float(gamma ** (1 / ratio))


#: Arguments of PyTorch's and Lightning's schedulers that depend on the length of the run, and how.
_LENGTHS: dict[str, dict[str, Callable[[Any, float], Any]]] = {
    "ConstantLR": {"total_iters": _longer},
    "CosineAnnealingLR": {"T_max": _longer},
    "CosineAnnealingWarmRestarts": {"T_0": _longer},
    "CyclicLR": {"step_size_up": _longer, "step_size_down": _longer},
    "ExponentialLR": {"gamma": _slower},
    "LinearLR": {"total_iters": _longer},
    "MultiStepLR": {"milestones": _longer},
    "OneCycleLR": {"total_steps": _longer, "epochs": _longer},
    "PolynomialLR": {"total_iters": _longer},
    "ReduceLROnPlateau": {"patience": _longer, "cooldown": _longer},
    "StepLR": {"step_size": _longer},
}
