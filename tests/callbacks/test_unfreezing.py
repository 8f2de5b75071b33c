"""Gradual unfreezing: what trains when, which optimizer gets it, and the same after any resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_prune import L1, GradualUnfreezing, MagnitudePruning, OneShot, Scope, StructuredPruning, XGBPruning
from lightning_prune.scoring import XGBoost
from lightning_prune.structure import TracedModel
from lightning_prune.structure.backbone import Backbone
from lightning_prune.structure.boundaries import find_boundaries
from lightning_prune.surgery.truncation import truncated
from tests.callbacks.networks import Curves, Loader, equal, make, refit, trainer, weights
from tests.support import ranks

CONVS = ["first", "second", "third"]


class Net(LightningModule):
    """Three convolutions, each with a norm, and a linear classifier."""

    def __init__(self, only_trainable: bool = False, optimizer: str = "sgd", schedule: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name, (inputs, outputs) in zip(CONVS, ((1, 4), (4, 6), (6, 6)), strict=True):
            self.add_module(name, nn.Conv2d(inputs, outputs, 3, padding=1))
            self.add_module(f"{name}_norm", nn.BatchNorm2d(outputs))
        self.head = nn.Linear(6, 3)
        self.example_input_array = torch.zeros(2, 1, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for name in CONVS:
            x = F.relu(self.get_submodule(f"{name}_norm")(self.get_submodule(name)(x)))
        return self.head(x.mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        given = [p for p in self.parameters() if p.requires_grad or not self.hparams.only_trainable]
        if self.hparams.optimizer == "adamw":
            optimizer: Any = torch.optim.AdamW(given, lr=0.01, weight_decay=0.1)
        else:
            optimizer = torch.optim.SGD(given, lr=0.1, momentum=0.9, weight_decay=0.01)
        schedule = SCHEDULES[self.hparams.schedule](optimizer) if self.hparams.schedule else None
        return optimizer if schedule is None else ([optimizer], [{"scheduler": schedule, "interval": "step"}])


SCHEDULES: dict[str, Any] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=60),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4, cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 40)], [4]
    ),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
}


def data(size: int = 8, samples: int = 32) -> Loader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 1, 6, 6, generator=generator)
    return Loader(TensorDataset(x, x.mean((1, 2, 3)).mul(30).long().clamp(-1, 1) + 1), batch_size=size)


BATCHES = 4


class Log(Callback):
    """Which layers trained in each batch, by what moved in its step, and in which mode the norms were."""

    def __init__(self) -> None:
        self.moved: list[tuple[str, ...]] = []
        self.norms: list[tuple[str, ...]] = []
        self.learning_rates: list[list[float]] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.norms.append(tuple(name for name in CONVS if pl_module.get_submodule(f"{name}_norm").training))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._before = weights(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now = pl_module.state_dict()
        moved = {key.split(".")[0] for key, value in now.items() if not torch.equal(value, self._before[key])}
        self.moved.append(tuple(name for name in (*CONVS, "head") if name in moved))
        assert {name for name in CONVS if f"{name}_norm" in moved} >= moved & set(CONVS)
        self.learning_rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def fit(
    folder: Path, model: Any, *callbacks: Any, loader: Any = None, ckpt_path: Any = None, **options: Any
) -> Trainer:
    options.setdefault("epochs", 4)
    run = trainer(folder, *callbacks, **options)
    refit(run, model, ckpt_path=ckpt_path, data=data() if loader is None else loader, validate=False)
    return run


def content(run: Trainer, model: Any, callback: GradualUnfreezing) -> dict[str, Any]:
    return {
        "weights": weights(model),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
        "state": callback.state_dict(),
    }


@pytest.mark.parametrize("only_trainable", [False, True])
@pytest.mark.parametrize(("e_f", "e_u"), [(1, 1), (0, 1), (0.5, 0.75), (2, 0.25), (1.1, 0.3)])
def test_layers_train_from_their_moment_on(e_f: float, e_u: float, only_trainable: bool, tmp_path: Path) -> None:
    """The i-th layer from the end from e_f + i·e_u, with its norm, and none before."""
    model, log = make(Net, only_trainable), Log()
    fit(tmp_path, model, GradualUnfreezing(e_f, e_u), log, epochs=5)
    assert len(log.moved) == 5 * BATCHES
    for batch, moved in enumerate(log.moved):
        expected = [name for i, name in enumerate(reversed(CONVS), 1) if batch >= (e_f + i * e_u) * BATCHES - 1e-4]
        assert moved == (*reversed(expected), "head"), batch
        if batch:
            assert log.norms[batch] == tuple(reversed(expected)), batch


def test_the_first_convolution_never_trains_as_printed(tmp_path: Path) -> None:
    model, log = make(Net), Log()
    before = weights(model)
    fit(tmp_path, model, GradualUnfreezing(1, 1), log, epochs=4)
    assert "first" not in {name for moved in log.moved for name in moved}
    for name in ("first.weight", "first_norm.weight", "first_norm.running_mean", "first_norm.num_batches_tracked"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert not torch.equal(model.state_dict()["second.weight"], before["second.weight"])


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_nothing_is_frozen_after_the_fit(tmp_path: Path) -> None:
    model = make(Net)
    model.third.bias.requires_grad_(False)
    model.head.eval()
    fit(tmp_path, model, GradualUnfreezing(1, 1))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["third.bias"]
    assert [name for name, m in model.named_modules() if not m.training] == ["head"]


def test_the_users_own_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model = make(Net, only_trainable=True)
    model.third.weight.requires_grad_(False)
    before = weights(model)
    run = fit(tmp_path, model, GradualUnfreezing(0, 0.5))
    assert torch.equal(model.third.weight, before["third.weight"])
    assert not torch.equal(model.third.bias, before["third.bias"])
    assert all(p is not model.third.weight for group in run.optimizers[0].param_groups for p in group["params"])


def test_norms_can_train_from_the_beginning(tmp_path: Path) -> None:
    model = make(Net, only_trainable=True)
    before = weights(model)
    run = fit(tmp_path, model, GradualUnfreezing(4, 1e-9, train_bn=True))
    now = model.state_dict()
    for name in CONVS:
        assert torch.equal(now[f"{name}.weight"], before[f"{name}.weight"])
        assert not torch.equal(now[f"{name}_norm.weight"], before[f"{name}_norm.weight"])
        assert now[f"{name}_norm.num_batches_tracked"] == 4 * BATCHES
    assert len(run.optimizers[0].param_groups) == 1


def test_stale_gradients_move_nothing(tmp_path: Path) -> None:
    model = make(Net)
    model.training_step(next(iter(data())), 0).backward()
    log = Log()
    fit(tmp_path, model, GradualUnfreezing(1, 1), log)
    assert log.moved[0] == ("head",)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_layer_gets_a_group_with_the_first_ones_options(schedule: str, optimizer: str, tmp_path: Path) -> None:
    """Once, in the order of unfreezing; schedulers treat it as they treat the first."""
    model, log = make(Net, only_trainable=True, optimizer=optimizer, schedule=schedule), Log()
    run = fit(tmp_path, model, GradualUnfreezing(1, 0.5), log, epochs=5)
    groups = run.optimizers[0].param_groups
    layers = [(model.head,), *((model.get_submodule(n), model.get_submodule(f"{n}_norm")) for n in reversed(CONVS))]
    assert len(groups) == len(layers) == 4
    for group, modules in zip(groups, layers, strict=True):
        assert list(map(id, group["params"])) == [id(p) for module in modules for p in module.parameters()]
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in groups[0].items() if k != "params"
        }
    assert all(len(set(rates)) == 1 for rates in log.learning_rates)
    assert len({rates[0] for rates in log.learning_rates}) > 3


def test_two_norms_with_equal_values_are_two(tmp_path: Path) -> None:
    """All of their weights are ones when they are unfrozen."""
    model = make(Net, only_trainable=True)
    run = fit(tmp_path, model, GradualUnfreezing(1, 0.5))
    given = [id(p) for group in run.optimizers[0].param_groups for p in group["params"]]
    assert sorted(given) == sorted(map(id, model.parameters()))


RUNS: dict[str, dict[str, Any]] = {
    "all given": {},
    "only trainable": {"only_trainable": True},
    "adamw": {"only_trainable": True, "optimizer": "adamw", "schedule": "cosine"},
    "one cycle": {"only_trainable": True, "schedule": "one cycle"},
    "two optimizers": {"kind": "Halves"},
    "accumulated": {"only_trainable": True, "run": {"accumulate_grad_batches": 2, "epochs": 8}},
    "clipped in bf16": {"only_trainable": True, "run": {"gradient_clip_val": 0.05, "precision": "bf16-mixed"}},
    "stopped by steps": {"optimizer": "adamw", "schedule": "cosine", "run": {"epochs": 9, "max_steps": 16}},
}


class Halves(Net):
    """The backbone has an optimizer of its own; both are stepped by hand."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        head = list(self.head.parameters())
        rest = [p for p in self.parameters() if all(p is not one for one in head)]
        return [torch.optim.SGD(rest, 0.05, momentum=0.9), torch.optim.Adam(head, 0.01)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        for one in optimizers:
            one.zero_grad()
        self.manual_backward(loss)
        for one in optimizers:
            one.step()


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize("kind", RUNS)
def test_resuming_equals_never_having_stopped(kind: str, tmp_path: Path) -> None:
    """Bit by bit, from every step, in the middle of an epoch as well as at its end."""
    settings = {**RUNS[kind]}
    options, net = settings.pop("run", {}), {"Halves": Halves}.get(settings.pop("kind", ""), Net)

    def callback() -> GradualUnfreezing:
        return GradualUnfreezing(0.75, 0.75)

    saver = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    ends = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    model, unfreezing = make(net, **settings), callback()
    expected = content(fit(tmp_path, model, unfreezing, saver, ends, **options), model, unfreezing)
    assert expected["state"]["unfrozen"] == ["third", "second", "first"]
    each = 2 if net is Halves else 1  # both optimizers' steps count
    files = [tmp_path / "steps" / f"step={each * step}.ckpt" for step in (1, 3, 6, 7, 12, 13)]
    if "max_steps" not in options:  # with them Lightning's own run is another one after an epoch's end
        files += [tmp_path / "ends" / f"epoch={epoch}.ckpt" for epoch in (0, 2)]
    for file in files:
        model, unfreezing = make(net, **settings), callback()
        found = content(fit(tmp_path, model, unfreezing, ckpt_path=file, **options), model, unfreezing)
        assert [part for part in expected if not equal(found[part], expected[part])] == [], file.name


def test_a_resume_with_another_pace(tmp_path: Path) -> None:
    """What is unfrozen stays so; the next layer is due by the new numbers, counted from the beginning of the run."""
    saver = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, make(Net, only_trainable=True), GradualUnfreezing(0.5, 0.5), saver)
    for e_u, numbers in ((1.25, [2] * 7 + [3] * 5 + [4] * 8), (0.25, [4] * 15)):
        log, unfreezing = Log(), GradualUnfreezing(0.5, e_u)
        model = make(Net, only_trainable=True)
        epochs = (5 + len(numbers)) // BATCHES
        run = fit(tmp_path, model, unfreezing, log, epochs=epochs, ckpt_path=tmp_path / "steps" / "step=5.ckpt")
        assert [len(moved) for moved in log.moved] == numbers[: len(log.moved)]
        assert len(log.moved) == epochs * BATCHES - 5
        assert len(run.optimizers[0].param_groups) == 4


def test_a_resume_with_another_kind_of_optimizer(tmp_path: Path) -> None:
    run = fit(tmp_path, make(Net, only_trainable=True), GradualUnfreezing(0.5, 0.5))
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"as in the run that saved the checkpoint, got .* from the beginning"):
        fit(tmp_path, make(Net), GradualUnfreezing(0.5, 0.5), epochs=6, ckpt_path=tmp_path / "last.ckpt")


def test_a_checkpoint_saved_after_the_fit_goes_on(tmp_path: Path) -> None:
    model, unfreezing = make(Net, only_trainable=True), GradualUnfreezing(1, 0.5)
    whole = content(fit(tmp_path, model, unfreezing, epochs=6), model, unfreezing)
    model, unfreezing = make(Net, only_trainable=True), GradualUnfreezing(1, 0.5)
    run = fit(tmp_path, model, unfreezing, epochs=3)
    run.validate(model, data(), verbose=False)
    run.save_checkpoint(tmp_path / "after.ckpt")
    model, unfreezing = make(Net, only_trainable=True), GradualUnfreezing(1, 0.5)
    found = content(fit(tmp_path, model, unfreezing, epochs=6, ckpt_path=tmp_path / "after.ckpt"), model, unfreezing)
    assert equal(found, whole)


def test_the_same_trainer_goes_on(tmp_path: Path) -> None:
    model, unfreezing, log = make(Net), GradualUnfreezing(1, 0.5), Log()
    run = fit(tmp_path, model, unfreezing, log, epochs=3)
    run.fit_loop.max_epochs = 5
    refit(run, model, data=data(), validate=False)
    assert log.moved[-1] == (*CONVS, "head")
    assert unfreezing.frozen == ()


def test_an_exception_leaves_nothing_frozen(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    class Stop(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise StopError

    model = make(Net)
    with pytest.raises(StopError):
        fit(tmp_path, model, GradualUnfreezing(1, 1), Stop())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_accumulated_gradients_belong_to_one_set_of_layers(tmp_path: Path) -> None:
    model, log = make(Net), Log()
    fit(tmp_path, model, GradualUnfreezing(0.25, 0.25), log, accumulate_grad_batches=2)
    moved = [names for names in log.moved if names]
    assert [len(names) for names in moved[:4]] == [1, 2, 4, 4]  # layers due at the batches 2, 3 and 4


def test_weight_averages_follow(tmp_path: Path) -> None:
    """What is frozen is its own average, bit by bit; the rest is averaged from its first step on."""
    model, average = make(Net), EMAWeightAveraging(decay=0.5)
    before = weights(model)
    fit(tmp_path, model, GradualUnfreezing(1, 1), average)
    now = weights(model)  # Lightning leaves the averaged weights
    assert torch.equal(now["first.weight"], before["first.weight"])
    assert torch.equal(now["first_norm.running_var"], before["first_norm.running_var"])
    assert not torch.equal(now["second.weight"], before["second.weight"])


def test_loggers_hear_of_each_layer(tmp_path: Path) -> None:
    curves, model = Curves(), make(Net)
    fit(tmp_path, model, GradualUnfreezing(1, 1), logger=curves, epochs=5)
    assert curves.of("unfreezing/layers") == [1, 2, 3]
    assert curves.of("unfreezing/params")[-1] == sum(p.numel() for p in model.parameters())


def test_compiled_networks_train_what_is_unfrozen(tmp_path: Path) -> None:
    """More layers than PyTorch compiles the same code for."""
    model, log = make(Net), Log()
    fit(tmp_path, torch.compile(model, backend="eager"), GradualUnfreezing(1, 1), log, epochs=5)
    assert [len(moved) for moved in log.moved[1:]] == [1] * 7 + [2] * 4 + [3] * 4 + [4] * 4


def test_a_rehearsal_only_freezes(tmp_path: Path) -> None:
    model, log = make(Net, only_trainable=True), Log()
    fit(tmp_path, model, GradualUnfreezing(1, 1), log, fast_dev_run=True)
    assert log.moved == [("head",)]


def test_other_stages_change_nothing(tmp_path: Path) -> None:
    model, unfreezing = make(Net), GradualUnfreezing(1, 1)
    trainer(tmp_path, unfreezing).validate(model, data(), verbose=False)
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert unfreezing.frozen == ()


def test_the_learning_rates_of_all_groups_are_logged(tmp_path: Path) -> None:
    curves, model = Curves(), make(Net, only_trainable=True, schedule="cosine")
    monitor = LearningRateMonitor("step")
    fit(tmp_path, model, GradualUnfreezing(1, 0.5), monitor, logger=curves, epochs=4, log_every_n_steps=1)
    rates = [row for _, row in curves.rows if "lr-SGD/pg1" in row]
    assert len({key for row in rates for key in row if key.startswith("lr-SGD/pg")}) == 4
    assert all(len({round(value, 12) for key, value in row.items() if key.startswith("lr-")}) == 1 for row in rates)


# -- with pruning -----------------------------------------------------------------------------------------------------


def pruning(**options: Any) -> StructuredPruning:
    return StructuredPruning(0.5, schedule=OneShot(at=0), layers=list(CONVS), **options)


@pytest.mark.parametrize("first", [True, False])
def test_pruning_acts_before_the_freeze_wherever_it_stands(first: bool, tmp_path: Path) -> None:
    model, log, unfreezing = make(Net, only_trainable=True), Log(), GradualUnfreezing(1, 1)
    callbacks = [pruning(), unfreezing] if first else [unfreezing, pruning()]
    run = fit(tmp_path, model, *callbacks, log, epochs=5)
    assert [getattr(model, name).out_channels for name in CONVS] == [2, 3, 3]
    assert [len(moved) for moved in log.moved[1:]] == [1] * 7 + [2] * 4 + [3] * 4 + [4] * 4
    assert [type(one).__name__ for one in run.callbacks[:2]] == ["StructuredPruning", "GradualUnfreezing"]


def test_resuming_after_a_cut(tmp_path: Path) -> None:
    def run(ckpt_path: Any = None, *others: Any) -> dict[str, Any]:
        model, unfreezing = make(Net, only_trainable=True), GradualUnfreezing(0.75, 0.75)
        done = fit(tmp_path, model, pruning(), unfreezing, *others, ckpt_path=ckpt_path)
        assert model.second.out_channels == 3
        return content(done, model, unfreezing)

    saver = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    expected = run(None, saver)
    for step in (2, 7, 10):
        assert equal(run(tmp_path / "steps" / f"step={step}.ckpt"), expected), step


def test_a_short_run_is_refused_before_anything_is_scored(tmp_path: Path) -> None:
    """Scoring may take an hour."""

    class Asked(L1):
        def score(self, *_: Any) -> Any:
            pytest.fail("scored")

    with pytest.raises(ValueError, match="at least 4 epochs"):
        fit(tmp_path, make(Net), pruning(criterion=Asked()), GradualUnfreezing(1, 1), epochs=3)


@pytest.mark.parametrize("only_trainable", [False, True])
def test_masks_are_laid_before_the_freeze_and_kept(only_trainable: bool, tmp_path: Path) -> None:
    """Also of layers that are frozen at that time, and after they are unfrozen; a resume is the same run."""

    def run(ckpt_path: Any = None, *others: Any) -> tuple[dict[str, Any], Any, Log]:
        model, unfreezing, log = make(Net, only_trainable=only_trainable), GradualUnfreezing(1, 1), Log()
        masks = MagnitudePruning(0.5, schedule=OneShot(at=0), scope="local", layers=CONVS)
        done = fit(tmp_path, model, unfreezing, masks, log, *others, epochs=5, ckpt_path=ckpt_path)
        return content(done, model, unfreezing), model, log

    saver = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    expected, model, log = run(None, saver)
    for name in CONVS:
        zeros = float((model.get_submodule(name).weight == 0).float().mean())
        assert zeros == pytest.approx(0.5, abs=0.02), name
    assert [len(moved) for moved in log.moved[1:]] == [1] * 7 + [2] * 4 + [3] * 4 + [4] * 4
    for step in (2, 10):
        found, *_ = run(tmp_path / "steps" / f"step={step}.ckpt")
        assert [part for part in expected if not equal(found[part], expected[part])] == [], step


class Branched(Net):
    """Its second and third convolution are a branch that a cut can take out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.third, self.third_norm = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first_norm(self.first(x)))
        x = x + self.third_norm(self.third(F.relu(self.second_norm(self.second(x)))))
        return self.head(x.mean((2, 3)))


def test_layers_that_a_cut_removed_are_not_waited_for(tmp_path: Path) -> None:
    """Two of three leave at the first batch, so that a run of two epochs is long enough."""
    model, unfreezing, log = make(Branched, only_trainable=True), GradualUnfreezing(1, 0.5), Log()
    cut = StructuredPruning({"second": 1.0, "first": 0.5}, schedule=OneShot(at=0), scope=Scope(min_width=0))
    run = fit(tmp_path, model, unfreezing, cut, log, epochs=2)
    assert not isinstance(model.third, nn.Conv2d)
    assert unfreezing.state_dict()["unfrozen"] == ["first"]
    assert [len(moved) for moved in log.moved[1:]] == [1] * 5 + [2] * 2
    assert len(run.optimizers[0].param_groups) == 2


class Ending(StructuredPruning):
    """Cuts, and then ends the network after its first layer, with a new head."""

    removes_layers = True

    def _change(self, change: Any, trainer: Any, module: Any, decision: Any) -> Any:
        structure = super()._change(change, trainer, module, decision)
        boundary = find_boundaries(TracedModel.of(module, torch.randn(2, 1, 6, 6)))[0]
        return change.replace(truncated(module, boundary), self._retrace(trainer), structure, new_dense=True)


@pytest.mark.parametrize("only_trainable", [False, True])
def test_a_new_head_trains_and_a_lost_tail_is_not_waited_for(only_trainable: bool, tmp_path: Path) -> None:
    """Two epochs are long enough for the one layer that is left; averages and a resume have the new head."""

    def run(ckpt_path: Any = None, *others: Any) -> tuple[dict[str, Any], Any, Log]:
        model, unfreezing, log = make(Net, only_trainable=only_trainable), GradualUnfreezing(1, 0.5), Log()
        average = EMAWeightAveraging(decay=0.5)
        callbacks = [unfreezing, Ending(0.5, schedule=OneShot(at=0)), average, log, *others]
        done = fit(tmp_path, model, *callbacks, ckpt_path=ckpt_path, epochs=2)
        return content(done, model, unfreezing), model, log

    saver = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    expected, model, log = run(None, saver)
    assert [type(layer) for layer in (model.second, model.third)] == [nn.Identity, nn.Identity]
    assert model.head.in_features == model.first.out_channels == 2
    assert expected["state"]["unfrozen"] == ["first"]
    assert log.moved[1:] == [("head",)] * 5 + [("first", "head")] * 2
    assert len(expected["optimizers"][0]["param_groups"]) == 1 + only_trainable
    for step in (1, 3, 5, 7):
        found, *_ = run(tmp_path / "steps" / f"step={step}.ckpt")
        assert [part for part in expected if not equal(found[part], expected[part])] == [], step


def test_xgb_pruning_in_width_and_depth(tmp_path: Path) -> None:
    """Algorithm 2 as a whole: scored and cut before the first batch, then unfrozen; a resume is the same run."""

    def run(ckpt_path: Any = None, *others: Any) -> tuple[dict[str, Any], Any]:
        model, unfreezing = make(Net, only_trainable=True), GradualUnfreezing(1, 0.5)
        # Any depth is good enough: the network ends after its first layer.
        trees = XGBPruning(gain=0.9, depth=1.0, surrogate=XGBoost(rounds=3, threads=1, early_stopping=None))
        callbacks = [unfreezing, trees, *others]
        done = fit(tmp_path, model, *callbacks, ckpt_path=ckpt_path, epochs=2, loader=data(samples=80, size=20))
        return content(done, model, unfreezing), model

    saver = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    expected, model = run(None, saver)
    assert isinstance(model.third, nn.Identity)
    assert expected["state"]["unfrozen"][0] == next(n for n in reversed(CONVS) if not _is_gone(model, n))
    for step in (1, 3, 5, 7):
        found, _ = run(tmp_path / "steps" / f"step={step}.ckpt")
        assert [part for part in expected if not equal(found[part], expected[part])] == [], step


def _is_gone(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Identity)


# -- several processes ------------------------------------------------------------------------------------------------


def shared(folder: Path, only_trainable: bool, ckpt_path: Any = None) -> dict[str, Any]:
    """A run of this process's share; norms in eval mode, so that two processes are as one."""
    import os

    rank, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get(ranks.PROCESSES, "1"))
    model = make(Net, only_trainable=only_trainable).double()
    for name in CONVS:
        model.get_submodule(f"{name}_norm").eval()
    x, y = data().dataset[:]
    loader = Loader(
        torch.utils.data.Subset(TensorDataset(x.double(), y), range(rank, 32, processes)), batch_size=8 // processes
    )
    unfreezing = GradualUnfreezing(0.75, 0.75)
    options: dict[str, Any] = {"devices": processes, "strategy": DDPStrategy()} if processes > 1 else {}
    saver = ModelCheckpoint(folder / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = fit(
        folder, model, unfreezing, saver, loader=loader, ckpt_path=ckpt_path, use_distributed_sampler=False, **options
    )
    return content(run, model, unfreezing)


def whole_and_resumed(folder: Path) -> dict[bool, Any]:
    """With either kind of optimizer, a run and what resumes it from the middle of an epoch."""
    found = {}
    for only_trainable in (False, True):
        home = folder / str(only_trainable)
        whole = shared(home, only_trainable)
        found[only_trainable] = whole, shared(home / "again", only_trainable, home / "steps" / "step=7.ckpt")
    return found


@pytest.mark.ddp
def test_two_processes_are_as_one(tmp_path: Path) -> None:
    """Nothing needs `find_unused_parameters`."""
    one = ranks.run(whole_and_resumed, tmp_path / "1")
    two = ranks.run(whole_and_resumed, tmp_path / "2", processes=2)
    for only_trainable, (expected, _) in one.items():
        found, again = two[only_trainable]
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-9, atol=1e-11)
        assert found["state"] == expected["state"]
        assert equal(again["weights"], found["weights"])
        assert equal(again["optimizers"], found["optimizers"])


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [(-1, 1), (math.nan, 1), (1, 0), (1, -1), (1, math.inf)])
def test_numbers_out_of_range(numbers: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"expected `e_[fu]` to be a number of epochs"):
        GradualUnfreezing(*numbers)


class Training(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_before_backward(self, *_: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize(
    ("model", "callback", "options", "message"),
    [
        (Net, GradualUnfreezing(1, 1), {"epochs": 3}, r"at least 4 epochs.*3 convolutional layers\), got max_epochs=3"),
        (Net, GradualUnfreezing(1, 0.5), {"epochs": -1, "max_steps": 9}, "at least 2.5 epochs.*got max_steps=9"),
        (Net, GradualUnfreezing(1, 1, head="*"), {}, "expected convolutions to unfreeze"),
        (
            Net,
            GradualUnfreezing(1, 1, head="nothing"),
            {},
            "expected names of modules as `head`, got 'nothing'. The outermost",
        ),
        (
            Net,
            GradualUnfreezing(1.5, 1),
            {"loader": "stream", "epochs": 5},
            "expected whole epochs with data of unknown length",
        ),
    ],
)
def test_refused_before_training(
    model: Any, callback: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(data().dataset)

    counter = Training()
    if options.get("loader") == "stream":
        options["loader"] = DataLoader(Stream(), batch_size=8)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make(model), callback, counter, **options)
    assert counter.steps == 0


def test_whole_epochs_of_unknown_length(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            x, y = data().dataset[:]
            return iter(zip(x, y, strict=True))

    log = Log()
    fit(tmp_path, make(Net), GradualUnfreezing(1, 1), log, loader=DataLoader(Stream(), batch_size=8))
    assert [len(moved) for moved in log.moved] == [1] * 8 + [2] * 4 + [3] * 4


def test_several_optimizers_without_the_backbone(tmp_path: Path) -> None:
    class Two(Net):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], 0.1) for p in self.head.parameters()]

    with pytest.raises(ValueError, match=r"expected one optimizer .*got 2 optimizers without"):
        fit(tmp_path, make(Two), GradualUnfreezing(1, 1))


def test_a_damaged_state(tmp_path: Path) -> None:
    model = make(Net)
    run = fit(tmp_path, model, GradualUnfreezing(1, 1))
    run.save_checkpoint(tmp_path / "good.ckpt")
    checkpoint = torch.load(tmp_path / "good.ckpt", weights_only=True)
    for change in ({"unfrozen": 3}, {"groups": ["x"]}, {"format": 9}):
        checkpoint["callbacks"]["GradualUnfreezing"] = {"format": 1, "unfrozen": [], "groups": [], **change}
        torch.save(checkpoint, tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match="GradualUnfreezing state"):
            fit(tmp_path, make(Net), GradualUnfreezing(1, 1), ckpt_path=tmp_path / "bad.ckpt")


def test_a_state_of_another_network(tmp_path: Path) -> None:
    run = fit(tmp_path, make(Net), GradualUnfreezing(1, 1))
    run.save_checkpoint(tmp_path / "good.ckpt")
    checkpoint = torch.load(tmp_path / "good.ckpt", weights_only=True)
    checkpoint["callbacks"]["GradualUnfreezing"] = {"format": 1, "unfrozen": ["third", "layer4.conv"], "groups": []}
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(
        ValueError, match=r"expected the convolutions of Net in the checkpoint, got layer4\.conv, which"
    ):
        fit(tmp_path, make(Net), GradualUnfreezing(1, 1), ckpt_path=tmp_path / "bad.ckpt", epochs=9)


# -- the backbone -----------------------------------------------------------------------------------------------------


def test_a_classifier_of_convolutions_is_named() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1)
    )
    found = Backbone.of(network, head="3")
    assert [layer.name for layer in found.layers] == ["0"]
    assert list(found.layers[0].parameters) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(found.head_parameters) == ["3.weight", "3.bias"]
    assert not Backbone.of(network).head_parameters


def test_norms_behind_the_classifier_are_the_classifiers() -> None:
    network = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4)
    )
    found = Backbone.of(network)
    assert [list(layer.modules) for layer in found.layers] == [["0", "1", "2"]]
    assert list(found.head) == ["4", "5"]
