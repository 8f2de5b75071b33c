"""MACs of whole fits: of steps, cuts, repairs and teachers, against counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Distill, OneShot, Ridge, StructuredPruning
from lightning_prune.study.training_macs import MacCounter, TrainingMacs

SAMPLES, BATCH, INPUTS, HIDDEN, CLASSES = 64, 16, 6, 8, 3


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, INPUTS)
        self.hidden = nn.Linear(INPUTS, HIDDEN)
        self.out = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.hidden(x).relu())
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def forward(hidden: int) -> int:
    return INPUTS * hidden + hidden * CLASSES


def step(hidden: int) -> int:
    """A forward pass, and the gradients of both weights and of the hidden features; none of the inputs."""
    return 2 * INPUTS * hidden + 3 * hidden * CLASSES


def loader(samples: int = SAMPLES) -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(samples, INPUTS), torch.randint(CLASSES, (samples,))), BATCH)


def fit(
    counted: TrainingMacs,
    *callbacks: Callback,
    folder: Path,
    epochs: int = 2,
    samples: int = SAMPLES,
    resume: Path | None = None,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, counted],
    )
    trainer.fit(Net(), loader(samples), loader(), ckpt_path=resume, weights_only=True)
    return trainer


def test_steps_of_a_plain_fit_count_and_validation_does_not(tmp_path: Path) -> None:
    counted = TrainingMacs()
    fit(counted, folder=tmp_path)
    assert (counted.steps, counted.around) == (2 * SAMPLES * step(HIDDEN), 0)
    assert (counted.macs, counted.batches) == (counted.steps, 2 * SAMPLES // BATCH)


def test_a_last_batch_of_another_size_counts_as_it_is(tmp_path: Path) -> None:
    counted = TrainingMacs()
    fit(counted, folder=tmp_path, samples=BATCH + 5)
    assert counted.macs == 2 * (BATCH + 5) * step(HIDDEN)


@pytest.mark.usefixtures("measured")  # timing a network is no training
def test_after_a_cut_steps_are_those_of_the_narrow_network(tmp_path: Path) -> None:
    counted, pruning = TrainingMacs(), StructuredPruning(0.5, schedule=OneShot(at=1, unit="epoch"))
    fit(counted, pruning, folder=tmp_path)
    assert counted.steps == SAMPLES * (step(HIDDEN) + step(HIDDEN // 2))
    assert counted.around <= 4 * BATCH * step(HIDDEN)  # that the cut network runs, is tried out


def test_repairs_count_with_their_passes(tmp_path: Path) -> None:
    plain, repaired = TrainingMacs(), TrainingMacs()
    for counted, extensions in ((plain, []), (repaired, [Ridge(2)])):
        pruning = StructuredPruning(0.5, schedule=OneShot(at=1, unit="epoch"), extensions=extensions)
        fit(counted, pruning, folder=tmp_path)
    assert plain.steps == repaired.steps
    assert repaired.around - plain.around >= 2 * BATCH * forward(HIDDEN)


def test_a_teacher_counts_as_a_forward_pass_of_the_dense_network(tmp_path: Path) -> None:
    plain, taught = TrainingMacs(), TrainingMacs()
    for counted, extensions in ((plain, []), (taught, [Distill()])):
        fit(
            counted,
            StructuredPruning(0.5, schedule=OneShot(at=1, unit="epoch"), extensions=extensions),
            folder=tmp_path,
        )
    assert plain.steps == taught.steps
    extra = taught.around - plain.around
    # Once more before training, to find the last layer, on the example.
    assert SAMPLES * forward(HIDDEN) <= extra <= (SAMPLES + BATCH) * forward(HIDDEN)


def test_a_resumed_fit_has_the_count_of_the_whole_run(tmp_path: Path) -> None:
    whole, first, rest = TrainingMacs(), TrainingMacs(), TrainingMacs()
    fit(whole, folder=tmp_path, epochs=3)
    fit(first, folder=tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    fit(rest, folder=tmp_path, epochs=3, resume=tmp_path / "last.ckpt")
    assert rest.macs == whole.macs


def test_nothing_is_counted_or_left_open_after_an_error(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            raise RuntimeError("stop")

    counted = TrainingMacs()
    with pytest.raises(RuntimeError, match="stop"):
        fit(counted, Stop(), folder=tmp_path)
    before = counted._counter.macs
    torch.ones(3, 3) @ torch.ones(3, 3)
    assert counted._counter.macs == before == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_attention_counts_in_every_mode(context: Any) -> None:
    """In eval mode without gradients, it is one operator."""
    attention, x, tokens = (
        nn.MultiheadAttention(8, 2, batch_first=True).eval(),
        torch.randn(2, 5, 8),
        torch.randn(2, 3, 8),
    )
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with context(), MacCounter() as counter:
        attention(x, x, x, need_weights=False)
    products = 2 * (2 * 5 * 5 * 8)
    assert counter.macs == 2 * 5 * 8 * 8 * 4 + products
    with context(), MacCounter() as counter:
        attention(x, tokens, tokens, need_weights=False)
    assert counter.macs == 2 * (5 + 3) * 8 * 8 * 2 + 2 * (2 * 5 * 3 * 8)
    with context(), MacCounter() as counter:
        layer(x)
    assert counter.macs == 2 * 5 * (8 * 8 * 4 + 2 * 8 * 16) + products


def test_networks_on_the_meta_device_do_not_count() -> None:
    with MacCounter() as counter:
        nn.Linear(4, 4, device="meta")(torch.zeros(2, 4, device="meta"))
    assert counter.macs == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_count_in_every_mode(context: Any, kind: type[nn.RNNBase], gates: int) -> None:
    """Also where all time steps are one operator, as those of an LSTM on processors that have it."""
    layer, x = kind(3, 6, 2, batch_first=True, bidirectional=True), torch.randn(2, 5, 3)
    with context(), MacCounter() as counter:
        layer(x)
    assert counter.macs == 2 * 5 * 2 * gates * 6 * ((3 + 6) + (12 + 6))


def test_the_backward_pass_of_an_lstm_counts() -> None:
    layer, x = nn.LSTM(3, 6), torch.randn(5, 2, 3, requires_grad=True)
    out = layer(x)[0].sum()
    with MacCounter() as counter:
        out.backward()  # type: ignore[no-untyped-call]
    forward, first = 5 * 2 * 4 * 6 * (3 + 6), 2 * 4 * 6 * 6  # the state of zeros needs no gradient
    assert 2 * forward - 2 * first <= counter.macs <= 2 * forward
