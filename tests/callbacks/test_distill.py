"""`Distill` against a training loop that adds its term to the loss by hand, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune
from lightning_prune import L1, Distill, OneShot, StructuredPruning
from tests.callbacks.networks import Net, fit, loader, make

BATCH, EPOCHS = 8, 3


class Plain(LightningModule):
    """Two layers without momentum, dropout or norms; `forward` is not what the step calls."""

    def __init__(self, dropout: float = 0.0, manual: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 3))
        self.automatic_optimization = not manual
        self.example_input_array = torch.zeros(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).softmax(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.body(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Images(LightningModule):
    """Dense prediction: the classes of its last layer lie on dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.first(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def images() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0, 1:5, 1:5] > 0).long()), batch_size=BATCH)


def pruner(*extensions: Any) -> StructuredPruning:
    schedule = OneShot(1, unit="epoch")
    return StructuredPruning(0.5, criterion=L1(), schedule=schedule, extensions=list(extensions))


def kl(z: Tensor, wanted: Tensor, t: float, dim: int) -> Tensor:
    p, q = (wanted / t).softmax(dim), (z / t).softmax(dim)
    return t * t * (p * (p / q).log()).sum(dim).mean()


def backward(z: Tensor, y: Tensor, wanted: Tensor | None, term: Any, every: int) -> None:
    loss = F.cross_entropy(z, y)
    if wanted is not None:
        loss = loss + term(z, wanted)
    (loss / every).backward()


def by_hand(net: nn.Module, data: Any, term: Any, every: int = 1, teacher: Any = None) -> nn.Module:
    """One epoch, cut, two epochs with a term between the outputs and those of the network before the cut."""
    dense: Any = None
    for epoch in range(EPOCHS):
        if epoch == 1:
            dense = teacher or copy.deepcopy(net)
            lightning_prune.prune(net, next(iter(data))[0], pruning_ratio=0.5, criterion=L1())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
        for number, (x, y) in enumerate(data):
            backward(net(x), y, None if dense is None else dense(x).detach(), term, every)
            if (number + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()
    return net


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    state = found.state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("manual", [False, True])
def test_as_a_loss_with_the_term(manual: bool, every: int, tmp_path: Path) -> None:
    every = 1 if manual else every  # Lightning leaves accumulation to the module then
    model = make(Plain, manual=manual)
    expected = by_hand(copy.deepcopy(model.body).double(), double(loader()), lambda z, w: 0.7 * kl(z, w, 3.0, 1), every)
    options = {} if manual else {"accumulate_grad_batches": every}
    extension = Distill(weight=0.7, temperature=3.0)
    fit(tmp_path, model, pruner(extension), epochs=EPOCHS, precision="64-true", validate=False, **options)
    assert model.body[0].out_features == 6
    assert_same(model.body, expected)
    plain = make(Plain, manual=manual)
    fit(tmp_path / "plain", plain, pruner(), epochs=EPOCHS, precision="64-true", validate=False, **options)
    assert (plain.body[0].weight - model.body[0].weight).abs().max() > 1e-3


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_of_images(loss: Any, tmp_path: Path) -> None:
    terms = {"kl": lambda z, w: kl(z, w, 2.0, 1), "mse": lambda z, w: ((z - w) ** 2).mean()}
    model = make(Images)
    expected = by_hand(copy.deepcopy(model).double(), double(images()), terms[loss])
    extension = Distill(loss=loss)
    fit(tmp_path, model, pruner(extension), data=images(), epochs=EPOCHS, precision="64-true", validate=False)
    assert_same(model, expected)


def double(data: Any) -> list[Any]:
    return [(x.double(), y) for x, y in data]


def test_random_numbers_of_the_run_stay(tmp_path: Path) -> None:
    """A term that weighs nothing changes nothing, dropout included."""
    ends = []
    for name, extensions in (("with", [Distill(weight=1e-30)]), ("without", [])):
        model = make(Plain, dropout=0.5)
        fit(tmp_path / name, model, pruner(*extensions), epochs=EPOCHS, validate=False)
        ends.append(model)
    assert_same(*ends)


def test_the_network_of_a_checkpoint(tmp_path: Path) -> None:
    """It is learnt from instead, narrow as it is, and is in no checkpoint of the run."""
    saver = ModelCheckpoint(tmp_path / "files", save_last=True)
    fit(tmp_path, make(Plain), pruner(), saver, epochs=4, precision="64-true", validate=False)
    file = str(tmp_path / "files" / "last.ckpt")
    teacher = lightning_prune.load_from_checkpoint(Plain, file).double().eval()
    teacher.load_state_dict(torch.load(file, weights_only=True)["state_dict"])  # not rounded to float32
    assert teacher.body[0].out_features == 6
    model = make(Plain)
    expected = by_hand(
        copy.deepcopy(model.body).double(), double(loader()), lambda z, w: kl(z, w, 2.0, 1), teacher=teacher.body
    )
    callback, last = pruner(Distill(teacher=file)), ModelCheckpoint(tmp_path / "next", save_last=True)
    run = fit(tmp_path, model, callback, last, epochs=EPOCHS, precision="64-true", validate=False)
    assert_same(model.body, expected)
    assert run.callback_metrics["pruning/distillation"] > 0
    state = torch.load(tmp_path / "next" / "last.ckpt", weights_only=True)["callbacks"]["StructuredPruning"]
    assert state["extensions"] == {}


@pytest.mark.parametrize("is_file", [False, True])
def test_the_teacher_outlives_a_resume_after_the_last_cut(is_file: bool, tmp_path: Path) -> None:
    """A new process has the narrow network only; the wide one is in the checkpoint of this run, or of another one."""
    fit(tmp_path / "other", make(Net), epochs=1).save_checkpoint(tmp_path / "dense.ckpt")
    extension = Distill(teacher=str(tmp_path / "dense.ckpt") if is_file else None)
    saver = ModelCheckpoint(tmp_path / "files", filename="{epoch}", save_top_k=-1)
    whole = make(Net)
    fit(tmp_path, whole, pruner(extension), saver, epochs=4)
    again = lightning_prune.load_from_checkpoint(Net, tmp_path / "files" / "epoch=2.ckpt")
    fit(tmp_path / "again", again, pruner(extension), ckpt_path=tmp_path / "files" / "epoch=2.ckpt", epochs=4)
    assert_same(again, whole)


class Trained(Callback):
    """The network at the end, before averaged weights take its place, and the average."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (averaging,) = (one for one in trainer.callbacks if isinstance(one, EMAWeightAveraging))
        self.body = copy.deepcopy(pl_module.body)
        self.average = copy.deepcopy(averaging._average_model.module.body)


def test_the_average_of_the_weights(tmp_path: Path) -> None:
    """With a decay of 1 it stays what it was after the first step, and is narrow since the cut."""
    model, trained, averaging = make(Plain), Trained(), EMAWeightAveraging(decay=1.0)
    start, callback = copy.deepcopy(model.body), pruner(Distill(teacher="average"))
    saver = ModelCheckpoint(tmp_path / "files", filename="{epoch}", save_top_k=-1)
    fit(tmp_path, model, callback, trained, averaging, saver, epochs=EPOCHS, precision="64-true", validate=False)
    assert trained.average[0].out_features == 6
    term = lambda z, w: kl(z, w, 2.0, 1)  # noqa: E731
    expected = by_hand(start.double(), double(loader()), term, teacher=trained.average.double())
    assert_same(trained.body, expected)
    resumed = Trained()
    callbacks = (pruner(Distill(teacher="average")), resumed, EMAWeightAveraging(decay=1.0))
    file = tmp_path / "files" / "epoch=1.ckpt"
    fit(tmp_path / "b", make(Plain), *callbacks, ckpt_path=file, epochs=EPOCHS, precision="64-true", validate=False)
    # The average and the weights beside it come back in float32.
    torch.testing.assert_close(resumed.body[0].weight, expected[0].weight, rtol=0, atol=1e-6)


def test_a_teacher_that_is_named_replaces_the_one_of_the_run_so_far(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "files", save_last=True)
    fit(tmp_path, make(Plain), pruner(Distill()), saver, epochs=2, validate=False)
    file = tmp_path / "files" / "last.ckpt"
    ends = []
    for name, extension in (("dense", Distill()), ("narrow", Distill(teacher=str(file)))):
        model, last = make(Plain), ModelCheckpoint(tmp_path / name, save_last=True)
        fit(tmp_path / name, model, pruner(extension), last, ckpt_path=file, epochs=3, validate=False)
        ends.append(model)
        state = torch.load(tmp_path / name / "last.ckpt", weights_only=True)["callbacks"]["StructuredPruning"]
        assert state["extensions"].keys() == ({"Distill"} if name == "dense" else set())
    assert (ends[0].body[0].weight - ends[1].body[0].weight).abs().max() > 1e-4


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Head(Net):
    """Of one class, and with a layer that nobody calls and one that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.spare = nn.Linear(3, 1), nn.Linear(3, 3)
        self.twice = Twice()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found, _ = self.twice(self(batch[0]))
        return F.binary_cross_entropy_with_logits(self.one(found)[:, 0], (batch[1] > 0).to(found.dtype))


class Quiet(Net):
    """Whose step calls no layer by itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = self.first.weight
        return F.cross_entropy((batch[0] @ weight.T)[:, :3] + 0 * self.head.weight.sum(), batch[1])


@pytest.mark.parametrize(
    ("kind", "extension", "text"),
    [
        (
            Net,
            Distill(layer="frist"),
            r"expected `layer` to be a layer of Net, got 'frist'. Layers: first, head, norm",
        ),
        (Net, Distill(layer="second"), r"whose outputs are in the group 'second'"),
        (Net, Distill(teacher="nowhere.ckpt"), "got 'nowhere.ckpt': no such file"),
        (Quiet, Distill(), "`training_step` of Quiet calls no layer with parameters"),
        (Head, Distill(), r"expected at least two classes for loss=\"kl\", got outputs of shape \(8, 1\) from 'one'"),
        (Head, Distill(layer="spare", loss="mse"), "`training_step` of Head does not call 'spare'"),
        (Head, Distill(layer="twice", loss="mse"), "returns a tensor, got 'twice', which returns a tuple"),
        (Net, Distill(teacher="average"), "expected a callback that averages weights .* got none"),
    ],
    ids=str,
)
def test_refused_before_the_first_step(kind: Any, extension: Distill, text: str, tmp_path: Path) -> None:
    model = make(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text):
        fit(tmp_path, model, pruner(extension), epochs=EPOCHS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_checkpoints_of_others_are_refused(tmp_path: Path) -> None:
    torch.save({"weights": {}}, tmp_path / "a.ckpt")
    torch.save({"state_dict": make(Net, width=20).state_dict()}, tmp_path / "b.ckpt")
    for name, text in (("a", "without `state_dict`"), ("b", "which is of another network")):
        with pytest.raises(ValueError, match=text):
            fit(tmp_path, make(Net), pruner(Distill(teacher=str(tmp_path / f"{name}.ckpt"))), epochs=EPOCHS)


def test_compiled_networks_are_refused(tmp_path: Path) -> None:
    model = make(Net)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="expected a network that is not compiled"):
        fit(tmp_path, model, pruner(Distill()), epochs=EPOCHS)


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"temperature": -1.0}, {"weight": float("nan")}])
def test_settings_out_of_range(settings: Any) -> None:
    with pytest.raises(ValueError, match=f"Distill: expected `{next(iter(settings))}`"):
        Distill(**settings)
