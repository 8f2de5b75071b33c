"""A network that is truncated, gets a new head and becomes narrower while Lightning trains it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.nn import functional as F

from lightning_prune import load_from_checkpoint
from lightning_prune.callbacks.extensions.rollback import restore_snapshot, snapshot
from lightning_prune.callbacks.lightning.averages import averages
from lightning_prune.callbacks.rewind_snapshot import RewindSnapshot
from lightning_prune.structure import TracedModel, trace
from lightning_prune.surgery import LayerSpec, history_of, tensors, transaction
from tests.callbacks.networks import make, trainer, weights
from tests.callbacks.ranked import share
from tests.callbacks.replaced import AT, HEAD, Deep, ends, resumed, same, state_of, train
from tests.support import ranks

#: Names after the replacement, as `configure_optimizers` gives them.
WEIGHTS = ["first.weight", "head.0.weight", "head.2.weight", "head.3.weight"]
GROUPS = [WEIGHTS, [name.replace("weight", "bias") for name in WEIGHTS]]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resuming_equals_never_having_stopped(optimizer: str, tmp_path: Path) -> None:
    """Also where the state of an equal-shaped neighbour would fit."""
    found = resumed(tmp_path, optimizer)
    assert found["wrong"] == {3: [], 5: [], 9: []}
    assert found["expected"]["groups"] == GROUPS
    assert found["expected"]["state"].keys() == {*GROUPS[0], *GROUPS[1]}
    shapes = {name: tuple(tensor.shape) for name, tensor in found["expected"]["weights"].items()}
    assert shapes["head.0.weight"] == shapes["head.2.weight"] == (6, 6)
    assert shapes["first.weight"] == (6, 6)  # of another layer, but of that shape too


@pytest.mark.ddp
def test_two_processes_do_the_same_and_resume(tmp_path: Path) -> None:
    found = ranks.run(resumed, tmp_path / "two", processes=2)
    assert found["wrong"] == {3: [], 5: [], 9: []}
    alone, *_ = train(tmp_path / "one")
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(found["expected"]["weights"][name], tensor, rtol=1e-9, atol=1e-11)


@pytest.mark.ddp
@pytest.mark.parametrize("step", [3, 5])
def test_a_resume_with_another_number_of_processes(step: int, tmp_path: Path) -> None:
    """From before the replacement and from after it, from two processes to one and back."""
    two, one = ranks.run(ends, tmp_path / "two", processes=2), ends(tmp_path / "one")
    fewer = ends(tmp_path / "fewer", tmp_path / "two" / "steps" / f"step={step}.ckpt")
    more = ranks.run(ends, tmp_path / "more", tmp_path / "one" / "steps" / f"step={step}.ckpt", processes=2)
    for found in (two, fewer, more):
        assert found["history"] == one["history"]
        assert found["groups"] == one["groups"]
        for part in ("weights", "state"):
            torch.testing.assert_close(found[part], one[part], rtol=1e-8, atol=1e-10)


class Averages(Callback):
    """Averaged weights before the replacement and right after it."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == AT:
            self.before = weights(averages(trainer)[0])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (AT, 0):
            self.after, self.live = weights(averages(trainer)[0]), weights(pl_module)


class Seen(Callback):
    """Weights and the optimizer's state right after the replacement."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (AT, 0):
            self.found = state_of(trainer, pl_module)


def test_training_goes_on_as_on_a_network_written_by_hand(tmp_path: Path) -> None:
    """The state of what stays is sliced, new parameters begin without one; rates and decay are their groups'."""
    seen = Seen()
    expected, run, _ = train(tmp_path, "adamw", seen)
    assert expected["history"] == ["replace", "keep"]
    before = torch.load(tmp_path / "steps" / "step=4.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    network = nn.Module()
    network.first = nn.Linear(6, 6)
    network.head = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    network.double().load_state_dict(seen.found["weights"])
    named = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[name] for name in names], "weight_decay": decay}
            for names, decay in zip(GROUPS, (0.1, 0.0), strict=True)
        ]
    )
    rows = torch.arange(1, 12, 2)
    for name, place in (("first.weight", 0), ("first.bias", 4)):  # of four matrices and four biases
        old = before[place]
        optimizer.state[named[name]] = {k: v.clone() if v.ndim == 0 else v[rows].clone() for k, v in old.items()}
        assert same(seen.found["state"][name], dict(optimizer.state[named[name]]))
    assert seen.found["state"].keys() == {"first.weight", "first.bias"}
    for epoch in (1, 2):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.7**epoch
        for x, y in share():
            optimizer.zero_grad()
            F.cross_entropy(network.head(F.relu(network.first(x))), y).backward()
            optimizer.step()
    assert run.global_step == 12
    for name, parameter in named.items():
        torch.testing.assert_close(expected["weights"][name], parameter.detach(), rtol=1e-11, atol=1e-12)


def test_every_checkpoint_loads_without_a_callback_and_widens(tmp_path: Path) -> None:
    _, run, model = train(tmp_path)
    last = tmp_path / "steps" / "step=12.ckpt"
    loaded = load_from_checkpoint(Deep, last, weights_only=True)
    x = share().dataset[:][0]  # type: ignore[index]
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    history = history_of(loaded)
    assert history is not None
    assert isinstance(loaded.second, nn.Identity)
    # Written narrow by hand, with the same weights.
    first = nn.Linear(6, 6).double()
    head = nn.Sequential(*(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))).double()
    first.load_state_dict(model.first.state_dict())
    head.load_state_dict(model.head.state_dict())
    assert torch.equal(head(F.relu(first(x))), model(x))
    # The live network gets its tail back to test what was saved before.
    wide = tmp_path / "steps" / "step=2.ckpt"
    (result,) = run.test(model, share(), ckpt_path=wide, weights_only=True, verbose=False)
    reference = make(Deep)
    reference.load_state_dict(torch.load(wide, weights_only=True)["state_dict"])
    (expected,) = trainer(tmp_path).test(reference, share(), verbose=False)
    assert result == expected
    assert same(weights(model), weights(reference))


AVERAGING: dict[str, Any] = {
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1),
}


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.filterwarnings("ignore:Swapping scheduler `StepLR` for `SWALR`")
@pytest.mark.parametrize("kind", AVERAGING)
def test_averaged_weights_get_the_new_head_and_resume(kind: str, tmp_path: Path) -> None:
    ends = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    seen = Averages()
    expected, run, model = train(tmp_path, "adamw", AVERAGING[kind](), ends, seen)
    (average,) = averages(run)
    assert weights(average).keys() == weights(model).keys()
    assert isinstance(average.third, nn.Identity)
    # What stays is averaged on; the new head begins as in the network.
    rows = torch.arange(1, 12, 2)
    assert torch.equal(seen.after["first.weight"], seen.before["first.weight"][rows])
    assert all(torch.equal(seen.after[name], seen.live[name]) for name in seen.live if name.startswith("head"))
    # From many steps Lightning's SWA, once begun, does not go on as if never stopped, without a replacement neither.
    steps = [f"steps/step={step}" for step in ((3,) if kind == "swa" else (3, 5, 9))]
    for file in (*steps, "ends/epoch=0", "ends/epoch=1"):
        again, *_ = train(tmp_path / f"again {file}", "adamw", AVERAGING[kind](), ckpt_path=tmp_path / f"{file}.ckpt")
        assert [part for part in expected if not same(again[part], expected[part])] == [], file


def test_weights_to_go_back_to_follow_a_replacement() -> None:
    """What is new was not there at that epoch; what is damaged is still found."""
    model = make(Deep)
    run: Any = SimpleNamespace(lightning_module=model, current_epoch=0)
    snapshot = RewindSnapshot(0, "Rewind(0)")
    snapshot.begin_epoch(run, model)
    before = weights(model)
    traced = TracedModel.of(model, model.example_input_array)
    modules = {"second": LayerSpec("Identity"), "third": LayerSpec("Identity"), "head": HEAD}
    with transaction(model, run=lambda: model(model.example_input_array)) as change:
        structure = change.replace(modules, lambda: trace(traced), trace(traced))
        change.keep(structure, {"first": (0, 3, 4)})
    history = history_of(model)
    assert history is not None
    snapshot = snapshot.after_cut(history.edits)
    snapshot.require(run, ())
    rows = [0, 3, 4]
    assert same(snapshot.get(), {name: before[name][rows] for name in ("first.weight", "first.bias")})
    snapshot.get().pop("first.bias")
    with pytest.raises(ValueError, match=r"got others for first\.bias"):
        snapshot.require(run, ())


# PyTorch's compiler asks every input for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_network_does_the_same(tmp_path: Path) -> None:
    expected, *_ = train(tmp_path / "plain")
    compiled: Any = torch.compile(make(Deep), backend="eager")
    try:
        _, _, model = train(tmp_path / "compiled", model=compiled)
    finally:
        torch.compiler.reset()
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(tensors.named(model)[name].detach(), tensor, rtol=1e-10, atol=1e-12)
    assert model.head[0].in_features == 6


class ByName(Deep):
    """An optimizer that was given named parameters."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.named_parameters(), lr=0.01)


class Before(Callback):
    """What `Rollback` keeps before the replacement."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == AT:
            self.kept, self.groups = snapshot(trainer, pl_module), trainer.optimizers[0].state_dict()["param_groups"]


def test_a_rollback_outlives_a_replacement(tmp_path: Path) -> None:
    """Weights, and state and names of the optimizer go back."""
    before = Before()
    _, run, model = train(tmp_path, "adamw", before, model=make(ByName))
    restore_snapshot(before.kept, run, model)
    assert history_of(model) is None
    assert same(weights(model), before.kept["weights"])
    found = run.optimizers[0].state_dict()
    assert found["param_groups"][0]["params"] == before.groups[0]["params"]
    assert found["param_groups"][0]["param_names"] == before.groups[0]["param_names"]
    assert same(found["state"], before.kept["optimizers"][0])
