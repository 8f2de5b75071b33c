"""Which of several plans for one cut harms least."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_prune.planning import Plan
from lightning_prune.scoring import Batch, DataPass
from lightning_prune.structure import Structure
from lightning_prune.surgery.shrink import cut

__all__ = ["losses_of_plans"]


def losses_of_plans(copy: nn.Module, structure: Structure, plans: Iterable[Plan], data: DataPass) -> Tensor:
    """Run a network as each plan would leave it, in eval mode and without any repair.

    Args:
        copy: The network, or a copy of it where the loss is that of a training step; left as it is.
        structure: What it consists of.
        plans: What to keep.
        data: The samples, with a loss that is a mean over the samples of a batch.

    Returns:
        For each plan the loss summed over samples, shape ``(plans,)``, float64; infinite where it is no number.

    Raises:
        ValueError: If the data has no loss, or it is no scalar.
    """
    sums: list[float] = []
    for plan in plans:
        found: list[float] = []

        def see(batch: Batch, loss: Tensor, found: list[float] = found) -> None:
            found.append(len(batch) * float(loss))

        with cut(copy, structure.axes(plan.kept), drops=structure.drops(plan.kept)):
            data.run(copy, see, call=data.loss_of)
        sums.append(sum(found))
    return torch.tensor(sums, dtype=torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf)
