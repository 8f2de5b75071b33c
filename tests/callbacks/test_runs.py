"""Runs of every kind: they end at the target, the weights move, and nothing is left behind."""

from __future__ import annotations

import gc
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_prune import Contribution, ContributionPruning, LinearSchedule, OneShot, StructuredPruning
from lightning_prune.callbacks import live_transaction, network_pruning
from lightning_prune.callbacks.methods import structured
from lightning_prune.planning import NoEffectWarning
from lightning_prune.surgery import CutError, history_of
from tests.callbacks.networks import (
    BATCH,
    BATCHES,
    Net,
    equal,
    fit,
    hooks,
    make,
    refit,
    trainer,
    weights,
    widths,
)

SCHEDULE = LinearSchedule(start=1, end=2, cuts=2)


def contribution(schedule: Any = SCHEDULE, **options: Any) -> ContributionPruning:
    return ContributionPruning(0.5, criterion=Contribution(every_n_batches=1), schedule=schedule, **options)


class Stepped(Net):
    """With a scheduler, and parameters in two groups, one layer frozen."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.head.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.first.parameters()},
            {"params": [*self.norm.parameters(), *self.second.parameters()], "lr": 0.02},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        if self.kind == "cycle":
            scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01, 0.02], total_steps=4 * BATCHES)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Manual(Net):
    """Optimizes by hand, with one optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Gan(LightningModule):
    """Two networks and two optimizers, which take turns on every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
        self.example_input_array = torch.zeros(2, 3)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, two = self.optimizers()
        z = batch[0][:, :3]
        self.toggle_optimizer(one)
        self.manual_backward(-self.critic(self(z)).mean())
        one.step()
        one.zero_grad()
        self.untoggle_optimizer(one)
        self.toggle_optimizer(two)
        loss = self.critic(self(z).detach()).mean() - self.critic(batch[0]).mean()
        self.manual_backward(loss)
        two.step()
        two.zero_grad()
        self.untoggle_optimizer(two)
        self.log("critic", loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.generator.parameters()), torch.optim.Adam(self.critic.parameters())


class Auxiliary(Net):
    """A head that only the training knows, and metrics in collections."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(12, 3)
        self.measures = nn.ModuleDict(
            {"fit": MetricCollection({"acc": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)})}
        )
        self.test_acc = MulticlassAccuracy(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = F.relu(self.norm(self.first(batch[0])))
        out = self.head(F.relu(self.second(hidden)))
        measures: Any = self.measures["fit"]
        self.log_dict(measures(out, batch[1]), on_step=True, on_epoch=False)
        self.log("share", (out.argmax(1) == batch[1]).float().mean(), prog_bar=True)
        if self.trainer.global_step % 2 == 0 and self.trainer.is_last_batch is not None:
            self.print("", end="")
        return F.cross_entropy(out, batch[1]) + F.cross_entropy(self.auxiliary(hidden), batch[1])


class Losses(Callback):
    """Keeps the widths, weights and rates at every epoch's start and end."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.starts.append(weights(pl_module))


def moved(watch: Losses, name: str) -> bool:
    """Whether a tensor changed in the run's last step of its final shape."""
    last, before = watch.starts[-1][name], watch.starts[-2][name]
    return last.shape == before.shape and not torch.equal(last, before)


OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (Net, {}),
    "sanity check": (Net, {"num_sanity_val_steps": 2}),
    "limited": (Net, {"limit_train_batches": 2, "limit_val_batches": 1}),
    "limited, share": (Net, {"limit_train_batches": 0.5}),
    "max_steps": (Net, {"epochs": -1, "max_steps": 14}),
    "accumulate": (Net, {"accumulate_grad_batches": 3}),
    "often validated": (Net, {"val_check_interval": 2}),
    "seldom validated": (Net, {"check_val_every_n_epoch": 2}),
    "clip by norm": (Net, {"gradient_clip_val": 0.1}),
    "clip by value": (Net, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    "one cycle": (lambda: Stepped("cycle"), {}),
    "step lr": (lambda: Stepped("step"), {}),
    "adamw": (lambda: Net("adamw"), {}),
    "bf16-mixed": (Net, {"precision": "bf16-mixed"}),
    "bf16-true": (Net, {"precision": "bf16-true"}),
    "64-true": (Net, {"precision": "64-true"}),
    "manual": (Manual, {}),
    "auxiliary": (Auxiliary, {}),
    "no example": (lambda: Net(example=False), {}),
    "inference mode off": (Net, {"inference_mode": False}),
    "deterministic": (Net, {"deterministic": True}),
    "profiled": (Net, {"profiler": "simple"}),
    "anomalies": (Net, {"detect_anomaly": True}),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_runs_end_at_the_target(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, options = OPTIONS[kind]
    watch, model = Losses(), make(build)
    names, before = [type(m) for m in model.modules()], hooks(model)
    schedule = LinearSchedule(start=3, end=8, cuts=2, unit="step") if kind == "max_steps" else SCHEDULE
    run = fit(tmp_path, model, contribution(schedule), watch, **({"epochs": 4} | options))
    assert widths(model) == (6, 4)
    assert [type(m) for m in model.modules()] == names
    assert hooks(model) == before
    for name in ("first.weight", "second.weight", "norm.bias"):
        assert moved(watch, name), name
    if "one cycle" in kind or "step lr" in kind:
        assert not moved(watch, "head.weight")
        assert len(run.optimizers[0].param_groups) == 2
        assert run.lr_scheduler_configs[0].scheduler.optimizer is run.optimizers[0]
    if "true" in kind:
        expected = torch.float64 if "64" in kind else torch.bfloat16
        assert {p.dtype for p in model.parameters()} == {expected}


def test_a_gan(tmp_path: Path) -> None:
    for schedule, step in (
        (LinearSchedule(start=1, end=2, cuts=2), BATCHES),
        (LinearSchedule(start=0.25, end=0.5, cuts=2, unit="step"), 4),
    ):
        watch, model, pruner = Losses(), make(Gan), contribution(schedule)
        run = fit(tmp_path / str(step), model, pruner, watch, epochs=4, validate=False)
        assert model.generator[0].out_features == 5
        assert model.critic[0].out_features == 4
        assert run.global_step == 2 * 4 * BATCHES
        # Two optimizers step on every batch: a quarter of the run is the same moment however steps are counted.
        assert [cut.epoch for cut in pruner.report.cuts] == [1, 2]
        for optimizer in run.optimizers:
            for parameter, state in optimizer.state.items():
                assert state["exp_avg"].shape == parameter.shape
        assert moved(watch, "generator.0.weight") or moved(watch, "critic.0.weight")


def test_momentum_is_kept(tmp_path: Path) -> None:
    class Look(Callback):
        seen: list[tuple[Tensor, Tensor]]

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(self.now(trainer, pl_module))

        @staticmethod
        def now(trainer: Any, model: Any) -> Any:
            state = trainer.optimizers[0].state.get(model.second.bias, {})
            return model.second.bias.detach().clone(), state.get("momentum_buffer", torch.zeros(8)).clone()

    before, after = Look(), Look()
    before.seen, after.seen = [], []
    model = make()
    fit(tmp_path, model, before, StructuredPruning(0.5, schedule=OneShot(at=2)), after)
    wide, narrow = before.seen[2 * BATCHES], after.seen[2 * BATCHES]
    kept = history_of(model).edits[0].kept["second"]
    assert torch.equal(wide[0][list(kept)], narrow[0])
    assert torch.equal(wide[1][list(kept)], narrow[1])
    assert narrow[1].abs().min() > 0


def test_two_runs_with_one_callback(tmp_path: Path) -> None:
    pruner = contribution()
    one, two, alone = make(), make(), make()
    fit(tmp_path / "one", one, pruner, epochs=4)
    first = pruner.report
    fit(tmp_path / "two", two, pruner, epochs=4)
    fit(tmp_path / "alone", alone, contribution(), epochs=4)
    assert equal(weights(two), weights(alone))
    assert equal(weights(one), weights(alone))
    assert pruner.report is not first
    assert len(first.cuts) == len(pruner.report.cuts) == 2


def test_the_same_network_goes_on(tmp_path: Path) -> None:
    """With the same trainer: what was cut stays cut once, and the report grows."""
    pruner, model = contribution(LinearSchedule(start=1, end=6, cuts=3, unit="epoch")), make()
    with pytest.warns(UserWarning, match="of the way to the target|before the last of its cuts"):
        run = fit(tmp_path, model, pruner, epochs=3)
    middle, rows = widths(model), len(pruner.report.history)
    refit(run, model)  # nothing is left to do
    (note,) = pruner.report.notes
    assert note.startswith("The target was not reached: LinearSchedule(")
    assert "goes 33 % of the way" in note
    assert note in str(pruner.report).replace("\n", " ")
    run.fit_loop.max_epochs = 8
    refit(run, model)
    assert middle == (10, 7)
    assert widths(model) == (6, 4)
    assert [cut.index for cut in pruner.report.cuts] == [0, 1, 2]
    assert pruner.report.notes == [], "the longer run has reached it"
    assert len(pruner.report.history) > rows
    assert pruner.report.final is not None
    assert pruner.report.final.widths == {"first": 6, "second": 4}
    assert (tmp_path / "report.json").exists()
    assert not (tmp_path / "pruning-2").exists()


def test_a_pruned_network_is_pruned_further_by_a_new_run(tmp_path: Path) -> None:
    model = make()
    fit(tmp_path / "one", model, StructuredPruning(0.25, schedule=SCHEDULE), epochs=4)
    assert widths(model) == (9, 6)
    again = StructuredPruning(0.75, schedule=SCHEDULE)
    fit(tmp_path / "two", model, again, epochs=4)
    assert widths(model) == (3, 2)
    assert again.report.dense.widths == {"first": 12, "second": 8}
    with pytest.warns(NoEffectWarning, match="holds already"):
        fit(tmp_path / "three", model, StructuredPruning(0.5, schedule=SCHEDULE), epochs=4)
    assert widths(model) == (3, 2)


def test_fast_dev_run_checks_and_cuts_nothing(tmp_path: Path) -> None:
    model = make()
    fit(tmp_path, model, contribution(OneShot(at=50)), fast_dev_run=True)
    assert widths(model) == (12, 8)
    assert list(tmp_path.rglob("report*")) == []
    with pytest.raises(ValueError, match="nonsense"):
        fit(tmp_path, make(), contribution(layers="nonsense"), fast_dev_run=True)


def test_users_hooks_see_no_fake_tensors(tmp_path: Path) -> None:
    class Recording(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []
            self.first.register_forward_hook(lambda m, i, o: self.seen.append(o.detach()))
            self.second.weight.register_hook(lambda g: self.seen.append(g))

    model = make(Recording)
    before = hooks(model)
    fit(tmp_path, model, contribution(), epochs=4)
    assert model.seen
    assert not any(isinstance(tensor, FakeTensor) for tensor in model.seen)
    forwards = [t for t in model.seen if t.ndim == 2 and t.shape[0] == BATCH]
    # A training and a validation batch each, a backward for every training batch, and nothing of ours.
    assert len(model.seen) == 4 * BATCHES * 3
    assert len(forwards) >= 4 * BATCHES * 2
    assert hooks(model) == before


def test_features_that_hooks_store_are_cut_with_their_layer(tmp_path: Path) -> None:
    class Branching(Net):
        def __init__(self) -> None:
            super().__init__()
            self.features: dict[str, Tensor] = {}
            self.first.register_forward_hook(self.keep)

        def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.features["first"] = output
            self.log("samples", len(output))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(torch.relu(self.first(x)) + self.features["first"]))

    model = make(Branching)
    fit(tmp_path, model, contribution(OneShot(at=1)), epochs=3)
    assert model.features["first"].shape[1] == model.first.out_features == 6


def test_measuring_does_not_run_the_network(measured: None, tmp_path: Path) -> None:
    class Counting(Net):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return super().forward(x)

    model, seen = make(Counting), list[int]()
    model.first.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    pruning = StructuredPruning(0.5, schedule=OneShot(at=1))
    fit(tmp_path, model, pruning, epochs=2)
    assert len(seen) == 2 * BATCHES * 2
    assert model.passes == 2 * BATCHES * 2 + 1, "training, validation, and the check after the cut"
    assert pruning.report.final is not None
    assert pruning.report.final.latency[64] > 0


class FailError(Exception):
    pass


def failing(*_: Any, **__: Any) -> Any:
    raise FailError


PLACES = {
    **dict.fromkeys(("score_groups", "make_plan"), structured),
    **dict.fromkeys(
        ("apply", "edits_of", "history_or_new", "verify"), import_module("lightning_prune.surgery.transaction")
    ),
    "assert_same_parameters": live_transaction,
    **dict.fromkeys(("verify_shapes", "reset_monitors", "log_now"), network_pruning),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_error_anywhere_leaves_the_network_whole(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pruner = make(), contribution(OneShot(at=2))
    seen: dict[str, Any] = {}

    class Arm(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 2 and not seen:
                seen.update(weights(pl_module))
                monkeypatch.setattr(PLACES[place], place, failing)

    before = hooks(model)
    run = trainer(tmp_path, Arm(), pruner)
    with pytest.raises((FailError, CutError)):
        refit(run, model)
    monkeypatch.undo()
    history = history_of(model)
    if place in ("reset_monitors", "log_now"):  # the cut itself was made
        assert widths(model) == (6, 4)
        assert len(history.edits) == 1
    else:
        assert equal(weights(model), seen)
        assert history is None
    assert hooks(model) == before
    for parameter, state in run.optimizers[0].state.items():
        assert state["momentum_buffer"].shape == parameter.shape
    # What is saved now can be loaded, and the training goes on from it.
    run.save_checkpoint(tmp_path / "rescued.ckpt")
    model = make()
    fit(tmp_path / "again", model, contribution(OneShot(at=2)), ckpt_path=tmp_path / "rescued.ckpt")
    assert widths(model) == (6, 4)


def test_a_network_that_fails_when_narrow_is_taken_back(tmp_path: Path) -> None:
    class Stubborn(Net):
        def forward(self, x: Tensor) -> Tensor:
            if (
                self.trainer.current_epoch >= 1
                and self.first.out_features < 12
                and not torch.is_inference_mode_enabled()
            ):
                raise RuntimeError("too narrow")
            return super().forward(x)

    model = make(Stubborn)
    with pytest.raises(CutError, match="too narrow"):
        fit(tmp_path, model, contribution(OneShot(at=2)), validate=False)
    assert widths(model) == (12, 8)
    assert hooks(model) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(
    "place", ["on_before_backward", "on_train_batch_end", "on_validation_batch_end", "on_before_zero_grad"]
)
def test_an_interrupt_leaves_no_hook(error: type[BaseException], place: str, tmp_path: Path) -> None:
    class Stop(Callback):
        pass

    def stop(self: Any, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch == 1:
            raise error

    setattr(Stop, place, stop)
    model = make()
    run = trainer(tmp_path, Stop(), contribution(OneShot(at=2)))
    before = [c for c in gc.get_objects() if type(c) is FakeTensor]  # of what other tests have compiled
    with pytest.raises((error, SystemExit)):
        refit(run, model)
    assert hooks(model) == 0
    assert not [c for c in gc.get_objects() if type(c) is FakeTensor and not any(c is other for other in before)]


def test_a_batch_that_ends_early_leaves_no_hook(tmp_path: Path) -> None:
    class Skip(Callback):
        most = 0

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> int | None:
            self.most = max(self.most, hooks(pl_module))
            return -1 if batch_idx == 1 else None

    skip, model = Skip(), make()
    fit(tmp_path, model, contribution(), skip, epochs=4)
    assert skip.most == 2
    assert hooks(model) == 0


def test_early_stopping_waits_for_the_target(tmp_path: Path) -> None:
    class Worse(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float(self.trainer.current_epoch))

    for options in ({}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}):
        model, stopping = make(Worse), EarlyStopping("val_loss", patience=1)
        pruner = StructuredPruning(0.5, schedule=LinearSchedule(start=3, end=6, cuts=2))
        run = fit(tmp_path / str(len(str(options))), model, pruner, stopping, epochs=20, **options)
        assert widths(model) == (6, 4)
        assert 7 <= run.current_epoch <= 11
    model, stopping = make(Worse), EarlyStopping("val_loss", patience=1)
    with pytest.warns(UserWarning, match="ended before the last of its cuts"):
        run = fit(
            tmp_path,
            model,
            StructuredPruning(0.5, schedule=LinearSchedule(start=3, end=6, cuts=2), reset_monitors=False),
            stopping,
            epochs=20,
        )
    assert run.current_epoch == 2
    assert widths(model) == (12, 8)


def test_monitors_start_anew_after_a_cut(tmp_path: Path) -> None:
    class Best(Net):
        """Best in epoch 1, before the cut."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", [3.0, 1.0, 9.0, 8.0, 8.5][self.trainer.current_epoch])

    for reset, best in ((True, "epoch=3"), (False, "epoch=1")):
        saver = ModelCheckpoint(tmp_path / str(reset), filename="{epoch}", monitor="val_loss")
        pruner = StructuredPruning(0.5, schedule=OneShot(at=2), reset_monitors=reset)
        fit(tmp_path, make(Best), pruner, saver, epochs=5)
        assert best in saver.best_model_path
        assert (tmp_path / str(reset) / "epoch=1.ckpt").exists()


def test_nothing_grows_over_forty_cuts(tmp_path: Path) -> None:
    class Count(Callback):
        tensors: dict[int, int]
        hooks: list[int]

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.hooks.append(hooks(pl_module))
            if trainer.current_epoch in (5, 38):  # to look at all objects takes longer than a cut
                gc.collect()
                found = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
                self.tensors[trainer.current_epoch] = found

    count, model = Count(), make(Net, "adamw", width=80)
    count.tensors, count.hooks = {}, []
    pruner = contribution(LinearSchedule(start=1, end=40, cuts=40))
    pruner.ignore = "second"
    fit(tmp_path, model, pruner, count, epochs=42, validate=False)
    assert model.first.out_features == 40
    assert len(pruner.report.cuts) == 40
    assert set(count.hooks) == {0}
    assert count.tensors[38] <= count.tensors[5] + 5


def test_weights_follow_the_same_path_with_any_validation(tmp_path: Path) -> None:
    one, two = make(), make()
    fit(tmp_path / "one", one, contribution(), epochs=4)
    fit(tmp_path / "two", two, contribution(), epochs=4, validate=False)
    assert equal(weights(one), weights(two))
    assert not re.search("Fake", repr(one))
