"""`GrowPenalty` against a training loop that shrinks, measures and cuts by hand, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_prune import (
    L1,
    L2,
    GroupLasso,
    GrowPenalty,
    LinearSchedule,
    NetworkSlimming,
    OneShot,
    Reinitialise,
    Ridge,
    SPvRPruning,
    StructuredPruning,
    WhenStable,
)
from tests.callbacks.contents import content
from tests.callbacks.networks import BATCHES, Curves, Net, Stream, equal, fit, loader, make, trainer

OVER = 3
STEPS = OVER * BATCHES


class Plain(LightningModule):
    """Two layers, sigmoid in between: a unit without weights still gives 1/2, so that only its columns silence it."""

    def __init__(self, optimizer: str = "sgd", norm: bool = False) -> None:
        super().__init__()
        middle = nn.LayerNorm(12) if norm else nn.Identity()
        self.body = nn.Sequential(nn.Linear(6, 12), middle, nn.Sigmoid(), nn.Linear(12, 3))
        self.optimizer = optimizer
        self.example_input_array = torch.zeros(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.body(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.body(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.optimizer, self.parameters())


def optimizer_of(name: str, parameters: Any) -> Any:
    # An eps at which rounding of tiny gradients does not count.
    kinds = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=1e-3),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=0.01, eps=1e-3),
    }
    return kinds[name]()


def held_out(net: nn.Module) -> float:
    x, y = (torch.cat(parts) for parts in zip(*loader(2), strict=True))
    with torch.no_grad():
        return float(F.cross_entropy(net(x.double()), y))


def narrowed(net: Any, keep: list[int]) -> nn.Module:
    """The network of these units alone."""
    first, last = net[0], net[3]
    small = nn.Sequential(nn.Linear(6, len(keep)), nn.Sigmoid(), nn.Linear(len(keep), 3)).double()
    contents = {"0.weight": first.weight[keep], "0.bias": first.bias[keep], "2.weight": last.weight[:, keep]}
    small.load_state_dict({**contents, "2.bias": last.bias})
    return small


class ByHand:
    """The plan, its penalty and its checks, step by step.

    Args:
        net: The network.
        steps: Optimizer steps of the penalty.
        jump: Accepted change of the loss.
    """

    def __init__(self, net: Any, steps: int, jump: float) -> None:
        self.net, self.steps, self.jump = net, steps, jump
        self.keep = planned(net)
        self.gone = [unit for unit in range(12) if unit not in self.keep]
        self.stage, self.jumps = 0, [self.measured()]

    def measured(self) -> float:
        return held_out(narrowed(self.net, self.keep)) / held_out(self.net) - 1

    def is_ready(self, elapsed: int) -> bool:
        then, self.stage = self.stage, 100 * elapsed // self.steps
        if self.stage > then:
            with torch.no_grad():
                for weights in (self.net[0].weight, self.net[0].bias, self.net[3].weight.T):
                    weights[self.gone] *= (100 - self.stage) / (100 - then)
        if self.stage // 10 == then // 10:
            return False
        self.jumps.append(self.measured())
        return abs(self.jumps[-1]) <= self.jump or self.stage == 100


def by_hand(net: Any, optimizer: str, jump: float, every: int) -> tuple[nn.Module, int, list[float]]:
    """Two epochs, then the penalty until the cut: the network after it, its step, and the jumps of all checks."""
    made, begun = optimizer_of(optimizer, net.parameters()), 2 * BATCHES // every
    state: ByHand | None = None
    for number, (x, y) in enumerate([*loader()] * 20):
        step = number // every
        if step == begun and state is None:
            state = ByHand(net, OVER * BATCHES // every, jump)
        elif state is not None and state.is_ready(step - begun):
            return narrowed(net, state.keep), step, state.jumps
        (F.cross_entropy(net(x.double()), y) / every).backward()
        if (number + 1) % every == 0:
            made.step()
            made.zero_grad()
    raise AssertionError("never cut")


def planned(net: Any) -> list[int]:
    """The units whose incoming weights have the largest sums of absolute values."""
    return sorted(net[0].weight.abs().sum(1).argsort(descending=True)[:6].tolist())


class Seen(Callback):
    """The network right after its cut."""

    def __init__(self) -> None:
        super().__init__()
        self.body: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.body is None and pl_module.body[0].out_features < 12:
            self.body, self.step = copy.deepcopy(pl_module.body), trainer.global_step


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("share", [1e-9, 0.8])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_as_by_hand(optimizer: str, share: float, every: int, tmp_path: Path) -> None:
    """The same weights, the same jumps at every check, the same step; exactly no jump once the units are zero."""
    model = make(Plain, optimizer)
    _, _, (first, *_) = by_hand(copy.deepcopy(model.body).double(), optimizer, 0.0, every)
    jump = share * abs(first)
    expected, step, jumps = by_hand(copy.deepcopy(model.body).double(), optimizer, jump, every)
    curves, seen, last = Curves(), Seen(), jumps[-1]
    pruner = StructuredPruning(
        0.5, criterion=L1(producers="first"), schedule=OneShot(2), extensions=[GrowPenalty(jump, OVER)]
    )
    fit(tmp_path, model, pruner, seen, epochs=9, precision="64-true", logger=curves, accumulate_grad_batches=every)
    assert seen.step == step
    assert curves.of("pruning/jump") == pytest.approx(jumps, rel=1e-6, abs=1e-12)
    assert curves.of("pruning/jump_at_cut") == pytest.approx([last], rel=1e-6, abs=1e-12)
    state = seen.body.state_dict()
    for (name, tensor), other in zip(state.items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-11, msg=name)
    if share < 0.1:
        assert step == (2 + OVER) * BATCHES // every
        assert abs(last) < 1e-12
    note = pruner.report.notes[-1]
    assert "Cut 1 changed the held-out loss by " + f"{last:+.2%}".replace("-0.00%", "+0.00%") in note
    assert f"it would have changed it by {jumps[0]:+.2%}" in note


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_units_are_zero_in_the_end_in_any_precision(optimizer: str, precision: str, tmp_path: Path) -> None:
    curves = Curves()
    pruner = StructuredPruning(0.5, schedule=OneShot(1), extensions=[GrowPenalty(1e-9, 2)])
    fit(tmp_path, make(Net, optimizer), pruner, epochs=5, precision=precision, logger=curves)
    # In bfloat16 alone, the losses may be the same number before.
    assert [cut.epoch for cut in pruner.report.cuts] == [3] or precision == "bf16-true"
    assert curves.of("pruning/jump")[0] != 0
    assert curves.of("pruning/jump_at_cut") == pytest.approx([0.0], abs=1e-6)


def test_a_norm_over_units_is_cut_in_the_end_and_told(tmp_path: Path) -> None:
    """Zero units count in a LayerNorm's mean, so that the cut changes the outputs in any case."""
    pruner = StructuredPruning(0.5, schedule=OneShot(1), extensions=[GrowPenalty(1e-9, 2)])
    model = make(Plain, norm=True)
    with pytest.warns(UserWarning, match="more than `jump`. Cut 1 changed the held-out loss by"):
        fit(tmp_path, model, pruner, epochs=5)
    assert [cut.epoch for cut in pruner.report.cuts] == [3]
    assert model.body[0].out_features == 6


def test_repairs_count_in_what_a_cut_changes(tmp_path: Path) -> None:
    curves = Curves()
    extensions = [GrowPenalty(10.0, 2), Ridge(batches=2)]
    fit(
        tmp_path, make(Net), StructuredPruning(0.5, schedule=OneShot(1), extensions=extensions), epochs=4, logger=curves
    )
    (planned_change,), (change,) = curves.of("pruning/jump"), curves.of("pruning/jump_at_cut")
    assert abs(change - planned_change) > 1e-4


CALLBACKS: dict[str, Any] = {
    "two cuts": lambda: StructuredPruning(
        0.5, schedule=LinearSchedule(start=1, end=4, cuts=2), extensions=[GrowPenalty(0.001, 2)]
    ),
    "stable": lambda: StructuredPruning(
        0.5, schedule=WhenStable(0.5, 2, start=1, latest=6), extensions=[GrowPenalty(0.001, 2)]
    ),
    "slimming": lambda: NetworkSlimming(
        0.5, penalty=GroupLasso(0.01), criterion=L2(), schedule=OneShot(2), extensions=[GrowPenalty(0.001, 2)]
    ),
}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_resumed_run_goes_on_with_plan_and_penalty(kind: str, tmp_path: Path) -> None:
    """Bit by bit, from the middle of the penalty."""
    saver = ModelCheckpoint(tmp_path / "every", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    model, callback = make(Net, "adamw"), CALLBACKS[kind]()
    whole = content(fit(tmp_path, model, callback, saver, epochs=9), model, callback)
    first = callback.report.cuts[0]
    assert len(callback.report.cuts) == (2 if kind == "two cuts" else 1)
    assert first.step > {"two cuts": 1, "stable": 3, "slimming": 2}[kind] * BATCHES, "it has waited"
    for step in (first.step - 3, first.step - 1, first.step + 1):
        file = tmp_path / "every" / f"step={step}.ckpt"
        assert ("planned" in torch.load(file, weights_only=True)["callbacks"][callback.state_key]) == (
            step < first.step
        )
        again, other = make(Net, "adamw"), CALLBACKS[kind]()
        torch.nn.init.zeros_(again.first.weight)
        found = content(fit(tmp_path / "again", again, other, epochs=9, ckpt_path=file), again, other)
        # Lightning does not validate again after the last batch of an epoch.
        skipped = {"report", "attribute _measured"} if step % BATCHES == 0 else set()
        for part in whole.keys() - skipped:
            assert equal(found[part], whole[part]), (step, part)


def test_the_plan_is_that_of_the_moment_it_was_due(tmp_path: Path) -> None:
    """Units that decay are those that go: a plan made again later would be the same one, so it is not made again."""
    free, bound = (
        StructuredPruning(0.5, schedule=OneShot(2), extensions=extensions)
        for extensions in ([], [GrowPenalty(1e-9, 2)])
    )
    kept = []
    for name, pruner in (("free", free), ("bound", bound)):
        saver = ModelCheckpoint(tmp_path / name, filename="last", save_top_k=1)
        fit(tmp_path / name, make(Net), pruner, saver, epochs=6)
        edits = torch.load(tmp_path / name / "last.ckpt", weights_only=True)["lightning_prune"]["edits"]
        kept.append({group: units.tolist() for group, units in edits[0]["kept"].items()})
    assert kept[0] == kept[1]
    assert [pruner.report.cuts[0].epoch for pruner in (free, bound)] == [2, 4]


def test_a_resume_with_other_cuts_plans_again(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    extensions = [GrowPenalty(1e-9, 2)]
    fit(tmp_path, make(Net), StructuredPruning(0.5, schedule=OneShot(1), extensions=extensions), saver, epochs=6)
    pruner = StructuredPruning(0.5, schedule=OneShot(3), extensions=extensions)
    model = make(Net)
    fit(tmp_path / "again", model, pruner, epochs=6, ckpt_path=tmp_path / "step=7.ckpt")
    assert [cut.epoch for cut in pruner.report.cuts] == [5]


def test_a_damaged_plan_is_told(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    extensions = [GrowPenalty(1e-9, 2)]
    fit(tmp_path, make(Net), StructuredPruning(0.5, schedule=OneShot(1), extensions=extensions), saver, epochs=4)
    whole = torch.load(tmp_path / "step=7.ckpt", weights_only=True)
    for place in ("planned", "extension"):
        checkpoint = copy.deepcopy(whole)
        state = checkpoint["callbacks"]["StructuredPruning"]
        plan = state["planned"]["plan"] if place == "planned" else state["extensions"]["GrowPenalty"]["plan"]
        plan["kept"]["first"] = "all"
        torch.save(checkpoint, tmp_path / "damaged.ckpt")
        pruner = StructuredPruning(0.5, schedule=OneShot(1), extensions=extensions)
        with pytest.raises(ValueError, match="state in the checkpoint is damaged"):
            fit(tmp_path, make(Net), pruner, epochs=4, ckpt_path=tmp_path / "damaged.ckpt")


class Failing(Plain):
    """Whose loss is NaN in eval mode, from an epoch on."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch
        self.register_buffer("added", torch.tensor(0.0 if epoch else torch.nan))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if self.training else loss + self.added

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.epoch:
            self.added.fill_(torch.nan)


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    """Two infinite losses are not the same: no cut is ready then."""
    pruner = StructuredPruning(0.5, schedule=OneShot(1), extensions=[GrowPenalty(0.01, 2)])
    with pytest.raises(ValueError, match="expected a finite loss of `training_step` on validation data"):
        fit(tmp_path / "first", make(Failing, 0), pruner, epochs=5)
    with pytest.warns(UserWarning, match="more than `jump`. Cut 1 changed the held-out loss by \\+inf%"):
        fit(tmp_path / "later", make(Failing, 1), pruner, epochs=5)
    assert [cut.epoch for cut in pruner.report.cuts] == [3]


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.body(batch[0]), batch[1]))
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options", "extension", "text"),
    [
        (Net, {"validate": False}, GrowPenalty(), "GrowPenalty measures the loss on validation data: .* got none"),
        (Net, {"limit_val_batches": 0}, GrowPenalty(), "GrowPenalty measures the loss on validation data: .* got none"),
        (Net, {}, GrowPenalty(over=5), "at least 20 steps before the end .* made after 24 of 24 steps"),
        (Net, {}, GrowPenalty(over=1.0), "the last cut to be due at least 24 steps before the end"),
        (Manual, {}, GrowPenalty(), "expected a `training_step` that returns a loss, got NoneType. GrowPenalty"),
    ],
    ids=["none", "limited", "epochs", "share", "no loss"],
)
def test_refused_before_the_first_step(
    kind: Any, options: dict[str, Any], extension: GrowPenalty, text: str, tmp_path: Path
) -> None:
    model = make(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, model, StructuredPruning(0.5, schedule=OneShot(1), extensions=[extension]), **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_validation_data_without_positions_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, StructuredPruning(0.5, schedule=OneShot(1), extensions=[GrowPenalty()]))
    with pytest.raises(ValueError, match=r"got DataLoader over Stream\. Give the fit `val_dataloaders`"):
        run.fit(make(Net), loader(), DataLoader(Stream(), batch_size=8))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"jump": 0.0}, "`jump` above 0"),
        ({"over": 0}, "`over` in"),
        ({"over": 0.0}, "`over` in"),
        ({"over": 1.5}, "`over` in"),
        ({"samples": 0}, "`samples` of at least 1"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"GrowPenalty: expected {text}"):
        GrowPenalty(**settings)


def test_where_preparing_a_cut_has_no_effect() -> None:
    with pytest.raises(ValueError, match=r"without Reinitialise.*, which sets all weights"):
        StructuredPruning(0.5, extensions=[GrowPenalty(), Reinitialise()])
    with pytest.raises(ValueError, match="SPvRPruning: expected no GrowPenalty"):
        SPvRPruning(budget=0.5, extensions=[GrowPenalty()])
