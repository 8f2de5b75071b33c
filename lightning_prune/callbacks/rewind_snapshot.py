"""Snapshot of weights for rewinding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_prune.callbacks.lightning.progress import run_length
from lightning_prune.planning import CutPoint
from lightning_prune.structure.layers import is_within
from lightning_prune.surgery import Edit, Replace, history_of, transform_stored
from lightning_prune.surgery.tensors import named

__all__ = ["RewindSnapshot"]


class RewindSnapshot:
    """Parameters and buffers (without those of metrics) at the start of an epoch, cut like the network.

    Args:
        epoch: The epoch.
        asker: The extension that uses it, for messages: ``"Rewind(1)"``.
    """

    def __init__(self, epoch: int, asker: str) -> None:
        self.epoch, self.asker = epoch, asker
        self.weights: dict[str, Tensor] | None = None  # on the CPU

    def require(self, trainer: Trainer, timeline: Sequence[CutPoint]) -> None:
        """Check that the run can save or has saved the weights.

        Raises:
            ValueError: If it has passed the epoch without saving them, cuts before it, or has weights of other shapes.
        """
        if self.weights is not None:
            self._compare(self.weights, trainer.lightning_module)
            return
        first, per_epoch = timeline[0] if timeline else None, run_length(trainer).steps_per_epoch
        if first is not None and (first.unit == "epoch" or per_epoch):
            at = first.at if first.earliest is None else first.earliest
            epoch = at if first.unit == "epoch" or not per_epoch else at // per_epoch
            if self.epoch > epoch:
                raise ValueError(
                    f"{self.asker}: expected an epoch not after the first cut, which comes after {epoch} epoch(s), got "
                    f"{self.epoch}. Let the schedule start later, or rewind to an earlier epoch."
                )
        if (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx) > (self.epoch, 0):
            raise ValueError(
                f"{self.asker}: expected the weights of epoch {self.epoch} in the checkpoint, but they were not kept. "
                "Resume from a whole checkpoint of a run that goes back to it, or start a new run."
            )

    def begin_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        """Save the weights if this is the epoch."""
        if trainer.current_epoch == self.epoch and self.weights is None:
            self.weights = {name: t.detach().to("cpu", copy=True) for name, t in _weights_of(module).items()}

    def after_cut(self, edits: Iterable[Edit]) -> RewindSnapshot:
        """The snapshot after a cut; replaced modules are removed."""
        if self.weights is None:
            return self
        return self.holding(reduce(lambda weights, edit: transform_stored(edit, weights), edits, self.weights))

    def holding(self, weights: dict[str, Tensor] | None) -> RewindSnapshot:
        """A snapshot with these weights."""
        other = RewindSnapshot(self.epoch, self.asker)
        other.weights = weights
        return other

    def get(self) -> dict[str, Tensor]:
        """The weights by name.

        Raises:
            ValueError: If the run has not reached the epoch.
        """
        if self.weights is None:
            raise ValueError(
                f"{self.asker}: expected the weights of epoch {self.epoch}, which the run has not come to before its "
                "first cut. Let the schedule start later, or rewind to an earlier epoch."
            )
        return self.weights

    def _compare(self, weights: Mapping[str, Tensor], module: LightningModule) -> None:
        history = history_of(module)
        edits = () if history is None else history.edits
        new = [name for edit in edits if isinstance(edit, Replace) for name in edit.modules]
        # A constant layer has no weight.
        present = {name: tensor for name, tensor in _weights_of(module).items() if tensor.numel()}
        expected = {
            name: _form(tensor) for name, tensor in present.items() if name in weights or not is_within(name, new)
        }
        found = {name: _form(tensor) for name, tensor in weights.items()}
        if found != expected:
            wrong = ", ".join(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            raise ValueError(
                f"{self.asker}: expected the weights that it goes back to in the shapes of the network, got others for "
                f"{wrong}. The checkpoint is damaged: resume from another one."
            )


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.is_floating_point(), tensor.is_complex()


def _weights_of(module: LightningModule) -> dict[str, Tensor]:
    """Weights by name; tied ones by their first name."""
    seen = {id(t) for part in module.modules() if isinstance(part, Metric) for t in part.buffers()}
    found = {}
    for name, tensor in named(module).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found
