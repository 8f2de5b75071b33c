"""Replaced modules and cuts together: equal to a network written by hand, taken back, stored and loaded."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_prune.models import ResNetCIFAR
from lightning_prune.structure import Structure, TracedModel, trace
from lightning_prune.structure.flow import with_flow
from lightning_prune.structure.stubs import Empty
from lightning_prune.surgery import (
    CutError,
    HistoryError,
    LayerSpec,
    attach,
    history_of,
    load_from,
    match_checkpoint_shapes,
    original_of,
    replay,
    save_into,
    spec_of,
    transaction,
)
from lightning_prune.surgery.edits import Replace
from lightning_prune.surgery.history import KEY, History
from lightning_prune.surgery.tensors import named

IDENTITY = LayerSpec("Identity")


def chain(widths: tuple[int, ...] = (6, 8, 4), seed: int = 0) -> nn.Sequential:
    """Convolutions with norms, a classifier behind them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3)).double()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def images(seed: int = 1) -> Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves(structure: Structure) -> dict[str, tuple[int, ...]]:
    return {group.name: tuple(range(1, group.width, 2)) for group in structure.groups}


def step(model: nn.Module, optimizer: Optimizer, seed: int = 1) -> None:
    optimizer.zero_grad()
    model(images(seed)).square().sum().backward()
    optimizer.step()


def truncate(model: nn.Module, *, cut: bool = True, **options: Any) -> Structure:
    """Everything behind the second convolution goes, a new head comes, and half of the units."""
    traced = TracedModel.of(model, images())
    tail = {str(number): IDENTITY for number in range(6, 9)}
    with transaction(model, run=lambda: model(images()), **options) as change:
        head = {"11": LayerSpec("Linear", {"in_features": 8, "out_features": 5})}
        structure = change.replace(tail | head, lambda: trace(traced), trace(traced))
        return change.keep(structure, halves(structure), {"share": 1.0}) if cut else structure


def by_hand(model: nn.Module) -> nn.Module:
    """The network that `truncate` leaves, written narrow, with the same weights."""
    reference = nn.Sequential(
        *(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Identity(), nn.Identity(), nn.Identity()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    ).double()
    reference.load_state_dict(model.state_dict())
    return reference.train(model.training)


def checkpoint_of(model: nn.Module) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    save_into(checkpoint, model)
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


def load(model: nn.Module, checkpoint: dict[str, Any]) -> nn.Module:
    load_from(checkpoint, model)
    model.load_state_dict(checkpoint["state_dict"])
    return model


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = named(model), named(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert torch.equal(model.eval()(images()), other.eval()(images()))
    model.train()
    other.train()


class TestTruncation:
    def test_equals_the_network_written_by_hand(self) -> None:
        model = chain()
        truncate(model)
        reference = by_hand(model)
        for network in (model, reference):
            optimizer = AdamW(network.parameters(), lr=0.01)
            for seed in range(3):
                step(network, optimizer, seed)
        assert_equal(model, reference)

    def test_loads_into_a_dense_network_and_a_dense_checkpoint_into_it(self) -> None:
        model, dense = chain(), chain(seed=3)
        wide = checkpoint_of(dense)
        truncate(model)
        narrow = checkpoint_of(model)
        fresh = load(chain(seed=9), narrow)
        assert_equal(fresh, model)
        assert_equal(load(fresh, wide), dense)  # its tail comes back
        assert history_of(fresh) is None
        assert_equal(load(fresh, narrow), model)

    def test_of_a_network_that_was_cut_before(self) -> None:
        """Names and dense shapes change in the midst of a history."""
        model = chain()
        wide, traced = checkpoint_of(model), TracedModel.of(model, images())
        with transaction(model, run=lambda: model(images())) as change:
            structure = trace(traced)
            change.keep(structure, {"0": (0, 2, 3, 5), "3": (0, 1, 2, 4, 5, 7)})
        earlier = checkpoint_of(model)
        head = {"11": LayerSpec("Linear", {"in_features": 6, "out_features": 5}), "6": IDENTITY, "7": IDENTITY}
        with transaction(model, run=lambda: model(images())) as change:
            structure = change.replace(head, lambda: trace(traced))
            change.keep(structure, {"0": (0, 1), "3": (1, 2, 3)})
        later = checkpoint_of(model)
        assert [edit.cut for edit in History.from_plain(later[KEY]).edits] == [0, 1, 1]
        network = chain(seed=4)
        for checkpoint in (later, earlier, wide, later, wide, earlier, later):
            load(network, checkpoint)
            assert all(torch.equal(t, checkpoint["state_dict"][n]) for n, t in network.state_dict().items())
        assert_equal(network, model)

    def test_shares_go_on_referring_to_the_dense_network(self) -> None:
        model = chain()
        dense = trace(TracedModel.of(model, images()))
        structure = truncate(model)
        original = original_of(model, structure)
        assert (original.params, original.macs) == (dense.cost.params(dense.widths), dense.cost.macs(dense.widths))
        assert original.widths == dense.widths
        assert structure.widths == {"0": 3, "3": 4}
        fresh = load(chain(seed=2), checkpoint_of(model))
        assert original_of(fresh, trace(TracedModel.of(fresh, images()))) == original

    def test_of_half_a_network_that_is_the_new_dense_one(self) -> None:
        model = chain()
        traced = TracedModel.of(model, images())
        with transaction(model, run=lambda: model(images())) as change:
            head = {"11": spec_of(model[11], out_features=7)}
            structure = change.replace(head, lambda: trace(traced), new_dense=True)
        params = sum(parameter.numel() for parameter in model.parameters())
        assert original_of(model, structure).params == params
        with transaction(model, run=lambda: model(images())) as change:
            structure = change.keep(structure, halves(structure))
        assert original_of(model, structure).params == params

    def test_a_share_needs_the_network_as_it_was(self) -> None:
        model = chain()
        with pytest.raises(HistoryError, match="Expected the structure"), transaction(model) as change:
            change.replace({"11": IDENTITY}, lambda: trace(TracedModel.of(model, images())))

    def test_replay_keeps_the_weights_that_stay(self) -> None:
        model, twin = chain(), chain()
        truncate(model)
        replay(twin, history_of(model))  # type: ignore[arg-type]
        twin[11].load_state_dict(model[11].state_dict())
        assert_equal(twin, model)


def test_a_layer_that_vanishes_is_bypassed() -> None:
    """It becomes an identity, and its consumer is built again in the width of its predecessor."""
    model = chain()
    traced, dense = TracedModel.of(model, images()), copy.deepcopy(model)
    with transaction(model, run=lambda: model(images())) as change:
        bypass = {"3": IDENTITY, "4": IDENTITY, "5": IDENTITY, "6": spec_of(model[6], in_channels=6)}
        structure = change.replace(bypass, lambda: trace(traced), trace(traced))
        change.install({"6.weight": dense[6].weight[:, :6] * 2})
        assert structure.widths == {"0": 6, "6": 4}
    reference = nn.Sequential(*dense[:3], nn.Conv2d(6, 4, 3, padding=1, bias=False).double(), *dense[7:])
    reference[3].weight.data = dense[6].weight[:, :6] * 2
    assert torch.equal(model(images()), reference(images()))
    assert_equal(load(chain(seed=5), checkpoint_of(model)), model)


class TestResNet:
    def test_truncated_behind_a_block(self) -> None:
        torch.manual_seed(0)
        model = ResNetCIFAR(14).double()
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        traced = TracedModel.of(model, x)
        wide = checkpoint_of(model)
        with transaction(model, run=lambda: model(x)) as change:
            tail = dict.fromkeys(("layer3", "layer2.1"), IDENTITY)
            head = {"linear": LayerSpec("Linear", {"in_features": 32, "out_features": 5})}
            structure = change.replace(tail | head, lambda: trace(traced), trace(traced))
            structure = change.keep(structure, halves(structure))
        assert model(x).shape == (2, 5)
        fresh = ResNetCIFAR(14).double()
        load(fresh, checkpoint_of(model))
        assert torch.equal(fresh(x), model(x))
        load(fresh, wide)
        assert all(torch.equal(t, wide["state_dict"][n]) for n, t in fresh.state_dict().items())

    @pytest.mark.parametrize("first", ["drop", "replace"])
    @torch.no_grad()
    def test_branches_that_are_taken_out_before_and_after(self, first: str) -> None:
        """One of them is part of what is replaced: dense, it comes back whole."""
        torch.manual_seed(0)
        model = ResNetCIFAR(14).double()
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        traced, wide = TracedModel.of(model, x), checkpoint_of(model)
        params = sum(parameter.numel() for parameter in model.parameters())
        head = LayerSpec("Linear", {"in_features": 16, "out_features": 4})
        modules = {"layer2": IDENTITY, "layer3": IDENTITY, "linear": head}

        def found() -> Structure:
            history = history_of(model)
            return with_flow(trace(traced), traced, history.vanished if history is not None else ())

        with transaction(model, run=lambda: model(x)) as change:
            structure = found()
            if first == "drop":
                kept: dict[str, tuple[int, ...]] = {
                    "layer2.1.conv1": (),
                    "layer1.0.conv1": (),
                    "layer2.0.conv1": (0, 3),
                }
                structure = change.keep(structure, kept)
                assert isinstance(model.layer2[1].conv1, Empty)
            structure = change.replace(modules, found, structure)
            structure = change.keep(structure, {"layer1.1.conv1": (), "conv1": (0, 1, 2)})
        left = {"conv1"} if first == "drop" else {"conv1", "layer1.0.conv1"}
        assert structure.widths.keys() == found().widths.keys() == left
        assert original_of(model, structure).params == params
        narrow = checkpoint_of(model)
        fresh = load(ResNetCIFAR(14).double(), narrow)
        assert torch.equal(fresh.eval()(x), model.eval()(x))
        for network in (model, fresh):
            load(network, wide)
            assert type(network.layer2[1].conv1) is type(network.layer1[1].conv1) is nn.Conv2d
            assert all(torch.equal(t, wide["state_dict"][n]) for n, t in network.state_dict().items())
            assert network.layer2[0].conv1.out_channels == 32
            assert torch.equal(network.eval()(x), load(ResNetCIFAR(14).double(), wide).eval()(x))
            load(network, narrow)
            assert all(torch.equal(t, narrow["state_dict"][n]) for n, t in network.state_dict().items())


class Knotted(nn.Module):
    """A decoder that is tied to the encoder, a table that no checkpoint holds, and a tail with both."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle = nn.Linear(4, 8, bias=False), nn.Linear(8, 4)
        self.tail = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), Shifted(8))
        self.tail[0].weight = self.encoder.weight
        self.second = nn.Linear(8, 8, bias=False)
        self.third = nn.Sequential(nn.Linear(8, 8, bias=False))
        self.third[0].weight = self.second.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.tail(self.middle(self.encoder(x))))))


class Shifted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0.5, 2, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table


class TestTied:
    def _replaced(self, *orders: tuple[str, ...]) -> tuple[Knotted, dict[str, Any]]:
        torch.manual_seed(0)
        model, x = Knotted().double(), torch.ones(2, 4, dtype=torch.float64)
        wide, traced = checkpoint_of(model), TracedModel.of(model, x)
        specs = {
            "tail": LayerSpec("Linear", {"in_features": 4, "out_features": 8}),
            "second": IDENTITY,
            "third": IDENTITY,
        }
        structure = trace(traced)
        for names in orders:
            with transaction(model, run=lambda: model(x)) as change:
                structure = change.replace({n: specs[n] for n in names}, lambda: trace(traced), structure)
        return model, wide

    @pytest.mark.parametrize(
        "orders",
        [(("tail", "second", "third"),), (("tail",), ("second",), ("third",)), (("third",), ("second", "tail"))],
    )
    def test_ties_and_tables_come_back(self, orders: tuple[tuple[str, ...], ...]) -> None:
        model, wide = self._replaced(*orders)
        encoder = model.encoder.weight
        narrow = checkpoint_of(model)
        fresh = load(Knotted().double(), narrow)
        x = torch.ones(2, 4, dtype=torch.float64)
        assert torch.equal(fresh(x), model(x))
        for network in (model, fresh, copy.deepcopy(fresh)):
            load(network, wide)
            assert network.tail[0].weight is network.encoder.weight
            assert network.third[0].weight is network.second.weight
            assert torch.equal(network.tail[2].table, Knotted().double().tail[2].table)
            assert torch.equal(network(x), load(Knotted().double(), wide)(x))
        assert model.encoder.weight is encoder


class TestOptimizers:
    def _resumed(self, model: nn.Module, build: Callable[[nn.Module], Optimizer], optimizer: Optimizer) -> None:
        """The state goes to the same tensors by position as by name."""
        names = {id(p): name for name, p in model.named_parameters()}
        expected = [[names[id(p)] for p in group["params"]] for group in build(model).param_groups]
        assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == expected
        assert all(key in {id(p) for p in model.parameters()} for key in map(id, optimizer.state))

    @pytest.mark.parametrize("split", ["one", "decay", "layers", "backwards"])
    @pytest.mark.parametrize("deeper", [False, True])
    def test_new_parameters_stand_where_a_resume_puts_them(self, split: str, deeper: bool) -> None:
        def build(model: nn.Module) -> Optimizer:
            parameters = [p for _, p in model.named_parameters()]
            if split == "one":
                return AdamW(parameters, lr=0.1)
            if split == "backwards":
                return AdamW(parameters[::-1], lr=0.1) if not deeper else AdamW(parameters, lr=0.1)
            if split == "decay":
                matrices = [p for p in parameters if p.ndim > 1]
                return AdamW([{"params": matrices}, {"params": [p for p in parameters if p.ndim < 2], "lr": 1.0}])
            last = list(model[11].parameters())
            ids = {id(p) for p in last}
            return AdamW([{"params": [p for p in parameters if id(p) not in ids]}, {"params": last, "lr": 1.0}])

        model = chain((4, 4, 4))
        model[11] = nn.Linear(4, 4).double()  # equal-shaped neighbours
        optimizer = build(model)
        step(model, optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        groups = [id(group) for group in optimizer.param_groups]
        traced = TracedModel.of(model, images())
        linear = LayerSpec("Linear", {"in_features": 4, "out_features": 4})
        head = LayerSpec("Sequential", layers=(linear, LayerSpec("ReLU"), linear)) if deeper else linear
        state = {id(p): copy.deepcopy(s) for p, s in optimizer.state.items()}
        with transaction(model, [optimizer], run=lambda: model(images())) as change:
            change.replace({"6": IDENTITY, "7": IDENTITY, "11": head}, lambda: trace(traced), trace(traced))
        self._resumed(model, build, optimizer)
        assert [id(group) for group in optimizer.param_groups] == groups
        assert scheduler.optimizer is optimizer
        assert all(not optimizer.state.get(p) for p in model[11].parameters())
        assert all(torch.equal(optimizer.state[p]["exp_avg"], state[id(p)]["exp_avg"]) for p in model[3].parameters())
        before = [p.detach().clone() for p in model.parameters()]
        step(model, optimizer)
        assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))

    def test_named_parameters_keep_their_names(self) -> None:
        model = chain()
        optimizer = SGD(model.named_parameters(), lr=0.1)
        truncate(model, optimizers=[optimizer])
        (group,) = optimizer.param_groups
        assert group["param_names"] == [name for name, _ in model.named_parameters()]
        assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("fatal", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["within", "run", "undone"])
def test_all_is_taken_back(fatal: type[BaseException], place: str, photograph: Any, same: Any) -> None:
    model = chain()
    average, optimizer = copy.deepcopy(model), AdamW(model.parameters(), lr=0.01)
    step(model, optimizer)
    before = photograph(model, [optimizer]), photograph(average), torch.get_rng_state()
    modules = [[id(module) for module in network.modules()] for network in (model, average)]
    structure = trace(TracedModel.of(model, images()))

    def run() -> Tensor:
        if place == "run" and isinstance(model[6], nn.Identity):
            raise fatal("planted")
        return model(images())

    def attempt() -> None:
        traced = TracedModel.of(model, images())
        with transaction(model, [optimizer], [average], run) as change:
            change.keep(structure, halves(structure))
            head = {"6": IDENTITY, "7": IDENTITY, "11": spec_of(model[11], in_features=4)}
            change.replace(head, lambda: trace(traced))
            change.install({"11.weight": torch.ones(3, 4)})
            change.forget()
            assert torch.equal(average[11].bias, model[11].bias)
            if place == "within":
                raise fatal("planted")
        change.undo()

    if place == "undone":
        attempt()
    else:
        expected = CutError if place == "run" and fatal is RuntimeError else fatal
        with pytest.raises(expected, match="planted"):
            attempt()
    assert same((photograph(model, [optimizer]), photograph(average), torch.get_rng_state()), before)
    assert [[id(module) for module in network.modules()] for network in (model, average)] == modules
    assert history_of(model) is history_of(average) is None


class TestChecked:
    def test_contents_that_are_not_finite(self, photograph: Any, same: Any) -> None:
        model = chain()
        before = photograph(model)
        structure = trace(TracedModel.of(model, images()))

        def attempt() -> None:
            with transaction(model, run=lambda: model(images())) as change:
                change.keep(structure, {"0": (0, 1)})
                change.install({"0.weight": torch.full((2, 3, 3, 3), torch.nan)})

        with pytest.raises(CutError, match="no longer finite"):
            attempt()
        assert same(photograph(model), before)

    def test_a_network_that_was_not_finite_before(self) -> None:
        model = chain()
        model[11].bias.data[0] = torch.inf
        truncate_head = {"0": (0, 1)}
        with transaction(model, run=lambda: model(images())) as change:
            change.keep(trace(TracedModel.of(model, images())), truncate_head)
        assert model[0].out_channels == 2
        assert history_of(model) is not None
        assert model(images()).isinf().any()

    def test_it_runs_once_after_all_edits(self) -> None:
        model, calls = chain(), []

        def run() -> Tensor:
            calls.append(model[0].out_channels)
            return model(images())

        traced = TracedModel.of(model, images())
        with transaction(model, run=run) as change:
            structure = change.keep(trace(traced), {"0": (0, 1, 2)})
            change.keep(structure, {"0": (0, 1)})
            change.install({"0.weight": torch.zeros(2, 3, 3, 3)})
        assert calls == [2]
        with transaction(model, run=run):
            pass
        assert calls == [2]
        with transaction(model, run=run) as change:
            change.keep(trace(traced), {"0": (1,)})
            change.verify()
        assert calls == [2, 1]


class TestRefused:
    @pytest.mark.parametrize(
        ("modules", "text"),
        [
            ({"17": IDENTITY}, "no such module"),
            ({"": IDENTITY}, "the network itself"),
        ],
    )
    def test_what_cannot_be_replaced(
        self, modules: dict[str, LayerSpec], text: str, photograph: Any, same: Any
    ) -> None:
        model = chain()
        before, traced = photograph(model), TracedModel.of(model, images())
        structure = trace(traced)
        with pytest.raises((CutError, HistoryError), match=text), transaction(model) as change:
            change.replace(modules, lambda: trace(traced), structure)
        assert same(photograph(model), before)

    @pytest.mark.parametrize(
        ("path", "value", "text"),
        [
            (("modules", "11", "kind"), "Evil", "known kind"),
            (("modules", "11", "kind"), 3, "expected 'kind' to be a str"),
            (("modules", "11", "options", "in_features"), -1, "Linear: expected 'in_features' .* at least 1, got -1"),
            (("modules", "11", "options", "in_features"), 0, "'in_features' .* at least 1, got 0"),
            (("modules", "11", "options", "in_features"), [[1]], "a whole number of at least 1, got"),
            (("modules", "11", "options", "depth"), 1, "expected options of a Linear"),
            (("modules", "11"), [], "to be a dict"),
            (("modules", "11.x"), {"kind": "Identity", "options": {}}, "part of another"),
            (("widths", "0"), 7, "has 7 units, of a dense 6"),
            (("widths", "0"), None, "a group '0' without a dense width"),
            (("original", "params"), "many", "'params' to be a int"),
            (("original",), None, "it has no 'original'"),
            (("new_dense",), 1, "'new_dense' to be a bool"),
            (("cut",), None, "it has no 'cut'"),
        ],
        ids=str,
    )
    def test_damaged_data(self, path: tuple[str, ...], value: Any, text: str, photograph: Any, same: Any) -> None:
        model, fresh = chain(), chain()
        truncate(model)
        plain, before = checkpoint_of(model)[KEY], photograph(fresh)
        place = next(edit for edit in plain["edits"] if edit["kind"] == Replace.kind)
        for key in path[:-1]:
            place = place[key]
        if value is None:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        with pytest.raises(HistoryError, match=f"(?s){text}"):
            load_from({"state_dict": {}, KEY: plain}, fresh)
        assert same(photograph(fresh), before)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda weights: weights.update({"11.weight": torch.ones(5, 8)}), r"11.weight is \[5, 8\]"),
            (lambda weights: weights.update({"3.weight": torch.ones(8, 3, 3, 3)}), r"3.weight is \[8, 3"),
        ],
    )
    def test_weights_that_contradict_the_history(
        self, change: Callable[[dict[str, Tensor]], None], text: str, photograph: Any, same: Any
    ) -> None:
        model, fresh = chain(), chain()
        truncate(model)
        checkpoint = checkpoint_of(model)
        change(checkpoint["state_dict"])
        before = photograph(fresh)
        with pytest.raises(HistoryError, match=f"(?s)another architecture.*{text}"):
            load_from(checkpoint, fresh)
        assert same(photograph(fresh), before)

    @pytest.mark.parametrize("cut", [True, False])
    @pytest.mark.parametrize("what", ["deleted", "another head", "an identity"])
    @pytest.mark.parametrize("live", ["dense", "truncated"])
    def test_a_replacement_that_is_not_in_the_history(
        self, cut: bool, what: str, live: str, photograph: Any, same: Any
    ) -> None:
        model, fresh = chain(), chain()
        truncate(model, cut=cut)
        if live == "truncated":
            truncate(fresh)
        checkpoint = checkpoint_of(model)
        edits = checkpoint[KEY]["edits"]
        if what == "deleted":
            del edits[0]
        elif what == "an identity":
            edits[0]["modules"]["11"] = IDENTITY.to_plain()
        else:
            edits[0]["modules"]["11"]["options"]["out_features"] = 4
        before = photograph(fresh)
        with pytest.raises(HistoryError, match="history"):
            load_from(checkpoint, fresh, strict=True)
        assert same(photograph(fresh), before)

    def test_a_deleted_replacement_says_what_to_do(self) -> None:
        model = chain()
        truncate(model, cut=False)
        checkpoint = checkpoint_of(model)
        checkpoint[KEY]["edits"].clear()
        text = r"6\.weight is missing in the checkpoint; .* and \d more.*history was damaged: take another checkpoint"
        checkpoint["state_dict"]["11.weight"], checkpoint["state_dict"]["11.bias"] = torch.ones(3, 4), torch.ones(3)
        with pytest.raises(HistoryError, match=f"(?s){text}"):
            load_from(checkpoint, chain(), strict=True)
        load_from(checkpoint, chain())  # as with `strict=False`

    def test_what_a_module_loads_by_its_own_rules_is_left_to_it(self) -> None:
        model, fresh = chain(), chain()
        truncate(model, cut=False)
        checkpoint = checkpoint_of(model)
        weights = checkpoint["state_dict"]
        weights["1.old"] = weights.pop("1.weight")

        def renamed(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
            state[f"{prefix}weight"] = state.pop(f"{prefix}old")

        fresh[1].register_load_state_dict_pre_hook(renamed)
        load_from(checkpoint, fresh, strict=True)
        fresh.load_state_dict(weights)
        assert_equal(model, fresh)

    def test_a_network_without_the_module(self) -> None:
        model = chain()
        truncate(model)
        with pytest.raises(HistoryError, match="8 was replaced, here it is missing"):
            load_from(checkpoint_of(model), nn.Sequential(*chain()[:8]))


def test_a_failure_while_a_replacement_is_loaded(photograph: Any, same: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fresh = chain(), chain()
    truncate(model)
    before = photograph(fresh)

    def failing(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_prune.surgery.restore.attach", failing)
    with pytest.raises(KeyboardInterrupt):
        load_from(checkpoint_of(model), fresh)
    assert same(photograph(fresh), before)


def test_the_same_history_again_leaves_all_objects(photograph: Any) -> None:
    model = chain()
    truncate(model)
    objects = [id(parameter) for parameter in model.parameters()]
    load(model, checkpoint_of(model))
    assert [id(parameter) for parameter in model.parameters()] == objects


def test_compiled() -> None:
    model = chain()
    twin = copy.deepcopy(model)
    model[11] = torch.compile(model[11], backend="eager")  # type: ignore[assignment]
    truncate(model)
    truncate(twin)
    assert_equal(model, twin)
    whole = chain()
    truncate(torch.compile(whole, backend="eager"))  # type: ignore[arg-type]
    assert_equal(whole, twin)


def test_masks_of_what_is_replaced_go() -> None:
    from lightning_prune.surgery import attach_masks, masks_of

    model = chain()
    attach_masks(model, {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()})
    truncate(model)
    assert masks_of(model).keys() == {n for n, _ in model.named_parameters() if not n.startswith("11.")}
    assert all(mask.shape == model.get_parameter(name).shape for name, mask in masks_of(model).items())
    attach(model, None)
    match_checkpoint_shapes(model, {}, None)
    assert np.all([mask.any().item() is False for mask in masks_of(model).values()])


class Tied(nn.Module):
    """Two equal-shaped layers with one weight, or one layer in two places."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.third.weight = self.second.weight
        self.third = self.second if whole else self.third
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x).relu()).relu()).relu())  # type: ignore[no-any-return]

    def by_kind(self) -> AdamW:
        parameters = list(self.parameters())
        return AdamW([{"params": [p for p in parameters if (p.ndim > 1) is matrix]} for matrix in (True, False)])


@pytest.mark.parametrize("name", ["second", "third"])
def test_a_tied_weight_that_is_replaced_has_its_group_and_place(name: str) -> None:
    """The group of the weight that it was tied to, not that of its module's bias: state loads by position."""
    model, x = Tied(), torch.randn(5, 6, dtype=torch.float64)
    optimizer, traced = model.by_kind(), TracedModel.of(model, x)
    model(x).square().sum().backward()
    optimizer.step()
    with transaction(model, [optimizer], run=lambda: model(x)) as change:
        spec = LayerSpec("Linear", {"in_features": 8, "out_features": 8})
        change.replace({name: spec}, lambda: trace(traced), trace(traced))
    again = load(Tied(), checkpoint_of(model))
    names = [{id(p): name for name, p in network.named_parameters()} for network in (model, again)]
    found, expected = (
        [[known[id(p)] for p in group["params"]] for group in one.param_groups]
        for known, one in zip(names, (optimizer, again.by_kind()), strict=True)  # type: ignore[operator]
    )
    assert found == expected


@pytest.mark.parametrize("names", [["second"], ["third"], ["second", "third"]])
def test_a_layer_in_two_places_is_not_replaced(names: list[str], photograph: Any, same: Any) -> None:
    """The other place would keep the old one, and after widening they would no longer be one."""
    model, x = Tied(whole=True), torch.randn(5, 6, dtype=torch.float64)
    traced, before = TracedModel.of(model, x), photograph(model)
    with pytest.raises(CutError, match=r"one place each, but .* shares one"), transaction(model) as change:
        change.replace(dict.fromkeys(names, IDENTITY), lambda: trace(traced), trace(traced))
    assert same(before, photograph(model))


@pytest.mark.parametrize("modules", [None, "11", {"11": nn.Linear(4, 3)}, {"11": "Identity"}, {11: IDENTITY}])
def test_what_is_no_description_of_a_layer(modules: Any, photograph: Any, same: Any) -> None:
    model = chain()
    traced, before = TracedModel.of(model, images()), photograph(model)
    with pytest.raises(TypeError, match="expected a `LayerSpec` by the name of each module"), transaction(model) as c:
        c.replace(modules, lambda: trace(traced), trace(traced))
    assert same(before, photograph(model))


def test_the_verification_of_all_processes_counts(photograph: Any, same: Any) -> None:
    model = chain()
    before, answers = photograph(model), iter([False, True])
    with pytest.raises(CutError, match="no longer finite"):
        truncate(model, agree=lambda _: next(answers))
    assert same(photograph(model), before)
    truncate(model, agree=lambda _: False)  # nor was it before the cut
    assert not same(photograph(model), before)
