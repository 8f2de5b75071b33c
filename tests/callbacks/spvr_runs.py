"""A run of SPvR that every process of a crew makes, and that can be killed while it ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_prune import SPvRPruning
from lightning_prune.callbacks.display.report_writer import ReportWriter
from lightning_prune.callbacks.methods import spvr as callback_file
from lightning_prune.surgery import history_of
from tests.callbacks.small import trainer
from tests.callbacks.test_spvr import Chain, images
from tests.support.ranks import PROCESSES

__all__ = ["train"]


def train(folder: Path, settings: dict[str, Any], die_after: int | None = None) -> dict[str, Any]:
    """What was found and done; of a run that is killed once something was written down so often, nothing."""
    ReportWriter.measure = lambda self, traced, size, dense=None: size  # type: ignore[method-assign]
    ReportWriter.finish = lambda *_: None  # type: ignore[method-assign]
    if die_after is not None:
        _die(die_after)
    processes = int(os.environ.get(PROCESSES, "1"))
    settings = {"budget": 0.3, "samples_per_class": 8, **settings}
    module, pruning = Chain(), SPvRPruning(**settings)
    how: dict[str, Any] = {"devices": 1}
    if processes > 1:
        how = {"devices": processes, "strategy": DDPStrategy()}
    run = trainer(folder, 1, pruning, **how)
    run.fit(module, images(3 * settings["samples_per_class"]))
    ranking, history = pruning.ranking, history_of(module)
    assert ranking is not None
    assert history is not None
    kept = [
        {name: list(units) for name, units in getattr(edit, "kept", {}).items()}
        for edit in history.edits
        if hasattr(edit, "kept")
    ]
    return {
        "bundles": dict(ranking.bundles),
        "scores": dict(ranking.scores),
        "samples": ranking.samples,
        "macs": ranking.macs,
        "kept": kept,
        "edits": len(history.edits),
        "weights": {name: weight.detach() for name, weight in module.named_parameters()},
        "total": torch.tensor(sum(weight.numel() for weight in module.parameters())),
    }


def _die(after: int) -> None:
    """SIGKILL, in the middle of a ranking."""
    see, seen = callback_file.RankingProgress.see, []

    def counting(self: Any, name: str, done: int, total: int) -> None:
        see(self, name, done, total)
        seen.append(name)
        if len(seen) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    callback_file.RankingProgress.see = counting  # type: ignore[method-assign]
