"""Pruning without a Trainer."""

from __future__ import annotations

import copy
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_prune
from lightning_prune import (
    L2,
    NISP,
    SNIP,
    APoZ,
    Contribution,
    Explicit,
    FoldMean,
    OneShot,
    Reconstruction,
    ReestimateBatchNorm,
    Reinitialise,
    Ridge,
    Rollback,
    Scope,
    SequentialRidge,
    StructuredPruning,
    SynFlow,
    Taylor,
    prune,
)
from lightning_prune.models import CNNClassifier, MLPClassifier
from lightning_prune.reporting import measure
from lightning_prune.scoring import Criterion, DataPass, criteria
from lightning_prune.structure import StructureError, TracedModel, latency, trace
from lightning_prune.surgery import Repair, history_of, mask, repaired, replay
from tests.callbacks.small import Small, loaders, trainer
from tests.support.planted_times import plant_times


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    ).double()


EXAMPLE = torch.zeros(2, 3, 6, 6, dtype=torch.float64)


def test_a_network_that_computes_otherwise_at_the_widths_left_is_refused() -> None:
    class Otherwise(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x)
            return self[1](y if y.shape[1] > 3 else y.relu())

    net = Otherwise(nn.Linear(4, 12), nn.Linear(12, 3))
    x = torch.randn(5, 4)
    before = net(x).detach()
    with pytest.raises(StructureError, match=r"Otherwise .* at the widths of this cut"):
        prune(net, x, pruning_ratio=0.75)
    assert torch.equal(net(x), before)
    assert prune(net, x, pruning_ratio=0.5).final is not None


def test_what_remains_is_the_masked_network() -> None:
    net = network()
    dense, images = copy.deepcopy(net), torch.randn_like(EXAMPLE)
    report = prune(net, EXAMPLE, pruning_ratio=0.5)
    assert (net[0].out_channels, net[4].in_features, net[4].out_features) == (4, 64, 6)
    assert report.widths == {"0": 4, "4": 6}
    history = history_of(net)
    assert history is not None
    masked = copy.deepcopy(dense)
    mask(masked, history.axes)
    torch.testing.assert_close(net.eval()(images), masked.eval()(images), rtol=1e-12, atol=1e-12)


def test_layers_are_chosen_and_left_out() -> None:
    for options, expected in (
        ({"layers": "4"}, {"0": 8, "4": 6}),
        ({"ignore": "4"}, {"0": 4, "4": 12}),
        ({"layers": ["0", "4"], "ignore": ["0"]}, {"0": 8, "4": 6}),
    ):
        assert prune(network(), EXAMPLE, pruning_ratio=0.5, **options).widths == expected  # type: ignore[arg-type]


def test_a_budget_counts_from_the_dense_network() -> None:
    net = network()
    dense = sum(p.numel() for p in net.parameters())
    prune(net, EXAMPLE, budget={"params": 0.7}, criterion=L2(), scope="global")
    prune(net, EXAMPLE, budget={"params": 0.4}, criterion=L2(), scope="global")
    left = sum(p.numel() for p in net.parameters())
    one_unit = 16 * 12 + 3 * 9 + 3  # the dearest: a channel
    assert 0.4 * dense - one_unit <= left <= 0.4 * dense
    history = history_of(net)
    assert history is not None
    assert [edit.cut for edit in history.edits] == [0, 1]
    again = network()
    replay(again, history)
    assert [p.shape for p in again.parameters()] == [p.shape for p in net.parameters()]


def test_a_second_call_compares_with_the_dense_network() -> None:
    net = network()
    whole = sum(p.numel() for p in net.parameters())
    prune(net, EXAMPLE, pruning_ratio={"4": 0.5})
    between = sum(p.numel() for p in net.parameters())
    report = prune(net, EXAMPLE, pruning_ratio={"0": 0.25})
    left = sum(p.numel() for p in net.parameters())
    assert report.dense is not None
    assert (report.dense.params, report.dense.widths) == (whole, {"0": 8, "4": 12})
    assert (report.dense.bytes, report.dense.latency) == (None, {}), "of a network that is no more"
    assert report.start is not None
    assert (report.start.params, report.widths, report.pruning_ratio) == (between, {"0": 6, "4": 6}, 0.4)
    summary = report.grids()[0]
    assert summary.columns == ("", "dense", "pruned earlier, before the first cut", "pruned", "left")
    rows = {row[0]: row[1:] for row in summary.rows}
    assert rows["parameters"] == (f"{whole:,}", f"{between:,}", f"{left:,}", f"{100 * left / whole:.1f} %")
    assert "40.0 % of the units are gone, in 2 cuts, 1 of them earlier." in str(report)
    assert [row[:4] for row in report.grids()[1].rows] == [("2", "0", "0", "14 → 12")]
    assert type(report).from_plain(report.to_plain()) == report


def test_a_run_that_begins_with_a_pruned_network_says_so(tmp_path: Path) -> None:
    module, example = Small(), torch.zeros(1, 6, dtype=torch.float64)
    prune(module, example, pruning_ratio={"net.0": 0.5})
    callback = StructuredPruning(pruning_ratio={"net.2": 0.25}, schedule=OneShot(1))
    trainer(tmp_path, 2, callback).fit(module, *loaders())
    assert callback.report.widths == {"net.0": 4, "net.2": 6}
    assert "37.5 % of the units are gone, in 2 cuts, 1 of them earlier." in str(callback.report)
    assert [row[3] for row in callback.report.grids()[1].rows] == ["12 → 10"]


def activations(net: nn.Module) -> int:
    """Elements that the layers of `network` write for one sample."""
    sizes: list[int] = []
    hooks = [m.register_forward_hook(lambda _m, _x, out: sizes.append(out.numel())) for m in net if m is not net[3]]
    net(EXAMPLE[:1])
    for hook in hooks:
        hook.remove()
    return sum(sizes)


def test_a_budget_of_memory() -> None:
    net = network().eval()
    dense = activations(net)
    report = prune(net, EXAMPLE, budget={"memory": 0.6})
    left = activations(net)
    assert report.dense is not None
    assert report.final is not None
    assert (report.dense.memory, report.final.memory) == (8 * dense, 8 * left)
    assert 0.6 * dense - 3 * 16 <= left <= 0.6 * dense  # a channel is the dearest unit
    prune(net, EXAMPLE, budget={"memory": 0.4})
    assert 0.4 * dense - 3 * 16 <= activations(net) <= 0.4 * dense


def test_a_budget_of_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_times(monkeypatch, 1e-6)
    net = network()
    report = prune(net, EXAMPLE, budget={"latency": 0.7})
    assert report.dense is not None
    assert report.final is not None
    assert report.dense.table_latency == pytest.approx(1e-3 * report.dense.macs, rel=0.05)
    assert report.final.table_latency == pytest.approx(1e-3 * report.final.macs, rel=0.05)
    assert 0.6 * report.dense.macs < report.final.macs < 0.72 * report.dense.macs
    # The table stays with the network: times of another machine are not compared with it.
    plant_times(monkeypatch, 9e-6)
    again = prune(net, EXAMPLE, budget={"latency": 0.5})
    assert again.final is not None
    assert again.final.table_latency == pytest.approx(1e-3 * again.final.macs, rel=0.05)
    assert 0.4 * report.dense.macs < again.final.macs < 0.52 * report.dense.macs
    assert "latency by the table" in str(again)


def test_milliseconds_beside_another_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_times(monkeypatch, 1e-6)
    net = network()
    report = prune(net, EXAMPLE, budget={"latency_ms": 7.0, "macs": 0.3})
    assert report.final is not None
    assert report.dense is not None
    assert report.final.macs <= 0.3 * report.dense.macs
    assert report.final.table_latency is not None
    assert report.final.table_latency < 3
    again = prune(net, EXAMPLE, budget={"macs": 0.9, "latency_ms": 1.2})
    assert again.final is not None
    assert again.final.table_latency is not None
    assert 0.8 < again.final.table_latency <= 1.2
    before = net.state_dict().copy()
    with pytest.raises(ValueError, match=r"budget of 0.01 milliseconds of latency cannot be reached: .* are left"):
        prune(net, EXAMPLE, budget={"latency_ms": 0.01})
    assert all(tensor is before[name] or torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_scores_per_millisecond_need_a_table_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_times(monkeypatch, 1e-6)
    report = prune(network(), EXAMPLE, budget={"macs": 0.5}, scope=Scope("global", per="latency"))
    assert report.final is not None
    assert report.final.table_latency is not None


def test_a_table_of_latencies_stays_though_the_first_cut_needed_none(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    prune(net, EXAMPLE, pruning_ratio={"4": 0.25})
    plant_times(monkeypatch, 1e-6)
    prune(net, EXAMPLE, budget={"latency": 0.8})
    history = history_of(net)
    assert history is not None
    assert history.latency is not None
    monkeypatch.delattr(latency, "median_seconds")
    prune(net, EXAMPLE, budget={"latency": 0.6})
    again = history_of(net)
    assert again is not None
    assert again.latency == history.latency


class Counting(nn.Module):
    """Counts its passes, in an attribute and in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.passes = nn.Linear(4, 8), nn.Linear(8, 2), 0
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.calls += 1
        hidden: Tensor = self.last(self.first(x).relu())
        return hidden


def test_latency_is_measured_when_asked_for_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> float:
        raise AssertionError("nobody asked for a latency")

    monkeypatch.setattr(measure, "median_seconds", refuse)
    monkeypatch.setattr(latency, "median_seconds", refuse)
    report = prune(Counting(), torch.zeros(1, 4), pruning_ratio=0.5)
    assert report.dense is not None
    assert report.final is not None
    assert (report.dense.latency, report.final.latency) == ({}, {})
    assert "latency" not in str(report)


@pytest.mark.parametrize("how", [{"pruning_ratio": 0.5, "measure": True}, {"budget": {"latency": 0.9}}])
def test_measuring_runs_copies(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plant_times(monkeypatch)  # so that the budget can be met
    net = Counting()
    report = prune(net, torch.zeros(1, 4), **how)
    assert (net.passes, net.calls.item()) == (1, 0), "one pass, that of the check after the cut"
    assert report.final is not None
    assert (1 in report.final.latency) is how.get("measure", False)
    assert ("latency at batch 1" in str(report)) is how.get("measure", False)


def test_the_optimizer_follows() -> None:
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn_like(EXAMPLE)).sum().backward()
    optimizer.step()
    prune(net, EXAMPLE, pruning_ratio=0.5, optimizers=[optimizer])
    assert optimizer.state[net[0].weight]["exp_avg"].shape == net[0].weight.shape
    before = net[0].weight.detach().clone()
    optimizer.zero_grad()
    net(torch.randn_like(EXAMPLE)).sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, before)


def test_an_optimizer_keeps_what_is_not_of_the_network() -> None:
    backbone, head = network(), nn.Linear(4, 2).double()
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()])
    head(backbone(torch.randn_like(EXAMPLE))).sum().backward()
    optimizer.step()
    before = head.weight.detach().clone()
    prune(backbone, EXAMPLE, pruning_ratio=0.5, optimizers=optimizer)
    assert head.weight in optimizer.state
    optimizer.zero_grad()
    head(backbone(torch.randn_like(EXAMPLE))).sum().backward()
    optimizer.step()
    assert not torch.equal(head.weight, before)


def test_an_optimizer_of_another_network_is_refused() -> None:
    net, optimizer = network(), torch.optim.Adam(network().parameters())
    with pytest.raises(ValueError, match="steps none of its parameters"):
        prune(net, EXAMPLE, pruning_ratio=0.5, optimizers=[optimizer])
    assert net[0].out_channels == 8
    assert len(optimizer.param_groups[0]["params"]) == 8


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (EXAMPLE.float(), "fails on the example"),
        (EXAMPLE[:0], "empty batch"),
        (EXAMPLE[:, :2], "forward"),
        (tuple(EXAMPLE.shape), "example .* as it is or taken apart.*The first attempt"),
        (EXAMPLE.to("meta"), "meta device"),
        (None, "example"),
    ],
)
def test_an_example_that_does_not_fit_changes_nothing(example: Any, words: str) -> None:
    net = network()
    with pytest.raises(StructureError, match=words):
        prune(net, example, pruning_ratio=0.5)
    assert (net[0].out_channels, net[4].out_features) == (8, 12)


def test_a_batch_of_one_in_train_mode_is_told_from_a_wrong_shape() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(StructureError, match=r"runs in eval mode: call `\.eval\(\)` first, or give .* two samples"):
        prune(net, torch.zeros(1, 4), pruning_ratio=0.5)
    assert net.training
    prune(net.eval(), torch.zeros(1, 4), pruning_ratio=0.5)
    assert net[0].out_features == 3


def test_a_criterion_whose_statistic_is_none_is_refused() -> None:
    class Own(Criterion):
        def statistic(self, structure: Any) -> Any:
            return {"means": 0}

        def score(self, group: Any, tensors: Any, statistic: Any) -> Any:
            return torch.zeros(group.width)

    with pytest.raises(TypeError, match=r"Own\.statistic: expected a `lightning_prune\.scoring\.Statistic`.*got dict"):
        prune(network(), EXAMPLE, pruning_ratio=0.5, criterion=Own())


def test_what_is_no_network_with_weights_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        prune(torch.relu, EXAMPLE, pruning_ratio=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got a Tensor$"):
        prune(EXAMPLE, network(), pruning_ratio=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got the class ReLU$"):
        prune(torch.nn.ReLU, EXAMPLE, pruning_ratio=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="meta device"):
        prune(network().to("meta"), EXAMPLE, pruning_ratio=0.5)
    with pytest.raises(StructureError, match="Run one forward pass first"):
        prune(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2)), torch.zeros(1, 4), pruning_ratio=0.5)


def test_a_lightning_module_brings_its_example() -> None:
    model = MLPClassifier([64, 20, 10])
    report = prune(model, pruning_ratio=0.25)
    assert report.size is not None
    assert report.size.params == sum(p.numel() for p in model.parameters())


def test_a_tuple_is_the_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            return self.last(self.first(x) + (0 if y is None else self.second(y)))

    net = Two()
    prune(net, (torch.zeros(1, 4), torch.zeros(1, 3)), pruning_ratio=0.5)
    assert net.second.out_features == 3


def test_dead_channels_leave_without_a_trace() -> None:
    net = network().eval()
    with torch.no_grad():
        net[0].weight[[1, 5]] = 0
        net[0].bias[[1, 5]] = 0
        net[1].weight[[1, 5]] = 0
        net[1].bias[[1, 5]] = 0
    images = torch.randn_like(EXAMPLE)
    before = net(images).detach()
    prune(net, EXAMPLE, pruning_ratio=0.25, layers="0")
    torch.testing.assert_close(net(images), before, rtol=1e-12, atol=1e-12)
    assert trace(TracedModel.of(net, EXAMPLE)).widths["0"] == 6


@pytest.mark.parametrize("argument", [{"criterion": "l1"}, {"criterion": L2}, {"schedule": "linear"}])
def test_an_argument_of_a_wrong_type_is_named(argument: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"`{next(iter(argument))}` to be an instance"):
        StructuredPruning(pruning_ratio=0.5, **argument)


@pytest.mark.parametrize("argument", [{"dirpath": 3}, {"reset_monitors": "no"}, {"layers": 3}, {"ignore": [None]}])
def test_a_setting_of_a_wrong_type_is_named(argument: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"StructuredPruning: expected `{next(iter(argument))}` to be"):
        StructuredPruning(pruning_ratio=0.5, **argument)


def test_moments_alone_are_no_schedule() -> None:
    with pytest.raises(TypeError, match=r"got \[3, 5\].* `Explicit\(\(\(3, 0.5\), \(5, 1.0\)\)\)`"):
        StructuredPruning(pruning_ratio=0.5, schedule=[3, 5])  # type: ignore[arg-type]
    assert lightning_prune.Explicit is Explicit


def test_a_criterion_of_a_wrong_type_is_named_by_the_function_too() -> None:
    with pytest.raises(TypeError, match="`criterion` to be an instance of Criterion, got <class"):
        prune(network(), EXAMPLE, pruning_ratio=0.5, criterion=L2)  # type: ignore[arg-type]


# -- criteria and repairs that look at data ---------------------------------------------------------------------------


def labelled(total: int = 24) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(total, 3, 6, 6, generator=draw, dtype=torch.float64)
    return list(zip(x.split(8), (torch.arange(total) % 4).split(8), strict=True))


@pytest.mark.parametrize("kind", criteria.__all__)
@pytest.mark.filterwarnings("ignore:Reconstruction sees fewer rows than inputs")
def test_every_criterion_without_a_trainer(kind: str) -> None:
    net = network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    dense, states = copy.deepcopy(net), torch.get_rng_state()
    settings = {"group_size": 1} if kind == "SPvR" else {}
    criterion = getattr(criteria, kind)(**settings)
    report = prune(net, pruning_ratio=0.5, criterion=criterion, data=labelled(), loss=nn.functional.cross_entropy)
    assert report.widths == {"0": 4, "4": 6}
    assert torch.equal(torch.get_rng_state(), states)
    assert all(module.training for module in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not any(p._backward_hooks for p in net.parameters())
    history = history_of(net)
    assert history is not None
    masked = copy.deepcopy(dense)
    mask(masked, history.axes)
    torch.testing.assert_close(net.eval()(EXAMPLE + 1), masked.eval()(EXAMPLE + 1), rtol=1e-12, atol=1e-12)
    assert torch.equal(dense.state_dict()["1.running_mean"], before["1.running_mean"])


def test_scores_are_those_of_the_data() -> None:
    """Taylor by hand: of each batch, in eval mode, the square of what weights times gradients add up to."""
    net, batches = network(), labelled()
    reference, score = copy.deepcopy(net).eval(), torch.zeros(12, dtype=torch.float64)
    for batch in DataPass(batches):
        reference.zero_grad()
        nn.functional.cross_entropy(reference(*batch.args), batch.labels).backward()
        products = {name: (p * p.grad).detach() for name, p in reference.named_parameters()}
        score += (products["4.weight"].sum(1) + products["4.bias"] + products["6.weight"].sum(0)).square()
    prune(net, pruning_ratio={"4": 0.5}, criterion=Taylor(), data=batches, loss=nn.functional.cross_entropy)
    history = history_of(net)
    assert history is not None
    assert history.axes["4.weight"][0].tolist() == sorted(score.topk(6).indices.tolist())


def test_of_random_allocations_the_one_with_the_least_loss_is_taken() -> None:
    """By hand: every draw on a copy, and the loss of the whole data."""
    net, batches = network(), labelled()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found: list[tuple[float, dict[str, int]]] = []
    for seed in range(7, 13):
        drawn = copy.deepcopy(net)
        report = prune(drawn, EXAMPLE, budget={"params": 0.4}, scope=Scope("random", seed=seed))
        found.append((nn.functional.cross_entropy(drawn.eval()(x), y).item(), report.widths))
    losses = sorted(loss for loss, _ in found)
    assert losses[1] - losses[0] > 1e-4, "no near tie"
    before = copy.deepcopy(net.state_dict())
    scope, loss = Scope("random", draws=6, seed=7), nn.functional.cross_entropy
    with pytest.raises(ValueError, match="expected `data=` and `loss=` to compare 6 draws, got no data"):
        prune(net, EXAMPLE, budget={"params": 0.4}, scope=scope)
    with pytest.raises(ValueError, match="to compare 6 draws, got no loss"):
        prune(net, EXAMPLE, budget={"params": 0.4}, scope=scope, data=batches)
    with pytest.raises(ValueError, match="the network or the loss fails on `data`"):
        prune(net, EXAMPLE, budget={"params": 0.4}, scope=scope, data=[(x, y.double())], loss=loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    report = prune(net, budget={"params": 0.4}, scope=scope, data=batches, loss=loss)
    assert report.widths == min(found, key=lambda one: one[0])[1] != found[0][1]


@pytest.mark.parametrize(
    "repair",
    [Ridge(), SequentialRidge(), FoldMean(), ReestimateBatchNorm(), Reinitialise()],
    ids=repr,
)
@pytest.mark.parametrize("training", [True, False])
def test_repairs_without_a_trainer(repair: Repair, training: bool) -> None:
    """As the function that computes them says, called by hand."""
    net, data = network().train(training), DataPass(labelled(256))
    dense = copy.deepcopy(net)
    prune(net, pruning_ratio=0.5, data=data, extensions=[repair])
    history = history_of(net)
    assert history is not None
    drops: dict[str, str] = {}

    contents = repaired(lambda: copy.deepcopy(dense).train(), history.axes, [repair], data, drops)
    assert contents
    state = net.state_dict()
    for name, content in contents.items():
        torch.testing.assert_close(state[name], content.to(state[name]))
    assert net.training is training
    assert all(module.training is training for module in net.modules())


@pytest.mark.parametrize(
    "asked",
    [{"extensions": [SequentialRidge()]}, {"extensions": [Ridge()]}, {"criterion": Reconstruction()}],
    ids=repr,
)
def test_samples_instead_of_batches(asked: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    before = copy.deepcopy(net.state_dict())
    images = list(torch.randn(4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"fails on `data` .*4D input.*Give batches"):
        prune(net, torch.randn(2, 3, 8, 8), pruning_ratio=0.5, data=images, **asked)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_repair_brings_the_outputs_back() -> None:
    x = torch.cat([x for x, _ in labelled()])
    errors = []
    for extensions in ((), (FoldMean(),), (Ridge(),)):
        torch.manual_seed(0)
        net = network().eval()
        wanted = net(x).detach()
        prune(net, EXAMPLE, pruning_ratio={"4": 0.5}, data=labelled(), extensions=extensions)
        errors.append(float((net(x) - wanted).square().mean().detach()))
    none, mean, ridge = errors
    assert ridge < mean < none


def test_batch_norms_of_a_module_in_eval_mode_are_estimated_again() -> None:
    """It has metrics, which say that they are in train mode wherever they are copied."""
    found = []
    for extensions in ((), (ReestimateBatchNorm(),)):
        torch.manual_seed(0)
        module = CNNClassifier((1, 8, 8), channels=(4, 4), hidden=(8, 8)).eval()
        batches = [(torch.randn(16, 1, 8, 8), torch.zeros(16))]
        prune(module, pruning_ratio=0.5, data=batches, extensions=extensions)
        found.append(module.features[1].running_mean)
    assert not torch.equal(*found)


def test_a_pass_with_its_own_loss_and_form() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, *, image: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.net(image)
            return out

    net = Keyword()
    raw = [{"image": x, "label": y} for x, y in labelled()]
    data = DataPass(
        raw,
        samples=12,
        labels=lambda batch: batch["label"],
        inputs=lambda batch: {"image": batch["image"]},
        loss=lambda model, batch: nn.functional.cross_entropy(model(**batch.kwargs), batch.labels),
    )
    prune(net, pruning_ratio=0.5, criterion=SNIP(), data=data)
    assert net.net[0].out_channels == 4


def test_what_is_missing_is_named() -> None:
    net = network()
    with pytest.raises(ValueError, match=r"expected `data=` for Contribution.*\(FPGM, L1, L2, LAMP, BNScale, Random\)"):
        prune(net, EXAMPLE, pruning_ratio=0.5, criterion=Contribution())
    with pytest.raises(ValueError, match=r"expected `loss=` for Taylor"):
        prune(net, EXAMPLE, pruning_ratio=0.5, criterion=Taylor(), data=labelled())
    unlabelled = [x for x, _ in labelled()]
    with pytest.raises(ValueError, match=r"expected data with labels for the loss, got none"):
        prune(net, pruning_ratio=0.5, criterion=Taylor(), data=unlabelled, loss=nn.functional.cross_entropy)
    with pytest.raises(ValueError, match=r"expected `data=` for Ridge"):
        prune(net, EXAMPLE, pruning_ratio=0.5, extensions=[Ridge()])
    with pytest.raises(TypeError, match=r"repairs such as `Ridge\(\)`, got Rollback"):
        prune(net, EXAMPLE, pruning_ratio=0.5, extensions=[Rollback()])  # type: ignore[list-item]
    assert net[0].out_channels == 8


@pytest.mark.parametrize("criterion", [NISP(), SynFlow()], ids=repr)
def test_what_looks_at_the_form_alone_needs_no_data(criterion: Criterion) -> None:
    net = network()
    assert prune(net, EXAMPLE, pruning_ratio=0.5, criterion=criterion).widths == {"0": 4, "4": 6}


def test_layers_that_cannot_be_scored_stay() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.linear(self.first(x), self.second.weight, self.second.bias)
            out: torch.Tensor = self.last(x)
            return out

    net, data = Functional(), [torch.randn(8, 4)]
    with pytest.raises(StructureError, match="APoZ cannot score first: second was called as a module in none"):
        prune(net, pruning_ratio=0.5, criterion=APoZ(), data=data, layers="first")
    with pytest.warns(UserWarning, match="APoZ cannot score, so these stay as they are: first"):
        assert prune(net, pruning_ratio=0.5, criterion=APoZ(), data=data).widths == {"first": 6, "second": 3}


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ({"loss": "ce"}, TypeError, "expected `loss` to be a function of outputs and labels, got 'ce'"),
        ({"loss": nn.CrossEntropyLoss}, TypeError, "expected `loss` to be a function .*, got <class"),
        ({"loss": lambda outputs: outputs.sum()}, ValueError, r"the loss fails on `data` \(TypeError"),
        ({"data": [(torch.zeros(4, 5), torch.zeros(4))]}, ValueError, r"the network .* fails on `data` \(RuntimeError"),
        ({"data": 3}, ValueError, "expected `batches` to be a DataLoader"),
        ({"data": []}, ValueError, "expected at least one sample"),
        ({"extensions": Ridge()}, TypeError, "expected `extensions` to be a list, got Ridge"),
        ({"extensions": None}, TypeError, "expected `extensions` to be a list, got None"),
        ({"extensions": "ridge"}, TypeError, "expected `extensions` to be a list, got 'ridge'"),
        ({"extensions": [Ridge]}, TypeError, r"repairs such as `Ridge\(\)`, got <class"),
        (
            {"extensions": [Reinitialise(), Reinitialise(seed=1)]},
            ValueError,
            "at most one of `extensions` that sets all",
        ),
        ({"measure": None}, TypeError, "expected `measure` to be True or False, got None"),
        ({"optimizers": torch.optim.SGD}, TypeError, "expected `optimizers` to be one or several optimizers"),
        ({"optimizers": "adam"}, TypeError, "expected `optimizers` to be one or several optimizers"),
        ({"layers": 3}, TypeError, "prune: expected `layers` to be a layer's name"),
        ({"ignore": [3]}, TypeError, "prune: expected `ignore` to be a layer's name"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),
)
def test_wrong_arguments_change_nothing(wrong: dict[str, Any], kind: type[Exception], text: str) -> None:
    module = Small()
    before = copy.deepcopy(module.state_dict())
    data = [(torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))]
    given: dict[str, Any] = {"criterion": Taylor(), "data": data, "loss": nn.functional.cross_entropy, **wrong}
    with pytest.raises(kind, match=f"(?s){text}"):
        prune(module, torch.zeros(1, 6, dtype=torch.float64), pruning_ratio=0.5, **given)
    assert history_of(module) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_the_example_that_is_given_counts() -> None:
    """Not the module's own, which may be of another type or shape."""
    module = Small()
    module.example_input_array = torch.zeros(1, 6)  # of another type than the network
    with pytest.raises(StructureError, match="must have the same dtype"):
        prune(module, pruning_ratio=0.5)
    assert prune(module, torch.zeros(1, 6, dtype=torch.float64), pruning_ratio=0.5).widths == {"net.0": 4, "net.2": 4}


def test_a_feature_that_a_hook_stores_is_cut_too_and_one_that_cannot_be_copied_is_told() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.side = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)
            self.stored: dict[str, Tensor] = {}
            self.a.register_forward_hook(lambda module, args, output: self.stored.update(a=output))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) + self.side(self.stored["a"])

    class Locked:
        def __init__(self, network: nn.Module) -> None:
            self.network, self.lock = network, threading.Lock()

        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
            return

    net = Branching()
    net.b.register_forward_hook(Locked(net))
    report = prune(net, torch.zeros(2, 4), pruning_ratio=0.5)
    assert (net.a.out_features, net.b.in_features, net.side.in_features) == (4, 4, 4)
    assert not net.stored
    assert net(torch.zeros(2, 4)).shape == (2, 2)
    (note,) = report.notes
    assert "a hook of `b` was left out" in note
