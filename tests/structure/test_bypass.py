"""Which layers of a chain can go, and with which poolings."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.models import VGG16CIFAR, ResNetCIFAR, SegNet
from lightning_prune.structure import TracedModel, trace
from lightning_prune.structure.bypass import find_bypasses
from lightning_prune.structure.flow import with_flow


def bypasses_of(model, *inputs):
    traced = TracedModel.of(model, *inputs)
    return find_bypasses(trace(traced), traced)


def block(inputs, outputs, **how):
    how = {"kernel_size": 3, "padding": 1} | how
    return [nn.Conv2d(inputs, outputs, **how), nn.BatchNorm2d(outputs), nn.ReLU()]


def chain(*, flat=False, features=7, **how):
    end = (nn.Flatten(),) if flat else (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(
        *(*block(3, 4), nn.MaxPool2d(2), *block(4, 5), *block(5, 6, **how), nn.MaxPool2d(2), *block(6, 7)),
        *(*end, nn.Linear(features, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 3)),
    )


IMAGES = torch.zeros(2, 3, 8, 8)


def test_layers_of_a_chain_go_with_norm_and_activation():
    found = bypasses_of(chain(), IMAGES)
    assert {name: (b.before, b.inputs, b.modules, dict(b.consumers)) for name, b in found.groups.items()} == {
        "4": ("0", 1, ("4", "5", "6"), {"7": 1}),
        "7": ("4", 1, ("7", "8", "9"), {"11": 1}),
        "11": ("7", 1, ("11", "12", "13"), {"16": 1}),
        "16": ("11", 1, ("16", "17", "18"), {"19": 1}),
    }
    # The pooling behind the first layer stays with it; the second goes with both layers of its stage.
    assert found.pools == {"10": {"4", "7"}}
    assert found.modules(["7", "4"]) == ("7", "8", "9", "4", "5", "6", "10")
    assert found.modules(["7"]) == ("7", "8", "9")
    assert found.reads("11", ["11", "7", "4"]) == ("0", 1)
    assert found.consumers(["7", "4"]) == {"11": ("0", 1)}
    assert found.consumers(["4"]) == {"7": ("0", 1)}
    assert found.widths({"0": 4, "4": 5, "7": 6, "11": 7, "16": 8}, ["7", "4"]) == {
        "0": 4, "4": 4, "7": 4, "11": 7, "16": 8,
    }  # fmt: skip


def test_a_stride_goes_along_where_the_size_does_not_matter():
    assert "7" in bypasses_of(chain(stride=2), IMAGES).groups
    flat = chain(stride=2, flat=True, features=7)
    found = bypasses_of(flat, IMAGES)
    assert "7" not in found.groups
    assert "4" in found.groups


def test_a_pooling_stays_where_the_size_matters():
    found = bypasses_of(chain(flat=True, features=28), IMAGES)
    assert [*found.groups] == ["4", "7", "11", "15"]
    assert found.groups["11"].consumers == {"15": 4}
    assert found.groups["15"].inputs == 4
    assert found.reads("15", ["15", "11"]) == ("7", 4)
    assert found.consumers(["15", "11"]) == {"18": ("7", 4)}
    assert found.pools == {}


def test_what_is_more_than_a_chain_stays():
    class Branched(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.left, self.right = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(5, 7)
            self.joined, self.tied, self.head = nn.Linear(13, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem(x).relu()
            x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
            return self.head(F.relu(self.tied(self.tied(self.joined(x).relu()))))

    # `left` and `right` are half of what `joined` reads, which reads two groups; `tied` is called twice.
    assert bypasses_of(Branched(), torch.zeros(2, 4)).groups == {}


def test_a_residual_block_is_found_too_and_shared_activations_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3), nn.ReLU()

        def forward(self, x):
            return self.c(self.act(self.b(self.act(self.a(x)))))

    found = bypasses_of(Net(), torch.zeros(2, 4))
    assert {name: b.modules for name, b in found.groups.items()} == {"b": ("b",)}


def test_the_network_is_left_as_it_is():
    model = chain().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    bypasses_of(model, IMAGES)
    assert model.training
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("size", [32, 64])
def test_vgg16(size):
    found = bypasses_of(VGG16CIFAR(), torch.zeros(1, 3, size, size))
    assert len(found.groups) == 12
    assert [sorted(stage) for stage in found.pools.values()] == [
        ["features.10", "features.7"],
        ["features.14", "features.17", "features.20"],
        ["features.24", "features.27", "features.30"],
        ["features.34", "features.37", "features.40"],
    ]


@pytest.mark.parametrize("kind", ["resnet", "blocks"])
def test_a_stage_goes_with_its_blocks(kind):
    """Whether its blocks are in a module of their own or not."""
    model = ResNetCIFAR(14, shortcut="projection")
    if kind == "blocks":
        model = nn.Sequential(
            *(model.conv1, model.bn1, nn.ReLU(), *model.layer1, *model.layer2, *model.layer3),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.linear),
        )
    traced = TracedModel.of(model, torch.zeros(2, 3, 8, 8))
    structure = with_flow(trace(traced), traced)
    found = {name: bypass for name, bypass in find_bypasses(structure, traced).groups.items() if bypass.along}
    names = {"resnet": ("layer2", "layer3"), "blocks": (("5", "6"), ("7", "8"))}[kind]
    second, third = found.values()
    assert second.modules == (("layer2",) if kind == "resnet" else names[0])
    assert third.modules == (("layer3",) if kind == "resnet" else names[1])
    assert third.before in found
    assert len(second.along) == 2
    assert len(second.consumers) == 2
    # The stem is the first layer of the first stage, and reads the image.
    assert second.before not in found


def test_a_stage_whose_layers_share_a_module_with_others_stays():
    class Flat(nn.Module):
        """Blocks that are no modules: identities in place of the layers would add the input to itself."""

        def __init__(self):
            super().__init__()
            self.stem, self.project, self.a, self.b, self.head = (
                nn.Conv2d(i, o, k, padding=k // 2)
                for i, o, k in ((3, 4, 3), (4, 6, 1), (4, 5, 3), (5, 6, 3), (6, 2, 1))
            )

        def forward(self, x):
            x = self.stem(x).relu()
            x = (self.project(x) + self.b(self.a(x).relu())).relu()
            return self.head(x).mean((2, 3))

    traced = TracedModel.of(Flat(), IMAGES)
    structure = with_flow(trace(traced), traced)
    assert "project" in structure.widths
    assert not any(bypass.along for bypass in find_bypasses(structure, traced).groups.values())


def test_places_of_maxima_are_no_way_around_a_layer():
    """The decoder of SegNet unpools with the encoder's indices: they say where, not what."""
    torch.manual_seed(0)
    traced = TracedModel.of(SegNet(3, ((4, 2), (5, 2)), (3, 8, 8)), torch.randn(2, 3, 8, 8))
    structure = with_flow(trace(traced), traced)
    assert structure.flow is not None
    for name in structure.widths:
        assert "no other path leads around it" in structure.flow.without([name])
    found = find_bypasses(structure, traced).groups
    assert {"encoder.1.0", "encoder.1.3", "decoder.0.0", "decoder.1.0"} <= found.keys()
    assert not {"encoder.0.0", "encoder.0.3"} & found.keys()  # they read the input, or are read at two sizes
