"""Quantisation-aware training: from when, what is validated, the same after any resume, and bad input."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_prune import OneShot, QuantisationAware, StructuredPruning
from tests.callbacks.networks import BATCHES, Curves, Net, equal, fit, hooks, loader, make, refit, trainer, weights
from tests.support import ranks


class Observed(Callback):
    """Whether the network rounds, by batch of training and by epoch of validation."""

    def __init__(self, quantisation: QuantisationAware) -> None:
        self.quantisation = quantisation
        self.training: list[bool] = []
        self.validation: list[bool] = []

    def _now(self) -> bool:
        return self.quantisation.rounding is not None and self.quantisation.rounding.is_attached

    def on_before_backward(self, *_: Any) -> None:
        self.training.append(self._now())

    def on_validation_epoch_start(self, *_: Any) -> None:
        self.validation.append(self._now())


@pytest.mark.parametrize(
    ("start", "options", "first"),
    [
        (2, {}, 2 * BATCHES),
        (0.5, {}, 2 * BATCHES),
        (0, {}, 0),
        (2, {"precision": "bf16-mixed"}, 2 * BATCHES),
        (2, {"precision": "64-true"}, 2 * BATCHES),
        (0.5, {"epochs": -1, "max_steps": 4 * BATCHES}, 2 * BATCHES),
    ],
)
def test_begins_at_its_moment(start: Any, options: dict[str, Any], first: int, tmp_path: Path) -> None:
    quantisation = QuantisationAware(start)
    observed, model = Observed(quantisation), make()
    fit(tmp_path, model, quantisation, observed, **{"epochs": 4, **options})
    assert observed.training == [step >= first for step in range(4 * BATCHES)]
    assert observed.validation == [BATCHES * (epoch + 1) > first for epoch in range(4)]
    assert hooks(model) == 0
    assert quantisation.rounding is not None
    assert list(quantisation.rounding.ranges) == ["first", "second", "head"]


def test_nothing_changes_before(tmp_path: Path) -> None:
    plain, aware = make(), make()
    fit(tmp_path, plain, epochs=2)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, aware, QuantisationAware(2), saver, epochs=3)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert equal(saved["state_dict"], weights(plain))
    assert saved["state_dict"].keys() == aware.state_dict().keys()


@pytest.mark.parametrize("file", ["epoch=0.ckpt", "epoch=2.ckpt", f"step={3 * BATCHES + 2}.ckpt"])
def test_resumes_bit_by_bit(file: str, tmp_path: Path) -> None:
    """Before it begins, after it, and within an epoch; units are cut while it rounds."""

    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        model, quantisation = make(), QuantisationAware(1)
        steps = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        epochs = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        pruning = StructuredPruning(0.5, schedule=OneShot(at=4))
        fit(folder, model, pruning, quantisation, steps, epochs, epochs=6, ckpt_path=ckpt_path)
        assert model.first.out_features == 6
        return weights(model), quantisation.state_dict()

    whole = run(tmp_path)
    assert equal(run(tmp_path / "again", tmp_path / file), whole)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_validates_and_tests_what_was_trained(tmp_path: Path) -> None:
    """From a checkpoint too, by a new callback; without it, or from before it began, in floats."""
    curves, quantisation = Curves(), QuantisationAware(1)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model = make()
    run = fit(tmp_path, model, quantisation, saver, epochs=2, logger=curves)
    losses = curves.of("val_loss")
    assert run.test(model, loader(2), verbose=False)[0]["val_loss"] == losses[1]
    for callbacks, file, expected in (
        ([QuantisationAware(1)], "epoch=1.ckpt", True),
        ([], "epoch=1.ckpt", False),
        ([QuantisationAware(1)], "epoch=0.ckpt", None),
    ):
        fresh = trainer(tmp_path, *callbacks)
        model = make()
        found = fresh.validate(model, loader(2), ckpt_path=tmp_path / file, verbose=False, weights_only=True)
        if expected is None:
            assert found[0]["val_loss"] == losses[0]
        else:
            assert (found[0]["val_loss"] == losses[1]) is expected
        assert hooks(model) == 0


def test_best_means_best_with_rounding(tmp_path: Path) -> None:
    class Known(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float(self.current_epoch >= 2))  # best before

    best = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss")
    fit(tmp_path, make(Known), QuantisationAware(2), best, epochs=4)
    assert Path(best.best_model_path).name == "epoch=2.ckpt"


def test_an_exception_leaves_no_hook(tmp_path: Path) -> None:
    class Fails(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ArithmeticError

    model, quantisation = make(Fails), QuantisationAware(0)
    with pytest.raises(ArithmeticError):
        fit(tmp_path, model, quantisation)
    assert hooks(model) == 0
    assert not any("weight" in vars(module) for module in model.modules())


def test_a_second_fit_begins_again(tmp_path: Path) -> None:
    quantisation = QuantisationAware(1)
    found = []
    for _ in range(2):
        model = make()
        fit(tmp_path, model, quantisation, epochs=2)
        found.append((weights(model), quantisation.state_dict()))
    assert equal(*found)


class Gathers(Callback):
    def __init__(self, quantisation: QuantisationAware) -> None:
        self.quantisation = quantisation
        self.found: list[Any] = [None, None]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.quantisation.rounding is not None
        own = self.quantisation.rounding.ranges, {name: value.tolist() for name, value in weights(pl_module).items()}
        torch.distributed.all_gather_object(self.found, own)


def in_processes(folder: Path) -> list[Any]:
    rank = int(os.environ["LOCAL_RANK"])
    quantisation = QuantisationAware(1)
    gathers = Gathers(quantisation)
    options: dict[str, Any] = {"devices": 2, "strategy": DDPStrategy(), "use_distributed_sampler": False}
    model = make(Net, norm=False)
    refit(trainer(folder, quantisation, gathers, epochs=2, **options), model, data=loader(rank), validate=False)
    return gathers.found


@pytest.mark.ddp
def test_processes_agree(tmp_path: Path) -> None:
    first, second = ranks.run(in_processes, tmp_path, processes=2)
    assert first == second
    assert list(first[0]) == ["first", "second", "head"]


class TestRefusals:
    @pytest.mark.parametrize("start", [-1, 1.0, 1.5, float("nan"), True, "half"])
    def test_start(self, start: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=r"QuantisationAware.*`?start`?"):
            QuantisationAware(start)

    def test_sharded_layers(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, strategy=ModelParallelStrategy())
        with pytest.raises(ValueError, match=r"expected one device or DistributedDataParallel, got sharded layers"):
            QuantisationAware().setup(run, make(), "fit")

    def test_bits(self) -> None:
        with pytest.raises(ValueError, match="`weight_bits` of 4 or 8, got 2"):
            QuantisationAware(weight_bits=2)

    def test_a_run_that_ends_before(self, tmp_path: Path) -> None:
        model = make()
        before = weights(model)
        with pytest.raises(ValueError, match="QuantisationAware: expected `start` within the run, got 6"):
            fit(tmp_path, model, QuantisationAware(6), epochs=6)
        assert equal(weights(model), before)

    def test_a_computed_weight(self, tmp_path: Path) -> None:
        class Normed(Net):
            def configure_model(self) -> None:
                nn.utils.parametrizations.weight_norm(self.second)

        model = make(Normed)
        with pytest.raises(ValueError, match="that of 'second' is computed"):
            fit(tmp_path, model, QuantisationAware(2))
        assert model.trainer.global_step == 0

    def test_a_checkpoint_of_other_bits(self, tmp_path: Path) -> None:
        saver = ModelCheckpoint(tmp_path, filename="{epoch}")
        fit(tmp_path, make(), QuantisationAware(0), saver, epochs=1)
        with pytest.raises(ValueError, match="training with `weight_bits=4`, got 8"):
            fit(tmp_path, make(), QuantisationAware(0, weight_bits=4), ckpt_path=tmp_path / "epoch=0.ckpt")

    @pytest.mark.parametrize("state", [None, {}, {"format": 2, "rounding": None}, {"format": 1}])
    def test_a_damaged_state(self, state: Any) -> None:
        with pytest.raises(ValueError, match="expected a state of format 1"):
            QuantisationAware().load_state_dict(state)
