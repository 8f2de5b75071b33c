"""Repairs in a Lightning run: they help, they disturb nothing, and they are the same after a resume."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import StructuredPruning
from lightning_prune.planning import Explicit
from lightning_prune.surgery import CutError, FoldMean, ReestimateBatchNorm, Repair, Ridge, history_of
from tests.callbacks.small import Small, loaders, samples, trainer

ONCE = Explicit(((1, 1.0),))


class Observed(Callback):
    """Outputs around a cut, what the loop hands out, and random states."""

    def __init__(self) -> None:
        self.outputs: dict[int, list[Tensor]] = {}
        self.batches: list[float] = []
        self.random: list[Any] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.outputs[trainer.current_epoch] = [self._out(pl_module)]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(float(batch[0].sum()))
        self.random.append(
            (torch.get_rng_state().sum(), random.getstate()[1][:5], np.random.get_state()[1][:5].tolist())
        )
        if batch_idx == 0:
            self.outputs[trainer.current_epoch].append(self._out(pl_module))

    def _out(self, module: Any) -> Tensor:
        training, _ = module.training, module.eval()
        with torch.no_grad():
            out: Tensor = module(samples().tensors[0])
        module.train(training)
        return out


def fit(
    folder: Path, repairs: Any, module: Small | None = None, epochs: int = 3, shuffle: bool = False, **more: Any
) -> Any:
    module, seen = module or Small(), Observed()
    callback = StructuredPruning(pruning_ratio=0.5, schedule=ONCE, extensions=repairs)
    torch.manual_seed(3)
    trainer(folder, 3, callback, seen).fit(module, *loaders(shuffle))
    before, after = seen.outputs[1]
    return module, seen, float((after - before).square().mean())


def test_outputs_change_less(tmp_path: Path) -> None:
    errors = [fit(tmp_path / str(i), repairs)[2] for i, repairs in enumerate(([], [FoldMean()], [Ridge()]))]
    none, mean, ridge = errors
    assert 0 < ridge < mean < none


def test_the_loop_and_random_numbers_are_not_disturbed(tmp_path: Path) -> None:
    repairs = [Ridge(batches=2), ReestimateBatchNorm(batches=2)]
    plain, repaired = (
        fit(tmp_path / str(i), repair, Small(norm=True), shuffle=True) for i, repair in enumerate((None, repairs))
    )
    assert plain[1].batches == repaired[1].batches
    assert str(plain[1].random) == str(repaired[1].random)
    assert repaired[0].steps == plain[0].steps == 15
    assert not torch.equal(plain[0].net[1].running_var, repaired[0].net[1].running_var)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in repaired[0].modules())


def test_a_run_that_was_interrupted_repairs_as_one_that_was_not(tmp_path: Path) -> None:
    repairs = [Ridge(batches=2), ReestimateBatchNorm(batches=2)]

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    whole, resumed = Small(norm=True), Small(norm=True)
    callback = StructuredPruning(pruning_ratio=0.5, schedule=ONCE, extensions=repairs)
    trainer(tmp_path / "a", 3, callback, Stop()).fit(whole, *loaders())
    torch.manual_seed(99)
    again = StructuredPruning(pruning_ratio=0.5, schedule=ONCE, extensions=repairs)
    trainer(tmp_path / "b", 3, again).fit(resumed, *loaders(), ckpt_path=tmp_path / "stop.ckpt")
    assert len(again.report.cuts) == 1
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_random_numbers_of_a_repair_are_its_own(tmp_path: Path) -> None:
    """Dropout in the batches that it reads drops the same, whatever was drawn before."""

    class Dropping(Small):
        def __init__(self) -> None:
            super().__init__(norm=True)
            self.net.insert(1, nn.Dropout(0.5))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    class Variances(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 0:  # right after the cut
                found.append(pl_module.net[2].running_var.clone())

    found: list[Tensor] = []
    for seed in (3, 99):
        module, repairs = Dropping(), [ReestimateBatchNorm(batches=2)]
        callback = StructuredPruning(pruning_ratio=0.5, schedule=ONCE, extensions=repairs)
        torch.manual_seed(seed)
        trainer(tmp_path, 2, callback, Variances()).fit(module, *loaders())
    assert len(found[0]) == 4
    assert torch.equal(*found)


class Broken(Repair):
    batches = 1

    def after(self, model: nn.Module, run: Any) -> dict[str, Tensor]:
        run(model, 1)
        return {"net.0.bias": torch.full((4,), torch.nan)}


def test_a_repair_that_fails_takes_the_cut_back(tmp_path: Path) -> None:
    module, seen = Small(), Observed()
    callback = StructuredPruning(pruning_ratio=0.5, schedule=ONCE, extensions=[Broken()])
    with pytest.raises(CutError, match=r"Broken.*NaN or infinity for net\.0\.bias.*in the data"):
        trainer(tmp_path, 3, callback, seen).fit(module, *loaders())
    assert module.net[0].out_features == 8
    assert history_of(module) is None
    assert torch.equal(seen._out(module), seen.outputs[1][0])


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from iter(samples())


@pytest.mark.parametrize("data", [DataLoader(Endless(), batch_size=8), {"a": loaders()[0]}], ids=["iterable", "dict"])
def test_data_that_cannot_be_read_again_is_refused_at_once(tmp_path: Path, data: Any) -> None:
    class Takes(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"] if isinstance(batch, Mapping) else batch, batch_idx)

    module = Takes()
    module.example_input_array = samples().tensors[0][:2]
    schedule = Explicit(((5, 1.0),), unit="step")
    callback = StructuredPruning(pruning_ratio=0.5, schedule=schedule, extensions=[FoldMean()])
    with pytest.raises(ValueError, match="expected one DataLoader over a data set with a length"):
        trainer(tmp_path, 3, callback).fit(module, data, loaders()[1])
    assert module.steps == 0
