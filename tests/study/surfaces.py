"""Studies without training: accuracy as a function of the hyperparameters, and a launcher in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lightning_prune.study.definition import Study, define
from lightning_prune.study.launchers import Job, Launcher
from lightning_prune.study.recipe import get

RECIPE: dict[str, Any] = {
    "model": {"class_path": "MLPClassifier", "init_args": {"sizes": [64, 12, 10], "lr": 0.1, "weight_decay": 1e-3}},
    "data": {"class_path": "Digits", "init_args": {"train_limit": 40, "batch_size": 20}},
    "trainer": {"max_epochs": 2},
}


def study(points: int = 3, **entries: Any) -> Study:
    """A small study; lr × weight decay in steps of a power of ten."""
    axis = {"step": 1.0, "points": points}
    given = {"recipe": RECIPE, "grid": {"model.lr": axis, "model.weight_decay": axis}, **entries}
    return define(given, Path)


@dataclass
class Surface:
    """In place of the command line: writes an accuracy where a fit would have logged it.

    Args:
        accuracy: Of log10(lr), log10(weight decay), whether the network is pruned, and the seed.
    """

    accuracy: Callable[[float, float, bool, int], float]
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, words: Sequence[str], callbacks: Sequence[Any]) -> None:
        config = yaml.safe_load(Path(words[1].removeprefix("--config=")).read_text())
        (recorder,) = callbacks
        folder = Path(words[1].removeprefix("--config=")).parent / "fit" / "001" / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {}, "global_step": 1}, folder / "last.ckpt")
        start = get({"trainer": {"callbacks": config["trainer"]["callbacks"][:1]}}, "trainer.callbacks")[0]["init_args"]
        lr, decay = (float(np.log10(get(config, f"model.{name}"))) for name in ("lr", "weight_decay"))
        self.calls.append(config)
        value = self.accuracy(lr, decay, "architecture" in start, config["seed_everything"])
        recorder.curve.append({"val_acc": value})
        recorder.size, recorder.seconds, recorder.architecture = (100, 1000), 1.0, {"edits": []}


class Inline(Launcher):
    """Runs jobs one after the other in this process."""

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str | None]]:
        for index, job in enumerate(jobs):
            job()
            yield index, None


def hill(lr: float, decay: float, pruned: bool, seed: int) -> float:
    """Best at lr 0.1 and weight decay 0.001, and falling by a tenth a step; pruned a little lower."""
    return 0.9 - 0.1 * (abs(lr + 1) + abs(decay + 3)) - 0.05 * pruned - 0.001 * seed


def silent(_: str) -> None:
    """Takes a line and drops it."""
