"""Saving history and masks in checkpoints, and loading pruned networks."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.cloud_io import _load as read
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_prune.callbacks.lightning.averages import averages
from lightning_prune.packages import both
from lightning_prune.structure.sharding import has_shards
from lightning_prune.surgery import load_from, save_into, save_masks_into

__all__ = ["StatefulCallback", "check_states", "keep_history", "load_from_checkpoint", "load_into"]

Module = TypeVar("Module", bound=LightningModule)

# Loading replaces a hook of the class temporarily.
_loading = RLock()


class StatefulCallback(Callback):
    """A callback whose state in a checkpoint is checked before the network changes."""

    @property
    def needs_whole_network(self) -> str | None:
        """What needs a whole network in each process, for messages; None if a sharded one is enough."""
        return f"`{type(self).__name__}`"

    def snapshot_state(self) -> Callable[[], None]:
        """Return a function that restores the current state of the callback."""
        return partial(vars(self).update, dict(vars(self)))


def keep_history(module: LightningModule) -> None:
    """Save history and masks in the module's checkpoints, and set widths when one is loaded.

    The module's hooks are wrapped, since they also run for ``save_weights_only``, after the fit, and before shapes are
    compared. Calling it again has no effect.
    """
    if not isinstance(vars(module).get("on_save_checkpoint"), partial):
        # Partials of functions of this module, so that the network can still be pickled and copied.
        vars(module)["on_save_checkpoint"] = partial(_save, module)
        vars(module)["on_load_checkpoint"] = partial(_load, module)


def load_from_checkpoint(
    model_class: type[Module],
    checkpoint_path: str | Path,
    map_location: Any = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **init: Any,
) -> Module:
    """Load a pruned or dense network from a checkpoint, without a callback.

    Args:
        model_class: The LightningModule class.
        checkpoint_path: The checkpoint.
        map_location: As in ``torch.load``.
        strict: As in ``LightningModule.load_from_checkpoint``.
        weights_only: As in ``torch.load``, which reads tensors and plain values only, unless this is False. Pass False
            for a checkpoint that you trust and whose saved hyperparameters contain other objects.
        **init: Arguments of the class that ``save_hyperparameters()`` did not save, or to override.

    Returns:
        An instance of ``model_class`` with the widths of the checkpoint and its history; in train mode, as from
        Lightning, so call ``.eval()`` before you predict with it.

    Raises:
        HistoryError: If the checkpoint is of another architecture or its history is damaged.
        TypeError: If ``model_class`` is not a LightningModule class.
        ValueError: If the file is incomplete, no checkpoint of a Trainer, or of other shapes without a history.
    """
    if not (isinstance(model_class, type) and issubclass(model_class, both(LightningModule))):
        raise TypeError(
            f"expected the class of a LightningModule, got {model_class!r}. "
            "Write `load_from_checkpoint(MyModule, path)`."
        )

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        keep_history(self)
        own = before or super(model_class, self).on_load_checkpoint.__func__
        own(self, checkpoint)
        load_from(checkpoint, self, strict=self.strict_loading if strict is None else strict)

    # Lightning creates the instance, calls this hook and then loads the weights. A subclass would not be the class that
    # a # LightningCLI checkpoint names.
    with _loading, torch.inference_mode(False):
        before = vars(model_class).get("on_load_checkpoint")
        model_class.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]
        try:
            return model_class.load_from_checkpoint(
                checkpoint_path, map_location=map_location, strict=strict, weights_only=weights_only, **init
            )
        except (KeyError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            message = _cause(error, Path(checkpoint_path), model_class)
            if message is None:
                raise
            raise ValueError(message) from error
        finally:
            if before is None:
                del model_class.on_load_checkpoint
            else:
                model_class.on_load_checkpoint = before  # type: ignore[method-assign]


def load_into(
    module: LightningModule, checkpoint_path: str | Path, weights_only: bool | None = None
) -> Mapping[str, Any]:
    """Give a module, built with the arguments it had, the widths and weights of a checkpoint, on the CPU.

    Unlike `load_from_checkpoint`, it needs no ``save_hyperparameters()``.

    Returns:
        The checkpoint.

    Raises:
        HistoryError: If the checkpoint is of another architecture or its history is damaged.
        ValueError: If the file is incomplete, no checkpoint of a Trainer, or of other shapes without a history.
    """
    keep_history(module)
    try:
        checkpoint = read(checkpoint_path, map_location="cpu", weights_only=weights_only is not False)
        if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
            raise KeyError("pytorch-lightning_version")
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
        return checkpoint
    except (KeyError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        message = _cause(error, Path(checkpoint_path), type(module))
        if message is None:
            raise
        raise ValueError(message) from error


def _cause(error: Exception, file: Path, model_class: type[LightningModule]) -> str | None:
    """Why a checkpoint cannot be loaded, and what to do; None where the error says it."""
    if "pytorch-lightning_version" in str(error):
        return (
            f"expected a checkpoint of the Trainer, got '{file}', which is none. Save one by "
            "`trainer.save_checkpoint(path)` or `ModelCheckpoint`."
        )
    if "size mismatch" in str(error):
        return (
            f"the weights of '{file}' have other shapes than {model_class.__name__}, and it holds no pruning history. "
            "Build the module with the arguments it had. If a part of it was pruned by itself, as by "
            "`prune(module.net, ...)`, prune the LightningModule instead, so that its checkpoints hold the history. "
            f"First: {next(line for line in str(error).splitlines() if 'size mismatch' in line).strip()}"
        )
    if isinstance(error, KeyError) or not file.is_file() or zipfile.is_zipfile(file):
        return None
    return (
        f"expected a whole checkpoint, got '{file}' of {file.stat().st_size:,} bytes, which is another kind of file, "
        "or was torn while it was written or copied. Take another one."
    )


def _save(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    type(module).on_save_checkpoint(module, checkpoint)
    save_into(checkpoint, module)
    save_masks_into(checkpoint, module)


def _load(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    # The user's hook may create layers that the checkpoint needs.
    type(module).on_load_checkpoint(module, checkpoint)
    copies: tuple[nn.Module, ...] = ()
    if module._trainer is not None:
        if has_shards(module):  # `sharding.narrow_before_loading` has set the widths
            return
        check_states(module.trainer, checkpoint)
        copies = averages(module.trainer)
    load_from(checkpoint, module, *copies, strict=module.strict_loading)


def check_states(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Check the states of callbacks before the network changes, as Lightning loads them later."""
    states = checkpoint.get("callbacks", {})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StatefulCallback) and callback.state_key in states:
            back = callback.snapshot_state()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # shown when it is loaded
                    callback.load_state_dict(states[callback.state_key])
            finally:
                back()
