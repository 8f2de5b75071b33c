"""Mixed precision in fp16: the scaler skips, shrinks and grows as it does without a cut, and resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.nn import functional as F

from lightning_prune import (
    L2,
    Contribution,
    ContributionPruning,
    GroupLasso,
    LinearSchedule,
    MagnitudePruning,
    NetworkSlimming,
    StructuredPruning,
    Taylor,
)
from lightning_prune.callbacks.scheduled import ScheduledPruning
from lightning_prune.surgery import masks_of, revived
from tests.callbacks.networks import BATCHES, Net, equal, fit, make, weights, widths

EPOCHS = 5
#: Cuts before the epochs 1 and 3.
SCHEDULE = LinearSchedule(start=1, end=3, cuts=2)
#: Steps whose gradients overflow: right before a cut, right after one, and later.
OVERFLOWS = (BATCHES - 1, 3 * BATCHES, 4 * BATCHES + 2)

PRUNERS: dict[str, Callable[[], ScheduledPruning]] = {
    "weights": lambda: StructuredPruning(0.5, schedule=SCHEDULE),
    "activations": lambda: ContributionPruning(0.5, criterion=Contribution(every_n_batches=1), schedule=SCHEDULE),
    "gradients": lambda: StructuredPruning(0.5, criterion=Taylor(every_n_batches=3), schedule=SCHEDULE),
    "masks": lambda: MagnitudePruning(0.5, schedule=SCHEDULE),
    "penalty": lambda: NetworkSlimming(0.5, penalty=GroupLasso(0.01), criterion=L2(), schedule=SCHEDULE, scope="local"),
}


class Overflowing(Net):
    """Batch norm is left out: its running means move with every forward pass."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer, norm=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        done = self.trainer.current_epoch * BATCHES + batch_idx
        return loss * torch.inf if done in OVERFLOWS else loss


class Scaler(Callback):
    """What the scaler knows after every batch, and whether the batch has moved a weight."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, int, bool]] = []
        self.before: dict[str, Tensor] = {}

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before = weights(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        scaler = trainer.precision_plugin.scaler
        assert scaler._per_optimizer_states.keys() <= {id(optimizer) for optimizer in trainer.optimizers}
        self.rows.append((scaler.get_scale(), scaler._get_growth_tracker(), equal(weights(pl_module), self.before)))


def train(folder: Path, *callbacks: Callback, **options: Any) -> tuple[Any, Any, list[Any]]:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3))
    model, scaler = make(Overflowing), Scaler()
    run = fit(folder, model, *callbacks, scaler, epochs=EPOCHS, plugins=plugin, validate=False, **options)
    return model, run, scaler.rows


@pytest.mark.filterwarnings("ignore:NaN or infinite")  # the gradients that overflow are left out of the scores
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("kind", PRUNERS)
def test_a_scaler_survives_cuts_and_resumes(kind: str, tmp_path: Path) -> None:
    _, _, expected = train(tmp_path / "dense")
    assert [step for step, (*_, still) in enumerate(expected) if still] == list(OVERFLOWS)
    assert len({scale for scale, *_ in expected}) > 2
    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    model, run, rows = train(tmp_path / "whole", PRUNERS[kind](), saver)
    assert rows == expected
    assert kind == "masks" or widths(model) == (6, 4)
    assert bool(masks_of(model)) == (kind == "masks")
    assert not revived(model)
    for epoch in (0, 2):
        file = tmp_path / "ends" / f"epoch={epoch}.ckpt"
        again, resumed, later = train(tmp_path / "again", PRUNERS[kind](), ckpt_path=file)
        assert later == expected[(epoch + 1) * BATCHES :]
        assert equal(weights(again), weights(model))
        assert equal(resumed.optimizers[0].state_dict(), run.optimizers[0].state_dict())
