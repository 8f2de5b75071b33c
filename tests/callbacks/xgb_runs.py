"""Runs of the XGB pruner: small networks written by hand, as LightningModules, on a few images."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import OneShot, XGBoost, XGBPruning
from lightning_prune.callbacks.display import score_display
from lightning_prune.scoring import Surrogate
from lightning_prune.surgery import Keep, history_of
from tests.callbacks.small import trainer
from tests.support import xgb_reference as reference
from tests.support.ranks import PROCESSES

#: Small and quick; the naive reference has the defaults.
QUICK = XGBoost(rounds=8, threads=1)


class Module(LightningModule):
    """One of the reference's networks, by its name."""

    def __init__(self, kind: str = "Chain", lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = reference.network(getattr(reference, kind)).train()
        self.lr = lr
        self.example_input_array = torch.zeros(2, 1, 8, 8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Classifier(Module):
    """Any network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(lr=0.0)
        self.net = net
        self.example_input_array = None


class Deep(Module):
    """Four convolutions, of which the third one knows nothing of the image."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__(lr=lr)
        torch.manual_seed(3)
        widths = [(1, 6), (6, 6), (6, 4), (4, 4)]
        parts = [[nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b, momentum=0.0), nn.ReLU()] for a, b in widths]
        self.net = nn.Sequential(*(module for part in parts for module in part)).double()
        self.head = nn.Linear(4, 3).double()
        with torch.no_grad():
            self.net[6].weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.net(x).mean((2, 3)))
        return out


class Regressor(Module):
    """Predicts a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net.d2 = nn.Linear(7, 1).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0])[:, 0], batch[1])


def loader(n: int = 240, batch_size: int = 60, labels: Any = None) -> DataLoader[Any]:
    x, y = reference.images(n)
    return DataLoader(TensorDataset(x, y if labels is None else labels), batch_size=batch_size)


def fit(
    folder: Path, module: LightningModule, pruning: XGBPruning, *callbacks: Any, data: Any = None, **kw: Any
) -> Any:
    """The trainer of a run, by default of one epoch."""
    path = kw.pop("ckpt_path", None)
    run = trainer(folder, kw.pop("epochs", 1), pruning, *callbacks, **kw)
    run.fit(module, loader() if data is None else data, ckpt_path=path)
    return run


def kept(module: LightningModule) -> dict[str, list[int]]:
    """Units that cuts have kept of each group, by the reference's names."""
    history = history_of(module)
    assert history is not None
    cuts = [edit for edit in history.edits if isinstance(edit, Keep)]
    return {name.removeprefix("net."): list(units) for edit in cuts for name, units in edit.kept.items()}


def in_processes(folder: str, kind: str, settings: dict[str, Any], epochs: int = 1) -> tuple[Any, Any, Any]:
    """A run as each of several processes makes it: scores, units kept, weights. ``ends`` has a checkpoint an epoch."""
    without_pictures()
    pruning, module = XGBPruning(extensions=[], **settings), Deep() if kind == "Deep" else Module(kind, lr=0.1)
    several = {}
    if int(os.environ.get(PROCESSES, "1")) > 1:
        several = {"devices": int(os.environ[PROCESSES]), "strategy": DDPStrategy()}
    ends = ModelCheckpoint(Path(folder) / "ends", filename="{epoch}", save_top_k=-1)
    fit(Path(folder), module, pruning, ends, epochs=epochs, enable_checkpointing=True, **several)
    assert pruning.scored is not None
    found = {station.layer.removeprefix("net."): one for station, one in pruning.scored.layers.items()}
    numbers = {layer: (one.score, one.importance, one.share) for layer, one in found.items()}
    return numbers, kept(module), {name: p.detach() for name, p in module.named_parameters()}


class AfterTheCut(Callback):
    """What the network holds when the cut has been made, before it trains on."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.found is None and history_of(pl_module) is not None:
            self.found = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}


def repaired(folder: str, kind: str, repairs: list[Any], depth: Any = None, ckpt: str | None = None) -> Any:
    """What each of several processes holds after a cut at epoch 1, with its repairs; the run may begin there."""
    without_pictures()
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    settings: dict[str, Any] = {"pruning_ratio": 0.5, "depth": depth, "surrogate": QUICK, "schedule": OneShot(1)}
    pruning, after = XGBPruning(extensions=repairs, **settings), AfterTheCut()
    module = Deep(0.1) if kind == "Deep" else Module(kind, lr=0.1)
    for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.momentum = 0.1
    several: dict[str, Any] = {}
    count = int(os.environ.get(PROCESSES, "1"))
    if count > 1:
        several = {"devices": count, "strategy": DDPStrategy()}
    ends = ModelCheckpoint(Path(folder) / "ends", filename="{epoch}", save_top_k=-1)
    fit(Path(folder), module, pruning, ends, after, epochs=2, enable_checkpointing=True, ckpt_path=ckpt, **several)
    alike: list[Any] = [after.found] * count
    if count > 1:
        dist.all_gather_object(alike, after.found)
    return alike


@dataclass(frozen=True)
class Counting(Surrogate):
    """Boosted trees that count how often they are fitted, and stop the run at one of these fits.

    Attributes:
        fits: Grows by one for every fit; shared, and no part of what a score depends on.
        stop_at: The fit that stops the run, from 0.
    """

    fits: list[int] = field(default_factory=list, repr=False)
    stop_at: int | None = field(default=None, repr=False)
    task: Any = "classification"
    importance: str = "gain"
    seed: int = 0

    importances = ("gain",)

    def train(self, *tables: Any) -> Any:
        if len(self.fits) == self.stop_at:
            raise Interrupted
        self.fits.append(1)
        return QUICK.train(*tables)


class Interrupted(BaseException):
    """As a signal would end the run."""


def without_pictures() -> None:
    """As the fixture of the tests does, which processes of their own do not see."""
    score_display._pictures = lambda *_: []
