"""Return the pruned network from processes that Lightning spawns or forks to the main process.

Lightning's launcher returns the weights, but the main process has run no callback, and its network still has the
original widths. So the history, the masks and the reports are returned too and restored first. No callback hook runs
there before the weights are loaded, so one method of the launcher's class is patched for the lifetime of the process;
runs without a pruning callback are not affected. The launcher's private names are used here only.

"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher, _WorkerOutput

from lightning_prune.callbacks.lightning.checkpoints import keep_history
from lightning_prune.packages import beside, both
from lightning_prune.reporting import Report
from lightning_prune.surgery import load_from, save_into, save_masks_into

__all__ = ["patch_spawn_launcher", "return_history"]

_KEY = "lightning_prune"

# The methods that were patched, by class.
_recover_weights: dict[type[_MultiProcessingLauncher], Callable[..., None]] = {}


def patch_spawn_launcher() -> None:
    """Patch Lightning's launcher to repeat cuts of spawned processes in the main process; idempotent.

    That of ``pytorch_lightning`` too, if it is imported.
    """
    for launcher in both(_MultiProcessingLauncher):
        if launcher not in _recover_weights:
            _recover_weights[launcher] = launcher._recover_results_in_main_process
            launcher._recover_results_in_main_process = _recover  # type: ignore[method-assign]


def return_history(trainer: Trainer) -> None:
    """Make the launcher of a spawned process return history, masks and reports with the weights."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, both(_MultiProcessingLauncher)):
        launcher.get_extra_results = partial(_extra, launcher)  # type: ignore[method-assign]


def _extra(self: _MultiProcessingLauncher, trainer: Trainer) -> dict[str, Any]:
    """Return what rank zero sends to the main process with the weights."""
    extra = type(self).get_extra_results(self, trainer)
    reports = {callback.state_key: report.to_plain() for callback, report in _reports(trainer)}
    if reports:
        payload: dict[str, Any] = {"reports": reports}
        save_into(payload, trainer.lightning_module)
        save_masks_into(payload, trainer.lightning_module)
        buffer = io.BytesIO()
        torch.save(payload, buffer)  # bytes, as Lightning does: tensors would share the memory of a process that ends
        extra[_KEY] = buffer.getvalue()
    return extra


def _recover(self: _MultiProcessingLauncher, worker_output: _WorkerOutput, trainer: Trainer) -> None:
    """Restore widths and masks in the main process, then let Lightning load the weights."""
    payload = worker_output.extra.get(_KEY)
    if payload is not None and worker_output.weights_path is not None:  # only a fit brings weights
        found = torch.load(io.BytesIO(payload), weights_only=True)
        module = trainer.lightning_module
        keep_history(module)
        load_from({**found, "state_dict": {}}, module)
        for callback, _ in _reports(trainer):
            if callback.state_key in found["reports"]:
                vars(callback)["report"] = Report.from_plain(found["reports"][callback.state_key])
    _recover_weights[beside(_MultiProcessingLauncher, self)](self, worker_output, trainer)


def _reports(trainer: Trainer) -> list[tuple[Callback, Report]]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = ((callback, getattr(callback, "report", None)) for callback in callbacks)
    return [(callback, report) for callback, report in found if isinstance(report, Report)]
