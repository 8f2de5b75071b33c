"""Re-estimation of batch norm statistics after a cut."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.scoring.linear_maps import double
from lightning_prune.structure.tracing.contexts import buffers_restored
from lightning_prune.surgery.repairs.repair import Repair, Run, require_positive
from lightning_prune.surgery.tensors import canonical

__all__ = ["ReestimateBatchNorm", "batch_norms"]


@final
@dataclass(frozen=True)
class ReestimateBatchNorm(Repair):
    """Re-estimates the running mean and variance of every batch norm on the network after the cut.

    Statistics are averages over batches of means and unbiased variances, in train mode (with dropout). Batch norms in
    eval mode (frozen), those without running statistics and all other buffers are not changed.

    Args:
        batches: Number of batches of training data.
    """

    batches: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def after(self, model: nn.Module, run: Run) -> dict[str, Tensor]:
        """The running statistics."""
        norms = batch_norms(model)
        if not norms:
            return {}
        sums: dict[str, list[Tensor]] = {name: [] for name in norms}

        def see(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
            values = double(args[0]).transpose(0, 1).flatten(1)
            seen = torch.stack([values.mean(1), values.var(1), torch.ones_like(values[:, 0])])
            sums[name] = [sums[name][0] + seen] if sums[name] else [seen]

        with buffers_restored(model.buffers()), ExitStack() as hooks:
            for name, norm in norms.items():
                hooks.callback(norm.register_forward_pre_hook(partial(see, name)).remove)
            run(model, self.batches)
        contents = {}
        for name, total in ((name, total[0]) for name, total in sums.items() if total):
            prefix = canonical(name) + "." if name else ""
            contents[f"{prefix}running_mean"] = total[0] / total[2]
            contents[f"{prefix}running_var"] = total[1] / total[2]
        return contents


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Batch norms in train mode with running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    }
