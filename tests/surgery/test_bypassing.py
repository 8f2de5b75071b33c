"""Networks without some layers of a chain: the same as written by hand."""

import pytest
import torch
from torch import nn

from lightning_prune.models import ResNetCIFAR
from lightning_prune.planning.ranked import plan_ranked
from lightning_prune.structure import TracedModel, trace
from lightning_prune.structure.bypass import find_bypasses
from lightning_prune.structure.flow import with_flow
from lightning_prune.surgery import History, history_of, replay, transaction
from lightning_prune.surgery.bypassing import bypassed


def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


def chain():
    return network([6, 8, 8], pooled=[0, 2])


def cut(model, removals, limit):
    x = torch.randn(2, 3, 8, 8)
    traced = TracedModel.of(model, x)
    structure = trace(traced)
    bypasses = find_bypasses(structure, traced)
    plan = plan_ranked(structure, removals, limit, bypasses)
    with transaction(model, run=lambda: model(x)) as change:
        after = change.keep(structure, plan.kept)
        if plan.bypassed:
            specs = bypassed(model, bypasses, plan.bypassed, after.widths)
            after = change.replace(specs, lambda: trace(traced), after)
    return plan, after


def network(convolutions, pooled, hidden=9):
    layers = []
    for number, (inputs, outputs) in enumerate(zip([3, *convolutions], convolutions, strict=False)):
        layers += [*block(inputs, outputs), *([nn.MaxPool2d(2)] if number in pooled else [])]
    head = [nn.Linear(convolutions[-1], hidden), nn.ReLU(), nn.Linear(hidden, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


@pytest.mark.parametrize(
    ("removals", "small"),
    [
        ([{"0": (1, 2)}, {"7": range(8)}], lambda: network([4, 8], pooled=[0, 1])),
        ([{"4": range(8)}, {"7": (1, 5)}], lambda: network([6, 6], pooled=[0, 1])),
        # A stage goes with its pooling, whatever else became narrower.
        ([{"7": range(8)}, {"4": range(8)}, {"0": (0,)}], lambda: network([5], pooled=[0])),
    ],
    ids=["last of a stage", "first of a stage", "stage"],
)
def test_equals_the_network_written_by_hand(removals, small):
    torch.manual_seed(0)
    model, small = chain(), small()
    target = sum(p.numel() for p in small.parameters())
    plan, after = cut(model, removals, target)
    assert plan.params == target == sum(p.numel() for p in model.parameters())
    assert [p.shape for p in model.parameters()] == [p.shape for p in small.parameters()]
    with torch.no_grad():
        for mine, theirs in zip(small.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(model.eval()(x), small.eval()(x))
    assert after.cost.params(after.widths) == target
    assert not set(plan.bypassed) & after.widths.keys()


def test_the_history_says_it_all():
    torch.manual_seed(0)
    model = chain()
    cut(model, [{"7": range(8)}, {"4": range(8)}, {"0": (0,)}], 235)
    again = chain()
    replay(again, History.from_plain(history_of(model).to_plain()))
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]
    again.load_state_dict(model.state_dict())
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(model.eval()(x), again.eval()(x))


@pytest.mark.parametrize("branch", [(0, 1), range(64)], ids=["some units", "a whole branch"])
def test_a_stage_of_a_residual_network_goes_whole(branch):
    """The layers behind read what it read, but for those of a branch that vanishes too."""
    torch.manual_seed(0)
    model = ResNetCIFAR(14, shortcut="projection")
    x = torch.randn(2, 3, 16, 16)
    traced = TracedModel.of(model, x)
    structure = with_flow(trace(traced), traced)
    bypasses = find_bypasses(structure, traced)
    (stage,) = (name for name, bypass in bypasses.groups.items() if bypass.modules == ("layer2",))
    removals = [{"layer3.0.conv1": branch}, {stage: range(32)}]
    block, left = model.layer3[0], 64 - len(branch)
    whole = sum(p.numel() for p in model.parameters())
    gone = sum(p.numel() for p in model.layer2.parameters()) + 16 * 64  # what reads 16 channels instead of 32
    gone += 64 * (9 * (32 + 64) + 2) - left * (9 * (16 + 64) + 2)
    plan = plan_ranked(structure, removals, whole - gone, bypasses)
    with transaction(model, run=lambda: model(x)) as change:
        after = change.keep(structure, plan.kept)
        change.replace(bypassed(model, bypasses, plan.bypassed, after.widths), lambda: trace(traced), after)
    assert plan.params == whole - gone == sum(p.numel() for p in model.parameters())
    assert isinstance(model.layer2, nn.Identity)
    assert block.shortcut[0].in_channels == 16
    assert [tuple(p.shape) for p in block.conv1.parameters()] == ([(left, 16, 3, 3)] if left else [])
    assert model(x).shape == (2, 10)
