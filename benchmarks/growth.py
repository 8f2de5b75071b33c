"""Two hundred cuts in one fit: ``python -m benchmarks.growth``.

An MLP with two hidden layers of 400 units loses 90 % of them, with contributions observed on every batch. Measured
right after each cut: memory of the process, live tensors, hooks on modules and parameters, duration of the cut, and
size of a checkpoint. Only the checkpoint's history may grow.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import publish, quiet_fit
from lightning_prune import Contribution, ContributionPruning, LinearSchedule
from lightning_prune.extras import require
from lightning_prune.models import MLPClassifier

Row = dict[str, float]
UNITS = 400


class Watch(Callback):
    """What there is after the first batch that follows a cut."""

    def __init__(self, pruning: ContributionPruning, every: int) -> None:
        self.pruning, self.every = pruning, every
        self.rows: list[Row] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        cuts = self.pruning.report.cuts
        if len(cuts) <= len(self.rows):
            return
        row: Row = {"cut": len(cuts), "seconds": cuts[-1].seconds, "params": cuts[-1].size.params}
        if len(cuts) % self.every == 0 or len(cuts) == 1:
            gc.collect()
            objects = gc.get_objects()
            row["tensors"] = sum(type(thing) in (Tensor, nn.Parameter) for thing in objects)
            row["objects"] = len(objects)
            row["hooks"] = sum(
                len(getattr(module, kind))
                for module in pl_module.modules()
                for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            ) + sum(len(parameter._backward_hooks or ()) for parameter in pl_module.parameters())
            row["rss"] = _resident()
            with tempfile.TemporaryDirectory() as folder:
                trainer.save_checkpoint(Path(folder) / "now.ckpt")
                row["checkpoint"] = (Path(folder) / "now.ckpt").stat().st_size
        self.rows.append(row)


def _resident() -> float:
    """Memory of the process, MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 2**20


def run(cuts: int, every: int) -> list[Row]:
    """One fit, a cut at the start of every epoch but the first."""
    seed_everything(0, verbose=False)
    x = torch.randn(96, 20)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=32)
    schedule = LinearSchedule(start=1, end=cuts, cuts=cuts)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruning = ContributionPruning(0.9, criterion=Contribution(every_n_batches=1), schedule=schedule, dirpath=folder)
        watch = Watch(pruning, every)
        module = MLPClassifier([20, UNITS, UNITS, 2], optimizer="adamw", lr=0.001)
        quiet_fit(module, loader, [pruning, watch], max_epochs=cuts + 1)
    return watch.rows


def draw(rows: Sequence[Row]) -> Any:
    """A panel per quantity over the cuts."""
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=(10, 6), layout="constrained", dpi=130)
    panels = figure.subplots(2, 3).ravel()
    quantities = {
        "seconds": ("seconds of the cut", 1.0),
        "rss": ("memory of the process (MiB)", 1.0),
        "tensors": ("live tensors", 1.0),
        "hooks": ("hooks", 1.0),
        "checkpoint": ("checkpoint (KiB)", 2.0**10),
        "params": ("parameters", 1.0),
    }
    for axes, (name, (label, unit)) in zip(panels, quantities.items(), strict=True):
        points = [(row["cut"], row[name] / unit) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), "." if name == "seconds" else "o-", ms=3, color="#0072B2")
        axes.set(xlabel="cuts", title=label, ylim=(0, 1.15 * (max(value for _, value in points) or 1)))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """One run and its page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="cuts between two measurements of memory and objects")
    given = parser.parse_args()
    rows = run(given.cuts, given.every)
    publish("growth", {"rows": rows}, page(rows), draw(rows))


def page(rows: Sequence[Row]) -> str:
    """The table, and in words what it says: they cannot differ."""
    looks = [row for row in rows if "rss" in row]
    begin, end = (1000 * median(row["seconds"] for row in part) for part in (rows[:20], rows[-20:]))
    first, last = looks[0], looks[-1]
    entries = (last["objects"] - first["objects"]) / max(last["cut"] - first["cut"], 1)
    moves = {name: f"{first[name]:.0f} to {last[name]:.0f}" for name in ("rss", "tensors", "hooks")}
    says = (
        f"A cut takes {begin:.0f} ms in the median of the first twenty and {end:.0f} ms of the last. From the first "
        f"cut to the last the process goes from {moves['rss']} MiB, live tensors from {moves['tensors']}, hooks from "
        f"{moves['hooks']}, and each cut leaves {entries:.1f} objects. The checkpoint shrinks from "
        f"{first['checkpoint'] / 1024:.0f} to {last['checkpoint'] / 1024:.0f} KiB."
    )
    lines = [
        *(*wrap(says, 127), ""),
        "| cuts | seconds of a cut | memory (MiB) | live tensors | objects | hooks | checkpoint (KiB) | parameters |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    words = ("{cut:.0f}", "{seconds:.3f}", "{rss:.0f}", "{tensors:.0f}", "{objects:.0f}", "{hooks:.0f}")
    line = f"| {' | '.join(words)} | {{checkpoint:.0f}} | {{params:,.0f}} |"
    shown = looks[:: max(len(looks) // 8, 1)]
    lines += [line.format(**{**row, "checkpoint": row["checkpoint"] / 1024}) for row in shown]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
