"""Compiled networks are observed, cut and compiled anew, and end as those that are not compiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch._dynamo.utils import counters

from lightning_prune import (
    Contribution,
    ContributionPruning,
    LinearSchedule,
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
        0.5, criterion=Contribution(every_n_batches=2), schedule=LinearSchedule(start=1, end=3, cuts=2, unit="epoch")
    )
    observed = Observed(pruner)
    whole = compile_(model)
    fit(folder, whole if whole is not None else model, pruner, observed, epochs=5)
    return model, pruner, observed.seen


def in_place(compiler: Any) -> Any:
    return lambda model: model.second.compile(backend=compiler)


def a_layer(compiler: Any) -> Any:
    def wrap(model: Net) -> None:
        model.second = torch.compile(model.second, backend=compiler)

    return wrap


def the_module(compiler: Any) -> Any:
    return lambda model: torch.compile(model, backend=compiler)


#: Older compilers pass over PyTorch's own layers.
IN_PLACE = [in_place] if torch.__version__ >= (2, 15) else []


def assert_as_not_compiled(compile_: Any, folder: Path, rtol: float) -> None:
    plain, _, expected = run(folder / "plain", lambda _: None)
    torch.compiler.reset()
    model, _, seen = run(folder / "compiled", compile_)
    assert seen == expected
    assert min(seen[:3]) > 0
    assert widths(model) == widths(plain) == (6, 4)
    history, other = history_of(model), history_of(plain)
    assert history is not None
    assert other is not None
    for mine, theirs in zip(history.edits, other.edits, strict=True):
        assert list(mine.kept.values()) == list(theirs.kept.values())
    for name, weight in named(model).items():
        torch.testing.assert_close(weight, named(plain)[name], rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("how", [*IN_PLACE, a_layer, the_module])
def test_a_compiled_network_ends_as_one_that_is_not(how: Any, tmp_path: Path) -> None:
    compiler = Compiler()
    assert_as_not_compiled(how(compiler), tmp_path, rtol=1e-5)
    assert compiler.graphs >= 3  # dense, after the first cut, after the second
    assert compiler.calls >= 5 * 2  # batches that are not observed


@pytest.mark.slow
@pytest.mark.parametrize("how", [*IN_PLACE, the_module])
def test_with_the_backend_that_everybody_uses(how: Any, tmp_path: Path) -> None:
    counters["inductor"].clear()
    assert_as_not_compiled(how("inductor"), tmp_path, rtol=1e-4)
    assert sum(counters["inductor"].values()) > 0
    assert counters["stats"]["unique_graphs"] > 0
