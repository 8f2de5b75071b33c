"""Whole branches taken out: equal to the network in which all that is gone is zero, and back again."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.models import ResNetCIFAR
from lightning_prune.scoring import DataPass
from lightning_prune.structure import Structure, TracedModel, trace
from lightning_prune.structure.flow import with_flow
from lightning_prune.surgery import (
    CutError,
    FoldMean,
    History,
    HistoryError,
    Reinitialise,
    Repair,
    Ridge,
    attach,
    cut,
    edits_of,
    history_of,
    install,
    load_from,
    repaired,
    replay,
    save_into,
)
from tests.support.surgery import cut_and_check


class Bottleneck(nn.Module):
    """With a bias in its last convolution, a stride, an in-place addition and a projection."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, outputs, 1)
        self.project = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu())
        out += self.project(x)
        return out.relu()


class PreActivation(nn.Module):
    """Its first norm is computed for the branch alone."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 6, 3, padding=dilation, dilation=dilation)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, channels, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class Gate(nn.Module):
    """Squeeze and excitation: its own units may vanish alone, and go with those it weighs."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.squeeze, self.excite, self.up = (
            nn.Conv2d(8, 5, 1),
            nn.Linear(5, 3),
            nn.Linear(3, 5),
            nn.Conv2d(5, 8, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x).relu()
        gate = self.excite(self.squeeze(y.mean((2, 3))).relu()).sigmoid()
        return x + self.up(y * gate[:, :, None, None])


class Residual(nn.Module):
    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*members)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Dense(nn.Module):
    """What is concatenated may vanish beside what stays."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.norm = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([x, self.grow(x)], 1))


def image(*layers: nn.Module, channels: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)
    )


IMAGE, VECTOR = (3, 3, 8, 8), (5, 6)
#: Network, shape of its input, groups to take out, layers that go.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...], dict[str, str]]] = {
    "resnet": (
        lambda: ResNetCIFAR(14),
        (2, 3, 32, 32),
        ("layer1.1.conv1", "layer2.0.conv1"),
        {
            **{f"{block}.conv1": "nothing" for block in ("layer1.1", "layer2.0")},
            **{f"{block}.bn1": "identity" for block in ("layer1.1", "layer2.0")},
            **{f"{block}.conv2": "constant" for block in ("layer1.1", "layer2.0")},
        },
    ),
    "bottleneck": (
        lambda: image(Bottleneck(8, 4, 8), Bottleneck(8, 5, 12, stride=2), channels=12),
        IMAGE,
        ("1.conv2", "2.conv1"),
        {
            **dict.fromkeys(("1.conv1", "1.conv2", "2.conv1", "2.conv2"), "nothing"),
            **dict.fromkeys(("1.bn1", "1.bn2", "2.bn1", "2.bn2"), "identity"),
            **dict.fromkeys(("1.conv3", "2.conv3"), "constant"),
        },
    ),
    "pre-activation": (
        lambda: image(PreActivation(8), PreActivation(8, dilation=2), nn.BatchNorm2d(8)),
        IMAGE,
        ("2.conv1",),
        {"2.bn1": "identity", "2.conv1": "nothing", "2.bn2": "identity", "2.conv2": "constant"},
    ),
    "gate alone": (lambda: image(Gate()), IMAGE, ("1.squeeze",), {"1.squeeze": "nothing", "1.excite": "constant"}),
    "gate and all": (
        lambda: image(Gate()),
        IMAGE,
        ("1.down",),
        {"1.down": "nothing", "1.squeeze": "nothing", "1.excite": "nothing", "1.up": "constant"},
    ),
    "sequential": (
        lambda: image(Residual(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1))),
        IMAGE,
        ("1.branch.0",),
        {"1.branch.0": "nothing", "1.branch.1": "identity", "1.branch.3": "constant"},
    ),
    "depthwise": (
        lambda: image(
            Residual(
                *(nn.Conv2d(8, 6, 1), nn.ReLU6(), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)),
                *(nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)),
            )
        ),
        IMAGE,
        ("1.branch.0",),
        {
            **dict.fromkeys(("1.branch.0", "1.branch.2"), "nothing"),
            **{"1.branch.3": "identity", "1.branch.5": "constant"},
        },
    ),
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(6, 7), Residual(nn.LayerNorm(7), nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 7)), nn.Linear(7, 2)
        ),
        VECTOR,
        ("1.branch.1",),
        {"1.branch.0": "identity", "1.branch.1": "nothing", "1.branch.3": "constant"},
    ),
    "concatenated": (lambda: image(Dense(), channels=12), IMAGE, ("1.grow",), {"1.grow": "nothing"}),
}
cases = pytest.mark.parametrize("name", CASES)


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model = CASES[name][0]().double()
    x = torch.randn(CASES[name][1], dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn_like(x))
    return model, x


def structure_of(model: nn.Module, x: Tensor) -> Structure:
    traced = TracedModel.of(model, x)
    return with_flow(trace(traced), traced)


def gone(structure: Structure, groups: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(structure.without(groups).groups, ())


def masked(model: nn.Module, structure: Structure, groups: dict[str, tuple[int, ...]]) -> nn.Module:
    """A copy in which every slice of the units that are not kept is zero."""
    model = copy.deepcopy(model)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, kept in groups.items():
            group = structure.group(name)
            lost = np.setdiff1d(np.arange(group.width), kept)
            for member in group.members:
                positions = torch.from_numpy(member.index[lost].ravel())
                named[member.tensor].index_fill_(member.dim, positions, 0)
    return model


def operate(model: nn.Module, structure: Structure, kept: dict[str, tuple[int, ...]], number: int = 0) -> None:
    """A cut as a callback would make it."""
    history = history_of(model) or History.begin(structure)
    for edit in edits_of(structure, kept, number, 10 * number, number):
        history = history.add(edit, model)
    cut(model, structure.axes(kept), drops=structure.drops(kept))
    attach(model, history)


@cases
@pytest.mark.parametrize("training", [False, True])
def test_what_remains_is_the_masked_network(name: str, training: bool) -> None:
    model, x = build(name)
    structure = structure_of(model, x)
    kept = gone(structure, CASES[name][2])
    assert structure.drops(kept) == CASES[name][3]
    reference = masked(model, structure, kept).train(training)
    operate(model, structure, kept)
    model.train(training)
    if name != "mlp":  # a layer norm is not zero where its input is
        torch.testing.assert_close(model(x), reference(x), rtol=1e-12, atol=1e-12)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())  # nothing is computed for nobody, as DDP demands


@cases
def test_narrow_and_gone_together_and_narrower_later(name: str) -> None:
    model, x = build(name)
    structure = structure_of(model, x)
    kept: dict[str, tuple[int, ...]] = {g.name: tuple(range(1, g.width)) for g in structure.groups if g.width > 2}
    kept |= gone(structure, CASES[name][2])
    reference = masked(model, structure, kept).eval()
    operate(model, structure, kept)
    if name != "mlp":
        torch.testing.assert_close(model.eval()(x), reference(x), rtol=1e-12, atol=1e-12)
    after = structure.take(kept)
    later = {g.name: tuple(range(g.width - 1)) for g in after.groups if g.width > 2}
    reference = masked(model, after, later).eval()
    operate(model, after, later, 1)
    if name != "mlp":
        torch.testing.assert_close(model.eval()(x), reference(x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def means_of(model: nn.Module, layers: list[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """What each unit of these layers gives on average over samples and positions."""
    outputs: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    handles = [
        model.get_submodule(layer).register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out.clone()))
        for layer, seen in outputs.items()
    ]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(seen).transpose(0, 1).flatten(1).mean(1) for layer, seen in outputs.items()}


@cases
@pytest.mark.parametrize("repair", [FoldMean(), Ridge()])
@pytest.mark.filterwarnings("ignore:.* leaves some layers unchanged")
def test_a_constant_is_what_the_layer_gave_on_average(name: str, repair: Repair) -> None:
    model, x = build(name)
    structure = structure_of(model.eval(), x)
    batches = [*(torch.randn_like(x) for _ in range(4)), x[:1]]
    kept = gone(structure, CASES[name][2])
    axes, drops = structure.axes(kept), structure.drops(kept)
    means = means_of(model, [layer for layer, kind in drops.items() if kind == "constant"], batches)
    old = {n: t.clone() for n, t in model.state_dict().items()}
    contents = repaired(partial(copy.deepcopy, model), axes, [repair], DataPass(batches), drops)
    install(cut(model, axes, drops=drops), model, contents)
    expected = {}
    for layer, mean in means.items():
        norm = layer.replace("conv2", "bn2") if name == "resnet" else "1.branch.6"
        if f"{layer}.bias" in old:
            expected[f"{layer}.bias"] = mean
        else:  # what no longer comes is no longer subtracted
            expected[f"{norm}.running_mean"] = old[f"{norm}.running_mean"] - mean
    assert contents.keys() >= expected.keys()
    for tensor, value in expected.items():
        torch.testing.assert_close(model.state_dict()[tensor], value, rtol=1e-12, atol=1e-12)


def test_a_constant_branch_goes_without_a_trace() -> None:
    model, x = build("bottleneck")
    for block in (model[1], model[2]):
        nn.init.zeros_(block.bn2.weight)
        nn.init.uniform_(block.bn2.bias)
    expected = model.eval()(x).detach()
    structure = structure_of(model, x)
    kept = gone(structure, CASES["bottleneck"][2])
    axes, drops = structure.axes(kept), structure.drops(kept)
    contents = repaired(partial(copy.deepcopy, model), axes, [FoldMean()], DataPass([x]), drops)
    change = cut(model, axes, drops=drops)
    assert (model(x) - expected).abs().max() > 1e-3
    install(change, model, contents)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_constants_start_anew_at_zero() -> None:
    model, x = build("bottleneck")
    structure = structure_of(model, x)
    kept = gone(structure, CASES["bottleneck"][2])
    axes, drops = structure.axes(kept), structure.drops(kept)
    contents = repaired(partial(copy.deepcopy, model), axes, [Reinitialise()], None, drops)
    assert model[1].conv3.bias.any()
    install(cut(model, axes, drops=drops), model, contents)
    assert not model[1].conv3.bias.any()
    assert not model[2].conv3.bias.any()


@cases
def test_the_structure_afterwards_is_that_of_the_network_afterwards(name: str) -> None:
    model, x = build(name)
    structure = structure_of(model, x)
    kept = gone(structure, CASES[name][2])
    operate(model, structure, kept)
    after, again = structure.take(kept), structure_of(model, x)
    assert after.widths == again.widths
    assert {g.name: g for g in after.groups} == {g.name: g for g in again.groups}
    assert {(f.tensor, f.dim) for f in after.frozen} == {(f.tensor, f.dim) for f in again.frozen}
    assert after.cost.shapes == again.cost.shapes
    widths = after.widths
    assert after.cost.params(widths) == again.cost.params(widths) == sum(p.numel() for p in model.parameters())
    assert after.cost.macs(widths) == again.cost.macs(widths)
    # What the stand-ins write before they are as large as the branch was.
    assert after.cost.memory(widths) == pytest.approx(again.cost.memory(widths), rel=0.05)


@cases
def test_any_checkpoint_loads_into_any_network(name: str) -> None:
    """Dense, narrow with layers out, and narrower: one after another into one network and each into a new one."""
    model, x = build(name)
    checkpoints, outputs = [], []

    def keep() -> None:
        file = io.BytesIO()
        checkpoint = {"state_dict": model.state_dict()}
        save_into(checkpoint, model)
        torch.save(checkpoint, file)
        file.seek(0)
        checkpoints.append(torch.load(file, weights_only=True))
        outputs.append(model.eval()(x).detach())

    keep()
    structure = structure_of(model, x)
    for number, kept in enumerate(
        [
            {g.name: tuple(range(1, g.width)) for g in structure.groups if g.width > 2},
            gone(structure, CASES[name][2]),
            {g.name: (0, 1) for g in structure.groups if g.name not in gone(structure, CASES[name][2])},
        ]
    ):
        operate(model, structure, kept, number)
        structure = structure.take(kept)
        keep()
    wanderer, _ = build(name, seed=5)
    for number in (2, 3, 0, 3, 1, 2, 2, 0):
        fresh, _ = build(name, seed=7)
        for network in (wanderer, fresh):
            load_from(checkpoints[number], network)
            network.load_state_dict(checkpoints[number]["state_dict"])
            assert torch.equal(network.eval()(x), outputs[number])
    twin, _ = build(name)
    history = history_of(model)
    assert history is not None
    replay(twin, history)
    torch.testing.assert_close(twin.eval()(x), outputs[3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_optimizer_forgets_what_is_gone(optimizer: type[torch.optim.Optimizer]) -> None:
    model, x = build("bottleneck")
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    groups = [{"params": list(model[i].parameters())} for i in (0, 1, 2, 5)]
    optim = optimizer(groups, lr=0.01, **options)  # type: ignore[arg-type, call-arg]
    model(x).sum().backward()
    optim.step()
    structure = structure_of(model, x)
    kept = gone(structure, CASES["bottleneck"][2])
    cut_and_check(model, structure.axes(kept), [optim], (), lambda: model(x), structure.drops(kept))
    mine = {id(p) for p in model.parameters()}
    assert {id(p) for group in optim.param_groups for p in group["params"]} == mine
    assert {id(p) for p in optim.state} == mine
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().sum().backward()
    optim.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if b.grad.abs().max() > 0)


@cases
def test_a_failure_takes_everything_back(name: str) -> None:
    model, x = build(name)
    optim = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    optim.step()
    structure = structure_of(model, x)
    kept = gone(structure, CASES[name][2])
    modules, names = list(model.modules()), list(model.state_dict())
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optim.state_dict())
    runs = iter([0])

    def run() -> Tensor:
        next(runs, None)
        raise RuntimeError("planted")

    with pytest.raises(CutError, match="planted"):
        cut_and_check(model, structure.axes(kept), [optim], (), run, structure.drops(kept))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert names == list(model.state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    after = optim.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert all(torch.equal(after["state"][k]["exp_avg"], state["state"][k]["exp_avg"]) for k in state["state"])


def test_members_of_a_sequential_keep_their_places_and_names() -> None:
    model, x = build("sequential")
    before = {name: model.get_submodule(name) for name, _ in model.named_modules()}
    structure = structure_of(model, x)
    kept = gone(structure, CASES["sequential"][2])
    operate(model, structure, kept)
    assert [name for name, _ in model.named_modules()] == list(before)
    same = {name for name, module in model.named_modules() if module is before[name]}
    assert before.keys() - same == CASES["sequential"][3].keys()
    names = [name for name in model.state_dict() if "branch" in name]
    assert names == ["1.branch.3.bias", "1.branch.3.weight"]  # the one for its number of outputs alone


def test_what_would_cut_the_network_in_two_stays() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    structure = structure_of(plain, torch.randn(1, 3, 8, 8))
    for name in structure.widths:
        with pytest.raises(ValueError, match=f"{name} cannot lose all units: .*no other path leads around"):
            structure.axes({name: ()})


def test_two_paths_may_not_both_vanish() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) + self.d(self.c(x).relu())

    structure = structure_of(Two(), torch.randn(2, 4))
    assert structure.drops({"a": ()}) == {"a": "nothing", "b": "constant"}
    assert structure.drops({"c": ()}) == {"c": "nothing", "d": "constant"}
    with pytest.raises(ValueError, match="cannot lose all units"):
        structure.drops({"a": (), "c": ()})
    with pytest.raises(ValueError, match="cannot lose all units"):
        structure.take({"a": ()}).drops({"c": ()})


@pytest.mark.parametrize("what", ["subclass", "tied", "twice", "transposed"])
def test_layers_that_nothing_can_stand_in_for_stay(what: str) -> None:
    class Own(nn.Conv2d):
        pass

    inner: list[nn.Module] = [nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    if what == "subclass":
        inner[2] = Own(8, 8, 1)
    elif what == "transposed":
        inner[2] = nn.ConvTranspose2d(8, 8, 1)
    elif what == "tied":
        inner[2].weight = nn.Parameter(torch.randn(8, 8, 1, 1))
    branch = Residual(*inner)
    after: nn.Module = nn.Identity()
    if what == "tied":
        after = nn.Conv2d(8, 8, 1)
        after.weight = inner[2].weight  # type: ignore[assignment]
    model = image(branch, after, branch if what == "twice" else nn.Identity())
    structure = structure_of(model, torch.randn(IMAGE))
    name = "1.branch.0"
    if name in structure.widths:
        with pytest.raises(ValueError, match="cannot lose all units"):
            structure.drops({name: ()})
    else:
        assert what in ("tied", "twice")


def test_without_a_flow_nothing_vanishes() -> None:
    model, x = build("sequential")
    with pytest.raises(ValueError, match="at least one unit to stay"):
        trace(TracedModel.of(model, x)).axes({"1.branch.0": ()})


def test_a_history_of_another_network_is_refused() -> None:
    model, x = build("sequential")
    structure = structure_of(model, x)
    operate(model, structure, gone(structure, ("1.branch.0",)))
    checkpoint = {"state_dict": model.state_dict()}
    save_into(checkpoint, model)
    other = image(nn.ReLU()).double()
    with pytest.raises(HistoryError, match=r"1\.branch\.0 was taken out, here it is missing"):
        load_from(checkpoint, other)


def test_a_checkpoint_without_layers_loads_for_ever() -> None:
    """Written by version 2 of the format: the bottleneck of above, narrow, then without its branches, then narrower."""
    checkpoint = torch.load(Path(__file__).parent / "fixtures" / "depth_2.pt", weights_only=True)
    model, _ = build("bottleneck", seed=3)
    load_from(checkpoint, model)
    model.load_state_dict(checkpoint["state_dict"])
    torch.testing.assert_close(model.eval()(checkpoint["input"]), checkpoint["output"], rtol=0, atol=1e-9)
