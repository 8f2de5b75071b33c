"""Transfer learning that is killed and resumed: layers are scored and cut, then unfrozen one by one.

A residual network of five convolutions on made images. Every fit of a surrogate leaves a line in the run's folder, and
another one where its layer had been written down as finished before: that must not be. How runs are killed, and what
they are compared with, is in `tests/support/kills.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_prune import GradualUnfreezing, OneShot, XGBoost, XGBPruning
from lightning_prune.callbacks.display import score_display
from lightning_prune.scoring.xgb import LayerScore, LayerScorer
from tests.support import xgb_reference as reference
from tests.support.kills import one_start

__all__ = ["counts", "transfer"]

BATCHES, BATCH = 4, 24

What = Literal["one_shot", "layer_wise", "unfreezing"]


class Net(LightningModule):
    """The residual network, with an optimizer of what trains at the start."""

    def __init__(self, only_trainable: bool) -> None:
        super().__init__()
        self.net = reference.network(reference.Residual).train()
        self.only_trainable = only_trainable
        self.example_input_array = torch.zeros(2, 1, 8, 8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        given = [p for p in self.parameters() if p.requires_grad or not self.only_trainable]
        return torch.optim.AdamW(given, lr=0.01)


def transfer(folder: Path, what: What) -> None:
    """One start of the run in ``folder``, in each of its processes; `result.pt` is there when it is through.

    Args:
        folder: Of the run.
        what: ``"one_shot"`` and ``"layer_wise"``: layers are scored in the second of three epochs. ``"unfreezing"``:
            they are before the first batch, and unfrozen over the eight epochs that follow.
    """
    score_display._pictures = lambda *_: []
    unfreezes = what == "unfreezing"
    _watch(folder, 0.0 if unfreezes else 0.3)
    x, labels = reference.images(BATCHES * BATCH)
    torch.manual_seed(0)
    pruning = XGBPruning(
        "one_shot" if unfreezes else what,
        gain=0.9,
        surrogate=XGBoost(rounds=8, threads=1),
        schedule=None if unfreezes else OneShot(1),
        dirpath=str(folder),
    )
    unfreezing = GradualUnfreezing(0.75, 1.25)
    one_start(
        folder,
        Net(only_trainable=unfreezes),
        TensorDataset(x, labels),
        pruning,
        {"scoring": (pruning, "_score"), "a cut": (pruning, "_cut"), "unfreezing": (unfreezing, "_thaw")},
        batch_size=BATCH,
        epochs=8 if unfreezes else 3,
        every=1,
        others=[unfreezing] * unfreezes,
        more=lambda: {"unfrozen": unfreezing.state_dict(), "scores": _scores(folder)},
    )


def counts(folder: Path) -> Mapping[str, int]:
    """How many layers there are, how many fits were begun, and how many of layers that were finished before."""
    words = [line.split() for line in (folder / "fits").read_text(encoding="utf-8").splitlines()]
    return {
        "layers": len(_scores(folder)),
        "fits begun": sum(word == "begun" for word, _ in words),
        "fitted again": sum(word == "again" for word, _ in words),
    }


def _watch(folder: Path, pause: float) -> None:
    """Let every fit of a surrogate leave a line, and take so many seconds longer, so that kills meet it."""
    fitted = LayerScorer._fitted

    def watched(scorer: LayerScorer, station: Any, features: Tensor) -> LayerScore:
        known = station.layer in _scores(folder)
        with (folder / "fits").open("a", encoding="utf-8") as file:
            file.write(f"begun {station.layer}\n" + f"again {station.layer}\n" * known)
        time.sleep(pause)
        return fitted(scorer, station, features)

    LayerScorer._fitted = watched  # type: ignore[method-assign]


def _scores(folder: Path) -> dict[str, Any]:
    """What is written down of each layer, without the time that it took."""
    files = list(folder.glob("scores-*.jsonl"))
    lines = files[0].read_text(encoding="utf-8").splitlines(keepends=True)[1:] if files else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["layer"]: {name: value for name, value in row.items() if name != "seconds"} for row in whole}
