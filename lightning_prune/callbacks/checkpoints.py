"""The history of a network, and its masks, in every checkpoint, and the narrow network out of any of them."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_prune.callbacks.averages import averages
from lightning_prune.surgery import load_from, save_into, save_masks_into

__all__ = ["StatefulCallback", "keep_history", "load_from_checkpoint"]

Module = TypeVar("Module", bound=LightningModule)

# One load at a time: it borrows a hook of the class.
_loading = RLock()


class StatefulCallback(Callback):
    """A callback whose state in a checkpoint is checked before the network changes."""

    def snapshot_state(self) -> Callable[[], None]:
        """Return a function that brings the callback back to what it knows now."""
        return partial(vars(self).update, dict(vars(self)))


def keep_history(module: LightningModule) -> None:
    """From now on the module's checkpoints carry its history and masks; loading one gives it the widths it needs.

    The module's own hooks are wrapped, not a callback's: they also run for ``save_weights_only`` and after the fit, and
    before the shapes are compared. Twice is once.
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
    **init: Any,
) -> Module:
    """The network of a checkpoint, as narrow as it was saved; no callback is needed.

    Args:
        model_class: The LightningModule's class.
        checkpoint_path: A checkpoint of a pruned or of a dense network.
        map_location: Where to put the tensors, as in ``torch.load``.
        strict: As in ``LightningModule.load_from_checkpoint``.
        **init: Arguments of the class that ``save_hyperparameters()`` did not save, or that shall differ.

    Returns:
        A plain instance of ``model_class`` in the widths of the checkpoint. It keeps its history: checkpoints written
        from it load again.

    Raises:
        HistoryError: If the checkpoint is of another architecture or its history is damaged.
        TypeError: If ``model_class`` is no LightningModule class.
        ValueError: If the file was torn.
    """
    if not (isinstance(model_class, type) and issubclass(model_class, LightningModule)):
        raise TypeError(
            f"expected the class of a LightningModule, got {model_class!r}. "
            "Write `load_from_checkpoint(MyModule, path)`."
        )

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        keep_history(self)
        own = before or super(model_class, self).on_load_checkpoint.__func__
        own(self, checkpoint)
        load_from(checkpoint, self, strict=self.strict_loading if strict is None else strict)

    # Lightning builds the instance, calls this hook on it and then loads the weights: there is no other way in between,
    # and a subclass of our own would not be the class that the checkpoint of a LightningCLI asks for.
    with _loading, torch.inference_mode(False):
        before = vars(model_class).get("on_load_checkpoint")
        model_class.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]
        try:
            return model_class.load_from_checkpoint(checkpoint_path, map_location=map_location, strict=strict, **init)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            file = Path(checkpoint_path)
            if not file.is_file() or zipfile.is_zipfile(file):
                raise
            raise ValueError(
                f"expected a whole checkpoint, got '{file}' of {file.stat().st_size:,} bytes, which is another kind of "
                "file, or was torn while it was written or copied. Take another one."
            ) from error
        finally:
            if before is None:
                del model_class.on_load_checkpoint
            else:
                model_class.on_load_checkpoint = before  # type: ignore[method-assign]


def _save(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    type(module).on_save_checkpoint(module, checkpoint)
    save_into(checkpoint, module)
    save_masks_into(checkpoint, module)


def _load(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    # The user's hook may still build layers that the checkpoint asks for.
    type(module).on_load_checkpoint(module, checkpoint)
    copies: tuple[nn.Module, ...] = ()
    if module._trainer is not None:
        _check_states(module.trainer, checkpoint)
        copies = averages(module.trainer)
    load_from(checkpoint, module, *copies, strict=module.strict_loading)


def _check_states(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Refuse a damaged state of a callback: Lightning loads it when the network has changed already."""
    states = checkpoint.get("callbacks", {})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StatefulCallback) and callback.state_key in states:
            back = callback.snapshot_state()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # they come when it is loaded
                    callback.load_state_dict(states[callback.state_key])
            finally:
                back()
