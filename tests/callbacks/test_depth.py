"""Branches that vanish in training: resumed, tested, taken back, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_prune import (
    FoldMean,
    ReestimateBatchNorm,
    Reinitialise,
    Rewind,
    Ridge,
    Scope,
    StructuredPruning,
    load_from_checkpoint,
    prune,
)
from lightning_prune.callbacks import Rollback
from lightning_prune.planning import Explicit, NoEffectWarning, OneShot
from lightning_prune.surgery import history_of
from tests.callbacks.networks import BATCHES, Net, equal, fit, make
from tests.callbacks.test_resume import content

EPOCHS = 5
BRANCH = ("blocks.0.0", "blocks.1.0")


class Blocks(Net):
    """Net's data through two residual blocks, each with a norm of its own and one at the end of its branch."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 8), nn.BatchNorm1d(8))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x)


def pruner(**options: Any) -> StructuredPruning:
    """Half of the first branch at epoch 1, all of it at epoch 2; the stem loses a quarter and then half."""
    ratios = {"blocks.0.0": 0.9, "first": 0.5}
    schedule = Explicit(((1, 0.5), (2, 1.0)))
    return StructuredPruning(ratios, schedule=schedule, scope=Scope(min_width=0), **options)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_equals_never_having_stopped(optimizer: str, tmp_path: Path) -> None:
    ends = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    steps = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    model, callback = make(Blocks, optimizer), pruner()
    whole = fit(tmp_path / "whole", model, callback, ends, steps, epochs=EPOCHS)
    expected = content(whole, model, callback)
    assert callback.report.widths["blocks.0.0"] == 0
    assert [type(m).__name__ for m in model.blocks[0]] == ["Empty", "Identity", "ReLU", "Constant", "BatchNorm1d"]
    assert (model.first.out_features, model.blocks[1][0].in_features) == (4, 4)
    files = [tmp_path / "ends" / f"epoch={epoch}.ckpt" for epoch in range(EPOCHS - 1)]
    files += [tmp_path / "steps" / f"step={step}.ckpt" for step in (2 * BATCHES + 1, 4 * BATCHES - 1)]
    for file in files:
        again, resumed = make(Blocks, optimizer), pruner()
        nn.init.zeros_(again.first.weight)
        run = fit(tmp_path / "resumed", again, resumed, epochs=EPOCHS, ckpt_path=file)
        found = content(run, again, resumed)
        # Who goes on after a branch has vanished knows no share for it.
        for part in expected.keys() - {"attribute _resolved"}:
            assert equal(found[part], expected[part]), (file.name, part)


def test_every_checkpoint_of_the_run_loads(tmp_path: Path) -> None:
    ends = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model, callback = make(Blocks), pruner()
    run = fit(tmp_path, model, callback, ends, epochs=4)
    x = torch.randn(3, 6)
    for epoch in (0, 1, 3, 0, 2):
        file = tmp_path / f"epoch={epoch}.ckpt"
        loaded = load_from_checkpoint(Blocks, file)
        run.predict(model, torch.utils.data.DataLoader(torch.zeros(2, 1, 6)), ckpt_path=file, weights_only=True)
        assert torch.equal(model.eval()(x), loaded.eval()(x))
        names = {name for name, _ in loaded.named_parameters()}
        assert ("blocks.0.0.weight" in names) == (epoch < 2)
    history = history_of(load_from_checkpoint(Blocks, tmp_path / "epoch=3.ckpt"))
    assert history is not None
    assert history.vanished == {"blocks.0.0"}


class Judged(Blocks):
    """Good until a branch is gone."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        gone = not isinstance(self.blocks[0][0], nn.Linear)
        self.log("val_acc", 0.5 if gone else 0.9)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_rollback_brings_a_branch_back(optimizer: str, resume: bool, tmp_path: Path) -> None:
    ends = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model, callback = make(Judged, optimizer), pruner(extensions=[Rollback(epochs=2)])
    with pytest.warns(UserWarning, match="Cut 2 was taken back"):
        run = fit(tmp_path / "whole", model, callback, ends, epochs=6)
    if resume:
        model, callback = make(Judged, optimizer), pruner(extensions=[Rollback(epochs=2)])
        with pytest.warns(UserWarning, match="Cut 2 was taken back"):
            run = fit(tmp_path / "resumed", model, callback, epochs=6, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert callback.structure is not None
    assert callback.structure.widths == {"first": 6, "blocks.0.0": 2, "blocks.1.0": 4}
    (optim,) = run.optimizers
    mine = [id(p) for p in model.parameters()]
    assert [id(p) for group in optim.param_groups for p in group["params"]] == mine
    moments = [value for state in optim.state.values() for value in state.values() if value.dim()]
    assert {tuple(m.shape) for m in moments} == {tuple(p.shape) for p in model.parameters()}
    assert not torch.equal(model.blocks[0][0].weight, torch.zeros_like(model.blocks[0][0].weight))


def test_a_budget_takes_whole_branches(tmp_path: Path) -> None:
    model = make(Blocks)
    with torch.no_grad():
        model.blocks[1][0].weight *= 1e-3
        model.blocks[1][3].weight *= 1e-3
        model.blocks[1][1].weight *= 1e-3
        model.blocks[1][0].bias *= 1e-3
        model.blocks[1][1].bias *= 1e-3
    dense = sum(p.numel() for p in model.parameters())
    report = prune(model, budget={"params": 0.75}, scope=Scope("global", min_width=0, normalize="none"))
    left = sum(p.numel() for p in model.parameters())
    assert report.widths["blocks.1.0"] == 0
    assert report.size is not None
    assert report.size.params == left <= 0.75 * dense
    again = prune(model, budget={"params": 0.6}, scope=Scope("global", min_width=0, normalize="none"))
    assert again.size is not None
    assert again.size.params == sum(p.numel() for p in model.parameters()) <= 0.6 * dense


def test_with_one_unit_at_least_nothing_vanishes() -> None:
    model = make(Blocks)
    report = prune(model, pruning_ratio=0.95)
    assert set(report.widths.values()) == {1}
    why = "One unit of first stays: without it nothing of the input would reach the output: no other path leads around"
    with pytest.warns(NoEffectWarning, match=why):
        report = prune(make(Blocks), pruning_ratio=0.95, scope=Scope(min_width=0))
    assert report.widths == {"first": 1, "blocks.0.0": 0, "blocks.1.0": 0}
    assert report.notes == [f"{why} it."]
    report = prune(make(Blocks), pruning_ratio={"blocks.0.0": 0.95}, scope=Scope(min_width=0))
    assert report.notes == []


def test_a_run_says_why_a_layer_keeps_a_unit(tmp_path: Path) -> None:
    callback = StructuredPruning({"first": 0.999}, schedule=OneShot(1), scope=Scope(min_width=0))
    with pytest.warns(NoEffectWarning, match="One unit of first stays: without it"):
        fit(tmp_path, make(Blocks), callback, epochs=2)
    assert callback.report.widths["first"] == 1
    assert len(callback.report.notes) == 1


REPAIRS = [[FoldMean(batches=2), ReestimateBatchNorm(batches=2)], [Ridge(batches=2)], [Reinitialise()], [Rewind()]]


@pytest.mark.parametrize("extensions", REPAIRS)
def test_a_repaired_run_resumes_as_if_it_had_never_stopped(extensions: Any, tmp_path: Path) -> None:
    ends = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model, callback = make(Blocks), pruner(extensions=extensions)
    whole = fit(tmp_path / "whole", model, callback, ends, epochs=4)
    expected = content(whole, model, callback)
    assert callback.report.widths["blocks.0.0"] == 0
    for epoch in (0, 1, 2):
        again, resumed = make(Blocks), pruner(extensions=extensions)
        run = fit(tmp_path / "resumed", again, resumed, epochs=4, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        found = content(run, again, resumed)
        for part in expected.keys() - {"attribute _resolved"}:
            assert equal(found[part], expected[part]), (epoch, part)


def test_what_is_rewound_to_is_as_narrow_as_the_network(tmp_path: Path) -> None:
    ratios, schedule = {"blocks.0.0": 0.97, "first": 0.7}, Explicit(((1, 0.5), (2, 0.94), (3, 1.0)))
    callback = StructuredPruning(ratios, schedule=schedule, scope=Scope(min_width=0), extensions=[Rewind()])
    model = make(Blocks)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: dict[int, dict[str, Tensor]] = {}

    class Seen(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                seen[trainer.current_epoch] = {n: t.clone() for n, t in pl_module.state_dict().items()}

    fit(tmp_path, model, callback, Seen(), epochs=4)
    assert [len(seen[epoch]["first.weight"]) for epoch in (1, 2, 3)] == [5, 3, 2]
    assert [f"blocks.0.0.{own}" in seen[epoch] for epoch in (1, 2) for own in ("weight", "bias")] == [True] * 2 + [
        False
    ] * 2
    # A row of the first weight that stays is one of those at the start, whole.
    for row in seen[3]["first.weight"]:
        assert (start["first.weight"] == row).all(1).any()
