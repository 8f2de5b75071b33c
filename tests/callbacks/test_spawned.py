"""Processes that Lightning spawns or forks hand back the narrow network: weights, history, masks and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher, _WorkerOutput
from lightning.pytorch.trainer.states import TrainerFn, TrainerState

from lightning_prune import LinearSchedule, MagnitudePruning, StructuredPruning, load_from_checkpoint
from lightning_prune.surgery import history_of, masks_of, revived
from tests.callbacks.networks import Net, fit, loader, make, trainer, weights, widths
from tests.support import ranks

pytestmark = pytest.mark.ddp

SCHEDULE = LinearSchedule(start=1, end=2, cuts=2)


def train(folder: Path, strategy: str, kind: type = StructuredPruning) -> dict[str, Any]:
    """What the process that starts the others holds after a fit, and after the verbs that follow."""
    model = make(Net, norm=False)
    pruner = kind(0.5, schedule=SCHEDULE)
    processes = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
    run = fit(folder, model, pruner, epochs=4, **processes)
    found = {"weights": weights(model), "widths": widths(model), "report": pruner.report.to_plain()}
    found["masks"] = {name: mask.clone() for name, mask in masks_of(model).items()}
    found["revived"], found["history"] = revived(model), history_of(model)
    found["loss"] = float(run.callback_metrics["val_loss"])
    found["again"] = trainer(folder / "v", pruner).validate(model, loader(2), verbose=False)[0]["val_loss"]
    # What came home is saved, loaded and trained on.
    run = fit(folder, model, epochs=1)
    run.save_checkpoint(folder / "after.ckpt")
    found["loaded"] = widths(load_from_checkpoint(Net, folder / "after.ckpt", weights_only=True))
    deeper = StructuredPruning(0.75, schedule=SCHEDULE)
    fit(folder / "deeper", model, deeper, epochs=3, **processes)
    found["deeper"] = widths(model)
    return found


def assert_narrow(found: dict[str, Any], alone: Any, pruner: StructuredPruning) -> None:
    assert found["widths"] == found["loaded"] == (6, 4)
    assert found["deeper"] == (3, 2)
    assert found["loss"] == pytest.approx(found["again"], rel=1e-6)
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(found["weights"][name], weight)
    cuts = [(cut["index"], cut["step"], cut["after"]) for cut in found["report"]["cuts"]]
    assert cuts == [(cut.index, cut.step, dict(cut.after)) for cut in pruner.report.cuts]
    assert found["report"]["final"]["widths"] == {"first": 6, "second": 4}


def alone(folder: Path) -> tuple[Any, StructuredPruning]:
    """The same run in one process: both see the same batches, so their mean gradient is that of each."""
    model, pruner = make(Net, norm=False), StructuredPruning(0.5, schedule=SCHEDULE)
    fit(folder, model, pruner, epochs=4)
    return model, pruner


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_the_network_comes_home_narrow(strategy: str, tmp_path: Path) -> None:
    assert_narrow(ranks.run(train, tmp_path, strategy), *alone(tmp_path / "alone"))


def test_masks_come_home(tmp_path: Path) -> None:
    found = ranks.run(train, tmp_path, "ddp_fork", MagnitudePruning)
    assert sum(int(mask.sum()) for mask in found["masks"].values()) > 50
    assert not found["revived"]


def test_a_run_without_a_pruning_callback_is_as_before(tmp_path: Path) -> None:
    """Its launcher hands back what Lightning's does, and loads it as Lightning's does."""
    own = _MultiProcessingLauncher.get_extra_results
    StructuredPruning(0.5)
    assert _MultiProcessingLauncher.get_extra_results is own
    run, model = trainer(tmp_path), make()
    run.strategy._lightning_module = model
    launcher: Any = _MultiProcessingLauncher(run.strategy, start_method="fork")
    run.strategy._launcher = launcher
    extra = launcher.get_extra_results(run)
    assert extra.keys() == {"callback_metrics_bytes"}
    file = tmp_path / "weights.ckpt"
    torch.save({name: torch.full_like(weight, 0.5) for name, weight in model.state_dict().items()}, file)
    state = TrainerState(fn=TrainerFn.FITTING)
    launcher._recover_results_in_main_process(_WorkerOutput("best", str(file), state, None, extra), run)
    assert bool((model.first.weight == 0.5).all())
    assert run.state is state
    assert not vars(model).keys() & {"on_save_checkpoint", "on_load_checkpoint"}
    assert "get_extra_results" not in vars(launcher)
