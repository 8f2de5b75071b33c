"""The contract of everything that `extensions=[...]` takes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_prune
from lightning_prune import (
    CutExtension,
    Distill,
    Fold,
    FoldMean,
    GrowPenalty,
    LinearSchedule,
    ReestimateBatchNorm,
    ReestimateIfBetter,
    RefitLayerNorm,
    Reinitialise,
    Rewind,
    Ridge,
    Rollback,
    SaveEachSize,
    SequentialRidge,
    StructuredPruning,
)
from lightning_prune.surgery import Repair
from tests.callbacks.contents import content, differences
from tests.callbacks.networks import Net, fit, make

EPOCHS = 4
EXTENSIONS = [
    Distill(),
    Fold(batches=2),
    FoldMean(batches=2),
    GrowPenalty(jump=0.01),
    ReestimateBatchNorm(batches=2),
    RefitLayerNorm(batches=2),
    ReestimateIfBetter(batches=2),
    Reinitialise(),
    Rewind(1),
    Ridge(batches=2),
    Rollback(epochs=1, tolerance=100.0, monitor="val_loss"),
    SaveEachSize(),
    SequentialRidge(batches=2),
]


def kinds() -> set[type]:
    public = {getattr(lightning_prune, name) for name in lightning_prune.__all__ if name != "__version__"}
    bases = (Repair, CutExtension)
    return {one for one in public if inspect.isclass(one) and issubclass(one, bases)} - {*bases}


def pruner(extension: Any) -> StructuredPruning:
    return StructuredPruning(0.5, schedule=LinearSchedule(start=1, end=3, cuts=2), extensions=[extension])


def test_every_one_is_tried() -> None:
    assert {type(one) for one in EXTENSIONS} == kinds()


@pytest.mark.filterwarnings("ignore:SequentialRidge fits only the constant")  # two batches are few
@pytest.mark.parametrize("extension", EXTENSIONS, ids=repr)
def test_one_instance_serves_many_runs(extension: Any, tmp_path: Path) -> None:
    """And what a run does with it leaves no trace in it; its state loads as plain data, and goes on bit by bit."""
    saver = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", save_top_k=-1)
    before, ends = repr(extension), []
    for number in range(2):
        callback, model = pruner(extension), make(Net, "adamw")
        run = fit(tmp_path / str(number), model, callback, *([] if number else [saver]), epochs=EPOCHS)
        ends.append(content(run, model, callback))
    assert len(ends[0]["report"]["cuts"]) == 2
    assert differences(ends[1], ends[0]) == []
    assert repr(extension) == before
    assert not isinstance(extension, CutExtension) or extension.state() == {}
    for epoch in (0, 1):  # before the first cut, and after it
        file = tmp_path / "ends" / f"epoch={epoch}.ckpt"
        assert torch.load(file, weights_only=True)["callbacks"]["StructuredPruning"]["format"] == 2
        callback, model = pruner(extension), make(Net, "adamw")
        run = fit(tmp_path / "again", model, callback, epochs=EPOCHS, ckpt_path=file)
        # Lightning does not validate the epoch again that a checkpoint ends.
        found = differences(content(run, model, callback), ends[0])
        assert {*found} <= {"report", "attribute _measured"}, (epoch, found)


@pytest.mark.parametrize(
    ("extensions", "kind", "text"),
    [
        ([Ridge], TypeError, "got <class"),
        ([None], TypeError, "got None"),
        (Ridge(), TypeError, "expected `extensions` to be a list"),
        ({"a": Ridge()}, TypeError, "expected `extensions` to be a list"),
        ([Rewind(0), Reinitialise()], ValueError, "at most one of `extensions` that sets all weights"),
        ([Rewind(0), Rewind(1)], ValueError, "at most one of `extensions` that sets all weights"),
    ],
    ids=str,
)
def test_what_are_no_extensions(extensions: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=f"StructuredPruning: .*{text}"):
        StructuredPruning(0.5, extensions=extensions)
