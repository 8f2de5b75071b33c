"""A pruning run for `test_ddp`: python ddp_run.py PROCESSES RESULT [--resume]. No BatchNorm, float64, every batch seen.

With more than one process every rank takes its share of the same global batches.
"""

import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_prune import Contribution, ContributionPruning, Linear
from lightning_prune.surgery import history_of


class Net(L.LightningModule):
    """An MLP whose training does not depend on how a batch is split."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3)).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def main(processes: int, result: Path, *, resume: bool) -> None:
    """Train six epochs with three cuts; write the weights and what every cut kept."""
    warnings.filterwarnings("ignore")
    draw = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(64, 16, generator=draw, dtype=torch.float64), torch.randint(0, 3, (64,), generator=draw)
    )
    mine = range(int(os.environ.get("LOCAL_RANK", 0)), 64, processes)
    trainer = L.Trainer(
        max_epochs=6,
        devices=processes,
        accelerator="cpu",
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        callbacks=[
            ContributionPruning(
                pruning_ratio=0.5, schedule=Linear(start=1, end=3, cuts=3), criterion=Contribution(every_n_batches=1)
            ),
            L.pytorch.callbacks.ModelCheckpoint(result.parent / "steps", save_top_k=-1, every_n_train_steps=4),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(result.parent),
    )
    model = Net()
    # Step 8 ends epoch 1: one cut is done, the next is due at once, with statistics from before the checkpoint.
    checkpoint = str(result.parent / "steps" / "epoch=1-step=8.ckpt") if resume else None
    trainer.fit(model, DataLoader(Subset(data, mine), batch_size=16 // processes), ckpt_path=checkpoint)
    history = history_of(model)
    assert history is not None
    if trainer.is_global_zero:
        kept = [{name: list(units) for name, units in edit.kept.items()} for edit in history.edits]
        torch.save({"weights": model.state_dict(), "kept": kept}, result)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), resume="--resume" in sys.argv)
