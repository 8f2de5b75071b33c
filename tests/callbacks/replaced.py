"""A run whose network is truncated, gets a new head and becomes narrower on the way, as every process makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.callbacks.lightning.averages import averages
from lightning_prune.callbacks.lightning.checkpoints import keep_history
from lightning_prune.callbacks.lightning.processes import all_or_none, assert_same_parameters, unwrapped
from lightning_prune.callbacks.traced_models import traced_model_of
from lightning_prune.structure import trace
from lightning_prune.surgery import LayerSpec, history_of, transaction
from lightning_prune.surgery.compiled import eager, reset_compiled
from tests.callbacks.networks import Net, fit, make, weights
from tests.callbacks.ranked import processes, share

EPOCHS, AT = 3, 1
LINEAR = LayerSpec("Linear", {"in_features": 12, "out_features": 12})
#: Two layers of one shape, beside a first one of the same number of outputs: a state on the wrong tensor is seen.
HEAD = LayerSpec(
    "Sequential",
    layers=(LINEAR, LayerSpec("ReLU"), LINEAR, LayerSpec("Linear", {"in_features": 12, "out_features": 3})),
)


class Deep(Net):
    """Three hidden layers, in float64, with two groups of parameters in the optimizer and a schedule of its rates."""

    def __init__(self, optimizer: str = "adamw", norm: bool = False) -> None:
        super().__init__(optimizer, norm=norm)
        self.third = nn.Linear(8, 8)
        self.double()
        self.example_input_array = torch.zeros(2, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head(F.relu(self.third(F.relu(self.second(x)))))

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        kinds: dict[str, Any] = {
            "sgd": lambda: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
            "adamw": lambda: torch.optim.AdamW(groups, lr=0.01),
        }
        optimizer = kinds[self.optimizer]()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class Truncation(Callback):
    """At an epoch's first batch what is behind the first layer goes, a new head comes, and half of all units go."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        keep_history(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) != (AT, 0) or history_of(pl_module) is not None:
            return
        traced, copies = traced_model_of(pl_module, batch), averages(trainer)
        when = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        modules = {"second": LayerSpec("Identity"), "third": LayerSpec("Identity"), "head": HEAD}
        reset_compiled(pl_module)
        with eager(pl_module), unwrapped(trainer, pl_module):
            with (
                all_or_none(),
                transaction(
                    pl_module, trainer.optimizers, copies, lambda: pl_module.forward(batch[0]), **when
                ) as change,  # type: ignore[arg-type]
            ):
                structure = change.replace(modules, lambda: trace(traced), trace(traced))
                kept = {group.name: tuple(range(1, group.width, 2)) for group in structure.groups}
                change.keep(structure, kept)
            assert_same_parameters(pl_module)


def state_of(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Weights, averages and the optimizer's state by the names of the parameters."""
    names = {id(p): name for name, p in module.named_parameters()}
    (optimizer,) = trainer.optimizers
    return {
        "weights": weights(module),
        "averages": [weights(copy) for copy in averages(trainer)],
        "state": {
            names[id(p)]: {key: torch.as_tensor(value).clone() for key, value in entry.items()}
            for p, entry in optimizer.state.items()
        },
        "groups": [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups],
        "rates": [group["lr"] for group in optimizer.param_groups],
        "history": [edit.kind for edit in history_of(module).edits],  # type: ignore[union-attr]
    }


def train(folder: Path, optimizer: str = "adamw", *others: Callback, model: Any = None, **options: Any) -> Any:
    """What the run ends with, its trainer and its network; saved after every step into ``folder / "steps"``."""
    saver = ModelCheckpoint(folder / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    model = make(Deep, optimizer) if model is None else model
    settings: dict[str, Any] = {"epochs": EPOCHS, **options}
    if processes() > 1:
        settings |= {"devices": processes(), "strategy": "ddp", "use_distributed_sampler": False}
    run = fit(folder, model, Truncation(), saver, *others, data=share(), validate=False, **settings)
    if processes() > 1:
        assert_same_parameters(model)
    return state_of(run, model), run, model


def resumed(folder: Path, optimizer: str = "adamw") -> dict[str, Any]:
    """What the undisturbed run ends with, and what differs after a resume from each of some steps."""
    expected, *_ = train(folder, optimizer)
    wrong = {}
    for step in (3, 5, 9):  # before it, right after its first step, an epoch later
        again, *_ = train(folder / f"again {step}", optimizer, ckpt_path=folder / "steps" / f"step={step}.ckpt")
        wrong[step] = [part for part in expected if not same(again[part], expected[part])]
    return {"wrong": wrong, "expected": expected}


def ends(folder: Path, ckpt: Path | None = None) -> dict[str, Any]:
    """What a run ends with, as far as other processes take it."""
    return train(folder, ckpt_path=ckpt)[0]  # type: ignore[no-any-return]


def same(one: Any, other: Any) -> bool:
    """Bit by bit."""
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
