"""Under FSDP2 (`ModelParallelStrategy`), several processes prune as one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule

from lightning_prune import (
    ContributionPruning,
    Fisher,
    GradualUnfreezing,
    HybridPruning,
    NetworkSlimming,
    Reconstruction,
    Ridge,
    Scope,
    StructuredPruning,
    XGBPruning,
    load_from_checkpoint,
)
from lightning_prune.callbacks.lightning.sharding import refuse_sharded
from tests.callbacks import sharded
from tests.callbacks.networks import make, widths
from tests.support import ranks

CASES: dict[str, dict[str, Any]] = {
    "momentum, a file": {},
    "AdamW, a folder": {"optimizer": "adamw", "is_file": False},
    "contributions, a folder": {"callback": "ContributionPruning", "is_file": False},
}


def assert_alike(found: dict[str, Any], expected: dict[str, Any], bound: float) -> None:
    assert found["kept"] == expected["kept"]
    assert len(found["kept"]) == 2
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=bound)
    for mine, other in zip(found["state"], expected["state"], strict=True):
        for key, value in other.items():
            torch.testing.assert_close(mine[key], value, rtol=0, atol=bound)


@pytest.mark.ddp
@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="refused before PyTorch 2.13")
def test_two_processes_are_one_and_both_checkpoints_resume(tmp_path: Path) -> None:
    """Plans, weights, optimizer state and validation of each size; resumed runs bit by bit; a file loads in one."""
    found, resumed = ranks.run(sharded.resumed, tmp_path / "two", CASES, processes=2)
    expected = ranks.run(sharded.runs, tmp_path / "one", CASES)
    for name, run in found.items():
        assert_alike(run, expected[name], 1e-12)
        assert run["losses"] == pytest.approx(expected[name]["losses"], abs=1e-12)
        assert_alike(resumed[name], run, 0)
    file = tmp_path / "two" / "momentum, a file" / "step=6.ckpt"
    assert widths(load_from_checkpoint(sharded.Sharded, file)) == (9, 6)
    assert_alike(sharded.train(tmp_path / "alone", ckpt_path=file), found["momentum, a file"], 1e-12)


REFUSED: dict[str, Any] = {
    "masks": lambda: HybridPruning(0.5),
    "a penalty": lambda: NetworkSlimming(0.5),
    "XGB": lambda: XGBPruning(),
    "unfreezing": GradualUnfreezing,
    "gradients": lambda: StructuredPruning(0.5, criterion=Fisher()),
    "data at a cut": lambda: StructuredPruning(0.5, criterion=Reconstruction()),
    "repairs": lambda: ContributionPruning(0.5, extensions=[Ridge()]),
    "draws": lambda: StructuredPruning(0.5, scope=Scope("random", draws=3)),
    "layers": lambda: StructuredPruning(0.5, scope=Scope("global", min_width=0)),
    "latency": lambda: StructuredPruning(budget={"latency": 0.5}),
}


def sharding() -> Trainer:
    return Trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(2, 1), logger=False)


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_the_whole_network_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match="expected settings that work with a sharded network, got"):
        REFUSED[case]().setup(sharding(), make(), "fit")


def test_a_network_that_is_not_sharded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without a sharded parameter. Call `fully_shard` in `configure_model`"):
        refuse_sharded("StructuredPruning", sharding(), make())
