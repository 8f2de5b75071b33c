"""Averaged copies of Lightning's callbacks follow every cut, also back, and into checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import (
    L1,
    LinearSchedule,
    MagnitudePruning,
    OneShot,
    Rollback,
    SaveEachSize,
    StructuredPruning,
    load_from_checkpoint,
)
from lightning_prune.callbacks.lightning.averages import averages, counts
from lightning_prune.planning import AtStart, Explicit
from lightning_prune.surgery import history_of, take
from lightning_prune.surgery.tensors import named
from tests.callbacks.networks import Net, equal, fit, make, samples, trainer, weights, widths

pytestmark = pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
AVERAGING: dict[str, Any] = {
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2),
}


def pruning(**options: Any) -> StructuredPruning:
    return StructuredPruning(0.5, criterion=L1(), schedule=LinearSchedule(start=2, end=4, cuts=2), **options)


class Around(Callback):
    """Averaged weights right before and right after each batch's cut: one instance before the pruning, one after."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.counts: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(weights(averages(trainer)[0]))
        self.counts.append(counts(trainer))


@pytest.mark.parametrize("kind", AVERAGING)
def test_the_average_is_sliced(kind: str, tmp_path: Path) -> None:
    model, before, after = make(), Around(), Around()
    run = fit(tmp_path, model, AVERAGING[kind](), before, pruning(), after)
    history = history_of(model)
    assert history is not None
    assert widths(model) == (6, 4)
    for edit in history.edits:
        for name, content in before.seen[edit.step].items():
            assert torch.equal(after.seen[edit.step][name], take(content, edit.axes.get(name, {}))), name
    (copy,) = averages(run)
    assert widths(copy) == (6, 4)
    live = {name: value for name, value in weights(model).items() if "running" not in name and "batches" not in name}
    assert all(torch.equal(named(copy)[name], value) for name, value in live.items())  # taken over at the end
    assert not equal(before.seen[8], before.seen[9])


@pytest.mark.parametrize("first", ["pruning", "averaging"])
@pytest.mark.parametrize("kind", AVERAGING)
def test_resuming_equals_never_having_stopped(kind: str, first: str, tmp_path: Path) -> None:
    def once(folder: str, *more: Callback, **options: Any) -> dict[str, Any]:
        model, both = make(norm=kind != "swa"), [pruning(), AVERAGING[kind]()]
        both = both if first == "pruning" else both[::-1]
        run = fit(tmp_path / folder, model, *both, *more, **options)
        return {"live": weights(model), "average": weights(averages(run)[0]), "end": run.callback_metrics["val_loss"]}

    saver = ModelCheckpoint(tmp_path / "every", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    ends = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    expected = once("whole", saver, ends)
    # From many steps Lightning's SWA, once begun, does not go on as if never stopped, without a cut neither.
    files = [f"every/step={step}" for step in ((3, 14) if kind == "swa" else (3, 8, 9, 14, 18))]
    for file in (*files, "ends/epoch=1", "ends/epoch=3"):
        assert equal(once("resumed", ckpt_path=tmp_path / f"{file}.ckpt"), expected), file


def test_validation_and_checkpoints_are_of_the_average(tmp_path: Path) -> None:
    losses: list[float] = []

    class Look(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            copy = averages(trainer)[0].eval()
            x, y = samples(2).tensors
            losses.append(F.cross_entropy(copy(x), y).item())
            copy.train()

    saver = ModelCheckpoint(tmp_path / "epochs", filename="{epoch}", save_top_k=-1)
    pruner = pruning(extensions=[SaveEachSize()], dirpath=str(tmp_path / "report"))
    fit(tmp_path, make(), pruner, AVERAGING["ema"](), Look(), saver)
    found = [row.metrics["val_loss"] for row in pruner.report.history if "val_loss" in row.metrics]
    assert found == pytest.approx(losses, rel=1e-5)
    for epoch, width in ((1, 12), (2, 9), (5, 6)):
        narrow = load_from_checkpoint(Net, tmp_path / "epochs" / f"epoch={epoch}.ckpt")
        assert narrow.first.out_features == width
        x, y = samples(2).tensors
        assert F.cross_entropy(narrow.eval()(x), y).item() == pytest.approx(losses[epoch], rel=1e-5)
    for saved in pruner.report.size_checkpoints:
        narrow = load_from_checkpoint(Net, tmp_path / "report" / saved.file)
        assert F.cross_entropy(narrow.eval()(x), y).item() == pytest.approx(saved.metric, rel=1e-5)


def test_the_best_of_an_averaged_run_is_tested(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    model = make()
    run = fit(tmp_path, model, pruning(), AVERAGING["ema"](), best)
    (result,) = run.test(model, torch.utils.data.DataLoader(samples(2), batch_size=32), "best", weights_only=True)
    assert result["val_loss"] < 2
    assert widths(model) == (6, 4)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_cut_that_is_taken_back_takes_the_average_back(kind: str, tmp_path: Path) -> None:
    class Bad(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_acc", 0.9 if self.first.out_features == 12 else 0.1)

    model, before, after = make(Bad), Around(), Around()
    guarded = StructuredPruning(0.5, schedule=Explicit(((2, 1.0),)), extensions=[Rollback(epochs=1)])
    with pytest.warns(UserWarning, match="was taken back"):
        fit(tmp_path, model, AVERAGING[kind](), before, guarded, after)
    assert after.seen[8]["first.weight"].shape == (6, 6)
    assert equal(after.seen[12], before.seen[8])
    assert not equal(after.seen[13], before.seen[8]) or kind == "swa"
    # What follows weighs as if the cut had not been.
    assert after.counts[12] == before.counts[8] == [{"ema": 8, "swa": 2}[kind]]
    assert before.counts[12] == [{"ema": 12, "swa": 3}[kind]]


@pytest.mark.parametrize("kind", ["mean", "swa"])
def test_the_average_of_a_lottery_ticket_begins_anew(kind: str, tmp_path: Path) -> None:
    before, after = Around(), Around()
    masking = MagnitudePruning(0.5, schedule=OneShot(at=3), rewind=1)
    fit(tmp_path, make(), AVERAGING[kind](), before, masking, after)
    assert before.counts[12] != after.counts[12] == [0]
    assert after.counts[13] == [{"mean": 1, "swa": 0}[kind]]
    assert after.counts[16] == [{"mean": 4, "swa": 1}[kind]]


def test_a_copy_inside_the_module_is_refused(tmp_path: Path) -> None:
    model = make()
    model.average = torch.optim.swa_utils.AveragedModel(model.second)
    with pytest.raises(ValueError, match="no averaged copy inside the module, got `average`"):
        pruning().setup(trainer(tmp_path), model, "fit")


class OwnAverage(LightningModule):
    """Has a copy of its network, and code of its own for it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        self.copied = copy.deepcopy(self.net).requires_grad_(way == "in place")
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.way in ("teacher", "target"):
            with torch.no_grad():
                wanted = self.copied(batch[0])
            loss = loss + F.mse_loss(self(batch[0]), wanted)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("drift", F.mse_loss(self(batch[0]), self.copied(batch[0])))

    def on_train_batch_end(self, *_: Any) -> None:
        if self.way in ("in place", "target"):
            with torch.no_grad():
                for mine, other in zip(self.copied.parameters(), self.net.parameters(), strict=True):
                    mine.lerp_(other, 0.01)

    def on_train_epoch_end(self) -> None:
        if self.way == "by epoch":
            for mine, other in zip(self.copied.parameters(), self.net.parameters(), strict=True):
                mine.data.mul_(0.9).add_(other.data, alpha=0.1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)


@pytest.mark.parametrize(("way", "batches"), [("in place", 1), ("by epoch", 4), ("target", 1)])
def test_an_average_that_is_kept_by_hand_is_refused_before_a_cut(way: str, batches: int, tmp_path: Path) -> None:
    model = make(OwnAverage, way)
    with pytest.raises(
        ValueError, match=r"no averaged copy .* by hand .*, `copied` \(of `net`\): .*`EMAWeightAveraging`"
    ):
        fit(tmp_path, model, pruning())
    assert model.trainer.fit_loop.epoch_loop.global_step == batches
    assert history_of(model) is None


@pytest.mark.parametrize("way", ["teacher", "original"])
def test_a_copy_that_stays_as_it_is_may_be_there(way: str, tmp_path: Path) -> None:
    model = make(OwnAverage, way)
    fit(tmp_path, model, pruning(ignore="copied" if way == "teacher" else None))
    assert model.net[0].out_features == 6
    assert model.copied[0].out_features == 12


def test_a_cut_before_the_first_step_tells_of_a_copy(tmp_path: Path) -> None:
    model = make(OwnAverage, "original")
    with pytest.warns(UserWarning, match=r"there may be an averaged copy .*`copied` \(of `net`\)"):
        fit(tmp_path, model, StructuredPruning(0.5, criterion=L1(), schedule=AtStart()), epochs=1)


def test_frozen_layers_that_are_trained_later_are_no_average(tmp_path: Path) -> None:
    """Two layers of one form, of which one is unfrozen in the second epoch."""

    class Thawed(Net):
        def __init__(self) -> None:
            super().__init__(norm=False)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)
            self.second.requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            self.second.requires_grad_(self.current_epoch > 0)

    model = make(Thawed)
    fit(tmp_path, model, pruning())
    assert widths(model) == (3, 3)
