"""Runs under FSDP2, as every process makes them: it holds a part of every weight and takes its share of each batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F

import lightning_prune
from lightning_prune.structure.sharding import whole
from lightning_prune.surgery import history_of
from tests.callbacks.networks import Net, fit, make
from tests.callbacks.ranked import EPOCHS, SCHEDULE, processes, share


class Sharded(Net):
    """In float64 without batch norm, so that only rounding depends on how a batch is split."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer, norm=False)
        self.double()
        self.example_input_array = torch.zeros(2, 6, dtype=torch.float64)

    def configure_model(self) -> None:
        if processes() > 1 and not isinstance(self, FSDPModule):  # a second run calls it again
            mesh = self.device_mesh["data_parallel"]
            for part in (self.first, self.second, self):
                fully_shard(part, mesh=mesh)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-3)
        return super().configure_optimizers()


def train(
    folder: Path,
    optimizer: str = "sgd",
    callback: str = "StructuredPruning",
    is_file: bool = True,
    saving: bool = False,
    ckpt_path: Path | None = None,
) -> dict[str, Any]:
    """What a run ends with, all tensors whole; its checkpoints are files or folders."""
    model = make(Sharded, optimizer)
    pruner = getattr(lightning_prune, callback)(pruning_ratio=0.5, schedule=SCHEDULE)
    settings: dict[str, Any] = {}
    if processes() > 1:
        strategy = ModelParallelStrategy(processes(), 1, save_distributed_checkpoint=not is_file)
        settings = {"devices": processes(), "strategy": strategy, "use_distributed_sampler": False}
    steps = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    callbacks = [pruner, steps] if saving else [pruner]
    settings |= {"epochs": EPOCHS, "ckpt_path": ckpt_path, "validate": False}
    run = fit(folder, model, *callbacks, data=share(), **settings)
    history = history_of(model)
    state = run.optimizers[0].state
    found = {
        "weights": {name: whole(tensor.detach()).clone() for name, tensor in model.state_dict().items()},
        "state": [{key: whole(value) for key, value in state[p].items()} for p in model.parameters()],
        "kept": [{name: list(kept) for name, kept in edit.kept.items()} for edit in history.edits] if history else [],
    }
    if saving:  # then the narrow network becomes wide again
        found["losses"] = [
            run.validate(model, share(), ckpt_path=folder / f"step={step}.ckpt", verbose=False)[0]["val_loss"]
            for step in (3, 12)
        ]
    return found


def runs(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Several runs one after the other, with checkpoints in a folder each."""
    return {name: train(folder / name, saving=True, **case) for name, case in cases.items()}


def resumed(folder: Path, cases: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same, and what the runs end with when they continue between their cuts."""
    found = runs(folder, cases)
    return found, {
        name: train(folder / "again", ckpt_path=folder / name / "step=6.ckpt", **case) for name, case in cases.items()
    }
