"""One training, a loadable checkpoint of every size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_prune import SaveEachSize, StructuredPruning, load_from_checkpoint
from lightning_prune.planning import Explicit
from tests.callbacks.small import Small, loaders, trainer


class AtEpochs(Callback):
    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(pl_module.net[0].weight.detach().clone())


@pytest.mark.usefixtures("measured")
def test_every_size_is_saved_as_it_was_before_the_next_cut(tmp_path: Path) -> None:
    module, ends = Small(), AtEpochs()
    cuts = Explicit(((1, 0.5), (3, 1.0)))
    callback = StructuredPruning(0.5, schedule=cuts, extensions=[SaveEachSize()], dirpath=str(tmp_path / "here"))
    run = trainer(tmp_path, 4, callback, ends)
    run.fit(module, *loaders())
    folder = tmp_path / "here" / "sizes"
    saved_sizes = callback.report.size_checkpoints
    assert [saved.file for saved in saved_sizes] == [f"sizes/params={n}.ckpt" for n in (155, 105, 63)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(Path(r.file).name for r in saved_sizes)
    assert [saved.metric for saved in saved_sizes] == pytest.approx([0.9, 0.9, 0.9])
    assert [saved.epoch for saved in saved_sizes][:2] == [1, 3]
    for saved, epoch in zip(saved_sizes, (0, 2, 3), strict=True):
        loaded = load_from_checkpoint(Small, folder / Path(saved.file).name)
        assert sum(p.numel() for p in loaded.parameters()) == saved.params
        assert torch.equal(loaded.net[0].weight, ends.weights[epoch])
        file = torch.load(folder / Path(saved.file).name, weights_only=True)
        assert "optimizer_states" not in file
    run.test(module, loaders()[1], ckpt_path=folder / "params=155.ckpt", verbose=False)
    assert module.net[0].out_features == 8
    page = (tmp_path / "here" / "report.md").read_text()
    assert "**Sizes**" in page
    assert "](sizes.png)" in page
    assert (tmp_path / "here" / "sizes.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "here" / "report.json").read_text())["size_checkpoints"]) == 3


def test_a_size_that_was_not_measured_has_no_metric(tmp_path: Path) -> None:
    """It has not that of the size before."""
    callback = StructuredPruning(0.5, schedule=Explicit(((2, 0.5), (3, 1.0))), extensions=[SaveEachSize()])
    trainer(tmp_path, 4, callback, check_val_every_n_epoch=2).fit(Small(), *loaders())
    metrics = [saved.metric for saved in callback.report.size_checkpoints]
    assert metrics[1] is None
    assert [metrics[0], metrics[2]] == pytest.approx([0.9, 0.9])


def test_saving_each_size_goes_on_after_a_resume(tmp_path: Path) -> None:
    def callback() -> StructuredPruning:
        cuts = Explicit(((1, 0.5), (3, 1.0)))
        return StructuredPruning(0.5, schedule=cuts, extensions=[SaveEachSize()], dirpath=str(tmp_path / "here"))

    first = trainer(tmp_path, 4, callback())

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    first.callbacks.append(Stop())
    first.fit(Small(), *loaders())
    for file in (tmp_path / "here" / "sizes").iterdir():
        file.unlink()
    resumed = callback()
    trainer(tmp_path, 4, resumed).fit(Small(), *loaders(), ckpt_path=tmp_path / "stop.ckpt")
    assert [saved.params for saved in resumed.report.size_checkpoints] == [155, 105, 63]  # the first is remembered
    assert len(list((tmp_path / "here" / "sizes").iterdir())) == 2


def test_without_it_nothing_is_saved(tmp_path: Path) -> None:
    callback = StructuredPruning(pruning_ratio=0.5, schedule=Explicit(((1, 1.0),)))
    trainer(tmp_path, 2, callback).fit(Small(), *loaders())
    assert not (tmp_path / "sizes").exists()
    assert not (tmp_path / "sizes.png").exists()
    assert callback.report.size_checkpoints == []
