"""Network slimming with and without its penalty: ``python -m benchmarks.slimming``.

The network of four convolutions, wider and with batch normalisation, is trained on CIFAR-10 with and without the L1
subgradient on the scales. Then it is cut by one threshold over all scales, and training continues. The learning rate
follows a cosine over the whole run. The plots show the scales right before the cut, and accuracy against the share of
filters removed, with the unpruned network trained equally long. All shares of a seed are cut from one checkpoint.
``--resume`` continues a stopped run from ``--work``. Needs the data set in ``--root`` or ``LIGHTNING_PRUNE_DATA``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import cos, pi
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from benchmarks.common import add_resume, computed, publish, quiet, quiet_fit, shown, signed
from benchmarks.four_methods import Right, accuracy, loaded
from lightning_prune import NetworkSlimming, OneShot, ScaleL1
from lightning_prune.data import CIFAR10
from lightning_prune.extras import require
from lightning_prune.models import FourConvClassifier

Row = dict[str, Any]

SHARES = (0.0, 0.2, 0.3, 0.5, 0.7)  # 0: unpruned
FILTERS, LR, MOMENTUM, DECAY = 32, 0.1, 0.9, 1e-4
# In s steps a scale, 1 at first, is pulled by s · mean lr / (1 − momentum) · strength: about 3 before the cut.
# The paper's 1e-4 pulls as far in its 160 epochs.
STRENGTH = 1e-3
NAMES = {0.0: ("without the penalty", "#0072B2", "o"), STRENGTH: ("with the penalty", "#D55E00", "s")}


class Cosine(Callback):
    """The learning rate of every epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.max_epochs
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = LR * (1 + cos(pi * trainer.current_epoch / trainer.max_epochs)) / 2


class Keep(Callback):
    """Stops the run before an epoch and keeps it."""

    def __init__(self, epoch: int, file: Path) -> None:
        self.epoch, self.file = epoch, file

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch - 1:
            trainer.save_checkpoint(self.file)
            trainer.should_stop = True


def network() -> FourConvClassifier:
    model = FourConvClassifier(
        filters=FILTERS, batch_norm=True, optimizer="sgd", lr=LR, momentum=MOMENTUM, weight_decay=DECAY
    )
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def scales(model: nn.Module) -> list[float]:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    return [float(scale) for layer in layers for scale in layer.weight.detach().abs()]


def slimming(share: float, strength: float, epochs: int) -> NetworkSlimming:
    return NetworkSlimming(share, penalty=ScaleL1(strength), schedule=OneShot(at=epochs))


def train(given: argparse.Namespace, model: nn.Module, data: CIFAR10, *callbacks: Callback, **settings: Any) -> None:
    epochs = given.epochs + given.after
    quiet_fit(model, data, [Cosine(), *callbacks], max_epochs=epochs, precision="bf16-mixed", **settings)


def sparse(given: argparse.Namespace, data: CIFAR10, seed: int, strength: float) -> Path:
    """A checkpoint of the run right before the cut, made once."""
    file = Path(given.work / f"sparse-{seed}-{strength}-{given.epochs}-{given.after}.ckpt")
    if not file.is_file():
        seed_everything(seed, verbose=False)
        train(given, network(), data, slimming(0.5, strength, given.epochs), Keep(given.epochs, file))
    return file


def jobs(given: argparse.Namespace) -> Iterator[Row]:
    for seed in range(given.seeds):
        for strength in NAMES:
            for share in SHARES:
                run = {"epochs": given.epochs, "after": given.after}
                yield {"seed": seed, "strength": strength, "share": share, **run}


def run(given: argparse.Namespace, job: Row) -> Row:
    """Cut once and go on."""
    share, strength, data = job["share"], job["strength"], loaded(given.root, job["seed"], augment=True)
    file, model = sparse(given, data, job["seed"], strength), network()
    model.load_state_dict(torch.load(file)["state_dict"])
    test = data._splits["test"]
    before, values = accuracy(model, test), scales(model)
    right, whole = Right(test), sum(p.numel() for p in model.parameters())
    callbacks = [slimming(share, strength, given.epochs)] if share else []
    train(given, model, data, *callbacks, right, resume=file)
    return {
        "before": before,
        "right after": right.accuracy,
        "accuracy": accuracy(model, test),
        "scales": values,
        "scales after": scales(model),
        "params left": sum(p.numel() for p in model.parameters()) / whole,
    }


def of(rows: Sequence[Row], strength: float, share: float) -> list[Row]:
    return [row for row in rows if row["strength"] == strength and row["share"] == share]


def figure(rows: Sequence[Row]) -> Any:
    """Scales before the cut, and accuracy against the share removed."""
    drawn = require("matplotlib.figure", extra="plot").Figure(figsize=(11, 4.2), dpi=140, layout="constrained")
    left, right = drawn.subplots(1, 2)
    values = {s: [scale for row in of(rows, s, 0.0) for scale in row["scales"]] for s in NAMES}
    top = max(max(v) for v in values.values())
    edges = [top * i / 40 for i in range(41)]
    for strength, (name, colour, mark) in NAMES.items():
        left.hist(values[strength], edges, color=colour, alpha=0.6, label=name)
        threshold = sorted(values[strength])[len(values[strength]) // 2]
        left.axvline(threshold, color=colour, ls=":", lw=1.5)
        style: dict[str, Any] = {"color": colour, "marker": mark, "ms": 5}
        x = [100 * share for share in SHARES[1:]]
        for key, line, label in (("accuracy", "-", name), ("right after", ":", None)):
            means = [fmean(row[key] for row in of(rows, strength, share)) for share in SHARES[1:]]
            right.plot(x, means, ls=line, label=label, **style)
        for share in SHARES[1:]:
            points = [row["accuracy"] for row in of(rows, strength, share)]
            right.plot([100 * share] * len(points), points, ".", color=colour, ms=3, alpha=0.6)
        whole = fmean(row["accuracy"] for row in of(rows, strength, 0.0))
        right.axhline(whole, color=colour, ls="--", lw=1)
    left.axvline(1, color="#666666", ls="--", lw=1)
    left.set(xlabel="|γ| right before the cut; dotted: the median; dashed: all at first", ylabel="filters, all seeds")
    right.set(xlabel="filters removed (%)", ylabel="test accuracy (%)")
    right.set_title("solid: trained on; dotted: right after the cut; dashed: unpruned", fontsize="small")
    left.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2, fontsize="small")
    right.legend(frameon=False, loc="lower left")
    for axes in (left, right):
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def tables(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| | filters removed, % | parameters left, % | before | right after | trained on "
        "| minus unpruned without the penalty, paired |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]

    def mean(mine: Sequence[Row], what: Callable[[Row], float]) -> float:
        return fmean(what(row) for row in mine)

    unpruned = [row["accuracy"] for row in of(rows, 0.0, 0.0)]
    for strength, (name, _, _) in NAMES.items():
        for share in SHARES:
            mine = of(rows, strength, share)
            less = [row["accuracy"] - whole for row, whole in zip(mine, unpruned, strict=True)]
            is_unpruned = not (strength or share)
            paired = "–" if is_unpruned else signed(less, 1)
            lines.append(
                f"| {name} | {100 * share:.0f} | {100 * mean(mine, lambda row: row['params left']):.1f} "
                f"| {mean(mine, lambda row: row['before']):.1f} | {mean(mine, lambda row: row['right after']):.1f} "
                f"| {shown([row['accuracy'] for row in mine], 1)} | {paired} |"
            )
    shares = []
    for strength, (name, _, _) in NAMES.items():
        values = [scale for row in of(rows, strength, 0.0) for scale in row["scales"]]
        small = 100 * fmean(scale < 0.05 for scale in values)
        shares.append(f"{name} {small:.0f} % of the scales are below 0.05 and their mean is {fmean(values):.2f}")
    text = f"Test accuracy in %, last epoch, {facts['seeds']} seeds. Right before the cut, {'; '.join(shares)}."
    return "\n".join([*lines, "", text])


def main() -> None:
    """Run all jobs, and write docs/evidence/slimming."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="epochs before the cut")
    parser.add_argument("--after", type=int, default=3, help="epochs after the cut")
    parser.add_argument("--work", type=Path, default=Path("runs/slimming"), help="folder of finished rows")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    rows = list(
        computed(
            jobs(given),
            partial(run, given),
            given.work / "rows.jsonl",
            resume=given.resume,
            leftovers=["sparse-*.ckpt"],
        )
    )
    settings = {"epochs": given.epochs, "after": given.after, "strength": STRENGTH}
    facts = {"seeds": given.seeds, **settings, "rows": rows}
    publish("slimming", facts, tables(rows, facts), figure(rows))


if __name__ == "__main__":
    main()
