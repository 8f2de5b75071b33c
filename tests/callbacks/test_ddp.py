"""Several processes decide as one does, end with the same network, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher, _WorkerOutput
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

import lightning_prune
from lightning_prune import (
    L2,
    Contribution,
    Distill,
    Fisher,
    FoldMean,
    GroupLasso,
    GrowPenalty,
    LinearSchedule,
    ReestimateBatchNorm,
    Ridge,
    Rollback,
    SaveEachSize,
    Scope,
    StructuredPruning,
    WhenStable,
    inspect,
)
from lightning_prune.models import MLPClassifier
from lightning_prune.scoring import Criterion
from lightning_prune.structure import TracedModel, trace
from tests.callbacks import ranked
from tests.callbacks.contents import pruning_callbacks
from tests.callbacks.networks import Net, make
from tests.support import ranks
from tests.support.surgery import cut_and_check

pytestmark = pytest.mark.ddp


def criteria() -> list[type[Criterion]]:
    found = {thing for name in lightning_prune.__all__ if isinstance(thing := getattr(lightning_prune, name), type)}
    return sorted((kind for kind in found if issubclass(kind, Criterion)), key=lambda kind: kind.__name__)


def assert_alike(found: dict[str, Any], expected: dict[str, Any], what: str = "") -> None:
    """The same plans, and weights equal within float error."""
    assert len(found["history"]["edits"]) == len(expected["history"]["edits"]) > 0, what
    for mine, other in zip(found["history"]["edits"], expected["history"]["edits"], strict=True):
        assert {name: kept.tolist() for name, kept in mine["kept"].items()} == {
            name: kept.tolist() for name, kept in other["kept"].items()
        }, what
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-10, atol=1e-12, msg=f"{what}: {name}")


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_equals_never_having_stopped(processes: int, tmp_path: Path) -> None:
    """Of every callback, bit by bit; two processes as torchrun starts them."""
    # The suite's network has no normalisation, which the default penalty needs.
    needs: dict[str, Any] = {"NetworkSlimming": {"penalty": GroupLasso(0.01), "criterion": L2()}}
    cases = [
        (kind.__name__, optimizer, needs.get(kind.__name__, {}))
        for kind in pruning_callbacks()
        for optimizer in ("sgd", "adamw")
    ]
    cases.append(("StructuredPruning", "sgd", {"scope": Scope("random", draws=4)}))
    assert len(cases) >= 7
    assert ranks.run(ranked.resumed, tmp_path, *cases, processes=processes, elastic=True) == {}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_with_every_criterion(processes: int, tmp_path: Path) -> None:
    cases = [("StructuredPruning", "sgd", {"criterion": kind()}) for kind in criteria() if kind.__name__ != "BNScale"]
    assert ranks.run(ranked.resumed, tmp_path, *cases, processes=processes, seconds=280) == {}


OBSERVING: dict[str, Any] = {
    "contribution": {"callback": "ContributionPruning", "pruning": {"criterion": Contribution(every_n_batches=1)}},
    "gradients": {"optimizer": "adamw", "pruning": {"criterion": Fisher(every_n_batches=1), "scope": "global"}},
}


def test_any_number_of_processes_is_one(tmp_path: Path) -> None:
    """Also when a run goes on with another number: what was observed before is neither lost nor counted twice."""
    found: dict[int, Any] = {}
    for number in (1, 2, 4):
        names = list(OBSERVING) if number < 4 else ["contribution"]
        cases = {name: {**OBSERVING[name], "saving": True} for name in names}
        found[number] = ranks.run(ranked.variants, tmp_path / str(number), cases, processes=number)
        for name, content in found[number].items():
            assert_alike(content, found[1][name], f"{name} with {number} processes")
    for before, after in ((2, 1), (1, 2)):
        for step in (3, 4, 7):
            file = tmp_path / str(before) / "contribution" / "steps" / f"step={step}.ckpt"
            cases = {"again": {**OBSERVING["contribution"], "ckpt_path": file}}
            again = ranks.run(ranked.variants, tmp_path / f"{before}{after}{step}", cases, processes=after)["again"]
            assert_alike(again, found[1]["contribution"], f"from {before} to {after} at step {step}")


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unused parameters": {"strategy": {"find_unused_parameters": True}},
    "static graph": {"strategy": {"static_graph": True}},
    "bucket views": {"strategy": {"gradient_as_bucket_view": True}},
    "accumulated": {"accumulate_grad_batches": 3},
    "accumulated in bucket views": {"accumulate_grad_batches": 3, "strategy": {"gradient_as_bucket_view": True}},
    # Eight and seven samples, in batches of four: the last ones differ.
    "uneven": {"callback": "ContributionPruning", "samples": 15},
}
AFTER: dict[str, dict[str, Any]] = {
    "rollback": {"pruning": {"extensions": [Rollback(epochs=1, tolerance=0.0, monitor="train_loss")]}},
    "rollback that takes back": {
        "pruning": {
            "extensions": [Rollback(epochs=1, tolerance=0.0, monitor="rising_loss")],
            "schedule": LinearSchedule(1, 3, cuts=2),
        },
        "optimizer": "adamw",
    },
    "each size": {"pruning": {"extensions": [SaveEachSize()]}},
    "distill": {"pruning": {"extensions": [Distill()]}},
    "repairs": {"pruning": {"extensions": [FoldMean(), Ridge(), ReestimateBatchNorm()]}},
}


def test_settings_of_ddp(tmp_path: Path) -> None:
    found = ranks.run(ranked.variants, tmp_path / "two", SETTINGS | AFTER, processes=2)
    for name, content in found.items():
        if "takes back" in name:
            assert content["history"] is None
            assert len(content["report"]["notes"]) == 1
        else:
            assert len(content["report"]["cuts"]) == 2, name
    for name in ("unused parameters", "static graph", "bucket views", "each size"):
        assert_alike(found[name], found["plain"], name)
    assert_alike(found["accumulated in bucket views"], found["accumulated"])
    alone = {
        "rollback": AFTER["rollback"],
        **{name: AFTER[name] for name in ("each size", "distill")},
        "accumulated": SETTINGS["accumulated"],
    }
    for name, content in ranks.run(ranked.variants, tmp_path / "one", alone).items():
        assert_alike(found[name], content, name)
    assert len(list((tmp_path / "two" / "each size").rglob("params=*.ckpt"))) == 3


def test_plans_agree_in_all_processes(tmp_path: Path) -> None:
    """From what all of them have observed, at the same epoch and equal to one process; also after a resume."""
    pruning = {"criterion": Contribution(every_n_batches=1), "schedule": WhenStable(0.6, 1, start=1, latest=3)}
    cases = {"waits": {"pruning": pruning, "saving": True}}
    two = ranks.run(ranked.variants, tmp_path / "two", cases, processes=2)["waits"]
    one = ranks.run(ranked.variants, tmp_path / "one", cases)["waits"]
    assert_alike(two, one)
    assert two["state"]["agreements"] == one["state"]["agreements"]
    file = tmp_path / "two" / "waits" / "steps" / f"step={ranked.BATCHES + 2}.ckpt"
    again = ranks.run(ranked.variants, tmp_path / "again", {"a": {"pruning": pruning, "ckpt_path": file}}, processes=2)
    assert_alike(again["a"], two)
    assert again["a"]["state"]["agreements"] == two["state"]["agreements"]


def test_cuts_are_ready_in_all_processes(tmp_path: Path) -> None:
    """By the same losses, each process having measured its share of the samples, and in one process alike."""
    growing = {"schedule": LinearSchedule(1, 2, cuts=1), "extensions": [GrowPenalty(jump=0.002, over=2)]}
    cases = {"grows": {"pruning": growing, "saving": True, "validate": True}}
    two = ranks.run(ranked.variants, tmp_path / "two", cases, processes=2)["grows"]
    one = ranks.run(ranked.variants, tmp_path / "one", cases)["grows"]
    assert_alike(two, one)
    (cut,) = two["report"]["cuts"]
    assert ranked.BATCHES < cut["step"] <= 3 * ranked.BATCHES
    assert cut["step"] == one["report"]["cuts"][0]["step"]
    file = tmp_path / "two" / "grows" / "steps" / f"step={ranked.BATCHES + 3}.ckpt"
    again = {"again": {"pruning": growing, "ckpt_path": file, "validate": True}}
    assert_alike(ranks.run(ranked.variants, tmp_path / "again", again, processes=2)["again"], two)


def test_a_communication_hook_is_there_after_a_cut(tmp_path: Path) -> None:
    calls, distance = ranks.run(ranked.compressed, tmp_path, processes=2)
    assert calls == ranked.EPOCHS * ranked.BATCHES
    assert 0 < distance < 0.01


def test_a_second_fit_goes_on_in_its_folder(tmp_path: Path) -> None:
    assert ranks.run(ranked.second_fit, tmp_path, processes=2) == 2


@pytest.mark.parametrize("failing", [0, 1])
def test_all_fail_if_one_does(failing: int, tmp_path: Path) -> None:
    """At once, without waiting for a collective's time limit, and with the network as it was."""
    error, whole = ranks.run(ranked.faulty, tmp_path, failing, "fails", processes=2, seconds=60)
    assert whole
    assert ("only here" if failing == 0 else "DisagreementError: 1 of 2 processes failed") in error


def test_weights_that_differ_between_processes_are_found(tmp_path: Path) -> None:
    error, whole = ranks.run(ranked.faulty, tmp_path, 1, "differs", processes=2, seconds=60)
    assert "expected the same weights in all processes" in error
    assert whole


def refusal(strategy: Any) -> str:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="expected") as error:
        StructuredPruning(pruning_ratio=0.5).setup(trainer, MLPClassifier([64, 8, 10]), "fit")
    return str(error.value)


def test_compression_with_a_state_is_refused() -> None:
    assert "fp16_compress_hook" in refusal(DDPStrategy(ddp_comm_state=PowerSGDState(None)))


def test_the_private_parts_of_lightning_that_we_use() -> None:
    """Lightning 2.6 has them; a minor without one of them needs another way to take the wrapper off and on again."""
    assert L.__version__.startswith("2.6."), "look at `processes.unwrapped` and `spawned` before this test is widened"
    strategy = DDPStrategy()
    assert strategy._start_method == "popen"
    assert strategy._ddp_comm_state is None
    assert strategy._pl_static_graph_delay_done is False
    assert callable(strategy._register_ddp_hooks)
    assert {"get_extra_results", "_recover_results_in_main_process"} <= vars(_MultiProcessingLauncher).keys()
    assert {"weights_path", "extra"} <= set(_WorkerOutput._fields)
    assert strategy._setup_model.__annotations__["return"] in (DistributedDataParallel, "DistributedDataParallel")


def test_synchronised_batch_norm_is_traced_cut_and_given_back() -> None:
    """Lightning converts it when the strategy is set up and back at the end; it trains on GPUs only."""
    x = torch.randn(5, 6)
    plain = make(Net)
    converted = TorchSyncBatchNorm().apply(make(Net))
    assert isinstance(converted.norm, nn.SyncBatchNorm)
    assert inspect(converted).structure.widths == inspect(plain).structure.widths == {"first": 12, "second": 8}
    structure = trace(TracedModel.of(plain, x))
    axes = structure.axes({"first": range(0, 12, 2), "second": range(8)})
    for model in (plain, converted):
        cut_and_check(model.eval(), axes, (), (), lambda model=model: model(x))
    back = TorchSyncBatchNorm().revert(converted)
    for model in (converted, back):
        assert model.norm.num_features == 6
        assert torch.equal(model.eval()(x), plain(x))
