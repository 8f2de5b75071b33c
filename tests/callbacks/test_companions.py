"""Every line of `docs/companions.md`: what works does, what is refused says so in the words of the page."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_prune import (
    L1,
    L2,
    NM,
    ContributionPruning,
    Fisher,
    HybridPruning,
    LinearSchedule,
    MagnitudePruning,
    OneShot,
    Rollback,
    SaveEachSize,
    Scope,
    StructuredPruning,
    load_from_checkpoint,
)
from lightning_prune.callbacks.lightning.averages import averages
from tests.callbacks.networks import Curves, Net, Stream, equal, fit, make, samples, weights, widths
from tests.callbacks.test_ddp import SETTINGS
from tests.callbacks.test_other_package import other_fit
from tests.callbacks.test_runs import Gan

PAGE = Path(__file__).parents[2] / "docs" / "companions.md"
LINES = {
    cells[0]: (cells[1], cells[2])
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| With ")
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}
CASES: dict[str, Callable[[Path], None]] = {}


def companion(line: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def add(case: Callable[[Path], None]) -> Callable[[Path], None]:
        assert line not in CASES
        CASES[line] = case
        return case

    return add


def test_every_line_has_its_test() -> None:
    assert CASES.keys() == LINES.keys()
    assert {outcome for outcome, _ in LINES.values()} == {"works", "refused"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's compiler asks every input for it
@pytest.mark.filterwarnings("ignore:SWA is currently")
@pytest.mark.parametrize("line", LINES)
def test_line(line: str, tmp_path: Path) -> None:
    outcome, note = LINES[line]
    if outcome == "works":
        CASES[line](tmp_path)
        return
    with pytest.raises((TypeError, ValueError), match=re.escape(note)):
        CASES[line](tmp_path)


def pruning(**options: Any) -> StructuredPruning:
    return StructuredPruning(0.5, **({"criterion": L1(), "schedule": OneShot(at=1)} | options))


def runs(folder: Path, *callbacks: Callback, model: Any = None, **options: Any) -> tuple[Any, Trainer]:
    """Train three epochs, with a cut to half after the first."""
    model = make() if model is None else model
    run = fit(folder, model, pruning(), *callbacks, **({"epochs": 3} | options))
    assert widths(model) == (6, 4)
    return model, run


# -- callbacks ---------------------------------------------------------------------------------------------------------


def averaging(callback: Callback) -> Callable[[Path], None]:
    def case(folder: Path) -> None:
        _, run = runs(folder, callback)
        (copy,) = averages(run)
        assert widths(copy) == (6, 4)

    return case


companion("`EMAWeightAveraging`")(averaging(EMAWeightAveraging(decay=0.8)))
companion("`WeightAveraging`")(averaging(WeightAveraging()))
companion("`StochasticWeightAveraging`")(averaging(StochasticWeightAveraging(0.01, 2)))


@companion("`AveragedModel` in the module")
def inside(folder: Path) -> None:
    model = make()
    model.average = torch.optim.swa_utils.AveragedModel(model.second)
    runs(folder, model=model)


class OwnAverage(Net):
    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.second).requires_grad_(False)

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        for mine, other in zip(self.average.parameters(), self.second.parameters(), strict=True):
            mine.lerp_(other, 0.1)


@companion("an averaged copy that the module's own code keeps")
def own_average(folder: Path) -> None:
    runs(folder, model=make(OwnAverage))


@companion("`ModelPruning`")
def lightnings_masks(folder: Path) -> None:
    runs(folder, ModelPruning("l1_unstructured", amount=0.5))


class WithBackbone(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(self.first, self.norm)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


@companion("`BackboneFinetuning`")
def finetuning(folder: Path) -> None:
    model, run = runs(folder, BackboneFinetuning(2, train_bn=False), model=make(WithBackbone))
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert id(model.first.weight) in optimized
    assert run.optimizers[0].state[model.first.weight]["momentum_buffer"].shape == (6, 6)


@companion("`LearningRateMonitor`")
def learning_rates(folder: Path) -> None:
    monitor = LearningRateMonitor()
    runs(folder, monitor, logger=CSVLogger(folder), log_every_n_steps=1)
    assert monitor.lrs["lr-SGD"][-1] == 0.05


@companion("`GradientAccumulationScheduler`")
def accumulation(folder: Path) -> None:
    _, run = runs(folder, GradientAccumulationScheduler({0: 1, 2: 2}))
    assert run.global_step == 4 + 4 + 2


class Told(Net):
    """Its metric is what it is told."""

    values: tuple[float, ...] = ()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.values[self.current_epoch])


def stopping(folder: Path, values: tuple[float, ...], expected: int, **options: Any) -> None:
    model = make(Told)
    model.values = values
    stopper = EarlyStopping("val_loss", **({"patience": 1} | options))
    run = fit(folder, model, pruning(schedule=LinearSchedule(start=2, end=4, cuts=2)), stopper, epochs=8)
    assert run.current_epoch == expected
    assert stopper.stopping_threshold == options.get("stopping_threshold")


@companion("`EarlyStopping`")
def early(folder: Path) -> None:
    # The last cut is made before epoch 4, the first value at the final size is its end's: no better at the next.
    stopping(folder, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0), 6)


@companion("`EarlyStopping(stopping_threshold=...)`")
def good_enough(folder: Path) -> None:
    stopping(folder, (0.1, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1), 6, stopping_threshold=0.5, patience=5)


@companion("`EarlyStopping(divergence_threshold=...)`")
def too_bad(folder: Path) -> None:
    with pytest.warns(UserWarning, match="ended before the last of its cuts"):
        stopping(folder, (1.0, 9.0, 1.0), 2, divergence_threshold=5.0)


def saved(file: str | Path, width: int = 6) -> None:
    assert load_from_checkpoint(Net, file).first.out_features == width


@companion("`ModelCheckpoint(monitor=...)`")
def best(folder: Path) -> None:
    saver = ModelCheckpoint(folder / "best", monitor="val_loss", filename="{epoch}")
    runs(folder, saver)
    saved(saver.best_model_path)  # of the narrow network, however good the wide one was


@companion("`ModelCheckpoint(every_n_train_steps=...)`")
def by_steps(folder: Path) -> None:
    runs(folder, ModelCheckpoint(folder / "steps", filename="{step}", every_n_train_steps=2, save_top_k=-1))
    saved(folder / "steps" / "step=4.ckpt", 12)
    saved(folder / "steps" / "step=6.ckpt")


@companion("`ModelCheckpoint(train_time_interval=...)`")
def by_time(folder: Path) -> None:
    interval = timedelta(microseconds=1)
    runs(folder, ModelCheckpoint(folder / "time", filename="{step}", train_time_interval=interval, save_top_k=-1))
    saved(folder / "time" / "step=12.ckpt")


@companion("`ModelCheckpoint(save_last=True)`")
def last(folder: Path) -> None:
    runs(folder, ModelCheckpoint(folder / "last", save_last=True))
    saved(folder / "last" / "last.ckpt")


@companion("`ModelCheckpoint(save_weights_only=True)`")
def weights_only(folder: Path) -> None:
    runs(folder, ModelCheckpoint(folder / "weights", filename="w", save_weights_only=True))
    saved(folder / "weights" / "w.ckpt")


@companion("`OnExceptionCheckpoint`")
def on_exception(folder: Path) -> None:
    class Fails(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 6:
                raise ArithmeticError

    with pytest.raises(ArithmeticError):
        runs(folder, OnExceptionCheckpoint(folder), model=make(Fails))
    saved(folder / "on_exception.ckpt")


class Tuned(Net):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size, self.lr = 2, 0.05

    def train_dataloader(self) -> Any:
        return DataLoader(samples(), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(samples(2), batch_size=8)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def tuned(folder: Path, finder: Callback) -> Any:
    model = make(Tuned)
    Trainer(
        max_epochs=3, callbacks=[pruning(), finder], default_root_dir=folder, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    ).fit(model)  # fmt: skip
    assert widths(model) == (6, 4)
    return model


@companion("`BatchSizeFinder`")
def batch_size(folder: Path) -> None:
    assert tuned(folder, BatchSizeFinder(max_trials=2, steps_per_trial=1)).batch_size > 2


@companion("`LearningRateFinder`")
def learning_rate(folder: Path) -> None:
    assert tuned(folder, LearningRateFinder(num_training_steps=30, update_attr=True)).lr != 0.05


@companion("`RichProgressBar`")
def rich_bar(folder: Path) -> None:
    runs(folder, RichProgressBar(), enable_progress_bar=True)


def together(*callbacks: Callback) -> Callable[[Path], None]:
    """What works is tested thoroughly in `test_two_callbacks`."""

    def case(folder: Path) -> None:
        model = make()
        fit(folder, model, *callbacks, epochs=3)
        assert widths(model) == (6, 4)

    return case


companion("`MagnitudePruning` or `HybridPruning` beside a callback that cuts")(
    together(pruning(), MagnitudePruning(schedule=OneShot(at=1)))
)
companion("two callbacks that cut, each with its own `layers`")(
    together(pruning(layers="first"), pruning(layers="second"))
)
companion("two callbacks that cut, one without `layers`")(together(pruning(layers="first"), ContributionPruning(0.5)))
companion("two callbacks that cut the same layer")(together(pruning(layers="first"), pruning(layers=["first"])))
companion("two callbacks with masks")(together(MagnitudePruning(), HybridPruning()))
companion("`NM` beside a callback that cuts")(together(pruning(), MagnitudePruning(granularity=NM(2, 4))))
companion("`Rollback` beside a second pruning callback")(together(pruning(extensions=[Rollback()]), MagnitudePruning()))
companion("`min_width=0` beside a second pruning callback")(
    together(pruning(scope=Scope(min_width=0)), MagnitudePruning())
)
companion("`extensions` in one of two callbacks that cut")(
    together(pruning(layers="first", extensions=[SaveEachSize()]), pruning(layers="second"))
)


@companion("`DeviceStatsMonitor`")
def device(folder: Path) -> None:
    curves = Curves()
    runs(folder, DeviceStatsMonitor(), logger=curves, log_every_n_steps=1)
    assert any("cpu_percent" in name for _, row in curves.rows for name in row)


# -- training ----------------------------------------------------------------------------------------------------------


class Adversaries(Net):
    """The head has an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        body = [p for name, p in self.named_parameters() if not name.startswith("head")]
        return [torch.optim.Adam(body), torch.optim.SGD(self.head.parameters(), 0.05, momentum=0.9)]


@companion("two optimizers, manual optimization")
def manual(folder: Path) -> None:
    model, run = runs(folder, model=make(Adversaries))
    assert run.optimizers[0].state[model.second.weight]["exp_avg"].shape == (4, 6)
    assert run.optimizers[1].state[model.head.weight]["momentum_buffer"].shape == (3, 4)


@companion("a GAN of which only the generator is pruned")
def generator(folder: Path) -> None:
    def train(**options: Any) -> tuple[Any, Trainer]:
        model = make(Gan)
        pruner = pruning(criterion=L2(), layers="generator", schedule=LinearSchedule(start=1, end=2, cuts=2))
        saver = ModelCheckpoint(folder / "ends", filename="{epoch}", save_top_k=-1)
        return model, fit(folder, model, pruner, saver, epochs=4, validate=False, **options)

    model, run = train()
    assert (model.generator[0].out_features, model.critic[0].out_features) == (5, 8)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for optimizer in run.optimizers:
        assert all(state["exp_avg"].shape == parameter.shape for parameter, state in optimizer.state.items())
        assert len(optimizer.state) == 4
    again, _ = train(ckpt_path=folder / "ends" / "epoch=1.ckpt")
    assert equal(weights(again), weights(model))
    dense = fit(folder / "dense", make(Gan), epochs=4, validate=False).lightning_module
    assert not equal(weights(model.critic), weights(dense.critic))  # type: ignore[arg-type]


@companion("`gradient_clip_val`")
def clipping(folder: Path) -> None:
    runs(folder, gradient_clip_val=0.01)


class Frugal(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: F.relu(self.second(F.relu(self.first(x)))), x, use_reentrant=False)
        return self.head(hidden)


@companion("gradient checkpointing")
def frugal(folder: Path) -> None:
    runs(folder, model=make(Frugal))


@companion("`torch.compile`")
def compiled(folder: Path) -> None:
    model = make()
    model.second.compile(backend="eager")
    runs(folder, model=model)


# -- precision and trainer ---------------------------------------------------------------------------------------------


def set_to(**options: Any) -> Callable[[Path], None]:
    def case(folder: Path) -> None:
        runs(folder, **options)

    return case


@companion('`precision="16-mixed"`')
def half(folder: Path) -> None:
    """Further in `test_scaler`; on CPUs Lightning itself takes bf16 in its place."""
    runs(folder, plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")))


for precision in ("bf16-mixed", "bf16-true", "64-true"):
    companion(f'`precision="{precision}"`')(set_to(precision=precision))
companion("`overfit_batches`")(set_to(overfit_batches=2))
companion("sanity check")(set_to(num_sanity_val_steps=1))
companion("`val_check_interval`")(set_to(val_check_interval=2))
companion("`limit_train_batches`")(set_to(limit_train_batches=3))


@companion("`fast_dev_run`")
def rehearsal(folder: Path) -> None:
    model = make()
    fit(folder, model, pruning(), fast_dev_run=True)
    assert widths(model) == (12, 8)


@companion("`max_steps`")
def by_max_steps(folder: Path) -> None:
    model = make()
    fit(folder, model, pruning(schedule=OneShot(at=0.5)), epochs=-1, max_steps=6)
    assert widths(model) == (6, 4)


@companion("iterable data of unknown length")
def stream(folder: Path) -> None:
    runs(folder, data=DataLoader(Stream(), batch_size=8))


@companion("a `Trainer` of `pytorch_lightning`")
def foreign(folder: Path) -> None:
    module, _ = other_fit(folder, pruning())
    assert module.net[0].out_features < 8


# -- strategies --------------------------------------------------------------------------------------------------------


def accepted(proof: str | None = None, **options: Any) -> Callable[[Path], None]:
    """Not refused; the runs are those of `test_ddp` (``proof`` is one of its settings) and `test_spawned`."""

    def case(folder: Path) -> None:
        assert proof is None or proof in SETTINGS
        run = Trainer(accelerator="cpu", devices=2, logger=False, enable_checkpointing=False, **options)
        pruning().setup(run, make(), "fit")

    return case


companion('`strategy="ddp"`')(accepted("plain", strategy="ddp"))
companion('`strategy="ddp_find_unused_parameters_true"`')(
    accepted("unused parameters", strategy="ddp_find_unused_parameters_true")
)
companion("`DDPStrategy(static_graph=True)`")(accepted("static graph", strategy=DDPStrategy(static_graph=True)))
companion("`DDPStrategy(gradient_as_bucket_view=True)`")(
    accepted("bucket views", strategy=DDPStrategy(gradient_as_bucket_view=True))
)
companion("`DDPStrategy(ddp_comm_hook=...)`")(
    accepted(strategy=DDPStrategy(ddp_comm_hook=default_hooks.fp16_compress_hook))
)
companion("`DDPStrategy(ddp_comm_state=...)`")(
    accepted(strategy=DDPStrategy(ddp_comm_hook=powerSGD_hook, ddp_comm_state=PowerSGDState(None)))
)
for name in ("ddp_spawn", "ddp_fork", "ddp_notebook"):
    companion(f'`strategy="{name}"`')(accepted(strategy=name))


def sharded(strategy: type) -> Callable[[Path], None]:
    """Without a GPU, or the package, Lightning refuses these itself."""

    def case(folder: Path) -> None:
        run = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
        run._accelerator_connector.strategy = strategy.__new__(strategy)
        pruning().setup(run, make(), "fit")

    return case


companion("`ModelParallelStrategy` with `fully_shard` (FSDP2)")(accepted(strategy=ModelParallelStrategy(2, 1)))


@companion("`ModelParallelStrategy` with masks, repairs, or criteria of gradients")
def needs_gradients(folder: Path) -> None:
    run = Trainer(accelerator="cpu", devices=2, logger=False, strategy=ModelParallelStrategy(2, 1))
    pruning(criterion=Fisher()).setup(run, make(), "fit")


companion('`strategy="fsdp"`')(sharded(FSDPStrategy))
companion("`DeepSpeedStrategy`")(sharded(DeepSpeedStrategy))
