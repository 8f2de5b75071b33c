"""Where networks can end, and that they do: found, replaced in a live network, equal to one written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import make_layers

from lightning_prune.models import CNNClassifier, MLPClassifier, ResNetCIFAR
from lightning_prune.structure import StructureError, TracedModel, trace
from lightning_prune.structure.backbone import Backbone
from lightning_prune.structure.boundaries import Boundary, find_boundaries
from lightning_prune.surgery import transaction
from lightning_prune.surgery.truncation import truncated


def example(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def boundaries(model: nn.Module, size: int, head: str | None = None) -> tuple[Boundary, ...]:
    return find_boundaries(TracedModel.of(model, example(size)), head)


def replaced(model: nn.Module, boundary: Boundary, x: Tensor) -> nn.Module:
    """The network truncated while it is alive, by a transaction that verifies it."""
    model = copy.deepcopy(model)
    traced = TracedModel.of(model, x)
    with transaction(model, run=lambda: model(x)) as change:
        change.replace(truncated(model, boundary), lambda: trace(traced), new_dense=True)
    return model.eval()


class Chain(nn.Module):
    """Three convolutions, a pooling in between, activations in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.third = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 3)
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.first(x))))
        x = F.relu(self.third(F.relu(self.second(x))))
        return self.classifier(x.mean((2, 3)))


def test_a_chain_ends_after_each_layer() -> None:
    first, second, whole = boundaries(Chain().double(), 16)
    assert first == Boundary("norm", ("first",), 4, ("pool", "second", "third"), {"classifier": 4})
    assert second == Boundary("second", ("first", "second"), 6, ("third",), {"classifier": 6})
    assert whole == Boundary("third", ("first", "second", "third"), 8, (), {})


class Vgg(nn.Module):
    """Torchvision's layers, activations in place, and a small head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = make_layers([4, "M", 6, 8, "M", 8, "M"], batch_norm=True)
        self.avgpool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


STAGES = ["layer1.0", "layer1", "layer2.0", "layer2", "layer3.0", "layer3", "layer4.0", "layer4"]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    # Modules of a chain; blocks of residual networks.
    "vgg": (Vgg, 32, [f"features.{i}" for i in (2, 6, 9, 13)]),
    "resnet": (lambda: torchvision.models.resnet18(num_classes=5), 32, ["relu", *STAGES]),
    "timm's resnet": (lambda: timm.create_model("resnet18", num_classes=5), 32, ["act1", *STAGES]),
    "cifar's resnet": (lambda: ResNetCIFAR(14, 5), 16, ["bn1", *STAGES[:6]]),
    "googlenet": (
        lambda: torchvision.models.googlenet(num_classes=5, aux_logits=False, init_weights=False),
        64,
        ["conv1", "conv2", "conv3", *(f"inception{n}" for n in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"))],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_ends_of_known_networks(name: str) -> None:
    build, size, expected = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    found = boundaries(model, size)
    assert [boundary.name for boundary in found] == expected
    order = [layer.name for layer in Backbone.of(model).layers]
    assert sorted(found[-1].layers, key=order.index) == order
    assert not found[-1].tail
    for shallow, deep in pairwise(found):
        assert set(shallow.layers) < set(deep.layers)


@pytest.mark.parametrize("name", ["vgg", "resnet", "timm's resnet", "cifar's resnet"])
def test_a_live_network_becomes_the_one_that_ends_there(name: str) -> None:
    """Its answers are the head's on what the dense network has at that place, seen by a hook."""
    build, size, _ = NETWORKS[name]
    torch.manual_seed(0)
    model, x, seen = build().double().eval(), example(size), {}
    for boundary in boundaries(model, size)[1:-1:3]:
        handle = model.get_submodule(boundary.name).register_forward_hook(
            lambda _, __, out, key=boundary.name: seen.update({key: out})
        )
        before = model(x)
        handle.remove()
        small: Any = replaced(model, boundary, x)
        (head,) = [module for module in small.modules() if isinstance(module, nn.Linear)]
        end = seen[boundary.name]
        pooled = (F.max_pool2d(end, 2) if name == "vgg" else end).mean((2, 3))  # poolings behind the end stay
        torch.testing.assert_close(small(x), head(pooled))
        assert small(x).shape == before.shape
        left = {layer.name for layer in Backbone.of(small).layers}
        assert left == set(boundary.layers)
        assert torch.equal(model(x), before)


def test_the_same_as_timms_own_pruning_of_layers() -> None:
    torch.manual_seed(0)
    model, x = timm.create_model("resnet18", num_classes=5).double().eval(), example(32)
    by_name = {boundary.name: boundary for boundary in boundaries(model, 32)}
    for stage in (1, 2, 3):
        theirs = copy.deepcopy(model)
        (index,) = theirs.prune_intermediate_layers([stage], prune_norm=False, prune_head=True)
        mine = replaced(model, by_name[f"layer{stage}"], x)
        (features,) = theirs.forward_intermediates(x, indices=[index], intermediates_only=True)
        torch.testing.assert_close(mine.forward_features(x), features)
        count = sum(p.numel() for n, p in mine.named_parameters() if not n.startswith("fc"))
        assert count == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("build", "size", "least"),
    [
        (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=5), 32, 28),
        (lambda: torchvision.models.DenseNet(4, (2, 2, 2), 8, num_classes=5), 32, 4),
        (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5), 32, 15),
    ],
    ids=["lite0", "densenet", "shufflenet"],
)
def test_other_networks_end_at_half_of_their_depth(build: Callable[[], nn.Module], size: int, least: int) -> None:
    model = build().double().eval()
    found = boundaries(model, size)
    assert len(found) >= least
    boundary, x = found[len(found) // 2], example(size)
    small = replaced(model, boundary, x)
    assert small(x).shape == (2, 5)
    assert {layer.name for layer in Backbone.of(small).layers} == set(boundary.layers)


def test_a_flattened_map_is_read_by_a_wider_layer() -> None:
    model = CNNClassifier(classes=5).double()
    boundary, _ = boundaries(model, 32)
    assert boundary.readers == {"classifier.1": 16 * 16 * 16}
    assert replaced(model, boundary, example(32))(example(32)).shape == (2, 5)


def test_a_classifier_that_is_a_convolution() -> None:
    model = torchvision.models.squeezenet1_1(num_classes=5).double()
    with pytest.raises(StructureError, match="name its classifier by `head`"):
        boundaries(model, 64)
    found = boundaries(model, 64, "classifier")
    assert found[-2].readers == {}
    assert found[0].readers == {"classifier.1": 64}
    assert replaced(model, found[0], example(64))(example(64)).shape == (2, 5)


class Crossed(nn.Module):
    """What the first layer gives is needed at the end: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.third(F.relu(self.second(F.relu(x + self.first(x)))))
        return self.head(torch.cat([x, y], 1).mean((2, 3)))


@pytest.mark.parametrize("model", [Crossed(), MLPClassifier([3 * 8 * 8, 4, 2])])
def test_networks_that_are_no_chain_are_refused(model: nn.Module) -> None:
    with pytest.raises(StructureError, match="expected a backbone that is a chain of layers or blocks"):
        boundaries(model.double(), 8)


def test_several_outputs_are_refused() -> None:
    class Two(Chain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    with pytest.raises(StructureError, match="expected one output"):
        boundaries(Two().double(), 16)


def test_a_layer_called_twice_is_no_boundary() -> None:
    class Again(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.second(self.first(x)))
            return self.classifier(self.third(self.second(x[:, :4])).mean((2, 3)))

    assert all("second" not in b.layers and "second" not in b.tail for b in boundaries(Again().double(), 16)[:-1])


def test_the_network_is_left_as_it_is() -> None:
    model = torchvision.models.resnet18().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    boundaries(model, 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
