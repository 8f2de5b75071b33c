"""One pruning run as every process of a crew makes it: each takes its share of the same global batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import Subset, TensorDataset

import lightning_prune
from lightning_prune import LinearSchedule
from lightning_prune.surgery import history_of
from tests.callbacks import networks
from tests.callbacks.contents import content, differences
from tests.callbacks.networks import BATCH, BATCHES, Loader, Net, fit, make, weights
from tests.support.ranks import PROCESSES

EPOCHS = 4
#: Cuts before the epochs 1 and 2.
SCHEDULE = LinearSchedule(start=1, end=2, cuts=2)


def processes() -> int:
    return int(os.environ.get(PROCESSES, "1"))


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def share(number: int = BATCHES * BATCH) -> Loader:
    """Of each of the four global batches of eight, every n-th sample; in float64."""
    x, y = networks.samples()[:]
    mine = Subset(TensorDataset(x.double(), y), range(rank(), number, processes()))
    return Loader(mine, batch_size=BATCH // processes())


class Double(Net):
    """Without batch norm, in float64: nothing but rounding depends on how a batch is split."""

    def __init__(self, optimizer: str = "sgd", norm: bool = False) -> None:
        super().__init__(optimizer, norm=norm)
        self.double()
        self.example_input_array = torch.zeros(2, 6, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.double())

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("rising_loss", float(self.trainer.global_step))
        return super().training_step(batch, batch_idx)


def train(
    folder: Path,
    callback: str = "StructuredPruning",
    optimizer: str = "sgd",
    pruning: dict[str, Any] | None = None,
    strategy: dict[str, Any] | None = None,
    saving: bool = False,
    trainer_strategy: DDPStrategy | None = None,
    samples: int = BATCHES * BATCH,
    validate: bool = False,
    **trainer: Any,
) -> tuple[dict[str, Any], Any, Any]:
    """What the run ends with, its trainer and its network; ``strategy`` are settings of DDP."""
    model = make(Double, optimizer)
    pruner = getattr(lightning_prune, callback)(**{"pruning_ratio": 0.5, "schedule": SCHEDULE, **(pruning or {})})
    settings: dict[str, Any] = {"epochs": EPOCHS, **trainer}
    steps = ModelCheckpoint(folder / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    others = [steps] if saving else []
    if processes() > 1:
        settings |= {
            "devices": processes(),
            "strategy": trainer_strategy or DDPStrategy(**(strategy or {})),
            "use_distributed_sampler": False,
        }
    done = fit(folder, model, pruner, *others, data=share(samples), validate=validate, **settings)
    if processes() > 1:
        mine = torch.cat([weight.double().flatten() for weight in weights(model).values()])
        everyone = [torch.empty_like(mine) for _ in range(processes())]
        torch.distributed.all_gather(everyone, mine)
        assert all(torch.equal(mine, other) for other in everyone)
    return content(done, model, pruner), done, model


def resumed(folder: Path, *cases: tuple[str, str, dict[str, Any]]) -> dict[str, list[str]]:
    """For every case of a callback, an optimizer and pruning settings: what differs after any resume, by case."""
    wrong = {}
    for number, (callback, optimizer, pruning) in enumerate(cases):
        home = folder / str(number)
        settings: dict[str, Any] = {"callback": callback, "optimizer": optimizer, "pruning": pruning}
        expected, *_ = train(home, saving=True, **settings)
        if len(expected["report"]["cuts"]) != 2:
            wrong[f"{callback} {pruning}"] = ["there were not two cuts"]
        # Right before the first cut, and between both in mid-epoch.
        for step in (BATCHES, BATCHES + 3):
            again, *_ = train(home / "again", ckpt_path=home / "steps" / f"step={step}.ckpt", **settings)
            parts = differences(again, expected)
            if step == BATCHES:
                parts.remove("report")  # Lightning does not end that epoch a second time, so its metrics are missing
            if parts:
                wrong[f"{callback} {optimizer} {pruning}, from step {step}"] = parts
    return wrong


class Compressing:
    """Registers a hook of DDP's communication wherever Lightning would: it does so on GPUs only. Counts its calls."""

    def __init__(self, strategy: DDPStrategy) -> None:
        self.strategy, self.calls = strategy, 0
        vars(strategy)["_register_ddp_hooks"] = self.register

    def register(self) -> None:
        self.strategy.model.register_comm_hook(None, self.compress)

    def compress(self, state: Any, bucket: Any) -> Any:
        self.calls += 1
        return default_hooks.fp16_compress_hook(state, bucket)


# DDP compares the types themselves, not their names.
Compressing.compress.__annotations__ = {"bucket": GradBucket, "return": torch.futures.Future[torch.Tensor]}


def compressed(folder: Path) -> tuple[int, float]:
    """How often a communication hook ran, and how far the weights are from those without it."""
    plain, *_ = train(folder / "plain")
    strategy = DDPStrategy()
    hook = Compressing(strategy)
    found, *_ = train(folder / "compressed", trainer_strategy=strategy)
    return hook.calls, max(
        float((found["weights"][name] - weight).abs().max()) for name, weight in plain["weights"].items()
    )


def second_fit(folder: Path) -> int:
    """How many cuts one callback with a ``dirpath`` made in two fits of one trainer."""
    _, done, model = train(
        folder, pruning={"dirpath": str(folder / "report"), "schedule": LinearSchedule(1, 5, cuts=2)}
    )
    done.fit_loop.max_epochs = EPOCHS + 2
    done.fit(model, share())
    callback = next(found for found in done.callbacks if isinstance(found, lightning_prune.StructuredPruning))
    return len(callback.report.cuts)


class Fault(Callback):
    """Makes one process fail in a cut, or change a weight of its own."""

    def __init__(self, failing: int, kind: str) -> None:
        self.failing, self.kind = failing, kind

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if rank() == self.failing and trainer.global_step == BATCHES:
            if self.kind == "fails":
                vars(pl_module)["forward"] = self.fail
            else:
                with torch.no_grad():
                    pl_module.head.bias.add_(1)

    def fail(self, *_: Any) -> None:
        raise RuntimeError("only here")


def faulty(folder: Path, failing: int, kind: str) -> tuple[str, bool]:
    """The error of this process, and whether its network is as before the cut."""
    model = make(Double)
    try:
        pruner = lightning_prune.StructuredPruning(0.5, schedule=SCHEDULE)
        settings: dict[str, Any] = {"devices": processes(), "strategy": "ddp", "use_distributed_sampler": False}
        fit(folder, model, Fault(failing, kind), pruner, data=share(), validate=False, epochs=EPOCHS, **settings)
    except Exception as error:
        whole = model.first.out_features == 12 and not pruner.report.cuts and pruner._done == -1
        return f"{type(error).__name__}: {error}", whole and history_of(model) is None
    return "no error", False


def variants(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Contents of several runs one after the other, by name of the case."""
    return {name: train(folder / name, **settings)[0] for name, settings in cases.items()}
