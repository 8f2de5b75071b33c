"""A run that was stopped anywhere ends, bit for bit, where one that never stopped does."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    ContributionPruning,
    Linear,
    Random,
    StructuredPruning,
    load_from_checkpoint,
)
from lightning_prune.surgery import history_of

# Checkpoints of one run are read by another, which writes its own elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from")

EPOCHS, STEPS_PER_EPOCH = 6, 4
# Cuts after epochs 1, 3 and 4: step 4, 12 and 16.
SCHEDULE = {"start": 1, "end": 4, "cuts": 3}


class Net(L.LightningModule):
    """An MLP with BatchNorm; the optimizer by name."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.hparams["optimizer"] == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    draw = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(32, 16, generator=draw), torch.randint(0, 3, (32,), generator=draw))
    return DataLoader(data, batch_size=32 // STEPS_PER_EPOCH)


def run(
    folder: Path,
    callback: StructuredPruning,
    optimizer: str,
    checkpoint: Path | None = None,
    weights_only: bool = False,
) -> tuple[L.Trainer, Net]:
    torch.manual_seed(0)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[
            callback,
            ModelCheckpoint(folder / "epochs", filename="{epoch}", save_top_k=-1, save_weights_only=weights_only),
            ModelCheckpoint(folder / "steps", filename="{step}", save_top_k=-1, every_n_train_steps=STEPS_PER_EPOCH),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    model = Net(optimizer)
    trainer.fit(model, loader(), loader(), ckpt_path=checkpoint and str(checkpoint))
    return trainer, model


def callback(kind: str) -> StructuredPruning:
    if kind == "contribution":
        return ContributionPruning(pruning_ratio=0.5, schedule=Linear(**SCHEDULE))
    criterion = Random(seed=3) if kind == "random" else None
    return StructuredPruning(budget={"params": 0.4}, criterion=criterion, schedule=Linear(**SCHEDULE), scope="global")


def assert_equal(first: object, second: object, where: str = "") -> None:
    """Nested dicts, lists and tensors: equal to the last bit."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor)
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert isinstance(second, dict)
        assert first.keys() == second.keys(), where
        for key, value in first.items():
            assert_equal(value, second[key], f"{where}/{key}")
    elif isinstance(first, list):
        assert isinstance(second, list)
        assert len(first) == len(second), where
        for number, value in enumerate(first):
            assert_equal(value, second[number], f"{where}/{number}")
    else:
        assert first == second, where


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["contribution", "l1", "random"])
def test_stopped_anywhere_is_never_stopped(kind: str, optimizer: str, tmp_path: Path) -> None:
    whole = callback(kind)
    trainer, model = run(tmp_path / "whole", whole, optimizer)
    history = history_of(model)
    assert history is not None
    assert [edit.step for edit in history.edits] == [4, 12, 16]
    # Before the first cut, between cuts, on the last batch before a cut is due, after the last.
    stops = ["steps/step=4.ckpt", "epochs/epoch=1.ckpt", "steps/step=12.ckpt", "epochs/epoch=4.ckpt"]
    for stop in stops:
        resumed = callback(kind)
        again, same = run(tmp_path / "again", resumed, optimizer, tmp_path / "whole" / stop)
        assert_equal(model.state_dict(), same.state_dict(), stop)
        assert_equal(trainer.optimizers[0].state_dict(), again.optimizers[0].state_dict(), stop)
        mine, theirs = history.to_plain(), history_of(same)
        assert theirs is not None
        assert_equal(mine, theirs.to_plain(), stop)
        states = [whole.state_dict(), resumed.state_dict()]
        reports = [state.pop("report") for state in states]
        assert_equal(states[0], states[1], stop)
        without_time = [[{**cut, "seconds": 0} for cut in report["cuts"]] for report in reports]
        assert without_time[0] == without_time[1]
        metrics = [[row["metrics"].get("val_loss") for row in report["history"]] for report in reports]
        assert metrics[0] == metrics[1]


def test_the_resumed_runs_did_train(tmp_path: Path) -> None:
    """What the test above compares is not a network that stood still."""
    run(tmp_path, callback("l1"), "adamw")
    early, late = (torch.load(tmp_path / "epochs" / f"epoch={n}.ckpt", weights_only=True) for n in (4, 5))
    assert not torch.equal(early["state_dict"]["net.0.weight"], late["state_dict"]["net.0.weight"])


def test_every_checkpoint_is_tested_whatever_the_width_of_the_live_network(tmp_path: Path) -> None:
    trainer, model = run(tmp_path, callback("contribution"), "adamw", weights_only=True)
    widths = {}
    for file in sorted((tmp_path / "epochs").glob("*.ckpt"), reverse=True):
        (result,) = trainer.validate(model, loader(), ckpt_path=str(file), verbose=False)
        widths[file.stem] = model.net[0].out_features
        alone = load_from_checkpoint(Net, file)
        assert type(alone) is Net
        assert alone.net[0].out_features == model.net[0].out_features
        alone.eval()
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(alone(x), y) for x, y in loader()]
        assert result["val_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert widths == {"epoch=0": 12, "epoch=1": 10, "epoch=2": 10, "epoch=3": 8, "epoch=4": 6, "epoch=5": 6}


def test_a_fit_goes_on_after_a_wider_checkpoint_was_tested(tmp_path: Path) -> None:
    trainer, model = run(tmp_path, callback("l1"), "adamw")
    trainer.validate(model, loader(), ckpt_path=str(tmp_path / "epochs" / "epoch=0.ckpt"), verbose=False)
    assert history_of(model) is None
    assert model.net[0].out_features == 12
    _, model = run(tmp_path / "more", callback("l1"), "adamw", tmp_path / "epochs" / "epoch=0.ckpt")
    history = history_of(model)
    assert history is not None
    assert len(history.edits) == 3
