"""Processes that Lightning spawns or forks hand the narrow network back to the one that has started them.

Lightning's launcher hands back the weights, but that process has never run a callback: its network is still wide. So
the history, the masks and the reports go with them, and come first. Nothing that a callback could use runs there before
the weights are loaded, so one method of the launcher's class is wrapped for as long as the process lives; it does for
a run without a pruning callback what it did. The launcher's private names are used here only.
"""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher, _WorkerOutput

from lightning_prune.callbacks.checkpoints import keep_history
from lightning_prune.reporting import Report
from lightning_prune.surgery import load_from, save_into, save_masks_into

__all__ = ["hand_back", "patch_spawn_launcher"]

_KEY = "lightning_prune"

_recover_weights = _MultiProcessingLauncher._recover_results_in_main_process


def patch_spawn_launcher() -> None:
    """From now on what spawned processes have cut is cut in the one that waits for them; twice is once."""
    _MultiProcessingLauncher._recover_results_in_main_process = _recover  # type: ignore[method-assign]


def hand_back(trainer: Trainer) -> None:
    """Let the launcher of a spawned process hand back what belongs to the weights."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        launcher.get_extra_results = partial(_extra, launcher)  # type: ignore[method-assign]


def _extra(self: _MultiProcessingLauncher, trainer: Trainer) -> dict[str, Any]:
    """In the first of the started processes: what goes home with the weights."""
    extra = type(self).get_extra_results(self, trainer)
    reports = {callback.state_key: report.to_plain() for callback, report in _reports(trainer)}
    if reports:
        luggage: dict[str, Any] = {"reports": reports}
        save_into(luggage, trainer.lightning_module)
        save_masks_into(luggage, trainer.lightning_module)
        buffer = io.BytesIO()
        torch.save(luggage, buffer)  # bytes, as Lightning does: tensors would share the memory of a process that ends
        extra[_KEY] = buffer.getvalue()
    return extra


def _recover(self: _MultiProcessingLauncher, worker_output: _WorkerOutput, trainer: Trainer) -> None:
    """In the process that has started them: widths and masks first, then Lightning loads the weights."""
    luggage = worker_output.extra.get(_KEY)
    if luggage is not None and worker_output.weights_path is not None:  # only a fit brings weights
        found = torch.load(io.BytesIO(luggage), weights_only=True)
        module = trainer.lightning_module
        keep_history(module)
        load_from({**found, "state_dict": {}}, module)
        for callback, _ in _reports(trainer):
            if callback.state_key in found["reports"]:
                vars(callback)["report"] = Report.from_plain(found["reports"][callback.state_key])
    _recover_weights(self, worker_output, trainer)


def _reports(trainer: Trainer) -> list[tuple[Callback, Report]]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = ((callback, getattr(callback, "report", None)) for callback in callbacks)
    return [(callback, report) for callback, report in found if isinstance(report, Report)]
