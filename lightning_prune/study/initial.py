"""Initial network of a study's run: new or stored weights, and a pruned architecture."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_prune.callbacks.lightning.checkpoints import keep_history
from lightning_prune.surgery import History, Reinitialise, history_of, replay

__all__ = ["InitialNetwork"]


class InitialNetwork(Callback):
    """Sets weights and architecture of a network before the optimizer is created.

    A run that is resumed takes its weights from its own checkpoint afterwards.

    Args:
        seed: Of new weights.
        weights: Checkpoint of the dense network whose weights are taken instead.
        architecture: File with the history of the cut that the network is given; by default it stays dense.
        dense: Draw the new weights for the dense network, of which those that are kept stay: a rewind to epoch 0. A
            parameter that no layer of PyTorch's holds stays as the module was made.
        rule: How new weights are drawn, see `Reinitialise`: ``"he"``, normal with variance 2 / fan in (He et al.,
            2015), or ``"own"``, as the layers initialise themselves.
    """

    def __init__(
        self,
        seed: int = 0,
        weights: str | None = None,
        architecture: str | None = None,
        dense: bool = False,
        rule: Literal["he", "own"] = "he",
    ) -> None:
        self.seed = seed
        self.rule = rule
        self.dense = dense
        self.weights = weights
        self.architecture = architecture

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or history_of(pl_module) is not None:
            return
        if self.weights is not None:
            pl_module.load_state_dict(_read(self.weights)["state_dict"])
        elif self.dense:
            self._draw(pl_module)
        if self.architecture is not None:
            replay(pl_module, History.from_plain(_read(self.architecture)))
            keep_history(pl_module)
        if self.weights is None and not self.dense:
            self._draw(pl_module)

    def _draw(self, module: LightningModule) -> None:
        Reinitialise(self.seed, self.rule).after(module, _no_batches)


def _read(file: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return found


def _no_batches(*_: object) -> None:
    raise RuntimeError("new weights are drawn without looking at batches")
