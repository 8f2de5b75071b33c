"""A small network, its data and a quiet Trainer for tests of what happens around a cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Small(LightningModule):
    """6-8-8-3 in float64. Its ``val_acc`` is what ``values`` says for each epoch and width of the first layer."""

    def __init__(self, norm: bool = False, bad_epochs: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(8)] if norm else []
        self.net = nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.double()
        self.bad_epochs = bad_epochs  # how long each cut looks bad
        self.steps = 0
        self._width, self._since = 8, 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        width = self.net[0].out_features
        if width != self._width:
            self._width, self._since = width, 0
        bad = width < 8 and self._since < self.bad_epochs
        self._since += 1
        self.log("val_acc", 0.5 if bad else 0.9)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def samples() -> TensorDataset:
    """Forty, sorted by class."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDataset(x, torch.arange(40) * 3 // 40)


def loaders(shuffle: bool = False) -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(samples(), batch_size=8, shuffle=shuffle), DataLoader(samples(), batch_size=40)


def trainer(folder: Path, epochs: int, *callbacks: Any, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=[*callbacks], **{**quiet, **settings})


class Saver(Callback):
    """Saves a checkpoint at the end of every epoch, as ``ModelCheckpoint`` does, and asks for nothing on resume."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path(trainer.current_epoch))

    def path(self, epoch: int) -> Path:
        return self.folder / f"{epoch}.ckpt"
