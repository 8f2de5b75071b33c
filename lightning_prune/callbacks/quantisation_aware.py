"""Quantisation-aware training: from a moment on, the network trains with the rounding of the file it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from typing_extensions import override

from lightning_prune.arguments import require_type
from lightning_prune.callbacks.lightning.checkpoints import StatefulCallback
from lightning_prune.callbacks.lightning.monitors import reset_monitors
from lightning_prune.callbacks.lightning.processes import refuse_strategy, several
from lightning_prune.callbacks.lightning.progress import now, run_length
from lightning_prune.packages import both
from lightning_prune.planning import CutPoint, OneShot
from lightning_prune.surgery import FakeQuantisation

__all__ = ["QuantisationAware", "rounding_in"]

_FORMAT = 1


@final
class QuantisationAware(StatefulCallback):
    """Trains with the rounding of integers from a moment on, so that the network learns to predict well with it.

    Linear and convolutional layers round their weights and inputs as described at `FakeQuantisation`, in training,
    validation and testing. Let it begin after the last cut, with a small learning rate, for the last tenth to quarter
    of the run. After the fit, `quantise` writes the file: it computes what was trained.

    When it begins, ``ModelCheckpoint`` and ``EarlyStopping`` are reset, so that "best" means best with rounding.
    Checkpoints hold the ranges in the state of the callback, and the weights as always. With DDP, the ranges are
    averaged over the processes after each batch.

    Args:
        start: When it begins: a share of the run (float) or an epoch (int; in runs limited by ``max_steps``, a share).
        weight_bits: Bits of a weight: 8, or 4 for files of half the size that only onnxruntime 1.18 and newer read.

    Attributes:
        rounding: The `FakeQuantisation`, for `quantise`; None before it begins.

    Raises:
        ValueError: On construction for arguments out of range; before training for a run that ends before ``start``, a
            network without such layers, with computed weights (weight norm) or compiled, and for strategies other than
            one device and DDP.

    Example:
        >>> from lightning_prune import QuantisationAware, StructuredPruning
        >>> callbacks = [StructuredPruning(0.5), QuantisationAware(start=0.8)]
    """

    def __init__(self, start: int | float = 0.8, weight_bits: int = 8) -> None:
        require_type("QuantisationAware", "start", start, int | float)
        if not (start >= 0 and (isinstance(start, int) or start < 1)):
            raise ValueError(
                f"QuantisationAware: expected `start` as a share of the run in [0, 1) or an epoch (int), got {start!r}."
            )
        FakeQuantisation(weight_bits)  # checks it
        self.start, self.weight_bits = start, weight_bits
        self.rounding: FakeQuantisation | None = None
        self._point: CutPoint | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_strategy(type(self).__name__, trainer)
            if isinstance(trainer.strategy, both(ModelParallelStrategy)):
                raise ValueError(
                    "QuantisationAware: expected one device or DistributedDataParallel, got sharded layers "
                    f"({type(trainer.strategy).__name__}), whose weights have no common steps of rounding."
                )
            self.rounding = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        FakeQuantisation.require_layers(pl_module)  # not in `setup`: `configure_model` may build it
        self._continue(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            (self._point,) = OneShot(self.start).timeline(run_length(trainer), remaining=0.5)
        except ValueError as error:
            raise ValueError(f"QuantisationAware: expected `start` within the run, got {self.start}: {error}") from None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.rounding is None and self._point is not None and now(trainer, self._point) >= self._point.at:
            self.rounding = FakeQuantisation(self.weight_bits)
            self.rounding.attach(pl_module)
            reset_monitors(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.rounding is not None and several():
            self.rounding.average(partial(trainer.strategy.reduce, reduce_op="mean"))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._continue(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._continue(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._continue(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"format": _FORMAT, "rounding": None if self.rounding is None else self.rounding.to_plain()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not isinstance(state_dict, dict) or state_dict.get("format") != _FORMAT or "rounding" not in state_dict:
            raise ValueError(
                f"QuantisationAware: expected a state of format {_FORMAT}, got another one. It is damaged, or was "
                "written by another version of lightning-prune: resume with that one."
            )
        plain = state_dict["rounding"]
        rounding = None if plain is None else FakeQuantisation.from_plain(plain)
        if rounding is not None and rounding.weight_bits != self.weight_bits:
            raise ValueError(
                f"QuantisationAware: expected a checkpoint of training with `weight_bits={self.weight_bits}`, got "
                f"{rounding.weight_bits}. Resume with that number, or from a checkpoint before `start`."
            )
        self.rounding = rounding

    def _continue(self, module: LightningModule) -> None:
        """Round again where a checkpoint or an earlier fit did."""
        if self.rounding is not None and not self.rounding.is_attached:
            self.rounding.attach(module)

    def _detach(self) -> None:
        if self.rounding is not None:
            self.rounding.detach()


def rounding_in(checkpoint: Mapping[str, Any]) -> FakeQuantisation | None:
    """The rounding that the network of a checkpoint was trained with; None if it was not.

    Raises:
        ValueError: If it is damaged.
    """
    plain = checkpoint.get("callbacks", {}).get(QuantisationAware.__qualname__, {}).get("rounding")
    return None if plain is None else FakeQuantisation.from_plain(plain)
