"""Whatever stops a run, and whenever: the network is whole before or after a cut, and the next start goes on."""

from __future__ import annotations

import linecache
import random
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    Contribution,
    ContributionPruning,
    Fisher,
    FoldMean,
    LinearSchedule,
    Rollback,
    StructuredPruning,
    Taylor,
    load_from_checkpoint,
)
from lightning_prune.callbacks import live_transaction, network_pruning
from lightning_prune.callbacks.methods import structured
from lightning_prune.surgery import CutError, history_of, shrink, verify
from lightning_prune.surgery.repairs import repair
from tests.callbacks.contents import attributes, content, differences, untimed
from tests.callbacks.networks import BATCHES, Net, equal, fit, hooks, make, refit, samples, trainer, weights, widths
from tests.support.kills import campaign
from tests.support.transfer_kills import counts, transfer

EPOCHS = 4
#: Cuts before the epochs 1 and 2.
SCHEDULE = LinearSchedule(start=1, end=2, cuts=2)


def pruner() -> ContributionPruning:
    observing, guard = Contribution(every_n_batches=2), Rollback(epochs=3, tolerance=10.0, monitor="train_loss")
    return ContributionPruning(0.5, criterion=observing, schedule=SCHEDULE, extensions=[FoldMean(), guard])


def alike() -> Any:
    """Batches that are all the same: Lightning does not give back the one that was begun."""
    x, y = samples()[:8]
    return DataLoader(TensorDataset(x.repeat(BATCHES, 1), y.repeat(BATCHES)), batch_size=8)


@cache
def undisturbed() -> dict[str, Any]:
    model, callback = make(Net, "adamw", norm=False), pruner()
    with tempfile.TemporaryDirectory() as folder:
        done = fit(Path(folder), model, callback, data=alike(), validate=False, epochs=EPOCHS)
    assert len(callback.report.cuts) == 2
    return content(done, model, callback)


def state(run: Any, module: Any, callback: StructuredPruning) -> dict[str, Any]:
    """All that a cut changes."""
    history = history_of(module)
    return {
        "weights": weights(module),
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "widths": widths(module),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "history": history.to_plain() if history else None,
        "report": untimed(callback.report.to_plain()),
        "random numbers": torch.get_rng_state(),
        "modes": len(_get_current_dispatch_mode_stack()),
        **{name: value for name, value in attributes(callback).items() if name not in ("_cut", "_take_back")},
    }


#: Where the parts of a cut are put together.
NEAR = ("network_pruning.py", "structured.py", "live_transaction.py", "processes.py")


class Interrupter:
    """Raises KeyboardInterrupt before the n-th line that the package runs."""

    def __init__(self, line: int | None) -> None:
        self.line, self.places = line, []  # type: ignore[var-annotated]

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if "lightning_prune" not in frame.f_code.co_filename:
            return None
        # Python reports a `with` once more as it is left, before `__exit__` is called: no signal can come there.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not line.lstrip().startswith("with "):
            self.places.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            if len(self.places) == self.line:
                raise KeyboardInterrupt
        return self.trace

    def run(self, work: Callable[[], object]) -> bool:
        """Whether ``work`` was interrupted."""
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def test_an_interrupt_at_any_line_of_a_cut(tmp_path: Path) -> None:
    """Tried at the first cut of a run, which then goes on as if nothing had been."""
    expected = undisturbed()
    seen: dict[str, Any] = {"places": [], "before": 0, "after": 0}

    def at_every_line(cut: Any) -> Any:
        def tried(run: Any, module: Any, point: Any) -> None:
            places, whole = seen["places"], state(run, module, callback)
            near = [line for line, place in enumerate(places, 1) if place.startswith(NEAR)]
            draw = random.Random(0)
            chosen = {*draw.sample(near, 40), *draw.sample(range(1, len(places) + 1), 40), near[-1]}
            for line in sorted(chosen) if point.index == 0 else []:
                assert Interrupter(line).run(partial(cut, run, module, point)), line
                assert hooks(module) == 0
                now = state(run, module, callback)
                if now["widths"] != whole["widths"]:
                    seen["after"] += 1
                    assert [cut.index for cut in callback.report.cuts] == [0], (line, places[line - 1])
                    assert callback._done == 0
                    assert now["history"]["edits"][0]["cut"] == 0
                    return  # nothing is left to do
                assert [name for name in whole if not equal(now[name], whole[name])] == [], (line, places[line - 1])
                seen["before"] += 1
            cut(run, module, point)

        return tried

    def counted(cut: Any) -> Any:
        def counts(run: Any, module: Any, point: Any) -> None:
            interrupter = Interrupter(None)
            interrupter.run(partial(cut, run, module, point))
            seen["places"] = seen["places"] or interrupter.places

        return counts

    for wrap in (counted, at_every_line):
        model, callback = make(Net, "adamw", norm=False), pruner()
        vars(callback)["_cut"] = wrap(callback._cut)
        done = fit(tmp_path / wrap.__name__, model, callback, data=alike(), validate=False, epochs=EPOCHS)
        found = content(done, model, callback)
        assert differences(found, {name: part for name, part in expected.items() if name in found}) == []
    assert seen["before"] >= 30
    assert seen["after"] == 1


# The package has a function of that name.
TRANSACTION = import_module("lightning_prune.surgery.transaction")

POINTS = {
    "statistics": (structured, "score_groups"),
    "plan": (structured, "make_plan"),
    "repair": (repair, "_copy_into"),
    "the cut": (TRANSACTION, "apply"),
    "the check": (verify, "check"),
    "optimizer": (shrink, "migrate"),
    "installing": (TRANSACTION, "install"),
    "history": (TRANSACTION, "edits_of"),
    "comparing": (live_transaction, "assert_same_parameters"),
    "monitors": (network_pruning, "reset_monitors"),
    "logging": (network_pruning, "log_now"),
}


@pytest.mark.parametrize(
    ("point", "error"),
    [(point, RuntimeError) for point in POINTS]
    + [(point, KeyboardInterrupt) for point in ("statistics", "the cut", "comparing", "logging")],
)
def test_a_run_that_fails_in_a_cut_is_resumed(
    point: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = POINTS[point]
    real = getattr(owner, name)
    expected = undisturbed()
    model, callback = make(Net, "adamw", norm=False), pruner()
    run = trainer(tmp_path, callback, OnExceptionCheckpoint(tmp_path), epochs=EPOCHS)
    failed = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        if run.current_epoch == 2 and not failed:
            failed.append(point)
            raise error("planted")
        return found

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises((error, CutError, SystemExit)):
        refit(run, model, data=alike(), validate=False)
    assert failed
    assert hooks(model) == 0
    after = point in ("monitors", "logging")
    assert widths(model) == ((6, 4) if after else (9, 6))
    assert len(callback.report.cuts) == (2 if after else 1)
    model, callback = make(Net, "adamw", norm=False), pruner()
    file = tmp_path / "on_exception.ckpt"
    done = fit(tmp_path / "again", model, callback, data=alike(), validate=False, epochs=EPOCHS, ckpt_path=file)
    assert differences(content(done, model, callback), expected) == []


def test_a_failure_while_a_cut_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network stays cut, and whole; the cut is judged again by who resumes."""

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def strict() -> StructuredPruning:
        rollback = Rollback(epochs=1, tolerance=0.0, monitor="rising_loss")
        return StructuredPruning(0.5, schedule=SCHEDULE, extensions=[rollback])

    class Rising(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("rising_loss", float(self.trainer.global_step))
            return super().training_step(batch, batch_idx)

    model, callback = make(Rising, norm=False), strict()
    run = trainer(tmp_path, callback, OnExceptionCheckpoint(tmp_path), epochs=EPOCHS)
    prepared = callback._prepare

    def prepare(*args: Any) -> None:
        prepared(*args)
        monkeypatch.setattr(network_pruning, "trace", fails)

    vars(callback)["_prepare"] = prepare
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        refit(run, model, data=alike(), validate=False)
    monkeypatch.undo()
    assert widths(model) == (9, 6)
    assert [cut.index for cut in callback.report.cuts] == [0]
    assert callback.report.notes == []
    assert len(history_of(model).edits) == 1  # type: ignore[union-attr]
    model, callback = make(Rising, norm=False), strict()
    file = tmp_path / "on_exception.ckpt"
    with pytest.warns(UserWarning, match="was taken back"):
        fit(tmp_path / "again", model, callback, data=alike(), validate=False, epochs=EPOCHS, ckpt_path=file)
    assert widths(model) == (12, 8)
    assert callback.report.cuts == []


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends, the network is whole, the last whole file is resumed."""
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    model, callback = make(Net, "adamw", norm=False), StructuredPruning(0.5, schedule=SCHEDULE)
    run = trainer(tmp_path, callback, saver, epochs=EPOCHS)
    real = torch.save

    def full(*args: Any, **kwargs: Any) -> None:
        if run.global_step == 2 * BATCHES + 1:
            raise OSError("no space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        refit(run, model, data=alike(), validate=False)
    monkeypatch.undo()
    assert hooks(model) == 0
    assert widths(model) == (6, 4)
    newest = max((tmp_path / "saved").glob("*.ckpt"), key=lambda file: int(file.stem[5:]))
    assert newest.name == f"step={2 * BATCHES}.ckpt"
    model, callback = make(Net, "adamw", norm=False), StructuredPruning(0.5, schedule=SCHEDULE)
    fit(tmp_path / "again", model, callback, data=alike(), validate=False, epochs=EPOCHS, ckpt_path=newest)
    assert widths(model) == (6, 4)
    assert [cut.step for cut in callback.report.cuts] == [BATCHES, 2 * BATCHES]


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_torn_checkpoint_is_refused_before_any_weight_changes(keep: float, tmp_path: Path) -> None:
    """Lightning renames a file when it is whole; one that was torn by something else does not load at all."""
    model = make(Net, "adamw", norm=False)
    fit(tmp_path, model, pruner(), data=alike(), validate=False, epochs=EPOCHS).save_checkpoint(tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "torn.ckpt").write_bytes(whole[: int(keep * len(whole))])
    model = make(Net, "adamw", norm=False)
    before = weights(model)
    with pytest.raises((RuntimeError, EOFError, OSError)):
        fit(tmp_path / "again", model, pruner(), data=alike(), ckpt_path=tmp_path / "torn.ckpt")
    assert equal(weights(model), before)
    with pytest.raises(ValueError, match=r"expected a whole checkpoint, got .*torn.ckpt' of .* bytes, .* another kind"):
        load_from_checkpoint(Net, tmp_path / "torn.ckpt")


@pytest.mark.parametrize(
    "criterion", [Contribution(every_n_batches=1), Taylor(every_n_batches=1), Fisher(every_n_batches=1)]
)
def test_an_interrupt_at_any_line_of_the_start_leaves_no_hook(criterion: Any, tmp_path: Path) -> None:
    """Of a batch that is to be observed."""

    class Tries(Callback):
        tried = 0

        def on_train_batch_end(self, run: Any, module: Any, *_: Any) -> None:
            if run.global_step != 2:
                return
            observation = callback._observation
            while Interrupter(self.tried + 1).run(lambda: observation.start(run, module)):
                observation.stop()
                assert hooks(module) == 0, self.tried
                self.tried += 1
            assert hooks(module) > 0
            observation.stop()

    callback = StructuredPruning(0.5, criterion=criterion, schedule=SCHEDULE)
    tries = Tries()
    fit(tmp_path, make(Net, norm=False), callback, tries, validate=False, epochs=EPOCHS)
    assert tries.tried > 100


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_killed_runs_end_as_an_undisturbed_one(number: int, tmp_path: Path) -> None:
    found = campaign(tmp_path, processes=number, kills=3, seed=1)
    assert len(found["kills"]) == 3
    assert found["cuts"] == 12
    assert found["wrong"] == []


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("what", ["one_shot", "layer_wise", "unfreezing"])
def test_killed_transfer_ends_as_an_undisturbed_one(what: str, number: int, tmp_path: Path) -> None:
    """No surrogate is fitted to a layer that is written down."""
    found = campaign(tmp_path, number, kills=3, seed=1, work=transfer, args=[what], count=counts)
    assert len(found["kills"]) == 3
    assert found["wrong"] == []
    assert found["counted"]["layers"] == 5 * found["runs"]
    assert found["counted"]["fitted again"] == 0
    assert found["counted"]["layers"] <= found["counted"]["fits begun"] <= found["counted"]["layers"] + 3
