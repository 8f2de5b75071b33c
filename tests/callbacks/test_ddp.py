"""Two processes decide as one does, and end with the same network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_prune import StructuredPruning
from lightning_prune.models import MLPClassifier

SCRIPT = Path(__file__).with_name("ddp_run.py")
ROOT = Path(__file__).parents[2]


def run(processes: int, folder: Path, *words: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    result = folder / "result.pt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(processes), str(result), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = torch.load(result, weights_only=True)
    return found


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["kept"] == second["kept"]
    for name, weight in first["weights"].items():
        torch.testing.assert_close(second["weights"][name], weight, rtol=1e-10, atol=1e-12)


@pytest.mark.ddp
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Same plans and, without BatchNorm, weights equal within float error, also when the next cut follows a resume."""
    one = run(1, tmp_path / "one")
    assert len(one["kept"]) == 3
    assert one["weights"]["net.0.weight"].shape == (12, 16)
    two = run(2, tmp_path / "two")
    assert_same(one, two)
    assert_same(one, run(2, tmp_path / "two", "--resume"))


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_other_ways_to_start_processes_are_refused(strategy: str) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match='strategy="ddp"'):
        StructuredPruning(pruning_ratio=0.5).setup(trainer, MLPClassifier([64, 8, 10]), "fit")
