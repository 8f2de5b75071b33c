"""The seed's networks: their sizes, their metrics, and that they learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.data import Digits, Shapes
from lightning_prune.data.tensors import ImageData
from lightning_prune.models import (
    VGG16CIFAR,
    CNNClassifier,
    FourConvClassifier,
    MLPClassifier,
    MobileNetV2CIFAR,
    ResNetCIFAR,
    SegNet,
)
from lightning_prune.scoring import L1, score_groups
from lightning_prune.structure import TracedModel, trace
from tests.support.cutting import half, masked, shrunk


def weights(model: LightningModule) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in model.parameters() if p.ndim > 1]


def test_mlp_is_the_seeds() -> None:
    model = MLPClassifier()
    assert weights(model) == [(50, 784), (30, 50), (10, 30)]
    assert model(torch.randn(3, 1, 28, 28)).shape == (3, 10)
    assert [type(layer) for layer in model.layers] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_cnn_is_the_seeds(batch_norm: bool) -> None:
    model = CNNClassifier(classes=100, batch_norm=batch_norm)
    assert weights(model) == [(16, 3, 3, 3), (32, 16, 3, 3), (256, 2048), (128, 256), (100, 128)]
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 2 * batch_norm
    assert model(torch.randn(3, 3, 32, 32)).shape == (3, 100)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_four_convolutions_are_the_reports(batch_norm: bool) -> None:
    model = FourConvClassifier(batch_norm=batch_norm)
    assert weights(model) == [(3, 3, 3, 3)] * 4 + [(15, 192), (10, 15)]
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 4 * batch_norm
    convolutional = sum(w.numel() for w in model.features.parameters() if w.ndim == 4)
    assert convolutional / sum(w.numel() for w in model.parameters() if w.ndim > 1) == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize(
    "model", [MLPClassifier(), CNNClassifier(), CNNClassifier((1, 28, 28)), FourConvClassifier()], ids=str
)
def test_example_runs(model: LightningModule) -> None:
    example = model.example_input_array
    assert isinstance(example, Tensor)
    assert len(model(example)) == len(example)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_optimizer_by_name(optimizer: str) -> None:
    settings = {"momentum": 0.9} if optimizer == "sgd" else {}
    made = MLPClassifier(optimizer=optimizer, lr=0.25, weight_decay=0.125, **settings).configure_optimizers()
    assert type(made).__name__.lower() == optimizer
    (group,) = made.param_groups
    assert (group["lr"], group["weight_decay"], group.get("momentum", 0.0)) == (
        0.25,
        0.125,
        settings.get("momentum", 0),
    )


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="expected `sizes` from the input to the classes"):
        MLPClassifier([10])
    with pytest.raises(ValueError, match="divisible by 4"):
        CNNClassifier((3, 30, 32))
    with pytest.raises(ValueError, match="expected `momentum` with optimizer='sgd' only"):
        MLPClassifier(optimizer="adam", momentum=0.9)


def test_hyperparameters_are_plain() -> None:
    """A checkpoint holds them, and must load with `weights_only=True`."""
    assert dict(CNNClassifier(hidden=(20, 10), lr=0.5).hparams) == {
        "input_shape": (3, 32, 32),
        "classes": 10,
        "channels": (16, 32),
        "hidden": (20, 10),
        "batch_norm": True,
        "optimizer": "sgd",
        "lr": 0.5,
        "momentum": 0.0,
        "weight_decay": 0.0,
    }


class Recorder(MLPClassifier.__base__):  # type: ignore[name-defined,misc]
    """Answers the first input value as class, so that every metric is known."""

    def __init__(self) -> None:
        super().__init__((1,), 2, lr=0.0)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * torch.stack([1 - images[:, 0], images[:, 0]], 1)


def test_metrics_are_means_over_the_epoch() -> None:
    # Three batches of unequal size; 4 of 5 are right.
    images = torch.tensor([[0.0], [1.0], [1.0], [0.0], [0.0]])
    labels = torch.tensor([0, 1, 1, 0, 1])
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    model = Recorder()
    trainer.fit(model, loader, loader)
    right, wrong = torch.tensor([1.0, 0.0]).log_softmax(0).neg().tolist()
    expected = (4 * right + wrong) / 5
    for stage in ("train", "val"):
        assert trainer.callback_metrics[f"{stage}_acc"] == pytest.approx(0.8)
        assert trainer.callback_metrics[f"{stage}_loss"] == pytest.approx(expected)
    (tested,) = trainer.test(model, loader, verbose=False)
    assert tested == {"test_acc": pytest.approx(0.8), "test_loss": pytest.approx(expected)}
    assert torch.cat(trainer.predict(model, loader)).tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_resnet_is_he_and_others(depth: int, parameters: int) -> None:
    """Table 6 of the paper says 0.27 M and 0.85 M."""
    model = ResNetCIFAR(depth)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.ndim > 1 for p in model.parameters()) == depth
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_the_shortcut_has_every_second_pixel_between_channels_of_zeros() -> None:
    block = ResNetCIFAR(8).layer2[0]
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 32, 32)
    out = block(x)
    torch.testing.assert_close(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_a_projection_leaves_all_widths_free() -> None:
    model = ResNetCIFAR(8, shortcut="projection")
    structure = trace(TracedModel.of(model, model.example_input_array))
    streams = {group.width for group in structure.groups if len(group.producers) > 1}
    assert streams == {16, 32, 64}
    assert [entry.layer for entry in structure.frozen] == ["linear"]
    extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in ResNetCIFAR(8).parameters())
    assert extra == (16 * 32 + 64) + (32 * 64 + 128)
    with pytest.raises(ValueError, match=r'`shortcut` of "pad" or "projection", got \'b\''):
        ResNetCIFAR(8, shortcut="b")  # type: ignore[arg-type]


def test_a_depth_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"expected `depth` of 6n \+ 2, got 21"):
        ResNetCIFAR(21)


def counted(model: nn.Module, size: int = 32) -> tuple[int, int]:
    """Parameters, and floating point operations (2 per multiplication) of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


# What the thesis (table 3.2) prints: 0.85 M and 2.5e8, 2.2 M and 6.1e8. Chen's MobileNetV2 has 2.24 M and 5.95e8; 6.1e8
# is what 1×1 convolutions as shortcuts would give, with 2.30 M.
@pytest.mark.parametrize(
    ("build", "millions", "flops"),
    [
        (lambda: ResNetCIFAR(56), 0.853, 2.51e8),
        (lambda: ResNetCIFAR(20), 0.2697, 8.11e7),
        (MobileNetV2CIFAR, 2.2378, 5.95e8),
        (VGG16CIFAR, 14.724, 6.27e8),
    ],
    ids=["resnet-56", "resnet-20", "mobilenet", "vgg"],
)
def test_sizes_are_those_that_are_known(build: Callable[[], nn.Module], millions: float, flops: float) -> None:
    model = build()
    params, operations = counted(model)
    assert params == pytest.approx(1e6 * millions, rel=5e-4)
    assert operations == pytest.approx(flops, rel=5e-3)
    structure = trace(TracedModel.of(model, model.example_input_array))
    assert structure.cost.params(structure.widths) == params
    assert 2 * structure.cost.macs(structure.widths) == operations


def test_the_engine_counts_resnet50_as_is_known() -> None:
    model = torchvision.models.resnet50(weights=None)
    structure = trace(TracedModel.of(model, torch.zeros(1, 3, 224, 224)))
    assert structure.cost.params(structure.widths) == pytest.approx(25.6e6, rel=2e-3)
    assert 2 * structure.cost.macs(structure.widths) == pytest.approx(8.2e9, rel=5e-3)


@pytest.mark.parametrize("build", [MobileNetV2CIFAR, VGG16CIFAR])
def test_half_of_every_group_leaves_the_masked_network(build: Callable[[], LightningModule]) -> None:
    model = build().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.1)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    structure = trace(TracedModel.of(model, x))
    axes = structure.axes(half(structure))
    fixed = sum(p.numel() for name, p in model.named_parameters() if name == "linear.bias")
    assert structure.cost.params(dict.fromkeys(structure.widths, 0)) == fixed
    torch.testing.assert_close(shrunk(model, axes)(x), masked(model, axes)(x), rtol=1e-12, atol=1e-12)


def test_mobilenet_adds_what_has_the_same_shape() -> None:
    model = MobileNetV2CIFAR().eval()
    assert [i for i, block in enumerate(model.blocks) if block.residual] == [2, 4, 5, 7, 8, 9, 11, 12, 14, 15]
    x = torch.randn(1, 24, 8, 8)
    block = model.blocks[2]
    torch.testing.assert_close(block(x), x + block.body(x))


def test_mobilenet_is_scored_on_the_expansion_convolution() -> None:
    model = MobileNetV2CIFAR()
    structure = trace(TracedModel.of(model, model.example_input_array))
    group = structure.group("blocks.3.body.0")
    scores = score_groups(L1("first"), [group], dict(model.named_parameters()), None)
    expected = model.blocks[3].body[0].weight.detach().double().abs().sum((1, 2, 3))
    torch.testing.assert_close(scores["blocks.3.body.0"], expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match='"all" or "first"'):
        L1("last")  # type: ignore[arg-type]


def test_the_best_five_of_many_classes_are_logged() -> None:
    images, labels = torch.randn(60, 4), torch.arange(60) % 12
    data = DataLoader(TensorDataset(images, labels), batch_size=25)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    model = MLPClassifier([4, 8, 12])
    (logged,) = trainer.validate(model, data, verbose=False)
    with torch.no_grad():
        right = (model.eval()(images).topk(5).indices == labels[:, None]).any(1)
    assert logged["val_acc_top5"] == pytest.approx(float(right.float().mean()))
    (few,) = trainer.validate(MLPClassifier([4, 8, 10]), DataLoader(TensorDataset(images, labels % 10)), verbose=False)
    assert set(few) == {"val_loss", "val_acc"}


@pytest.mark.parametrize(
    ("model", "data", "text"),
    [
        (MLPClassifier([64, 9]), Digits(), r"MLPClassifier: expected at least the 10 classes of Digits, got 9\. Set "),
        (SegNet(3, [(4, 1)], (3, 32, 32)), Shapes(20), "SegNet: expected at least the 4 classes of Shapes, got 3"),
    ],
    ids=["classes", "classes of pixels"],
)
@pytest.mark.parametrize("verb", ["fit", "test"])
def test_more_classes_in_the_data_are_refused(model: LightningModule, data: ImageData, text: str, verb: str) -> None:
    """Before anything runs, the sanity check included."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, **quiet)
    with pytest.raises(ValueError, match=text):
        getattr(trainer, verb)(model, data)


def test_fewer_classes_in_the_data_are_not() -> None:
    trainer = Trainer(accelerator="cpu", fast_dev_run=True, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(MLPClassifier([64, 12]), Digits())
    assert trainer.global_step == 1


def test_pixels_of_no_class_are_none() -> None:
    data = Shapes(20)
    data.setup("fit")
    data._splits["train"].labels[:, 0] = 255
    assert data.num_classes == 4
