"""Batch norms that are re-estimated after a cut where samples that were held back say so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_prune import L1, AtStart, NeuralProbe, ReestimateIfBetter, Ridge, StructuredPruning, XGBoost, XGBPruning
from lightning_prune.callbacks.extensions.reestimate_if_better import _is_better
from lightning_prune.surgery import Keep, history_of
from tests.callbacks.small import trainer


class Copies(LightningModule):
    """Both inputs, and copies of them with small weights, which go; what is left goes through a norm and a ReLU."""

    def __init__(self, mean: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(2, 4, bias=False)
        self.norm = nn.BatchNorm1d(4, momentum=0.0) if norm else nn.Identity()
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.0], [0.0, 0.1]]))
            if norm:
                self.norm.running_mean.fill_(mean)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.first(x)).relu())
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def inputs() -> Tensor:
    return torch.randn(320, 2, generator=torch.Generator().manual_seed(1))


def fit(folder: Path, module: Copies, labels: Tensor, *extensions: Any) -> StructuredPruning:
    callback = StructuredPruning(0.5, criterion=L1(), schedule=AtStart(), extensions=list(extensions))
    trainer(folder, 1, callback).fit(module, DataLoader(TensorDataset(inputs(), labels), batch_size=32))
    return callback


def info_of(module: LightningModule) -> dict[str, float]:
    history = history_of(module)
    assert history is not None
    (edit,) = (edit for edit in history.edits if isinstance(edit, Keep))
    return dict(edit.info)


x0 = inputs()[:, 0]


@pytest.mark.parametrize(
    ("mean", "labels", "stays"),
    [
        (10.0, (x0 > 0.7).long(), True),
        (10.0, x0.relu(), True),
        (-10.0, (x0 < -0.7).long(), False),
        (-10.0, x0, False),
        (0.0, (x0 > 0.7).long(), False),
    ],
    ids=["helps", "helps numbers", "hurts", "hurts numbers", "changes little"],
)
def test_the_task_decides(mean: float, labels: Tensor, stays: bool, tmp_path: Path) -> None:
    """Inputs far below the old mean are all 0 behind the ReLU; far above it they all pass, with new statistics half."""
    task: Any = "regression" if labels.is_floating_point() else "classification"
    module, probe = Copies(mean), NeuralProbe(task, hidden=0, epochs=30, lr=0.05)
    callback = fit(tmp_path, module, labels, ReestimateIfBetter(probe=probe))
    found = info_of(module)
    assert found["norms_reestimated"] == stays
    better, kept = found["score_norms_reestimated"], found["score_norms_kept"]
    assert (better > kept + 0.15) if stays else (better < kept + 0.05)
    expected = inputs().mean(0) if stays else torch.full((2,), mean)
    torch.testing.assert_close(module.norm.running_mean, expected)
    metric = "r2" if task == "regression" else "accuracy"
    said = f"Batch norms are {'' if stays else 'not '}re-estimated: {metric} of a probe on held-out samples is "
    assert callback.report.notes == [f"{said}{better:.3f} with re-estimated statistics and {kept:.3f} without."]
    assert callback.report.notes[0] in " ".join(str(callback.report).split())


def test_by_default_the_xgb_pruner_lets_the_task_decide(tmp_path: Path) -> None:
    """On its own samples, as it splits them, for its task."""
    labels = inputs()[:, 0].relu()
    surrogate = XGBoost("regression", rounds=4, threads=1)
    callback = XGBPruning(pruning_ratio=0.5, surrogate=surrogate, held_back=0.3, seed=2, samples=200)
    ridge, choice = callback.extensions
    assert ridge == Ridge()
    assert choice == ReestimateIfBetter(probe=NeuralProbe("regression", hidden=0), held_back=0.3, seed=2)
    module = Copies(10.0)
    trainer(tmp_path, 1, callback).fit(module, DataLoader(TensorDataset(inputs(), labels), batch_size=32))
    assert info_of(module)["norms_reestimated"] == 1


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(inputs(), (x0 > 0.7).long(), strict=True)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_a_network_without_norms_is_left_as_it_is(tmp_path: Path) -> None:
    """Nothing is read for it. Norms that the user has frozen are left too."""
    module, callback = Copies(norm=False), StructuredPruning(0.5, criterion=L1(), extensions=[ReestimateIfBetter()])
    module.example_input_array = torch.zeros(2, 2)
    trainer(tmp_path / "1", 1, callback, limit_train_batches=4).fit(module, DataLoader(Endless(), batch_size=32))
    assert callback.report.cuts
    assert callback.report.notes == []

    class Frozen(Copies):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.norm.eval()
            return self

    frozen = Frozen(10.0)
    frozen.train()
    assert fit(tmp_path / "2", frozen, (x0 > 0.7).long(), ReestimateIfBetter()).report.notes == []
    torch.testing.assert_close(frozen.norm.running_mean, torch.full((2,), 10.0))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"batches": 0}, "expected `batches` of at least 1, got 0"),
        ({"held_back": 1.0}, r"expected `held_back` in \(0, 0.9\), got 1.0. Give 0.2"),
        ({"probe": "linear"}, "expected `probe` to be an instance of Surrogate, got 'linear'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        ReestimateIfBetter(**settings)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (DataLoader(TensorDataset(inputs(), x0), batch_size=32), "expected whole numbers as classes, got labels such"),
        (DataLoader(Endless(), batch_size=32), "ReestimateIfBetter reads some training batches again: expected one"),
    ],
    ids=["numbers", "iterable"],
)
def test_data_that_do_not_suit_are_refused_before_training(data: Any, text: str, tmp_path: Path) -> None:
    module = Copies()
    callback = StructuredPruning(0.5, criterion=L1(), extensions=[ReestimateIfBetter()])
    run = trainer(tmp_path, 4, callback, limit_train_batches=4)
    with pytest.raises(ValueError, match=text):
        run.fit(module, data)
    assert run.global_step == 0


def test_one_standard_error_counts_as_better() -> None:
    truth, wrong, right = np.zeros(100, int), np.ones(100, int), np.zeros(100, int)

    def with_wrong(*samples: int) -> Any:
        return np.where(np.isin(np.arange(100), samples), wrong, right)

    assert not _is_better(truth, with_wrong(), with_wrong(), "classification")
    assert not _is_better(truth, with_wrong(0), with_wrong(), "classification"), "one sample is chance"
    assert _is_better(truth, with_wrong(0, 1), with_wrong(), "classification")
    assert not _is_better(truth, with_wrong(), with_wrong(0, 1), "classification")
    # Of 9 samples that change, 6 against 3 is a standard error, which is √9.
    assert not _is_better(truth, with_wrong(0, 1, 2, 3, 4), with_wrong(5, 6, 7), "classification")
    assert _is_better(truth, with_wrong(0, 1, 2, 3, 4, 5), with_wrong(6, 7), "classification")
    numbers = np.linspace(0, 1, 50)
    assert _is_better(numbers, numbers + 0.2, numbers + 0.1, "regression")
    assert not _is_better(numbers, numbers + 0.1, numbers + 0.1, "regression")
    assert not _is_better(numbers[:1], numbers[:1] + 0.2, numbers[:1], "regression"), "one sample has no spread"
