"""Every cell of the table in `docs/checkpoints.md`: each kind of checkpoint, by each verb."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_prune import LinearSchedule, MagnitudePruning, StructuredPruning, load_from_checkpoint
from lightning_prune.surgery import masks_of, revived
from tests.callbacks.networks import BATCHES, Net, equal, fit, loader, make, refit, trainer, weights, widths
from tests.support.quick_reports import quick_reports

EPOCHS = 4
#: Cuts before the epochs 1 and 2.
SCHEDULE = LinearSchedule(start=1, end=2, cuts=2)
PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text().splitlines()
    if line.startswith("| ")
]
VERBS = [cell.strip("`") for cell in ROWS[0][1:]]
TABLE = {row[0]: dict(zip(VERBS, row[1:], strict=True)) for row in ROWS[1:]}
FILES = {
    "before the first cut": "ends/epoch=0.ckpt",
    "every step": f"steps/step={BATCHES + 3}.ckpt",
    "last": "ends/last.ckpt",
    "best": "best.ckpt",
    "`save_weights_only=True`": "plain/epoch=1.ckpt",
    "on exception": "exception/on_exception.ckpt",
    "after the final cut": "after.ckpt",
}
WIDTHS = {"before the first cut": (12, 8), "every step": (9, 6), "`save_weights_only=True`": (9, 6)}


class Fails(Net):
    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == 2 * BATCHES + 2:
            raise ArithmeticError


def pruners() -> list[Any]:
    """With masks, so that these are looked at, too."""
    return [StructuredPruning(0.5, schedule=SCHEDULE), MagnitudePruning(0.5, schedule=SCHEDULE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("kinds")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quick_reports(patch)
        every: dict[str, Any] = {"filename": "{epoch}", "save_top_k": -1}
        best = ModelCheckpoint(home / "bests", filename="{epoch}", monitor="val_loss")
        savers = [
            ModelCheckpoint(home / "ends", save_last=True, **every),
            ModelCheckpoint(home / "steps", filename="{step}", save_top_k=-1, every_n_train_steps=1),
            ModelCheckpoint(home / "plain", save_weights_only=True, monitor="train_loss", **every),
            best,
        ]
        run = fit(home / "run", make(), *pruners(), *savers, epochs=EPOCHS)
        run.save_checkpoint(home / "after.ckpt")
        Path(best.best_model_path).rename(home / "best.ckpt")
        failing = trainer(home / "failing", *pruners(), OnExceptionCheckpoint(home / "exception"), epochs=EPOCHS)
        with pytest.raises(ArithmeticError):
            refit(failing, make(Fails))
    return home


def test_the_table_is_whole() -> None:
    assert VERBS == ["fit", "validate", "test", "predict", "load_from_checkpoint"]
    assert list(TABLE) == list(FILES)
    assert {cell for row in TABLE.values() for cell in row.values()} == {"works", "refused by Lightning"}


def assert_loaded(model: Any, file: Path, kind: str) -> None:
    stored = torch.load(file, weights_only=True)
    assert widths(model) == WIDTHS.get(kind, (6, 4))
    assert equal(weights(model), dict(stored["state_dict"]))
    assert bool(masks_of(model)) == ("lightning_prune_masks" in stored) == (kind != "before the first cut")
    assert not revived(model)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", FILES)
def test_cell(kind: str, verb: str, folder: Path, tmp_path: Path) -> None:
    file, outcome = folder / FILES[kind], TABLE[kind][verb]
    if verb == "load_from_checkpoint":
        assert_loaded(load_from_checkpoint(Net, file, weights_only=True), file, kind)
        return
    model, callbacks = make(), pruners()
    if verb != "fit":
        run = trainer(tmp_path, *callbacks)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            getattr(run, verb)(model, dataloaders=loader(2), ckpt_path=file, weights_only=True)
        assert_loaded(model, file, kind)
        return
    if outcome == "refused by Lightning":
        with pytest.raises(KeyError, match="save_weights_only"):
            fit(tmp_path, model, *callbacks, epochs=EPOCHS, ckpt_path=file)
        return
    more = EPOCHS + 1 if torch.load(file, weights_only=True)["epoch"] >= EPOCHS - 1 else EPOCHS
    run = fit(tmp_path, model, *callbacks, epochs=more, ckpt_path=file)
    assert run.current_epoch == more
    assert widths(model) == (6, 4)
    assert not revived(model)
    assert [cut.index for cut in callbacks[0].report.cuts] == [0, 1]
    assert masks_of(model)
