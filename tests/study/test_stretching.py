"""Schedules of recipes for runs of another length: the shape over the run stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_prune.study.stretching import stretched


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("CosineAnnealingLR", {"T_max": 10}),
        ("ExponentialLR", {"gamma": 0.8}),
        ("LinearLR", {"total_iters": 10}),
        ("MultiStepLR", {"milestones": [5, 8]}),
        ("PolynomialLR", {"total_iters": 10}),
        ("StepLR", {"step_size": 5}),
        ("CosineAnnealingWarmRestarts", {"T_0": 5}),
        ("ConstantLR", {"total_iters": 5}),
        ("OneCycleLR", {"total_steps": 101, "max_lr": 0.1}),
    ],
)
def test_a_run_of_twice_the_length_has_the_same_rate_at_the_same_share(name: str, arguments: dict[str, Any]) -> None:
    recipe = {"lr_scheduler": {"class_path": f"torch.optim.lr_scheduler.{name}", "init_args": arguments}}

    def rates(arguments: dict[str, Any], epochs: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **arguments)
        found = []
        for _ in range(epochs):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    epochs = arguments.get("total_steps", 11) - 1
    longer = stretched(recipe, 2.0)["lr_scheduler"]["init_args"]
    assert rates(longer, 2 * epochs)[::2] == pytest.approx(rates(arguments, epochs), abs=0.002)
    assert longer != arguments
    assert stretched(recipe, 1.0) == recipe


def test_other_keys_are_scaled_and_the_recipe_stays() -> None:
    recipe = {"model": {"class_path": "Net", "init_args": {"warmup": 3, "drops": [10, 20], "share": 0.5}}}
    longer = stretched(recipe, 1.5, ["model.warmup", "model.drops"])
    assert longer["model"]["init_args"] == {"warmup": 4, "drops": [15, 30], "share": 0.5}
    assert recipe["model"]["init_args"]["warmup"] == 3


def test_what_cannot_be_stretched_is_refused() -> None:
    with pytest.raises(
        ValueError, match="expected an `lr_scheduler` that can be stretched to another length, got Mine"
    ):
        stretched({"lr_scheduler": {"class_path": "my.Mine"}}, 2.0)
    with pytest.raises(ValueError, match=r"--stretch model.lr: expected a number .* got None"):
        stretched({"model": {"class_path": "Net"}}, 2.0, ["model.lr"])
