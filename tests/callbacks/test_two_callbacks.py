"""Two pruning callbacks in one run: each does what it is told, both resume, and what cannot be is refused."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint

from lightning_prune import (
    L2,
    NM,
    Channel,
    Contribution,
    ContributionPruning,
    FoldMean,
    GroupLasso,
    HybridPruning,
    LinearSchedule,
    MagnitudePruning,
    NetworkSlimming,
    OneShot,
    Ridge,
    Rollback,
    SaveEachSize,
    Scope,
    StructuredPruning,
    Taylor,
    load_from_checkpoint,
)
from lightning_prune.callbacks.lightning.averages import averages
from lightning_prune.callbacks.scheduled import ScheduledPruning
from lightning_prune.surgery import history_of, masks_of, revived
from tests.callbacks import ranked
from tests.callbacks.contents import untimed
from tests.callbacks.networks import BATCHES, Curves, Net, equal, fit, loader, make, refit, trainer, weights, widths
from tests.callbacks.test_faults import NEAR, Interrupter
from tests.support import ranks

EPOCHS = 6
#: Cuts before the epochs 2 and 4, masks before 1, 3 and 4.
CUTS = LinearSchedule(start=2, end=4, cuts=2)
MASKS = LinearSchedule(start=1, end=4, cuts=3)
OBSERVING = Contribution(every_n_batches=3)

COMPANIES: dict[str, Callable[[], list[ScheduledPruning]]] = {
    "masks, structure": lambda: [MagnitudePruning(0.5, schedule=MASKS), StructuredPruning(0.5, schedule=CUTS)],
    "structure, masks": lambda: [
        ContributionPruning(0.5, criterion=OBSERVING, schedule=CUTS),
        HybridPruning(0.5, schedule=MASKS),
    ],
    "slimming, masks": lambda: [
        NetworkSlimming(0.5, schedule=CUTS, penalty=GroupLasso(0.01), criterion=L2(), scope="local"),
        MagnitudePruning(0.5, schedule=MASKS),
    ],
    "masks that go back": lambda: [
        StructuredPruning(0.5, schedule=CUTS, extensions=[FoldMean(), Ridge(), SaveEachSize()]),
        MagnitudePruning(0.5, schedule=MASKS, rewind=1),
    ],
    "masks of units": lambda: [
        StructuredPruning(0.5, schedule=CUTS, layers="first"),
        MagnitudePruning(0.5, granularity=Channel(), schedule=MASKS, layers="second"),
    ],
    "two structures": lambda: [
        ContributionPruning(0.5, criterion=OBSERVING, schedule=CUTS, layers="first"),
        ContributionPruning(0.5, criterion=OBSERVING, schedule=CUTS, layers="second"),
    ],
    "two structures in turn": lambda: [
        StructuredPruning(0.5, criterion=Taylor(every_n_batches=2), schedule=CUTS, layers="first"),
        StructuredPruning(0.5, criterion=L2(), schedule=LinearSchedule(start=1, end=5, cuts=3), layers=["second"]),
    ],
}


def content(run: Any, model: Any, pruners: list[ScheduledPruning]) -> dict[str, Any]:
    """All that a run ends with."""
    history = history_of(model)
    found: dict[str, Any] = {
        "weights": weights(model),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "history": history.to_plain() if history else None,
        "masks": dict(masks_of(model)),
    }
    for number, pruner in enumerate(pruners):
        state = pruner.state_dict()
        report, state["run"] = untimed(state.pop("report")), ""
        found |= {f"report {number}": report, f"state {number}": state}
    return found


def expected_widths(company: str) -> tuple[int, int]:
    return (6, 8) if company == "masks of units" else (6, 4)


@pytest.mark.parametrize("company", COMPANIES)
def test_both_do_their_part_and_resume(company: str, tmp_path: Path) -> None:
    pruners = COMPANIES[company]()
    optimizer = ("sgd", "adamw")[len(company) % 2]
    saver = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    model = make(Net, optimizer)
    expected = content(fit(tmp_path / "whole", model, *pruners, saver, epochs=EPOCHS), model, pruners)
    assert widths(model) == expected_widths(company)
    assert not revived(model)
    for name, mask in masks_of(model).items():
        assert mask.shape == dict(model.named_parameters())[name].shape
        assert mask.any(), name
    assert bool(masks_of(model)) == ("masks" in company)
    # Before anything, between cuts in mid-epoch and at ends of epochs, where both are due or one, and after all.
    for step in (2, 2 * BATCHES, 2 * BATCHES + 1, 4 * BATCHES, 4 * BATCHES + 3):
        file = tmp_path / "steps" / f"step={step}.ckpt"
        stored = torch.load(file, weights_only=True)["state_dict"]
        loaded = load_from_checkpoint(Net, file, weights_only=True)
        assert equal(weights(loaded), dict(stored))
        assert not revived(loaded)
        again, model = COMPANIES[company](), make(Net, optimizer)
        torch.nn.init.zeros_(model.first.weight)
        run = fit(tmp_path / "resumed", model, *again, epochs=EPOCHS, ckpt_path=file)
        found = content(run, model, again)
        # Lightning does not validate again after the last batch of an epoch.
        skipped = {"report 0", "report 1"} if step % BATCHES == 0 else set()
        for part in expected.keys() - skipped:
            assert equal(found[part], expected[part]), (step, part)


def look(run: Any, model: Any, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        run.test(model, loader(2), ckpt_path=file, verbose=False)


@pytest.mark.parametrize("company", ["structure, masks", "two structures"])
def test_other_verbs_and_another_fit(company: str, tmp_path: Path) -> None:
    """Wide and narrow, with more masks and with fewer; then the training goes on."""
    pruners, model = COMPANIES[company](), make()
    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    run = fit(tmp_path, model, *pruners, saver, epochs=EPOCHS)
    whole = [len(pruner.report.cuts) for pruner in pruners]
    for epoch in (2, 0, 5, 1):
        file = tmp_path / "ends" / f"epoch={epoch}.ckpt"
        look(run, model, file)
        stored = torch.load(file, weights_only=True)
        assert equal(weights(model), dict(stored["state_dict"]))
        assert masks_of(model).keys() == stored.get("lightning_prune_masks", {"masks": {}})["masks"].keys()
        assert not revived(model)
    look(run, model, tmp_path / "ends" / "epoch=5.ckpt")
    run.fit_loop.max_epochs = EPOCHS + 2
    refit(run, model)
    assert widths(model) == (6, 4)
    assert [len(pruner.report.cuts) for pruner in pruners] == whole


def test_reports_tell_the_same(tmp_path: Path) -> None:
    """Of two that cut every one shows all cuts, and each logs the network as it is."""
    pruners, model, curves = COMPANIES["two structures in turn"](), make(), Curves()
    fit(tmp_path, model, *pruners, epochs=EPOCHS, logger=curves)
    first, second = (untimed(pruner.report.to_plain())["cuts"] for pruner in pruners)
    scored = [(bool(cut.pop("scores")), bool(other.pop("scores"))) for cut, other in zip(first, second, strict=True)]
    assert {*scored} == {(True, False), (False, True)}, "who cuts knows the scores"
    assert first == second
    assert [cut["step"] for cut in first] == sorted(cut["step"] for cut in first)
    assert len(first) == 5
    for pruner in pruners:
        assert pruner.report.widths == {"first": 6, "second": 4}
        assert pruner.report.final is not None
        assert pruner.report.final.params == sum(parameter.numel() for parameter in model.parameters())
    assert len(list(tmp_path.rglob("report.json"))) == 2
    by_step: dict[int | None, set[float]] = {}
    for step, row in curves.rows:
        if "pruning/params" in row:
            by_step.setdefault(step, set()).add(row["pruning/params"])
    assert by_step[EPOCHS * BATCHES] == {float(pruners[0].report.final.params)}  # type: ignore[union-attr]


def test_what_loggers_are_told_of_masks_and_cuts(tmp_path: Path) -> None:
    pruners, model, curves = COMPANIES["structure, masks"](), make(), Curves()
    run = fit(tmp_path, model, *pruners, epochs=EPOCHS, logger=curves)
    final = sum(parameter.numel() for parameter in model.parameters())
    assert curves.of("pruning/params")[-1] == run.progress_bar_metrics["params"] == final
    assert set(curves.of("pruning/width/first")) == {12.0, 9.0, 6.0}
    assert 0.4 < curves.of("pruning/sparsity/second")[-1] < 0.95
    assert "another callback decides what is cut" in pruners[1].report.notes[-1]


def test_early_stopping_waits_for_both(tmp_path: Path) -> None:
    class Good(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 0.1)

    pruners = [
        StructuredPruning(0.5, schedule=OneShot(at=1), layers="first"),
        StructuredPruning(0.5, schedule=OneShot(at=4), layers="second"),
    ]
    stopper = EarlyStopping("val_loss", stopping_threshold=0.5)
    model = make(Good)
    run = fit(tmp_path, model, *pruners, stopper, epochs=8)
    assert run.current_epoch == 5
    assert widths(model) == (6, 4)
    assert stopper.stopping_threshold == 0.5


def test_averaged_copies_follow_both(tmp_path: Path) -> None:
    model = make()
    run = fit(tmp_path, model, *COMPANIES["structure, masks"](), EMAWeightAveraging(decay=0.8), epochs=EPOCHS)
    (copy,) = averages(run)
    assert widths(copy) == widths(model) == (6, 4)
    for name, mask in masks_of(model).items():
        for network in (model, copy):
            assert not dict(network.named_parameters())[name][mask].any()


def test_one_joins_a_run_that_another_began(tmp_path: Path) -> None:
    """It has not done what the other has done."""
    first, second = COMPANIES["two structures"]()
    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    fit(tmp_path, make(), first, saver, epochs=EPOCHS)
    model = make()
    first, second = COMPANIES["two structures"]()
    fit(tmp_path, model, first, second, epochs=EPOCHS, ckpt_path=tmp_path / "ends" / "epoch=2.ckpt")
    assert widths(model) == (6, 4)


def test_another_order_is_said(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    fit(tmp_path, make(), *COMPANIES["structure, masks"](), saver, epochs=EPOCHS)
    turned = COMPANIES["structure, masks"]()[::-1]
    with pytest.warns(UserWarning, match="order of the run so far, ContributionPruning, HybridPruning, got HybridPrun"):
        fit(tmp_path, make(), *turned, epochs=EPOCHS, ckpt_path=tmp_path / "ends" / "epoch=2.ckpt")


class FailError(Exception):
    pass


@pytest.mark.parametrize("company", ["structure, masks", "two structures"])
def test_a_cut_that_fails_leaves_both_as_they_were(company: str, tmp_path: Path) -> None:
    """Also when the other one fails to follow."""
    pruners, model = COMPANIES[company](), make()
    known: list[dict[str, Any]] = []

    class Before(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2 * BATCHES:
                known.append(content(trainer, pl_module, pruners))

    def fail(*args: Any) -> None:
        type(pruners[1]).on_other_cut(pruners[1], *args)
        raise FailError

    vars(pruners[1])["on_other_cut"] = fail
    with pytest.raises(FailError):
        fit(tmp_path, model, Before(), *pruners, epochs=EPOCHS)
    assert widths(model) == (12, 8)
    assert history_of(model) is None
    after = content(pruners and model.trainer, model, pruners)
    assert [part for part in known[0] if not equal(after[part], known[0][part])] == []


def assert_of_one_mind(module: Any, pruners: Any) -> None:
    """Everybody knows the network as it is."""
    for pruner in pruners:
        assert all(mask.shape == p.shape for p, mask in getattr(pruner, "_masks", {}).items())
        assert pruner._structure.widths == dict(zip(("first", "second"), widths(module), strict=True))


@pytest.mark.parametrize("company", ["structure, masks", "two structures"])
def test_an_interrupt_at_any_line_of_a_cut(company: str, tmp_path: Path) -> None:
    """Tried at the first cut of a run, which then goes on as if nothing had been."""
    seen: dict[str, Any] = {"places": [], "before": 0, "after": 0}

    def counted(cut: Any, pruners: Any) -> Any:
        def counts(run: Any, module: Any, point: Any) -> None:
            interrupter = Interrupter(None)
            interrupter.run(partial(cut, run, module, point))
            seen["places"] = seen["places"] or interrupter.places

        return counts

    def at_many_lines(cut: Any, pruners: Any) -> Any:
        def tried(run: Any, module: Any, point: Any) -> None:
            places, whole = seen["places"], content(run, module, pruners)
            near = [
                line for line, place in enumerate(places, 1) if place.startswith((*NEAR, "session.py", "masking.py"))
            ]
            for line in sorted({*random.Random(0).sample(near, 50), near[-1]}) if point.index == 0 else []:
                assert Interrupter(line).run(partial(cut, run, module, point)), line
                now = content(run, module, pruners)
                assert_of_one_mind(module, pruners)
                if now["history"] is not None:
                    seen["after"] += 1
                    assert now["report 0"]["cuts"][-1]["step"] == now["report 1"]["cuts"][-1]["step"] == 2 * BATCHES
                    return  # nothing is left to do
                assert [part for part in whole if not equal(now[part], whole[part])] == [], (line, places[line - 1])
                seen["before"] += 1
            cut(run, module, point)

        return tried

    ends = []
    for wrap in (counted, at_many_lines):
        model, pruners = make(Net, "adamw", norm=False), COMPANIES[company]()
        vars(pruners[0])["_cut"] = wrap(pruners[0]._cut, pruners)
        run = fit(tmp_path / wrap.__name__, model, *pruners, validate=False, epochs=EPOCHS)
        ends.append(content(run, model, pruners))
    assert [part for part in ends[0] if not equal(ends[1][part], ends[0][part])] == []
    assert seen["before"] >= 30
    assert seen["after"] == 1


def train(folder: Path, *companies: str, resume: bool = False) -> list[dict[str, Any]]:
    """As every process makes it."""
    processes, ends = ranked.processes(), []
    options = {"devices": processes, "strategy": "ddp", "use_distributed_sampler": False} if processes > 1 else {}
    for company in companies:
        home = folder / company
        model, pruners = make(Net, "adamw", norm=False, example=False).double(), COMPANIES[company]()
        saver = ModelCheckpoint(home / "ends", filename="{epoch}", save_top_k=-1)
        run = fit(
            home, model, *pruners, saver, data=ranked.share(), validate=False, epochs=EPOCHS,
            ckpt_path=home / "ends" / "epoch=2.ckpt" if resume else None, **options,
        )  # fmt: skip
        ends.append(content(run, model, pruners))
    return ends


def whole_and_resumed(folder: Path, *companies: str) -> list[list[dict[str, Any]]]:
    return [train(folder, *companies, resume=resume) for resume in (False, True)]


@pytest.mark.ddp
def test_two_processes_are_one(tmp_path: Path) -> None:
    companies = "structure, masks", "two structures"
    alone = ranks.run(train, tmp_path / "one", *companies)
    for ends in ranks.run(whole_and_resumed, tmp_path / "two", *companies, processes=2):
        for two, one in zip(ends, alone, strict=True):
            assert equal(two["masks"], one["masks"])
            assert len(two["history"]["edits"]) == len(one["history"]["edits"]) > 1
            for mine, other in zip(two["history"]["edits"], one["history"]["edits"], strict=True):
                assert equal(mine["kept"], other["kept"])
            for name, value in one["weights"].items():
                torch.testing.assert_close(two["weights"][name], value, rtol=1e-10, atol=1e-12)


REFUSED: dict[str, tuple[Callable[[], list[Callback]], str]] = {
    "masks twice": (lambda: [MagnitudePruning(0.5), HybridPruning(0.5)], "expected one callback that lays all masks"),
    "blocks of inputs": (
        lambda: [MagnitudePruning(granularity=NM(2, 4)), StructuredPruning(0.5)],
        "expected no NM(n=2, m=4), whose blocks of inputs break",
    ),
    "a rollback": (
        lambda: [StructuredPruning(0.5, extensions=[Rollback()]), MagnitudePruning(0.5)],
        "expected no `Rollback`",
    ),
    "layers that leave": (
        lambda: [StructuredPruning(0.5, scope=Scope("global", min_width=0)), MagnitudePruning(0.5)],
        "expected no `min_width=0`",
    ),
    "no layers": (
        lambda: [StructuredPruning(0.5, layers="first"), ContributionPruning(0.5)],
        "expected `layers` in both, each with its own",
    ),
    "a repair": (
        lambda: [
            StructuredPruning(0.5, layers="first", extensions=[Ridge()]),
            StructuredPruning(0.5, layers="second"),
        ],
        "expected no `extensions`",
    ),
    "layers of another": (
        lambda: [StructuredPruning(0.5, layers=["first"]), StructuredPruning(0.5, layers=["first", "second"])],
        "expected layers that no other callback cuts, got first, which",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("turned", [False, True])
def test_what_cannot_be_is_refused_before_anything_has_changed(case: str, turned: bool, tmp_path: Path) -> None:
    build, text = REFUSED[case]
    model = make()
    before = weights(model)
    with pytest.raises(ValueError, match=re.escape(text)):
        fit(tmp_path, model, *(reversed(build()) if turned else build()), epochs=EPOCHS)
    assert equal(before, weights(model))


def test_a_folder_for_each(tmp_path: Path) -> None:
    one, other = (StructuredPruning(0.5, layers=name, dirpath=str(tmp_path)) for name in ("first", "second"))
    with pytest.raises(ValueError, match="`dirpath` of its own"):
        fit(tmp_path, make(), one, other)
    with pytest.raises(RuntimeError, match="state_key"):  # Lightning's own text
        trainer(tmp_path, StructuredPruning(0.5), StructuredPruning(0.3))
