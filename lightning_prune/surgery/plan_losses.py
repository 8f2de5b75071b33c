"""Losses of a network under several plans."""

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
    """Evaluate a network cut by each plan, in eval mode and without repairs.

    Args:
        copy: The network, or a copy if the loss is that of a training step; not changed.
        structure: Structure of the network.
        plans: The plans.
        data: The samples, with a loss that is a mean over the batch.

    Returns:
        Loss of each plan summed over samples, shape ``(plans,)``, float64; infinity for NaN.

    Raises:
        ValueError: If the data has no loss, or it is not a scalar.
    """
    sums: list[float] = []
    for plan in plans:
        found: list[float] = []

        def see(batch: Batch, loss: Tensor, found: list[float] = found) -> None:
            found.append(len(batch) * float(loss))

        axes, drops = structure.axes(plan.kept), structure.drops(plan.kept)
        with cut(copy, axes, drops=drops, factors=structure.factors(plan.kept)):
            data.run(copy, see, call=data.loss_of)
        sums.append(sum(found))
    return torch.tensor(sums, dtype=torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf)
