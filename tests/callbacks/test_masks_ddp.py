"""Two processes mask what one masks, and keep it over a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import LinearSchedule, MagnitudePruning
from lightning_prune.surgery import masks_of, revived
from tests.callbacks import ranked
from tests.callbacks.networks import Net, fit, make, weights
from tests.support import ranks


def train(folder: str, resume: bool = False) -> dict[str, Any]:
    """Six epochs with two cuts and a rewind, as every process makes them."""
    model = make(Net, "adamw", norm=False, example=False).double()
    processes = ranked.processes()
    options = {"devices": processes, "strategy": "ddp", "use_distributed_sampler": False} if processes > 1 else {}
    fit(
        Path(folder),
        model,
        MagnitudePruning(0.6, schedule=LinearSchedule(start=1, end=3, cuts=2), rewind=1),
        ModelCheckpoint(Path(folder) / "ends", filename="{epoch}", save_top_k=-1),
        data=ranked.share(),
        validate=False,
        ckpt_path=Path(folder) / "ends" / "epoch=1.ckpt" if resume else None,
        **options,
    )
    assert not revived(model)
    return {"weights": weights(model), "masks": dict(masks_of(model))}


def whole_and_resumed(folder: str) -> list[dict[str, Any]]:
    return [train(folder, resume) for resume in (False, True)]


@pytest.mark.ddp
def test_two_processes_are_one(tmp_path: Path) -> None:
    one = ranks.run(train, str(tmp_path / "one"))
    assert sum(int(mask.sum()) for mask in one["masks"].values()) > 50
    for two in ranks.run(whole_and_resumed, str(tmp_path / "two"), processes=2):
        for part in ("weights", "masks"):
            assert one[part].keys() == two[part].keys()
            for name, value in one[part].items():
                torch.testing.assert_close(two[part][name], value, rtol=1e-10, atol=1e-12)
