"""Callbacks in runs of `pytorch_lightning`, whose classes are not those of `lightning.pytorch`.

``make test-pytorch-lightning`` runs the whole suite of callbacks there.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, ModelPruning
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

import lightning_prune
from lightning_prune import LinearSchedule, OneShot, StructuredPruning, Taylor, load_from_checkpoint
from lightning_prune.packages import beside, both
from lightning_prune.surgery import history_of
from tests.callbacks.small import loaders

# Not by an import statement, which is that of the other package where the whole suite runs with it.
LIGHTNING = import_module("lightning.pytorch")


class Other(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def other_fit(folder, pruning, *callbacks, epochs=4, path=None, **options):
    module = Other()
    options = {"logger": False, "accelerator": "cpu"} | options
    trainer = pl.Trainer(
        max_epochs=epochs, default_root_dir=folder, callbacks=[pruning, *callbacks], enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, *loaders(), ckpt_path=path)
    return module, trainer


def pruner():
    return StructuredPruning(0.5, criterion=Taylor(), schedule=LinearSchedule(start=1, end=3, cuts=2))


def stopping():
    return EarlyStopping("val_loss", patience=1, min_delta=10.0)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_it_prunes_saves_and_resumes(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=-1)
    pruning, average = pruner(), EMAWeightAveraging(decay=0.5)
    module, trainer = other_fit(
        tmp_path, pruning, saver, stopping(), average, logger=TensorBoardLogger(tmp_path), log_every_n_steps=1
    )
    assert module.net[0].out_features == 4
    assert average._average_model.module.net[0].out_features == 4
    assert [cut.epoch for cut in pruning.report.cuts] == [1, 3]
    assert trainer.current_epoch == 4  # not stopped at the third epoch: patience begins again with the cut
    saver = ModelCheckpoint(tmp_path / "saved", filename="again-{epoch}", save_top_k=-1)
    callbacks = pruner(), saver, stopping(), EMAWeightAveraging(decay=0.5)
    again, _ = other_fit(tmp_path, *callbacks, path=tmp_path / "saved" / "epoch=1.ckpt")
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    loaded = load_from_checkpoint(Other, tmp_path / "saved" / "epoch=3.ckpt")
    assert history_of(loaded) is not None
    assert loaded.net[0].out_features == 4


def test_pruning_without_a_trainer_goes_into_its_checkpoints(tmp_path: Path) -> None:
    module = Other()
    lightning_prune.prune(module, torch.zeros(2, 6, dtype=torch.float64), pruning_ratio=0.5)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_epochs=0)
    trainer.fit(module, *loaders())
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    assert load_from_checkpoint(Other, tmp_path / "small.ckpt").net[0].out_features == 4


def test_lightnings_own_pruning_is_refused_beside_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected no `ModelPruning`"):
        other_fit(tmp_path, StructuredPruning(0.5, schedule=OneShot(1)), ModelPruning("l1_unstructured", amount=0.5))


def test_its_module_in_the_trainer_of_the_other_package_is_refused_by_lightning(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="LightningModule"):
        LIGHTNING.Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path).fit(Other(), *loaders())


def test_classes_of_both_packages() -> None:
    assert both(LIGHTNING.LightningModule) == (LIGHTNING.LightningModule, pl.LightningModule)
    assert beside(LIGHTNING.LightningModule, Other()) is pl.LightningModule
    for instance in (LIGHTNING.LightningModule(), nn.Linear(1, 1)):
        assert beside(LIGHTNING.LightningModule, instance) is LIGHTNING.LightningModule


def test_the_other_package_is_not_imported_for_it() -> None:
    code = "import sys, lightning_prune.callbacks; sys.exit('pytorch_lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
