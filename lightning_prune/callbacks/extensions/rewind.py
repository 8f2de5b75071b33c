"""Rewinding of weights to an earlier epoch at every cut."""

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
    """Rewinds the weights that remain after a cut to their values at an earlier epoch (Frankle et al., 2020).

    Parameters and buffers are rewound; ``epoch=0`` is the initialisation (the lottery ticket: Frankle and Carbin,
    2019). Their values are kept in memory and in checkpoints from that epoch on. The optimizer's state is cleared;
    learning rate and schedulers are not rewound, so choose them for the epochs after the cut.

    Args:
        epoch: Epochs trained before the weights are stored, at least 0 and not after the first cut.
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
        # Without modules that this cut removes or replaces.
        kept = {name: weight for name, weight in self._snapshot.get().items() if present.get(name) == weight.shape}
        return (StoredWeights(kept),)

    @override
    def after_cut(self, edits: Sequence[Edit]) -> None:
        self._snapshot = self._snapshot.after_cut(edits)

    @override
    def after_take_back(self) -> None:
        self._snapshot = RewindSnapshot(self.epoch, repr(self))  # the stored weights are narrower than the network now

    @override
    def state(self) -> dict[str, Any]:
        weights = self._snapshot.weights
        return {} if weights is None else {"weights": dict(weights)}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        require(state["weights"], dict[str, Tensor], "weights to go back to")
        self._snapshot = self._snapshot.holding(dict(state["weights"]))
