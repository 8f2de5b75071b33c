"""Every kind of checkpoint, into a network of any width, always with ``weights_only=True``."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune import LinearSchedule, MagnitudePruning, OneShot, StructuredPruning, load_from_checkpoint, prune
from lightning_prune.surgery import HistoryError, history_of
from tests.callbacks.networks import BATCHES, Net, equal, fit, loader, make, refit, trainer, weights, widths

SCHEDULE = LinearSchedule(start=1, end=2, cuts=2)


def pruner(**options: Any) -> StructuredPruning:
    return StructuredPruning(0.5, schedule=SCHEDULE, **options)


class Rebuilding(Net):
    """Has hooks of its own, and a layer that only a checkpoint tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 3

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.called.append(f"load {checkpoint['mine']}")


class Unsaved(LightningModule):
    """Keeps no hyperparameters."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.example_input_array = torch.zeros(2, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x)

    training_step = Net.training_step
    validation_step = Net.validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(tmp_path: Path, model: Any = None, **options: Any) -> tuple[Any, Any, dict[str, Path]]:
    """A run of four epochs, cut before the second and the third, with every kind of checkpoint."""
    model = make() if model is None else model
    savers = [
        ModelCheckpoint(tmp_path / "a", filename="{epoch}", save_top_k=-1, save_last=True),
        ModelCheckpoint(tmp_path / "b", filename="{epoch}", save_top_k=-1, save_weights_only=True, monitor="val_loss"),
        ModelCheckpoint(tmp_path / "c", filename="{step}", save_top_k=-1, every_n_train_steps=3),
    ]
    done = fit(tmp_path, model, pruner(**options), *savers, epochs=4)
    done.save_checkpoint(tmp_path / "after.ckpt")
    done.save_checkpoint(tmp_path / "after_weights.ckpt", weights_only=True)
    files = {
        "wide": tmp_path / "a" / "epoch=0.ckpt",
        "between": tmp_path / "a" / "epoch=1.ckpt",
        "last": tmp_path / "a" / "last.ckpt",
        "weights": tmp_path / "b" / "epoch=3.ckpt",
        "weights, wide": tmp_path / "b" / "epoch=0.ckpt",
        "step": tmp_path / "c" / "step=9.ckpt",
        "after": tmp_path / "after.ckpt",
        "after, weights": tmp_path / "after_weights.ckpt",
    }
    return done, model, files


WIDTHS = {"wide": (12, 8), "weights, wide": (12, 8), "between": (9, 6)}


def test_every_kind_loads_without_a_callback(tmp_path: Path) -> None:
    _, model, files = run(tmp_path)
    x = torch.randn(5, 6)
    for kind, file in files.items():
        loaded = load_from_checkpoint(Net, file, weights_only=True)
        assert type(loaded) is Net
        assert widths(loaded) == WIDTHS.get(kind, (6, 4)), kind
        assert (history_of(loaded) is None) == ("wide" in kind)
        stored = torch.load(file, weights_only=True)["state_dict"]
        assert equal(dict(loaded.state_dict()), dict(stored)), kind
        if "wide" not in kind and kind not in ("between", "step"):
            assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert "on_load_checkpoint" not in vars(Net)


def test_what_was_loaded_is_saved_and_loaded_again(tmp_path: Path) -> None:
    _, _, files = run(tmp_path)
    loaded = load_from_checkpoint(Net, files["last"])
    plain = trainer(tmp_path / "again", epochs=1)
    plain.fit(loaded, loader(), loader(2))
    plain.save_checkpoint(tmp_path / "again.ckpt")
    assert widths(load_from_checkpoint(Net, tmp_path / "again.ckpt")) == (6, 4)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_other_verbs_take_narrower_and_wider_checkpoints(verb: str, tmp_path: Path) -> None:
    done, model, files = run(tmp_path)
    report = done.callbacks[0].report if isinstance(done.callbacks[0], StructuredPruning) else None
    cuts = list(report.cuts) if report else []
    # Also into a dense network, and into another trainer with a callback of its own.
    fresh = (trainer(tmp_path / "fresh", pruner()), make())
    for some, network in ((done, model), fresh):
        for kind in ("wide", "last", "between", "weights", "weights, wide", "after"):
            import warnings

            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="Be aware that when using `ckpt_path`|The dirpath has changed"
                )
                getattr(some, verb)(network, dataloaders=loader(2), ckpt_path=files[kind], weights_only=True)
            assert widths(network) == WIDTHS.get(kind, (6, 4)), kind
            assert equal(weights(network), torch.load(files[kind], weights_only=True)["state_dict"])
    if report:
        assert report.cuts == cuts
        assert next(c for c in done.callbacks if isinstance(c, StructuredPruning)).report is report


def test_the_best_of_a_run_is_one_of_the_final_size(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss")
    model = make()
    done = fit(tmp_path, model, pruner(), best, epochs=4)
    metrics = done.test(model, loader(2), ckpt_path="best", verbose=False, weights_only=True)
    assert metrics[0]["val_loss"] == pytest.approx(float(best.best_model_score))
    assert widths(model) == (6, 4)


def test_the_best_may_be_wide_and_the_training_goes_on_from_it(tmp_path: Path) -> None:
    class Worse(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float(self.trainer.current_epoch))

    best = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss")
    model, callback = make(Worse), pruner(reset_monitors=False)
    done = fit(tmp_path, model, callback, best, epochs=4)
    done.test(model, loader(2), ckpt_path="best", verbose=False)
    assert widths(model) == (12, 8)
    before = weights(model)
    done.fit_loop.max_epochs = 6
    refit(done, model)
    assert widths(model) == (6, 4)
    assert not equal(before, weights(model))
    assert callback.report.widths == {"first": 6, "second": 4}


def test_resuming_into_a_narrower_network_widens_it(tmp_path: Path) -> None:
    _, model, files = run(tmp_path)
    assert widths(model) == (6, 4)
    callback = pruner()
    fit(tmp_path / "again", model, callback, epochs=4, ckpt_path=files["wide"])
    assert widths(model) == (6, 4)
    assert [cut.epoch for cut in callback.report.cuts] == [1, 2]


def test_a_class_with_its_own_hooks(tmp_path: Path) -> None:
    _, _, files = run(tmp_path, make(Rebuilding))
    loaded = load_from_checkpoint(Rebuilding, files["last"])
    assert loaded.called == ["load 3"]
    assert widths(loaded) == (6, 4)
    assert "on_load_checkpoint" in vars(Rebuilding)
    assert vars(Rebuilding)["on_load_checkpoint"].__name__ == "on_load_checkpoint"
    model = make(Rebuilding)
    trainer(tmp_path / "t", pruner()).test(model, loader(2), ckpt_path=files["after, weights"], verbose=False)
    assert model.called == ["load 3"]


def test_a_subclass_that_inherits_its_hook(tmp_path: Path) -> None:
    class Child(Rebuilding):
        pass

    _, _, files = run(tmp_path, make(Child))
    assert load_from_checkpoint(Child, files["last"]).called == ["load 3"]
    assert "on_load_checkpoint" not in vars(Child)


def test_arguments_that_were_not_saved_are_given(tmp_path: Path) -> None:
    def inside() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))

    _, _, files = run(tmp_path, make(Unsaved, inside()))
    assert load_from_checkpoint(Unsaved, files["last"], inside=inside()).inside[0].out_features == 5
    with pytest.raises(TypeError, match="inside"):
        load_from_checkpoint(Unsaved, files["last"])


def test_a_dense_checkpoint_and_hyperparameters(tmp_path: Path) -> None:
    model = make(Net, width=10)
    fit(tmp_path, model, epochs=1).save_checkpoint(tmp_path / "dense.ckpt")
    loaded = load_from_checkpoint(Net, tmp_path / "dense.ckpt")
    assert widths(loaded) == (10, 8)
    assert history_of(loaded) is None


def test_another_architecture_is_refused_whole(tmp_path: Path) -> None:
    _, _, files = run(tmp_path)
    with pytest.raises(HistoryError, match=r"another architecture: first\.weight"):
        load_from_checkpoint(Net, files["last"], width=14)
    model = make(Net, width=14)
    before = weights(model)
    with pytest.raises(HistoryError, match="another architecture"):
        fit(tmp_path / "other", model, pruner(), ckpt_path=files["last"])
    assert equal(before, weights(model))
    with pytest.raises(TypeError, match="class of a LightningModule"):
        load_from_checkpoint(make(), files["last"])  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("tamper", "error"),
    [
        (lambda c: c["lightning_prune"]["edits"][0].update(kind="drop"), HistoryError),
        (lambda c: c["lightning_prune"].update(version=99), HistoryError),
        (lambda c: c["lightning_prune"]["edits"].pop(), HistoryError),
        (lambda c: c["callbacks"]["StructuredPruning"].pop("report"), ValueError),
        (lambda c: c["callbacks"]["StructuredPruning"].update(format=7), ValueError),
        (lambda c: c["callbacks"]["StructuredPruning"].update(report={"format": 99}), ValueError),
        (lambda c: c["callbacks"]["StructuredPruning"].update(batches="many"), ValueError),
        (lambda c: c["callbacks"]["StructuredPruning"].update(done="many"), ValueError),
        (lambda c: c["callbacks"]["StructuredPruning"].update(done=math.inf), ValueError),
        (lambda c: c["callbacks"]["StructuredPruning"]["report"].update(notes=None), ValueError),
        (lambda c: c["callbacks"]["StructuredPruning"]["report"]["cuts"][0].update(seconds="long"), ValueError),
        (lambda c: c["callbacks"]["StructuredPruning"]["report"]["cuts"][0]["after"].update(first="x"), ValueError),
        (lambda c: c["callbacks"]["StructuredPruning"]["report"]["config"].update(cuts=[[1, 2]]), ValueError),
        (lambda c: c["callbacks"].update(StructuredPruning=[1]), ValueError),
    ],
)
def test_a_damaged_checkpoint_is_refused(tamper: Any, error: type[Exception], tmp_path: Path) -> None:
    _, _, files = run(tmp_path)
    checkpoint = torch.load(files["last"], weights_only=True)
    tamper(checkpoint)
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    model = make()
    with pytest.raises(error):
        fit(tmp_path / "other", model, pruner(), ckpt_path=tmp_path / "damaged.ckpt", epochs=6)
    assert model.trainer.global_step in (0, checkpoint["global_step"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: [],
        lambda kept: {**kept, "first.bias": 1.0},
        lambda kept: {name: tensor for name, tensor in kept.items() if name != "first.bias"},
        lambda kept: {**kept, "first.bias": kept["first.bias"][:-1]},
    ],
)
def test_damaged_weights_to_go_back_to_are_refused(damage: Any, tmp_path: Path) -> None:
    """When the run begins, not when they are asked for."""

    def masking() -> MagnitudePruning:
        return MagnitudePruning(0.5, schedule=LinearSchedule(start=2, end=4, cuts=2), rewind=1)

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, make(), masking(), saver)
    checkpoint = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["MagnitudePruning"]
    state["kept"] = damage(state["kept"])
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    model = make()
    with pytest.raises(ValueError, match="damaged"):
        fit(tmp_path / "other", model, masking(), ckpt_path=tmp_path / "damaged.ckpt")
    assert model.trainer.global_step in (0, 3 * BATCHES)


def test_the_network_is_plain(tmp_path: Path) -> None:
    model = make()
    first, optimizer_sees = model.first, list(model.parameters())
    done = fit(tmp_path, model, pruner(), epochs=4)
    assert model.first is first
    assert type(model.first) is nn.Linear
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer_sees}
    assert {id(p) for g in done.optimizers[0].param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    x = torch.randn(4, 6)
    model.eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert copied is not model
        assert torch.equal(copied(x), model(x))
        assert widths(copied) == (6, 4)
        # A copy keeps its own history and is trained and saved on its own.
        with torch.no_grad():
            copied.head.weight.zero_()
        again = fit(tmp_path / "copy", copied.train(), epochs=1)
        again.save_checkpoint(tmp_path / "copy.ckpt")
        loaded = load_from_checkpoint(Net, tmp_path / "copy.ckpt")
        assert equal(weights(loaded), weights(copied))
        assert not equal(weights(loaded), weights(model))


def test_scripting_and_export_of_the_narrow_network(tmp_path: Path) -> None:
    _, _, files = run(tmp_path)
    loaded = load_from_checkpoint(Net, files["last"]).eval()
    x = torch.randn(3, 6)
    exported = torch.export.export(loaded, (x,), strict=False)
    assert torch.equal(exported.module()(x), loaded(x))


def test_a_checkpoint_of_lightnings_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.cli import LightningCLI

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            return loader(2)

    monkeypatch.setattr(sys, "argv", ["fit"])  # Lightning warns where pytest's own arguments would be passed over
    for subclass_mode in (False, True):
        words = ["--model.width=10"]
        if subclass_mode:
            words = ["--model=tests.callbacks.networks.Net", *words]
        cli = LightningCLI(
            LightningModule if subclass_mode else Net,
            Data,
            subclass_mode_model=subclass_mode,
            save_config_callback=None,
            run=False,
            seed_everything_default=0,
            args=[*words],
            trainer_defaults={
                "callbacks": [pruner(), ModelCheckpoint(tmp_path / str(subclass_mode), save_last=True)],
                "max_epochs": 4,
                "logger": False,
                "default_root_dir": str(tmp_path),
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        )
        cli.trainer.fit(cli.model, cli.datamodule)
        file = tmp_path / str(subclass_mode) / "last.ckpt"
        assert "_instantiator" in torch.load(file, weights_only=True)["hyper_parameters"]
        loaded = load_from_checkpoint(Net, file, weights_only=True)
        assert type(loaded) is Net
        assert widths(loaded) == (5, 4)
    base: Any = load_from_checkpoint(LightningModule, file)
    assert type(base) is Net
    assert widths(base) == (5, 4)


class Wrapping(LightningModule):
    """Around a network that was made elsewhere."""

    def __init__(self, net: Any = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        self.example_input_array = torch.zeros(2, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_part_that_was_pruned_by_itself_is_told(tmp_path: Path) -> None:
    """Its history is not the module's; of the LightningModule pruned whole, any Trainer saves it."""
    part = Wrapping()
    prune(part.net, torch.zeros(2, 6), pruning_ratio=0.5)
    run = fit(tmp_path, part, epochs=1, validate=False)
    run.save_checkpoint(tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match=r"no pruning history.*prune the LightningModule instead"):
        load_from_checkpoint(Wrapping, tmp_path / "part.ckpt")
    callback = StructuredPruning(0.5, schedule=OneShot(0.5))
    with pytest.warns(UserWarning, match="`net` was pruned by itself, so that checkpoints of Wrapping"):
        fit(tmp_path / "again", part, callback, epochs=2, validate=False)
    whole = Wrapping()
    prune(whole, torch.zeros(2, 6), pruning_ratio=0.5)
    fit(tmp_path, whole, epochs=1, validate=False).save_checkpoint(tmp_path / "whole.ckpt")
    assert load_from_checkpoint(Wrapping, tmp_path / "whole.ckpt").net[0].out_features == 6


def test_training_goes_on_after_prune_without_a_callback(tmp_path: Path) -> None:
    model, file = make(Net, "adamw"), tmp_path / "small.ckpt"
    prune(model, torch.zeros(2, 6), pruning_ratio=0.5)
    fit(tmp_path, model, epochs=2, validate=False).save_checkpoint(file)
    loaded = load_from_checkpoint(Net, file)
    assert loaded.training
    run = fit(tmp_path, loaded, epochs=3, validate=False, ckpt_path=file)
    assert widths(loaded) == (6, 4)
    assert {float(state["step"]) for state in run.optimizers[0].state.values()} == {3 * BATCHES}


def test_a_checkpoint_with_objects_loads_if_it_is_trusted(tmp_path: Path) -> None:
    class WithObject(Wrapping):
        def __init__(self, settings: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()

    model = WithObject(SimpleNamespace(depth=3))
    prune(model, torch.zeros(2, 6), pruning_ratio=0.5)
    fit(tmp_path, model, epochs=1, validate=False).save_checkpoint(tmp_path / "objects.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_from_checkpoint(WithObject, tmp_path / "objects.ckpt")
    loaded = load_from_checkpoint(WithObject, tmp_path / "objects.ckpt", weights_only=False)
    assert loaded.hparams["settings"].depth == 3
    assert loaded.net[0].out_features == 6


def test_what_is_no_checkpoint_of_a_trainer_is_told(tmp_path: Path) -> None:
    torch.save({"state_dict": make(Net).state_dict()}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"expected a checkpoint of the Trainer, got '.*net\.pt'"):
        load_from_checkpoint(Net, tmp_path / "net.pt")
