"""Going back to the weights of an earlier epoch with every cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.extensions.extension import CutExtension, RunContext
from lightning_prune.callbacks.rewind_snapshot import RewindSnapshot
from lightning_prune.reporting import require
from lightning_prune.surgery import Edit, Repair, StoredWeights
from lightning_prune.surgery.tensors import named

__all__ = ["Rewind"]


@final
@dataclass
class Rewind(CutExtension):
    """Takes the weights that a cut leaves back to what they were after some epochs (Frankle et al., 2020).

    Parameters and buffers go back; ``epoch=0`` is the initialisation (the lottery ticket: Frankle and Carbin, 2019).
    They are kept in memory and in checkpoints from that epoch on. The optimizer's state is cleared; learning rate and
    schedulers go on as they are, so choose them for the epochs after the cut.

    Args:
        epoch: Epochs trained before the weights are kept, at least 0 and not after the first cut.
    """

    restarts = True

    epoch: int = 0
    _snapshot: RewindSnapshot = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epoch < 0:
            raise ValueError(f"Rewind: expected `epoch` of at least 0, got {self.epoch}.")
        self._snapshot = RewindSnapshot(self.epoch, repr(self))

    @override
    def prepare(self, run: RunContext) -> None:
        self._snapshot.require(run.trainer, run.timeline)

    @override
    def on_epoch_start(self, run: RunContext) -> None:
        self._snapshot.begin_epoch(run.trainer, run.module)

    @override
    def repairs(self, run: RunContext) -> tuple[Repair, ...]:
        present = {name: tensor.shape for name, tensor in named(run.module).items()}
        # Not those of modules that the same cut has taken out or put others in the place of.
        kept = {name: weight for name, weight in self._snapshot.get().items() if present.get(name) == weight.shape}
        return (StoredWeights(kept),)

    @override
    def after_cut(self, edits: Sequence[Edit]) -> None:
        self._snapshot = self._snapshot.after_cut(edits)

    @override
    def after_take_back(self) -> None:
        self._snapshot = RewindSnapshot(self.epoch, repr(self))  # narrower than the network is again

    @override
    def state(self) -> dict[str, Any]:
        weights = self._snapshot.weights
        return {} if weights is None else {"weights": dict(weights)}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        require(state["weights"], dict[str, Tensor], "weights to go back to")
        self._snapshot = self._snapshot.holding(dict(state["weights"]))
