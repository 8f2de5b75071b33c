"""A share per layer, in a run and without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune import StructuredPruning, prune
from lightning_prune.planning import Explicit
from tests.callbacks.small import Small, loaders, trainer


def run(folder: Path, **settings: Any) -> tuple[Small, StructuredPruning]:
    module = Small()
    callback = StructuredPruning(schedule=Explicit(((1, 0.5), (2, 1.0))), **settings)
    trainer(folder, 3, callback).fit(module, *loaders())
    return module, callback


def test_what_is_not_named_stays(tmp_path: Path) -> None:
    module, callback = run(tmp_path, pruning_ratio={"net.2": 0.5})
    assert [layer.out_features for layer in (module.net[0], module.net[2])] == [8, 4]
    assert [dict(cut.after) for cut in callback.report.cuts] == [{"net.2": 6}, {"net.2": 4}]


def test_the_first_name_that_fits_counts(tmp_path: Path) -> None:
    module, _ = run(tmp_path, pruning_ratio={"net.0": 0.25, "net.*": 0.75})
    assert [layer.out_features for layer in (module.net[0], module.net[2])] == [6, 2]


def test_misuse_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches no layer"):
        run(tmp_path, pruning_ratio={"nonsense": 0.5})
    with pytest.raises(ValueError, match="with a scope of 'global', got one per layer"):
        run(tmp_path, pruning_ratio={"net.0": 0.5}, scope="global")


def test_without_a_trainer() -> None:
    module = Small()
    prune(module, torch.zeros(2, 6, dtype=torch.float64), pruning_ratio={"net.2": 0.5})
    assert [layer.out_features for layer in (module.net[0], module.net[2])] == [8, 4]
