"""Ranks of neurons compared with ground truths, as in the paper's appendix A: part ``tau`` of `benchmarks.spvr`.

A network with one hidden layer of 64 neurons on 1,000 random samples (Guyon's data, 100 features, 2 % of labels
flipped), trained by Adam at 1e-3 with batches of 32, and ranked on its training samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.extras import require
from lightning_prune.scoring import DataPass, KLDivergence, Misclassification, SPvR
from lightning_prune.scoring.spvr.criterion import MaskingCriterion
from lightning_prune.structure import TracedModel, trace

__all__ = ["EPOCHS", "kendall"]

EPOCHS = (2, 3, 5, 10)


def kendall(seed: int) -> dict[str, Any]:
    """τ-b of both rankings against both truths after some epochs, None where it is undefined (a constant truth)."""
    make = require("sklearn.datasets", extra="xgb").make_classification
    features, labels = make(n_samples=2000, n_features=100, flip_y=0.02, random_state=seed)
    x, y = torch.tensor(features, dtype=torch.float32), torch.tensor(labels)
    (x, held), (y, held_y) = x.split(1000), y.split(1000)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    found: dict[str, Any] = {"seed": seed}
    for epoch in range(1, max(EPOCHS) + 1):
        for rows in torch.randperm(1000).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        if epoch in EPOCHS:
            found[str(epoch)] = _compared(model, (x, y), (held, held_y))
    return found


def _compared(model: nn.Sequential, ranked: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> dict[str, Any]:
    criteria: dict[str, MaskingCriterion] = {"SPvR": SPvR(group_size=1), "KL": KLDivergence()}
    scores = {name: _scores(criterion, model, ranked) for name, criterion in criteria.items()}
    truths = {"count": _scores(Misclassification(), model, ranked), "held-out loss": _loss_changes(model, held)}
    return {
        truth: {name: tau_b(values, expected) for name, values in scores.items()} for truth, expected in truths.items()
    }


def _scores(criterion: MaskingCriterion, model: nn.Sequential, data: tuple[Tensor, Tensor]) -> list[float]:
    structure = trace(TracedModel.of(model, data[0][:2]))
    statistic = criterion.statistic(structure)
    statistic.collect(model, DataPass([data], batch_size=1000))
    (name,) = structure.widths
    return [round(value, 9) for value in statistic.value(name).tolist()]


@torch.no_grad()
def _loss_changes(model: nn.Sequential, data: tuple[Tensor, Tensor]) -> list[float]:
    """What masking a neuron adds to the loss of samples that the network has not seen."""
    x, y = data
    hidden = model[1](model[0](x))
    before = F.cross_entropy(model[2](hidden), y)
    masks = 1 - torch.eye(hidden.shape[1])
    return [float(F.cross_entropy(model[2](hidden * mask), y) - before) for mask in masks]


def tau_b(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's rank correlation with ties; None if one side is constant."""
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (one, other))
    upper = torch.triu(torch.ones(len(a), len(a), dtype=torch.bool), 1)
    da, db = ((v[:, None] - v).sign()[upper] for v in (a, b))
    scale = math.sqrt(float((da != 0).sum()) * float((db != 0).sum()))
    return float((da * db).sum()) / scale if scale else None
