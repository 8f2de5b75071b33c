"""Network slimming with and without its penalty: ``python -m benchmarks.slimming``.

The network of four convolutions, wider and with batch normalisation, is trained on CIFAR-10 with the L1 subgradient on
the scales and without; then one threshold over all scales cuts it, and training goes on. Drawn are the scales right
before the cut, and accuracy against the share of filters removed, beside the unpruned network that goes on as long. All
shares of a seed are cut from one checkpoint. A stopped run goes on where it was: what is done lies in ``--work``. Needs
the set under ``--root`` or ``LIGHTNING_PRUNE_DATA``.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from benchmarks.common import EVIDENCE, command, fill, machine, signed
from benchmarks.four_methods import Right, accuracy, fit, with_interval
from lightning_prune import NetworkSlimming, OneShot, ScaleL1
from lightning_prune.data import CIFAR10
from lightning_prune.extras import require
from lightning_prune.models import FourConvClassifier

Row = dict[str, Any]

SHARES = (0.0, 0.3, 0.5, 0.7)  # 0: unpruned
FILTERS, LR, MOMENTUM, DECAY = 16, 0.05, 0.9, 1e-4
# In s steps a scale is pulled by s · lr / (1 − momentum) · strength: 3 in six epochs here, where scales begin at 1. The
# paper's 1e-4 pulls as far in its 160 epochs.
STRENGTH = 3e-3
NAMES = {0.0: ("without the penalty", "#0072B2", "o"), STRENGTH: ("with the penalty", "#D55E00", "s")}


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


def sparse(given: argparse.Namespace, data: CIFAR10, seed: int, strength: float) -> Path:
    """A checkpoint of the run right before the cut, made once."""
    file = Path(given.work / f"sparse-{seed}-{strength}-{given.epochs}.ckpt")
    if not file.is_file():
        seed_everything(seed, verbose=False)
        callbacks = slimming(0.5, strength, given.epochs), Keep(given.epochs, file)
        fit(network(), data, given.epochs + given.after, *callbacks, precision="bf16-mixed")
    return file


def run(given: argparse.Namespace, data: CIFAR10, seed: int, strength: float, share: float) -> Row:
    """Cut once and go on."""
    file, model = sparse(given, data, seed, strength), network()
    model.load_state_dict(torch.load(file)["state_dict"])
    data.setup("fit")
    test = data._splits["test"]
    before, values = accuracy(model, test), scales(model)
    right, whole = Right(test), sum(p.numel() for p in model.parameters())
    callbacks = [slimming(share, strength, given.epochs)] if share else []
    epochs = given.epochs + given.after
    fit(model, data, epochs, *callbacks, right, precision="bf16-mixed", resume=file)
    return {
        "seed": seed,
        "strength": strength,
        "share": share,
        "before": before,
        "right after": right.accuracy,
        "accuracy": accuracy(model, test),
        "scales": values,
        "scales after": scales(model),
        "params left": sum(p.numel() for p in model.parameters()) / whole,
    }


def remaining(given: argparse.Namespace, rows: Path) -> Iterator[Row]:
    """Run what is not among the rows yet, and write each down."""
    done = [json.loads(line) for line in rows.read_text("utf-8").splitlines()] if rows.is_file() else []
    for seed in range(given.seeds):
        data = CIFAR10(root=given.root, batch_size=128, augment=True, seed=seed)
        for strength in NAMES:
            for share in SHARES:
                job = {"seed": seed, "strength": strength, "share": share}
                row = next((row for row in done if job.items() <= row.items()), None)
                if row is None:
                    row = run(given, data, seed, strength, share)
                    with rows.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print(job, f"{row['right after']:.2f} {row['accuracy']:.2f}", flush=True)
                yield row


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
            paired = "–" if is_unpruned else signed(less, 1) if len(less) > 1 else f"{less[0]:+.1f}"
            lines.append(
                f"| {name} | {100 * share:.0f} | {100 * mean(mine, lambda row: row['params left']):.1f} "
                f"| {mean(mine, lambda row: row['before']):.1f} | {mean(mine, lambda row: row['right after']):.1f} "
                f"| {with_interval([row['accuracy'] for row in mine])} | {paired} |"
            )
    shares = []
    for strength, (name, _, _) in NAMES.items():
        values = [scale for row in of(rows, strength, 0.0) for scale in row["scales"]]
        small = 100 * fmean(scale < 0.05 for scale in values)
        shares.append(f"{name} {small:.0f} % of the scales are below 0.05 and their mean is {fmean(values):.2f}")
    return "\n".join(
        [
            *lines,
            "",
            f"Test accuracy in %, last epoch, {facts['seeds']} seeds. Right before the cut, {'; '.join(shares)}.",
            "",
            f"`{facts['command']}` on {facts['machine']['processor']}; {facts['machine']['versions']}",
        ]
    )


def main() -> None:
    """Run what is not done yet, and write docs/evidence/slimming."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6, help="before the cut")
    parser.add_argument("--after", type=int, default=2, help="epochs after the cut")
    parser.add_argument("--work", type=Path, default=Path("runs/slimming"), help="what is done so far")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    rows = list(remaining(given, given.work / "rows.jsonl"))
    facts = {
        "command": command("benchmarks.slimming"),
        "machine": machine(),
        "seeds": given.seeds,
        "epochs": given.epochs,
        "after": given.after,
        "strength": STRENGTH,
        "rows": rows,
    }
    home = EVIDENCE / "slimming"
    home.mkdir(parents=True, exist_ok=True)
    (home / "results.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    figure(rows).savefig(home / "figure.png")
    fill(home / "README.md", tables(rows, facts))


if __name__ == "__main__":
    main()
