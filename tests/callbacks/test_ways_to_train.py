"""Every method under what users turn on for speed: compiled networks, channels last, fp16, spawned processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    Contribution,
    ContributionPruning,
    GradualUnfreezing,
    HybridPruning,
    LinearSchedule,
    MagnitudePruning,
    OneShot,
    SPvRPruning,
    StructuredPruning,
    Taylor,
    XGBPruning,
)
from lightning_prune.surgery import history_of, masks_of, revived
from tests.callbacks.networks import hooks
from tests.callbacks.networks import trainer as quiet
from tests.callbacks.xgb_runs import QUICK
from tests.support import ranks
from tests.support.image_network import Images

SCHEDULE = LinearSchedule(start=1, end=2, cuts=2)

METHODS: dict[str, Callable[[], list[Any]]] = {
    "contributions": lambda: [ContributionPruning(0.5, criterion=Contribution(every_n_batches=1), schedule=SCHEDULE)],
    "gradients": lambda: [StructuredPruning(0.5, criterion=Taylor(every_n_batches=1), schedule=SCHEDULE)],
    "masks": lambda: [MagnitudePruning(0.5, schedule=SCHEDULE)],
    "kernels": lambda: [HybridPruning(0.5, schedule=SCHEDULE)],
    "xgb": lambda: [XGBPruning(pruning_ratio=0.5, surrogate=QUICK, schedule=OneShot(1))],
    "xgb, layer-wise": lambda: [XGBPruning("layer_wise", pruning_ratio=0.5, surrogate=QUICK, schedule=OneShot(1))],
    "spvr": lambda: [SPvRPruning(budget=0.5, group_size=2, samples_per_class=4, schedule=OneShot(1))],
    "unfreezing": lambda: [StructuredPruning(0.5, schedule=SCHEDULE), GradualUnfreezing(1, 0.5)],
}


def images() -> DataLoader[Any]:
    x = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(24) % 3), batch_size=8)


def run(folder: Path, method: str, module: Any, **settings: Any) -> Any:
    some = quiet(folder, *METHODS[method](), epochs=4, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor|NaN or infinite")
        some.fit(module, images())
    return some


def kept(module: nn.Module) -> list[dict[str, Any]]:
    history = history_of(module)
    edits = () if history is None else history.edits
    return [dict(edit.kept) for edit in edits if edit.kind == "keep"]


def assert_pruned(method: str, module: Any) -> None:
    assert hooks(module) == 0
    assert not revived(module)
    if method in ("masks", "kernels"):
        assert sum(int(mask.sum()) for mask in masks_of(module).values()) / 1000 * 1.2 > 0.3
    else:
        assert kept(module)
        assert sum(p.numel() for p in module.parameters()) < 0.75 * sum(p.numel() for p in Images().parameters())


@pytest.mark.parametrize("method", METHODS)
def test_channels_last(method: str, tmp_path: Path) -> None:
    class Last(Images):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0].to(memory_format=torch.channels_last), batch[1]

    module: Any = Last().to(memory_format=torch.channels_last)
    run(tmp_path, method, module)
    assert_pruned(method, module)
    convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)
    plain = Images()
    run(tmp_path / "plain", method, plain)
    assert kept(plain) == kept(module)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_with_a_scaler(method: str, tmp_path: Path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    module = Images()
    run(tmp_path, method, module, plugins=plugin)
    assert_pruned(method, module)
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("method", "how"),
    [(method, "whole") for method in ("contributions", "gradients", "kernels", "xgb", "spvr", "unfreezing")]
    + [(method, "in place") for method in ("contributions", "masks", "xgb, layer-wise", "spvr")],
)
def test_compiled(method: str, how: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    module = Images()
    if how == "in place":
        module.compile(backend="eager")
    run(tmp_path, method, module if how == "in place" else torch.compile(module, backend="eager"))
    assert_pruned(method, module)
    torch.compiler.reset()


def spawned(folder: Path, method: str) -> dict[str, Any]:
    module = Images()
    run(folder, method, module, devices=2, strategy="ddp_fork")
    return {"params": sum(p.numel() for p in module.parameters()), "kept": kept(module)}


@pytest.mark.ddp
@pytest.mark.parametrize("method", ["xgb", "spvr", "unfreezing"])
def test_spawned_processes(method: str, tmp_path: Path) -> None:
    found = ranks.run(spawned, tmp_path, method)
    assert found["kept"]
    assert found["params"] < 0.75 * sum(p.numel() for p in Images().parameters())
