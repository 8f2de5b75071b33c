"""Samples of a run's training data: the same for every kind of loader, and apart from the loop that trains."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_prune import GraSP, KLDivergence, OneShot, Scope, StructuredPruning, prune
from lightning_prune.callbacks.training_data import training_data
from lightning_prune.scoring import DataPass
from tests.callbacks.small import Small, loaders, samples, trainer


class Reads(Callback):
    """Draws a pass at the first batch."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.data: DataPass | None = None
        self.batches: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0])
        if self.data is None:
            self.data = training_data(trainer, pl_module, **self.settings)
            self.data.run(pl_module)


def read(folder: Path, loader: Any, settings: dict[str, Any] | None = None, **reading: Any) -> Reads:
    torch.manual_seed(0)
    callback = Reads(**reading)
    run = trainer(folder, 1, callback, **(settings or {}))
    if isinstance(loader, LightningDataModule):
        run.fit(Small(), datamodule=loader)
    else:
        run.fit(Small(), loader, loaders()[0])
    return callback


def inputs_of(data: DataPass | None) -> Tensor:
    assert data is not None
    return torch.cat([batch.raw[0] for batch in data])


class Module(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loaders(shuffle=True)[0]

    def val_dataloader(self) -> DataLoader[Any]:
        return loaders()[1]


def test_every_kind_of_loader_gives_the_same(tmp_path: Path) -> None:
    found = [
        inputs_of(read(tmp_path, loader, batches=2).data)
        for loader in (loaders()[0], loaders(shuffle=True)[0], Module())
    ]
    assert len(found[0]) == 16
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("total", [40, 37])
@pytest.mark.parametrize("batches", [1, 2, 4, 100])
def test_batches_are_full_and_samples_come_once(tmp_path: Path, batches: int, total: int) -> None:
    x = torch.arange(float(total), dtype=torch.float64)[:, None].repeat(1, 6)
    loader = DataLoader(TensorDataset(x, torch.zeros(total, dtype=torch.int64)), batch_size=8, shuffle=True)
    data = read(tmp_path, loader, batches=batches).data
    assert data is not None
    assert [len(batch) for batch in data] == [8] * min(batches, total // 8)
    assert len(set(inputs_of(data)[:, 0].tolist())) == len(data)


def test_samples_are_at_most_those_that_there_are(tmp_path: Path) -> None:
    """One recipe serves large and small data sets, without a warning."""
    loader = loaders(shuffle=True)[0]
    data = read(tmp_path, loader, samples=10**6).data
    assert data is not None
    assert len(data) == len(loader.dataset)  # type: ignore[arg-type]


def test_classes_and_processes(tmp_path: Path) -> None:
    data = read(tmp_path, loaders()[0], per_class=3).data
    assert data is not None
    assert data.classes == {0: 3, 1: 3, 2: 3}
    assert (data.rank, data.world_size) == (0, 1)


@pytest.mark.parametrize(
    ("settings", "count"),
    [({"overfit_batches": 2}, 16), ({"overfit_batches": 0.5}, 16), ({"fast_dev_run": True}, 40), ({}, 40)],
)
def test_samples_are_those_that_the_run_trains_on(tmp_path: Path, settings: dict[str, Any], count: int) -> None:
    callback = read(tmp_path, loaders()[0], settings)
    found = inputs_of(callback.data)
    assert len(found) == count
    trained, read_ = ({tuple(row.tolist()) for row in part} for part in (torch.cat(callback.batches), found))
    assert trained <= read_ if "fast_dev_run" in settings else trained == read_


def test_a_data_set_of_whole_batches_is_read_in_part(tmp_path: Path) -> None:
    numbers = []

    class Batches(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            numbers.append(index)
            return self.tensors[0][8 * index : 8 * index + 8], self.tensors[1][8 * index : 8 * index + 8]

        def __len__(self) -> int:
            return 5

    data = read(tmp_path, DataLoader(Batches(*samples().tensors), batch_size=None), batches=2).data
    assert data is not None
    assert len(data) == 16
    assert len(numbers) == 5 + 2, "each in training, and two of them once more"


def test_batches_come_as_the_training_gets_them(tmp_path: Path) -> None:
    class Doubles(Small):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 2, batch[1]]

    callback = Reads()
    trainer(tmp_path, 1, callback).fit(Doubles(), *loaders())
    assert torch.equal(inputs_of(callback.data).sum(0), samples().tensors[0].sum(0) * 2) or torch.allclose(
        inputs_of(callback.data).sum(0), samples().tensors[0].sum(0) * 2
    )


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from iter(samples())


def test_a_criterion_takes_the_batch_at_hand_where_nothing_can_be_read_again(tmp_path: Path) -> None:
    callback = StructuredPruning(0.5, criterion=KLDivergence(), schedule=OneShot(1))
    trainer(tmp_path, 3, callback).fit(Small(), DataLoader(Endless(), batch_size=8), loaders()[1])
    assert callback.report.widths == {"net.0": 4, "net.2": 4}
    with pytest.raises(ValueError, match="expected one DataLoader over a data set with a length"):
        read(tmp_path, DataLoader(Endless(), batch_size=8))


def test_labels_that_are_no_classes_leave_a_single_batch(tmp_path: Path) -> None:
    class Regression(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", 0.9)

    x = samples().tensors[0]
    loader = DataLoader(TensorDataset(x, torch.rand(40, 3, dtype=torch.float64)), batch_size=8)
    callback = StructuredPruning(0.5, criterion=KLDivergence(), schedule=OneShot(1))
    with pytest.warns(UserWarning, match="scores are taken on a single batch: .* labels that are classes"):
        trainer(tmp_path, 3, callback).fit(Regression(), loader, loader)
    assert callback.report.widths == {"net.0": 4, "net.2": 4}


def test_draws_are_compared_by_the_training_steps_loss(tmp_path: Path) -> None:
    """On the network as it is at the cut, without a trace: each allocation by hand, on all samples."""

    class Seen(StructuredPruning):
        def _decide(self, trainer: Any, module: Any, point: Any) -> Any:
            self.found: list[tuple[float, dict[str, int]]] = []
            x, y = samples()[:]
            for seed in range(6):
                drawn = nn.Sequential(OrderedDict(net=copy.deepcopy(module.net)))  # names decide what is drawn
                report = prune(drawn, x, budget={"params": 0.5}, scope=Scope("random", seed=seed))
                self.found.append((nn.functional.cross_entropy(drawn(x), y).item(), report.widths))
            steps = module.steps
            self.decision = super()._decide(trainer, module, point)
            assert module.steps == steps
            return self.decision

    callback = Seen(budget={"params": 0.5}, scope=Scope("random", draws=6), schedule=OneShot(2))
    module = Small()
    trainer(tmp_path, 3, callback).fit(module, *loaders(shuffle=True))
    loss, expected = min(callback.found, key=lambda one: one[0])
    others = [other for other, found in callback.found if found != expected]
    assert others
    assert min(others) - loss > 1e-4, "no near tie"
    assert callback.report.widths == expected
    place = callback.found.index((loss, expected))
    assert callback.decision.numbers["pruning/draw"] == place
    assert callback.decision.numbers["pruning/draw_loss"] == pytest.approx(loss)


def test_a_step_without_a_loss_is_named(tmp_path: Path) -> None:
    class Manual(Small):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            super().training_step(batch, batch_idx)

    callback = StructuredPruning(0.5, criterion=GraSP(), schedule=OneShot(1))
    with pytest.raises(ValueError, match=r"a `training_step` that returns a loss, got NoneType"):
        trainer(tmp_path, 3, callback).fit(Manual(), *loaders())
