"""One coordinator per run: what it takes from other callbacks it gives back, however the run ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from lightning_prune import HybridPruning, MagnitudePruning, NetworkSlimming, OneShot, StructuredPruning
from lightning_prune.callbacks.scheduled import ScheduledPruning
from tests.callbacks.networks import Net, make, refit, trainer

LATE = OneShot(at=5)
CALLBACKS: dict[str, Callable[[], list[ScheduledPruning]]] = {
    "structured": lambda: [StructuredPruning(0.5, schedule=LATE)],
    "slimming": lambda: [NetworkSlimming(0.5, schedule=LATE)],
    "masks": lambda: [MagnitudePruning(0.5, schedule=LATE)],
    "masks per filter": lambda: [HybridPruning(0.5, schedule=LATE)],
    "both": lambda: [StructuredPruning(0.5, schedule=LATE), MagnitudePruning(0.5, schedule=LATE)],
}


class Good(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 0.1)


class Ends(Callback):
    """Ends the run in its third epoch."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch != 2:
            return
        if self.how == "an error":
            raise ZeroDivisionError
        if self.how == "Ctrl-C":
            raise KeyboardInterrupt
        trainer.should_stop = True


@pytest.mark.filterwarnings("ignore:the run ended before the last of its cuts")
@pytest.mark.parametrize("how", ["an error", "Ctrl-C", "should_stop"])
@pytest.mark.parametrize("kind", CALLBACKS)
def test_early_stopping_gets_its_threshold_back(kind: str, how: str, tmp_path: Path) -> None:
    stopper = EarlyStopping("val_loss", stopping_threshold=0.5)
    held: list[float | None] = []

    class Seen(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            held.append(stopper.stopping_threshold)

    run, model = trainer(tmp_path, *CALLBACKS[kind](), stopper, Seen(), Ends(how), epochs=8), make(Good)
    with nullcontext() if how == "should_stop" else pytest.raises((ZeroDivisionError, KeyboardInterrupt, SystemExit)):
        refit(run, model)
    assert set(held) == {None}, "it was not withheld"
    assert stopper.stopping_threshold == 0.5
