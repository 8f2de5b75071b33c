"""Mask callbacks: what is masked stays zero, whatever trains, stops, averages, saves or loads."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_prune import (
    NM,
    Channel,
    Element,
    HybridPruning,
    Kernel,
    LinearSchedule,
    MagnitudePruning,
    OneShot,
    callbacks,
    load_from_checkpoint,
)
from lightning_prune.callbacks import masking
from lightning_prune.callbacks.lightning.averages import averages
from lightning_prune.callbacks.masking import MaskPruning
from lightning_prune.models import MLPClassifier
from lightning_prune.planning import NoEffectWarning, granularity
from lightning_prune.surgery import CutError, Transaction, history_of, masks_of, revived
from lightning_prune.surgery.tensors import named
from tests.callbacks.networks import BATCHES, Loader, Net, equal, fit, loader, make, refit, trainer, weights
from tests.callbacks.test_compiled import IN_PLACE, Compiler, a_layer, the_module
from tests.callbacks.test_resume import StopAt, StopError, alike, untimed

EPOCHS = 6
SCHEDULE = LinearSchedule(start=2, end=4, cuts=2)
CALLBACKS = [
    kind
    for kind in vars(callbacks).values()
    if inspect.isclass(kind) and issubclass(kind, MaskPruning) and kind is not MaskPruning
]
GRANULARITIES = [
    kind
    for kind in vars(granularity).values()
    if inspect.isclass(kind) and issubclass(kind, granularity.Granularity) and not inspect.isabstract(kind)
]


class Conv(LightningModule):
    """Two convolutions, the second in two groups, and a head; without batch norm."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer = optimizer
        self.net = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
        )
        self.example_input_array = torch.zeros(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, :1, None, None] + x[:, 1:6].reshape(-1, 5, 1, 1).mean(1, keepdim=True)
        grid = torch.arange(50, dtype=x.dtype).view(1, 2, 5, 5).sin()
        return self.net(image * grid)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def cases() -> list[Any]:
    """Every mask callback with every granularity that it takes, on a network that has something to mask."""
    found = []
    for kind in CALLBACKS:
        for grain in GRANULARITIES:
            options = {"ignore": ["net.0"]} if grain is NM else {}  # its two inputs are not a multiple of four
            try:
                kind(granularity=grain())
            except ValueError:
                continue
            found.append(
                pytest.param(
                    lambda k=kind, g=grain, o=options, **s: k(granularity=g(), **s, **o),
                    id=f"{kind.__name__}-{grain.__name__}",
                )
            )
    return found


def zeros(model: nn.Module) -> dict[str, Tensor]:
    """Where the weights that have a mask are zero."""
    present = dict(model.named_parameters())
    return {name: present[name].detach() == 0 for name in masks_of(model)}


def content(run: Any, model: Any, pruner: MaskPruning) -> dict[str, Any]:
    state = copy.deepcopy(pruner.state_dict())
    report, state["run"] = untimed(state.pop("report")), ""
    report["config"].pop("wandb", None)
    return {
        "weights": weights(model),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "masks": dict(masks_of(model)),
        "state": state,
        "report": report,
    }


def test_every_callback_takes_single_weights() -> None:
    assert {kind.__name__ for kind in CALLBACKS} == {"HybridPruning", "MagnitudePruning"}
    assert len(cases()) == 6  # four granularities of magnitude, elements and kernels within filters


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("pruner", cases())
def test_masks_hold_and_resume(pruner: Any, optimizer: str, tmp_path: Path) -> None:
    """2N = N + checkpoint + N bit by bit; zeros at every step; nothing that an optimizer remembers of them."""

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            assert not revived(module)
            for name, mask in masks_of(module).items():
                state = trainer.optimizers[0].state[dict(module.named_parameters())[name]]
                moments = [value for value in state.values() if value.shape == mask.shape]
                assert moments
                assert all((value[mask] == 0).all() for value in moments)

    every = ModelCheckpoint(tmp_path / "every", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    ends = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    model, mine = make(Conv, optimizer), pruner(schedule=SCHEDULE)
    options = {"epochs": EPOCHS, "validate": False, "data": data()}
    run = fit(tmp_path, model, mine, Look(), every, ends, **options)
    expected = content(run, model, mine)
    assert mine.report.pruning_ratio == pytest.approx(0.5, abs=0.02)
    assert len(mine.report.cuts) == 2
    for file in ("every/step=5", "ends/epoch=1", "every/step=17"):
        other, again = make(Conv, optimizer), pruner(schedule=SCHEDULE)
        nn.init.zeros_(other.net[0].weight)
        resumed = fit(tmp_path / "r", other, again, Look(), ckpt_path=tmp_path / f"{file}.ckpt", **options)
        found = content(resumed, other, again)
        for part in expected:
            assert equal(found[part], expected[part]), (file, part)


def data() -> Loader:
    x = torch.randn(BATCHES * 8, 8, generator=torch.Generator().manual_seed(1))
    return Loader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)


def masked_share(pruner: MaskPruning) -> int:
    """Weights of `Net` that were masked, before dead units left with some of them."""
    return round(pruner.report.pruning_ratio * 192)


@pytest.mark.parametrize("step", [3, 8, 9, 17])
def test_resuming_after_an_exception(step: int, tmp_path: Path) -> None:
    def net() -> Any:
        return make(Net, "adamw", norm=False)

    model, whole = net(), MagnitudePruning(schedule=SCHEDULE)
    expected = content(fit(tmp_path / "whole", model, whole, data=alike()), model, whole)
    model, mine = net(), MagnitudePruning(schedule=SCHEDULE)
    run = trainer(tmp_path, mine, StopAt(step), OnExceptionCheckpoint(tmp_path))
    with pytest.raises(StopError):
        refit(run, model, data=alike())
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in run.optimizers)
    model, mine = net(), MagnitudePruning(schedule=SCHEDULE)
    run = fit(tmp_path / "r", model, mine, data=alike(), ckpt_path=tmp_path / "on_exception.ckpt")
    found = content(run, model, mine)
    for part in expected:
        assert equal(found[part], expected[part]), part


def test_zeros_are_in_every_checkpoint(tmp_path: Path) -> None:
    """Also those of weights only; a plain `load_state_dict` has them, and the masks go on with whoever loads."""
    light = ModelCheckpoint(tmp_path, filename="light", save_weights_only=True, every_n_epochs=EPOCHS)
    whole = ModelCheckpoint(tmp_path, filename="whole")
    model = make(Net, "adamw")
    run = fit(tmp_path, model, HybridPruning(0.5, schedule=SCHEDULE), light, whole)
    for name in ("light", "whole"):
        file = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert (
            sum(int((file["state_dict"][n] == 0).sum()) for n in ("first.weight", "second.weight", "head.weight")) == 96
        )
        assert file["state_dict"].keys() == make(Net).state_dict().keys()  # no parametrization
        loaded = load_from_checkpoint(Net, tmp_path / f"{name}.ckpt")
        assert sum(int(mask.sum()) for mask in masks_of(loaded).values()) == 96
        # Trained on with the callback, for which the sparsity is reached.
        with pytest.warns(NoEffectWarning):
            fit(tmp_path / "more", loaded, HybridPruning(0.5, schedule=OneShot(at=1)), epochs=3)
        assert not revived(loaded)
        assert any(mask.any() for mask in masks_of(loaded).values())
    run.test(model, loader(3), ckpt_path=str(tmp_path / "light.ckpt"), weights_only=True, verbose=False)
    assert not revived(model)


def test_masks_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    fit(tmp_path, make(), MagnitudePruning(schedule=SCHEDULE), ModelCheckpoint(tmp_path, filename="c"))
    file = torch.load(tmp_path / "c.ckpt", weights_only=True)
    masks = file["lightning_prune_masks"]["masks"]
    masks["first.weight"]["shape"] = [6, 12]
    torch.save(file, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=r"mask of shape \[6, 12\] for 'first.weight', which is \[12, 6\] here"):
        load_from_checkpoint(Net, tmp_path / "c.ckpt")
    file["lightning_prune_masks"]["version"] = 99
    torch.save(file, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="newer"):
        load_from_checkpoint(Net, tmp_path / "c.ckpt")


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
def test_other_ways_to_train(options: dict[str, Any], tmp_path: Path) -> None:
    model = make(Net, "adamw")
    mine = MagnitudePruning(0.6, schedule=SCHEDULE)
    fit(tmp_path, model, mine, **options)
    assert not revived(model)
    assert masked_share(mine) == 115


class Manual(Net):
    """Two optimizers with momentum and weight decay, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        assert not revived(self)

    def configure_optimizers(self) -> Any:
        lower = [*self.first.parameters(), *self.norm.parameters()]
        upper = [*self.second.parameters(), *self.head.parameters()]
        return torch.optim.SGD(lower, 0.1, 0.9, weight_decay=0.1), torch.optim.Adagrad(upper, 0.1, weight_decay=0.1)


class Mixing(Manual):
    """Muon makes its step orthogonal: a weight moves whose own gradient and momentum are zero."""

    def configure_optimizers(self) -> Any:
        matrices = [parameter for parameter in self.parameters() if parameter.ndim == 2]
        others = [parameter for parameter in self.parameters() if parameter.ndim != 2]
        return torch.optim.Muon(matrices, 0.02), torch.optim.SGD(others, 0.1)


@pytest.mark.parametrize("kind", [Manual, Mixing])
def test_manual_optimization_with_several_optimizers(kind: type[Manual], tmp_path: Path) -> None:
    model = make(kind)
    mine = MagnitudePruning(0.6, schedule=LinearSchedule(start=2, end=4, cuts=2, unit="epoch"))
    fit(tmp_path, model, mine)
    assert masked_share(mine) == 115
    assert not revived(model)


def test_masked_weights_do_not_clip_the_others(tmp_path: Path) -> None:
    """Their gradients are zero before the clipping by norm."""

    class Norms(Callback):
        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            for name, mask in masks_of(module).items():
                grad = dict(module.named_parameters())[name].grad
                assert grad is None or (grad[mask] == 0).all()

    fit(tmp_path, make(), MagnitudePruning(schedule=SCHEDULE), Norms(), gradient_clip_val=0.01)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averaged_copies_keep_the_zeros(kind: str, tmp_path: Path) -> None:
    average: Any = (
        EMAWeightAveraging(decay=0.9) if kind == "ema" else StochasticWeightAveraging(0.01, swa_epoch_start=1)
    )
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model = make(Net, "adamw")
    mine = MagnitudePruning(0.6, schedule=SCHEDULE)
    fit(tmp_path, model, mine, average, saver)
    assert not revived(model)  # at the end the average is the network
    assert sum(int(mask.sum()) for mask in masks_of(model).values()) == 115
    assert "Dead units stay" in str(mine.report) or kind == "swa"
    file = torch.load(tmp_path / "epoch=4.ckpt", weights_only=True)
    assert sum(int((file["state_dict"][name] == 0).sum()) for name in masks_of(model)) == 115
    resumed = make(Net, "adamw")
    average = type(average)(0.01, swa_epoch_start=1) if kind == "swa" else EMAWeightAveraging(decay=0.9)
    fit(tmp_path / "r", resumed, MagnitudePruning(0.6, schedule=SCHEDULE), average, ckpt_path=tmp_path / "epoch=4.ckpt")
    assert not revived(resumed)
    assert equal(dict(masks_of(resumed)), dict(masks_of(model)))


def test_what_somebody_revives_is_named_and_zero_again(tmp_path: Path) -> None:
    class Vandal(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.current_epoch == 4:
                with torch.no_grad():
                    module.second.weight[masks_of(module)["second.weight"]] = 1

    model = make()
    with pytest.warns(UserWarning, match="zero at the end of epoch 4, got others: .* in second.weight"):
        run = fit(tmp_path, model, MagnitudePruning(schedule=SCHEDULE), Vandal(), EMAWeightAveraging(decay=0.9))
    for network in (model, *averages(run)):
        assert all((named(network)[name][mask] == 0).all() for name, mask in masks_of(model).items())


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_rewinding_goes_back_and_keeps_the_masks(epoch: int, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Watch(Callback):
        """After the pruner: the first batch of an epoch."""

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen[trainer.global_step] = weights(module), dict(masks_of(module)), len(trainer.optimizers[0].state)

    model, mine = make(Net, "adamw"), MagnitudePruning(0.6, schedule=SCHEDULE, rewind=epoch)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = fit(tmp_path, model, mine, Watch(), saver)
    if epoch < 2:
        start = seen[epoch * BATCHES][0]
        for step in (2 * BATCHES, 4 * BATCHES):
            now, masks, states = seen[step]
            assert states == 0  # the optimizer has begun anew
            assert masks
            for name, value in now.items():
                expected = start[name].masked_fill(masks[name], 0) if name in masks else start[name]
                assert torch.equal(value, expected), name
    assert len(mine.report.cuts) == 2
    expected = content(run, model, mine)
    for file in range(EPOCHS - 1):
        other, again = make(Net, "adamw"), MagnitudePruning(0.6, schedule=SCHEDULE, rewind=epoch)
        found = content(fit(tmp_path / "r", other, again, ckpt_path=tmp_path / f"epoch={file}.ckpt"), other, again)
        for part in expected:
            assert equal(found[part], expected[part]), (file, part)
    assert mine.state_dict()["kept"] is None  # the last cut needs it no more


def test_a_rewind_to_weights_that_nobody_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rewind=3\): .* after the first cut, which comes after 2 epoch"):
        fit(tmp_path, make(), MagnitudePruning(schedule=SCHEDULE, rewind=3))
    steps = LinearSchedule(start=9, end=12, cuts=2, unit="step")  # in the third epoch
    with pytest.raises(ValueError, match="after 2 epoch"):
        fit(tmp_path, make(), MagnitudePruning(schedule=steps, rewind=3))
    saver = ModelCheckpoint(tmp_path, filename="without")
    with pytest.warns(UserWarning, match="50 % of the way"):
        fit(tmp_path, make(), MagnitudePruning(schedule=SCHEDULE), saver, epochs=3)
    with pytest.raises(ValueError, match="expected the weights of epoch 1 in the checkpoint"):
        fit(tmp_path, make(), MagnitudePruning(schedule=SCHEDULE, rewind=1), ckpt_path=tmp_path / "without.ckpt")


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 1.5, float("nan"), True, "half"])
def test_sparsities_that_are_none(kind: Any, sparsity: Any) -> None:
    with pytest.raises(ValueError, match=r"`sparsity` in \[0, 1\)"):
        kind(sparsity)


def test_arguments_that_contradict() -> None:
    with pytest.raises(ValueError, match=r"NM\(n=1, m=4\) has a sparsity of 0.75, got sparsity=0.5"):
        MagnitudePruning(0.5, granularity=NM(1, 4))
    with pytest.raises(ValueError, match="within a filter"):
        HybridPruning(granularity=Channel())
    with pytest.raises(ValueError, match="within a filter"):
        HybridPruning(granularity=NM())
    with pytest.raises(ValueError, match="use HybridPruning"):
        MagnitudePruning(scope="filter")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`granularity` to be an instance of Granularity"):
        MagnitudePruning(granularity="element")  # type: ignore[arg-type]
    for rewind in (-1, 0.5, True):
        with pytest.raises(ValueError, match="`rewind` to be the number of epochs"):
            MagnitudePruning(rewind=rewind)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CALLBACKS)
def test_names_that_are_none(kind: Any) -> None:
    for wrong in ({"layers": 5}, {"ignore": [5]}):
        with pytest.raises(TypeError, match="to be a layer's name or glob or a list"):
            kind(**wrong)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__(width=8)
        self.extra = nn.Linear(8, 8)
        self.extra.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.extra(self.second(self.first(x))))


def frozen() -> Any:
    model = make()
    model.second.weight.requires_grad_(False)
    return model


def normed() -> Any:
    model = make()
    nn.utils.parametrizations.weight_norm(model.second)
    return model


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (lambda: make(Tied), {}, "weight is tied: it belongs to extra, second"),
        (frozen, {}, "second: its weight is frozen"),
        (normed, {}, "computed from others"),
        (make, {"granularity": NM(2, 4)}, "first: 6 inputs are not a multiple of 4"),
        (make, {"granularity": Kernel()}, "leave no weight for Kernel"),
        (make, {"granularity": Kernel(), "layers": ["first"]}, "has no kernels"),
        (make, {"layers": ["frist"]}, "Did you mean first"),
        (make, {"layers": ["norm"]}, "no filters and inputs"),
        (make, {"ignore": ["first", "second", "head"]}, "leave no weight"),
    ],
)
def test_networks_that_cannot_be_masked_so(model: Any, options: Any, text: str, tmp_path: Path) -> None:
    """Before the first step; leaving the layer out helps."""
    net = model()
    before = weights(net)
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, net, MagnitudePruning(schedule=SCHEDULE, **options))
    assert equal(weights(net), before)


def test_all_that_cannot_be_masked_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'second: .*; extra: .* ignore=\["second", "extra"\]'):
        fit(tmp_path, make(Tied), MagnitudePruning())
    with pytest.raises(ValueError, match=r"net\.0: 2 inputs are not a multiple of 3; net\.2: 4 inputs are not"):
        fit(tmp_path, make(Conv), MagnitudePruning(granularity=NM(1, 3)), data=data(), validate=False)


def test_a_tied_or_frozen_layer_can_be_left_out(tmp_path: Path) -> None:
    for model, ignore in ((make(Tied), ["second", "extra"]), (frozen(), ["second"])):
        fit(tmp_path, model, MagnitudePruning(schedule=SCHEDULE, ignore=ignore))
        assert masks_of(model).keys() == {"first.weight", "head.weight"}


def test_other_company_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one callback that lays all masks"):
        fit(tmp_path, make(), MagnitudePruning(), HybridPruning())


def test_nothing_left_of_a_layer_is_said(tmp_path: Path) -> None:
    model = make()
    nn.init.constant_(model.head.weight, 1e-6)
    with pytest.warns(UserWarning, match="nothing is left of head"):
        fit(tmp_path, model, MagnitudePruning(0.5, schedule=OneShot(at=0), granularity=Element()), epochs=2)


def test_fast_dev_run_masks_nothing(tmp_path: Path) -> None:
    model = make()
    fit(tmp_path, model, MagnitudePruning(), fast_dev_run=True)
    assert not masks_of(model)


def test_a_fit_with_nothing_to_do_forgets_nothing(tmp_path: Path) -> None:
    model, mine = make(), MagnitudePruning(0.6, schedule=SCHEDULE)
    with pytest.warns(UserWarning, match="50 % of the way"):
        run = fit(tmp_path, model, mine, epochs=3)
    for epochs in (3, EPOCHS):
        run.fit_loop.max_epochs = epochs
        refit(run, model)
    assert [(cut.index, cut.epoch) for cut in mine.report.cuts] == [(0, 2), (1, 4)]


def test_two_fits_with_one_instance(tmp_path: Path) -> None:
    mine = HybridPruning(0.5, schedule=SCHEDULE)
    for _ in range(2):
        model = make()
        fit(tmp_path, model, mine)
        assert len(mine.report.cuts) == 2
        assert not revived(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler asks every input for its gradient
@pytest.mark.parametrize("how", [*IN_PLACE, a_layer, the_module])
def test_a_compiled_network_has_the_masks_of_one_that_is_not(how: Any, tmp_path: Path) -> None:
    """Masks are zeros in the parameters, which compiled code reads anew in every step: no graph is made for a cut."""
    torch.compiler.reset()
    plain, model, compiler = make(Net, "adamw"), make(Net, "adamw"), Compiler()
    fit(tmp_path / "plain", plain, MagnitudePruning(0.3, schedule=SCHEDULE))
    mine = MagnitudePruning(0.3, schedule=SCHEDULE)
    wrapped = how(compiler)(model)
    fit(tmp_path / "compiled", model if wrapped is None else wrapped, mine)
    torch.compiler.reset()
    assert compiler.calls >= (EPOCHS - 1) * BATCHES
    assert not revived(model)
    assert equal(dict(masks_of(model)), dict(masks_of(plain)))
    assert sum(int(mask.sum()) for mask in masks_of(model).values()) == 58
    assert "Dead units stay: the network is compiled." in mine.report.notes


# -- at the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["with its dead units", "without its dead units"])
def test_what_is_exported_is_plain_and_has_the_zeros(whole: bool, tmp_path: Path) -> None:
    """`torch.export`, from which ONNX is made as well: a parameter is a parameter, and nothing is left of the masks."""
    model = make(Net, "adamw")
    if not whole:
        with torch.no_grad():
            model.first.weight[[1, 5]] *= 1e-6
    fit(tmp_path, model, MagnitudePruning(0.4, schedule=OneShot(at=0)))
    masks, x = masks_of(model), torch.randn(5, 6)
    assert (model.first.out_features == 12) is whole
    program = torch.export.export(model.eval(), (x,))
    assert program.state_dict.keys() == make().state_dict().keys()
    assert program.graph_signature.parameters == tuple(name for name, _ in make().named_parameters())
    assert program.graph_signature.buffers == tuple(name for name, _ in make().named_buffers())
    assert not program.constants
    assert sum(int(mask.sum()) for mask in masks.values()) > 50
    for name, mask in masks.items():
        assert equal(program.state_dict[name] == 0, mask)
    torch.testing.assert_close(program.module()(x), model(x))
    # The file of weights is that of a plain network of these widths.
    bare = make(width=model.first.out_features)
    bare.second = nn.Linear(bare.first.out_features, model.second.out_features)
    bare.head = nn.Linear(bare.second.out_features, 3)
    bare.load_state_dict(model.state_dict())
    torch.testing.assert_close(bare.eval()(x), model(x))


@pytest.mark.parametrize(
    ("room", "step"),
    [(masking, "without_dead"), (Transaction, "keep"), (Transaction, "install"), (Transaction, "verify")],
)
def test_a_removal_that_fails_costs_nothing_but_itself(
    room: Any, step: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The fit ends, the network is as it was trained, and what went wrong is told and in the report."""
    kept: dict[str, Any] = {}

    class Before(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            kept.update(weights=weights(module), masks=dict(masks_of(module)))

    real = getattr(room, step)

    def failing(*args: Any) -> Any:
        if not isinstance(args[0], Transaction) or history_of(args[0].model) is not None or step == "keep":
            raise CutError("twelve are wanted")
        return real(*args)

    monkeypatch.setattr(room, step, failing)
    model = make(Net, "adamw")
    with torch.no_grad():
        model.first.weight[[1, 5]] *= 1e-6
    mine = MagnitudePruning(0.4, schedule=OneShot(at=0), dirpath=str(tmp_path))
    with pytest.warns(
        UserWarning, match=r"Dead units stay, as zeros: removing them failed.*CutError: twelve are wanted"
    ):
        run = fit(tmp_path, model, Before(), mine)
    assert run.state.finished
    assert kept["masks"]["first.weight"][[1, 5]].all()
    assert equal(weights(model), kept["weights"])
    assert equal(dict(masks_of(model)), kept["masks"])
    assert model.first.out_features == 12
    assert history_of(model) is None
    assert mine.report.final is not None
    assert "twelve are wanted" in (tmp_path / "report.md").read_text(encoding="utf-8")
    run.test(model, loader(3), verbose=False)


def test_an_interrupt_in_a_removal_is_an_interrupt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And the half of the removal that was done is taken back."""
    model = make(Net, "adamw")
    with torch.no_grad():
        model.first.weight[[1, 5]] *= 1e-6

    def interrupted(*_: Any) -> None:
        assert model.first.out_features == 10
        raise KeyboardInterrupt

    monkeypatch.setattr(Transaction, "install", interrupted)
    with pytest.raises(SystemExit):  # Lightning's way to end after Ctrl+C
        fit(tmp_path, model, MagnitudePruning(0.4, schedule=OneShot(at=0)))
    assert model.first.out_features == 12
    assert history_of(model) is None


@pytest.mark.parametrize("norm", [False, True])
def test_dead_units_leave_and_the_network_stays_the_same(norm: bool, tmp_path: Path) -> None:
    """Units without inputs give a constant (bias, batch norm), which moves into the next layer."""
    kept: dict[str, Any] = {}

    class Before(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            kept["model"] = copy.deepcopy(module)

    class Kill(Callback):
        """Weights so small that the first cut takes them: all inputs of two units, all outputs of a third."""

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step < 2 * BATCHES:
                with torch.no_grad():
                    module.first.weight[[1, 5]] *= 1e-4
                    module.second.weight[:, 7] *= 1e-4

    model = make(Net, "adamw", norm=norm)
    mine = MagnitudePruning(0.4, schedule=OneShot(at=2))
    fit(tmp_path, model, Kill(), Before(), mine, precision="64-true")
    masks = masks_of(kept["model"])
    assert masks["first.weight"][[1, 5]].all()
    assert masks["second.weight"][:, 7].all()
    assert model.first.out_features <= 9
    assert masks_of(model)["first.weight"].shape == model.first.weight.shape
    assert "without effect were removed" in " ".join(str(str(mine.report)).split())  # wrapped for the terminal
    x = torch.randn(50, 6, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), kept["model"].eval()(x), rtol=1e-9, atol=1e-9)


def test_blocks_of_n_of_m_stay_whole(tmp_path: Path) -> None:
    """Without the dead unit the blocks behind it would begin elsewhere."""
    model = make()
    with torch.no_grad():
        model.second.weight[:, 1] *= 1e-9
    mine = MagnitudePruning(granularity=NM(2, 4), schedule=OneShot(at=0), ignore=["first"])
    fit(tmp_path, model, mine, epochs=1)
    assert not model.second.weight[:, 1].any()
    blocks = model.second.weight.unflatten(1, (-1, 4))
    assert ((blocks != 0).sum(2) == 2).all()
    assert "Dead units stay: the blocks of NM(n=2, m=4) stay whole" in str(mine.report.notes)


def test_a_constant_under_zero_padding_stays(tmp_path: Path) -> None:
    class Padded(Conv):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
            )
            with torch.no_grad():
                self.net[0].weight[1] = 1e-9
                self.net[0].bias.fill_(1.0)
                self.net[2].weight[3] = 1e-9
                self.net[2].bias.fill_(-1.0)  # dead behind the ReLU: nothing moves

    model = make(Padded)
    fit(tmp_path, model, MagnitudePruning(0.3, schedule=OneShot(at=0)), epochs=1, data=data(), validate=False)
    assert model.net[0].out_channels == 4
    assert model.net[2].out_channels == 3


def test_dead_units_of_a_network_with_metrics(tmp_path: Path) -> None:
    """Their stand-ins in the copies that are compared can be copied too."""
    model = MLPClassifier((6, 8, 8, 3))
    with torch.no_grad():
        model.layers[1].weight[:3] *= 1e-6
    fit(tmp_path, model, MagnitudePruning(0.4, schedule=OneShot(at=0)), epochs=1)
    assert model.layers[1].out_features == 5


@pytest.mark.parametrize("rewind", [None, 0])
def test_a_mask_that_fails_is_taken_back(rewind: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights, optimizers' state, masks and what the callback knows, to the bit."""
    model, seen = make(Net, "adamw"), dict[str, Any]()
    mine = MagnitudePruning(0.4, schedule=OneShot(at=1), rewind=rewind)

    def state(trainer: Any) -> list[dict[str, torch.Tensor]]:
        (optimizer,) = trainer.optimizers
        return [{name: value.clone() for name, value in entry.items()} for entry in optimizer.state.values()]

    def failing(module: Any) -> None:
        assert masks_of(module)
        assert not torch.equal(module.first.weight, seen["weights"]["first.weight"])
        raise CutError("planted")

    class Before(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            seen.update(weights=copy.deepcopy(weights(module)), state=state(trainer), trainer=trainer)

    monkeypatch.setattr(masking, "assert_same_parameters", failing)
    with pytest.raises(CutError, match="planted"):
        fit(tmp_path, model, Before(), mine)
    assert equal(weights(model), seen["weights"])
    assert not masks_of(model)
    assert mine.pending
    assert not mine.report.cuts
    after = state(seen["trainer"])
    assert len(after) == len(seen["state"]) > 0
    assert all(torch.equal(one[k], other[k]) for one, other in zip(after, seen["state"], strict=True) for k in one)
