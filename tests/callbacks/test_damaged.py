"""Damage to a checkpoint: it is refused before anything changes, or it has no effect."""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_prune import (
    Contribution,
    ContributionPruning,
    FoldMean,
    GradualUnfreezing,
    LinearSchedule,
    MagnitudePruning,
    OneShot,
    Rewind,
    Rollback,
    StructuredPruning,
    XGBPruning,
    load_from_checkpoint,
)
from lightning_prune.surgery import HistoryError, history_of, masks_of
from tests.callbacks import test_spvr, xgb_runs
from tests.callbacks.networks import BATCH, Net, equal, loader, weights
from tests.callbacks.small import Saver, trainer
from tests.callbacks.xgb_runs import QUICK
from tests.support.damage import Damage, damaged, damages

EPOCHS = 3
KEYS = ("lightning_prune", "lightning_prune_masks")
SCHEDULE = LinearSchedule(start=1, end=2, cuts=2)


def cuts() -> list[Any]:
    guard = Rollback(epochs=3, tolerance=10.0, monitor="train_loss")
    criterion = Contribution(every_n_batches=1)
    return [ContributionPruning(0.5, criterion=criterion, schedule=SCHEDULE, extensions=[FoldMean(), guard])]


def masks() -> list[Any]:
    return [StructuredPruning(0.5, schedule=SCHEDULE), MagnitudePruning(0.5, schedule=SCHEDULE, rewind=1)]


def rewinds() -> list[Any]:
    return [StructuredPruning(0.5, schedule=SCHEDULE, extensions=[Rewind(1)])]


def xgb() -> list[Any]:
    """Cut in depth: layers are replaced."""
    return [XGBPruning(pruning_ratio=0.5, depth="argmax", surrogate=QUICK, schedule=OneShot(1))]


def spvr() -> list[Any]:
    return [test_spvr.spvr(budget=0.4, group_size=4, schedule=OneShot(1))]


def unfreezing() -> list[Any]:
    return [GradualUnfreezing(1, 0.5)]


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: saved at the end of the second epoch of three."""

    module: Callable[[], LightningModule]
    callbacks: Callable[[], list[Any]]
    data: Callable[[], Any]


def net() -> LightningModule:
    torch.manual_seed(0)
    return Net("adamw")


KINDS = {
    "cuts": Kind(net, cuts, loader),
    "masks": Kind(net, masks, loader),
    "rewinds": Kind(net, rewinds, loader),
    "xgb": Kind(lambda: xgb_runs.Deep(0.1), xgb, lambda: xgb_runs.loader(60, BATCH)),
    "spvr": Kind(test_spvr.Chain, spvr, test_spvr.images),
    "unfreezing": Kind(lambda: xgb_runs.Deep(0.1), unfreezing, lambda: xgb_runs.loader(60, BATCH)),
}


@dataclass
class Case:
    """A checkpoint, and what the run ends with that resumes it."""

    kind: Kind
    checkpoint: dict[str, Any]
    ends: dict[str, Any]


def begun(kind: Kind, folder: Path) -> tuple[Trainer, LightningModule, list[Any]]:
    callbacks = kind.callbacks()
    return trainer(folder, EPOCHS, *callbacks), kind.module(), callbacks


def carry_on(some: Trainer, module: Any, kind: Kind, verb: str, file: Path | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if verb == "fit":
            some.fit(module, kind.data(), ckpt_path=file, weights_only=True if file else None)
        elif verb == "predict":
            some.predict(module, kind.data(), ckpt_path=file, weights_only=True)
        else:
            load_from_checkpoint(type(module), file, weights_only=True)  # type: ignore[arg-type]


def state(some: Trainer, module: Any, callbacks: list[Any]) -> dict[str, Any]:
    history = history_of(module)
    states = [copy.deepcopy(callback.state_dict()) for callback in callbacks]
    for one in states:
        one.pop("report", None)
        one.pop("run", None)
    return {
        "weights": weights(module),
        "training": [part.training for part in module.modules()],
        "trains": [parameter.requires_grad for parameter in module.parameters()],
        "edits": None if history is None else [edit.kind for edit in history.edits],
        "masks": dict(masks_of(module)),
        "optimizers": [optimizer.state_dict() for optimizer in some.optimizers],
        "callbacks": states,
    }


@cache
def prepared(name: str) -> Case:
    kind = KINDS[name]
    with tempfile.TemporaryDirectory() as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(home)
        saver = Saver(folder)
        trainer(folder, EPOCHS, *kind.callbacks(), saver).fit(kind.module(), kind.data())
        case = Case(kind, torch.load(saver.path(1), weights_only=True), {})
        some, module, callbacks = begun(kind, folder)
        carry_on(some, module, kind, "fit", saver.path(1))
        case.ends = state(some, module, callbacks)
    return case


def attempt(case: Case, damage: Damage, folder: Path, verb: str = "fit") -> str:
    """What is wrong with what comes of a damaged checkpoint, in words; empty if it is refused or has no effect."""
    file = folder / "damaged.ckpt"
    torch.save(damaged(case.checkpoint, damage), file)
    some, module, callbacks = begun(case.kind, folder)
    before = state(some, module, callbacks)
    try:
        carry_on(some, module, case.kind, verb, file)
    except ValueError as error:
        now = state(some, module, callbacks)
        changed = [n for n in ("weights", "edits", "masks", "callbacks") if not equal(now[n], before[n])]
        if some.global_step > case.checkpoint["global_step"]:
            return f"refused after a step: {error}"
        # What only the network can tell is refused when it has been loaded, before it trains.
        is_loaded = some.global_step > 0 and equal(now["weights"], dict(case.checkpoint["state_dict"]))
        return f"refused, but {', '.join(changed)} changed: {error}" if changed and not is_loaded else ""
    except Exception as error:
        return f"not refused in words: {type(error).__name__}: {error}"
    if verb != "fit":
        return ""
    ends = state(some, module, callbacks)
    other = [name for name in ends if not equal(ends[name], case.ends[name])]
    return f"other {', '.join(other)}" if other else ""


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_refused_or_has_no_effect(name: str, tmp_path: Path) -> None:
    """Of all there can be a sample; see `Damage`."""
    case = prepared(name)
    every = [damage for damage in damages(case.checkpoint, KEYS) if not _is_plausible(damage)]
    assert len(every) > 30
    assert {str(d): wrong for d in random.Random(1).sample(every, 15) if (wrong := attempt(case, d, tmp_path))} == {}


@pytest.mark.parametrize("verb", ["predict", "load"])
@pytest.mark.parametrize("name", ["cuts", "masks", "xgb"])
def test_damage_is_refused_by_other_verbs(name: str, verb: str, tmp_path: Path) -> None:
    case = prepared(name)
    every = [*damages({key: case.checkpoint[key] for key in KEYS if key in case.checkpoint}, KEYS)]
    chosen = random.Random(2).sample(every, 15)
    assert {str(d): wrong for d in chosen if (wrong := attempt(case, d, tmp_path, verb))} == {}


def test_damaged_masks_leave_the_network_as_wide_as_it_was(tmp_path: Path) -> None:
    case = prepared("masks")
    damage = Damage(
        ("lightning_prune_masks", "masks", "first.weight", "bits"), "short", torch.zeros(3, dtype=torch.uint8)
    )
    torch.save(damaged(case.checkpoint, damage), tmp_path / "damaged.ckpt")
    some, module, callbacks = begun(case.kind, tmp_path)
    before = state(some, module, callbacks)
    for verb in ("predict", "fit"):
        with pytest.raises(HistoryError, match=r"expected 7 bytes of mask for 'first.weight'. Nothing has changed"):
            carry_on(some, module, case.kind, verb, tmp_path / "damaged.ckpt")
        now = state(some, module, callbacks)
        assert [name for name in ("weights", "edits", "masks", "callbacks") if not equal(now[name], before[name])] == []


def _is_plausible(damage: Damage) -> bool:
    """Whether a run may have written it, so that nothing can be seen."""
    path = "/".join(map(str, damage.path))
    # Files of version 1 have no memory; layers that were unfrozen may have been removed since.
    known = ("report/history", "/info/", "report/config/cuts", "original/memory", "/unfrozen")
    return any(part in path for part in known)
