"""Compiled networks are observed, cut and compiled anew, and end as those that are not compiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_prune import (
    L1,
    Contribution,
    ContributionPruning,
    GraSP,
    Linear,
    OneShot,
    StructuredPruning,
    SynFlow,
    Taylor,
    inspect,
    prune,
)
from lightning_prune.surgery import history_of
from lightning_prune.surgery.tensors import named
from tests.callbacks.networks import Net, fit, make, widths

# PyTorch's compiler asks every input for its gradient.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Compiler:
    """Counts graphs and the calls of compiled code; what runs is the graph as captured."""

    def __init__(self) -> None:
        self.graphs, self.calls = 0, 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph.forward(*args)

        return run


class Observed(Callback):
    """How many batches the statistic has seen before each epoch."""

    def __init__(self, pruner: ContributionPruning) -> None:
        self.pruner, self.seen = pruner, []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        statistic = self.pruner._observation.statistic
        self.seen.append(statistic.passes("first") if statistic is not None else None)


def run(folder: Path, compile_: Any) -> tuple[Any, ContributionPruning, list[Any]]:
    model = make(norm=False)
    pruner = ContributionPruning(
        0.5, criterion=Contribution(every_n_batches=2), schedule=Linear(start=1, end=3, cuts=2, unit="epoch")
    )
    observed = Observed(pruner)
    whole = compile_(model)
    fit(folder, whole if whole is not None else model, pruner, observed, epochs=5)
    return model, pruner, observed.seen


def in_place(compiler: Compiler) -> Any:
    return lambda model: model.second.compile(backend=compiler)


def a_layer(compiler: Compiler) -> Any:
    def wrap(model: Net) -> None:
        model.second = torch.compile(model.second, backend=compiler)

    return wrap


def the_module(compiler: Compiler) -> Any:
    return lambda model: torch.compile(model, backend=compiler)


@pytest.mark.parametrize("how", [in_place, a_layer, the_module])
def test_a_compiled_network_ends_as_one_that_is_not(how: Any, tmp_path: Path) -> None:
    plain, _, expected = run(tmp_path / "plain", lambda _: None)
    compiler = Compiler()
    model, _, seen = run(tmp_path / "compiled", how(compiler))
    assert seen == expected
    assert min(seen[:3]) > 0
    assert widths(model) == widths(plain) == (6, 4)
    history, other = history_of(model), history_of(plain)
    assert history is not None
    assert other is not None
    for mine, theirs in zip(history.edits, other.edits, strict=True):
        assert list(mine.kept.values()) == list(theirs.kept.values())
    for name, weight in named(model).items():
        torch.testing.assert_close(weight, named(plain)[name], rtol=1e-5, atol=1e-6)
    assert compiler.graphs >= 3  # dense, after the first cut, after the second
    assert compiler.calls >= 5 * 2  # batches that are not observed


@pytest.mark.parametrize("criterion", [L1(), Taylor(), SynFlow(), GraSP()])
def test_criteria_know_the_layers_of_a_compiled_part_by_their_own_names(criterion: Any, tmp_path: Path) -> None:
    kept = []
    for folder, change in (("plain", lambda _: None), ("compiled", a_layer(Compiler()))):
        model = make(norm=False)
        change(model)
        pruner = StructuredPruning(0.5, criterion=criterion, schedule=OneShot(at=1))
        fit(tmp_path / folder, model, pruner, epochs=2)
        assert pruner.structure is not None
        history = history_of(model)
        assert history is not None
        kept.append([edit.kept for edit in history.edits])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("how", ["whole", "part", "in place"])
def test_a_compiled_network_is_cut_without_a_trainer(how: str) -> None:
    torch.manual_seed(0)
    part = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    compiled = torch.compile(part, backend=Compiler()) if how == "part" else part
    net: Any = torch.nn.Sequential(compiled, torch.nn.Linear(8, 2))
    if how == "in place":
        part.compile(backend=Compiler())
    whole: Any = torch.compile(net, backend=Compiler()) if how == "whole" else net
    x = torch.randn(3, 4)
    whole(x)
    assert inspect(whole, x).structure.widths == {"0.0": 8}
    report = prune(whole, x, pruning_ratio=0.5)
    assert report.widths == {"0.0": 4}
    assert part[0].out_features == net[1].in_features == 4
    torch.testing.assert_close(whole(x), net[1](torch.relu(part[0](x))))
