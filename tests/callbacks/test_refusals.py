"""Bad input ends before any weight has changed, in words that say what was expected, what came and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import (
    Contribution,
    ContributionPruning,
    LinearSchedule,
    MagnitudePruning,
    NetworkSlimming,
    OneShot,
    Ridge,
    StructuredPruning,
    XGBPruning,
)
from lightning_prune.planning import NoEffectWarning
from lightning_prune.surgery import OptimizerRefusedError
from tests.callbacks.networks import Net, equal, fit, hooks, make, refit, trainer, weights, widths

SCHEDULE = OneShot(at=1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "exactly one of `pruning_ratio`.*got none"),
        ({"pruning_ratio": 0.5, "budget": 0.5}, "exactly one of.*got both"),
        ({"pruning_ratio": 1.0}, r"`pruning_ratio`.*\[0, 1\), got 1.0"),
        ({"pruning_ratio": -0.1}, r"\[0, 1\), got -0.1"),
        ({"pruning_ratio": 50}, "did you mean 0.5"),
        ({"pruning_ratio": "half"}, "a number in"),
        ({"budget": 1.5}, "budget"),
        ({"budget": 0}, "budget"),
        ({"budget": {"flops": 0.5}}, '"units", "params", "macs"'),
        ({"budget": {"macs": 0.5, "flops": 0.5}}, "got 'flops'"),
        ({"pruning_ratio": 0.5, "scope": "everywhere"}, '"local".*"global"'),
    ],
)
def test_amounts_are_refused_at_once(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        StructuredPruning(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"layers": 3}, {"ignore": ["first", 4]}, {"extensions": True}, {"extensions": "ridge"}, {"extensions": Ridge()}],
)
def test_an_argument_of_another_type_is_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"StructuredPruning: expected `{next(iter(arguments))}` to be"):
        StructuredPruning(0.5, **arguments)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (StructuredPruning, "schedule"),
        (StructuredPruning, "criterion"),
        (NetworkSlimming, "penalty"),
        (XGBPruning, "surrogate"),
        (MagnitudePruning, "granularity"),
    ],
)
def test_what_is_no_part_of_a_method_is_named(kind: type, name: str) -> None:
    with pytest.raises(TypeError, match=rf"{kind.__name__}: expected `{name}` to be an instance of .*, got 'L1'"):
        kind(**({} if kind is MagnitudePruning else {"pruning_ratio": 0.5}), **{name: "L1"})


def test_what_is_no_extension_is_named() -> None:
    with pytest.raises(TypeError, match="expected repairs and cut extensions in `extensions`, got 1"):
        StructuredPruning(0.5, extensions=[Ridge(), 1])  # type: ignore[list-item]


def test_nothing_to_do_is_said() -> None:
    with pytest.warns(NoEffectWarning, match="pruning_ratio=0"):
        StructuredPruning(0.0)


class Bare(LightningModule):
    """One layer from input to output: nothing to prune."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)

    training_step = Net.training_step
    validation_step = Net.validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Unfit(Net):
    """Its example does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 7)


class Strange(Net):
    """Takes nothing that a batch holds."""

    def __init__(self) -> None:
        super().__init__(example=False)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * scale + shift)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0], torch.ones(6), torch.zeros(6)), batch[1])


class Flat(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Diverged(Net):
    """Activations are NaN in every pass from the start of training."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0] * torch.nan), batch[1])
        return loss.nan_to_num(0.0) * 0


def structured(**options: Any) -> StructuredPruning:
    return StructuredPruning(**({"schedule": SCHEDULE, "pruning_ratio": 0.5} | options))


CASES: dict[str, tuple[Any, Any, str]] = {
    "count too large": (
        Net,
        lambda: structured(pruning_ratio=None, budget={"params": 10**6}),
        "larger than the network",
    ),
    "out of reach": (Net, lambda: structured(pruning_ratio=None, budget={"params": 3}), "cannot be reached"),
    "no such layer": (Net, lambda: structured(layers="sekond"), "matches no layer. Did you mean second"),
    "no such layer to ignore": (Net, lambda: structured(ignore="*.conv?"), "ignore=.*matches no layer"),
    "the output": (Net, lambda: structured(layers="head"), "head.*What can be pruned: first, second"),
    "everything ignored": (Net, lambda: structured(ignore=["first", "second"]), "leave nothing to prune"),
    "nothing prunable": (Bare, structured, "nothing that can be pruned"),
    "example does not fit": (Unfit, structured, "fails on the example|shape|mat1"),
    "no example": (Strange, structured, "example_input_array"),
    "never fires": (Net, lambda: structured(schedule=OneShot(at=50)), "never fires"),
    "ambiguous unit": (Net, lambda: structured(schedule=LinearSchedule(start=5, end=9)), "unit"),
    "optimizer": (Flat, structured, "LBFGS"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_before_any_weight_changes(case: str, tmp_path: Path) -> None:
    build, callback, text = CASES[case]
    model = make(build)
    before = weights(model)
    options: dict[str, Any] = {"epochs": -1, "max_steps": 6} if case == "ambiguous unit" else {"epochs": 3}
    run = trainer(tmp_path, callback(), **options)
    with pytest.raises((ValueError, OptimizerRefusedError), match=text):
        refit(run, model, validate=False)
    assert equal(weights(model), before)
    assert run.global_step == 0
    assert hooks(model) == 0


def test_nan_activations(tmp_path: Path) -> None:
    model = make(Diverged, norm=False)
    before = weights(model)
    pruner = ContributionPruning(0.5, criterion=Contribution(every_n_batches=1), schedule=SCHEDULE)
    with pytest.warns(RuntimeWarning, match="NaN or infinite"), pytest.raises(FloatingPointError, match="second"):
        fit(tmp_path, model, pruner, validate=False)
    assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in weights(model).items()}
    assert hooks(model) == 0


def test_nan_weights(tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        model.first.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="first"):
        fit(tmp_path, model, structured(), validate=False)
    assert widths(model) == (12, 8)


def test_a_folder_with_another_runs_report(tmp_path: Path) -> None:
    fit(tmp_path, make(), structured(dirpath=str(tmp_path / "mine")), epochs=2)
    mine = json.loads((tmp_path / "mine" / "report.json").read_text())
    model = make()
    before = weights(model)
    with pytest.raises(FileExistsError, match=r"dirpath.*another run's report"):
        fit(tmp_path, model, structured(dirpath=str(tmp_path / "mine")), epochs=2)
    assert equal(weights(model), before)
    assert json.loads((tmp_path / "mine" / "report.json").read_text()) == mine
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        fit(tmp_path, make(), structured(dirpath=str(tmp_path / "file" / "inside")), epochs=2)
    # Without a folder of the user's choice a second report goes beside the first.
    for _ in range(2):
        fit(tmp_path / "logs", make(), structured(), epochs=2)
    assert (tmp_path / "logs" / "report.json").exists()
    assert (tmp_path / "logs" / "pruning-2" / "report.json").exists()


def test_surroundings(tmp_path: Path) -> None:
    model = make()
    run = trainer(tmp_path, structured(), ContributionPruning(0.5))
    with pytest.raises(ValueError, match="expected `layers` in both"):
        refit(run, model)
    with pytest.raises(ValueError, match="FSDP"):
        structured().setup(_with_strategy(tmp_path), model, "fit")
    assert "on_save_checkpoint" not in vars(make())


def _with_strategy(tmp_path: Path) -> Trainer:
    from lightning.pytorch.strategies import FSDPStrategy

    run = trainer(tmp_path)
    run._accelerator_connector.strategy = FSDPStrategy()
    return run
