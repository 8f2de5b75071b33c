"""Masks beside Lightning's ``ModelPruning``: ``python -m benchmarks.masks``.

The MLP 784-128-64-10 on Fashion-MNIST. First, zeros at the end of every epoch of a run that is stopped and resumed
from its checkpoint; then test accuracy at several sparsities, beside the dense network trained as long, over seeds.
Needs the set under ``--root`` or ``LIGHTNING_PRUNE_DATA``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn

from benchmarks.common import EVIDENCE, command, fill, interval, machine, signed
from lightning_prune import NM, HybridPruning, MagnitudePruning, OneShot
from lightning_prune.data import FashionMNIST, ImageData
from lightning_prune.extras import require
from lightning_prune.models import MLPClassifier

SIZES = (784, 128, 64, 10)
VARIANTS: dict[str, Callable[[], Callback]] = {
    "magnitude 50 %": lambda: MagnitudePruning(0.5),
    "hybrid 50 %": lambda: HybridPruning(0.5),
    "2:4": lambda: MagnitudePruning(granularity=NM(2, 4)),
    "magnitude 80 %": lambda: MagnitudePruning(0.8),
    "magnitude 95 %": lambda: MagnitudePruning(0.95),
}


class Zeros(Callback):
    """Share of zeros in the weights of the linear layers, as multiplied, after each epoch."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        weights = [layer.weight.detach() for layer in pl_module.modules() if isinstance(layer, nn.Linear)]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        self.shares.append(100 * zeros / sum(weight.numel() for weight in weights))


def train(
    data: ImageData, seed: int, epochs: int, folder: Path, *callbacks: Callback, resume: Path | None = None
) -> Any:
    """Train with AdamW and weight decay; the model and its test accuracy in %."""
    seed_everything(seed, verbose=False)
    model = MLPClassifier(SIZES, "adamw", lr=1e-3, weight_decay=0.01)
    settings: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks],
        accelerator="cpu",
        default_root_dir=folder,
        enable_checkpointing=checkpoints,
        limit_val_batches=0,
        **settings,
    )
    trainer.fit(model, datamodule=data, ckpt_path=resume)
    return 100 * trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"]


def resumed(data: ImageData, make: Callable[[], Callback], epochs: int, folder: Path) -> dict[str, list[float]]:
    """Zeros by epoch, before and after the stop in the middle."""
    first, second = Zeros(), Zeros()
    saver = ModelCheckpoint(folder, filename="stop", save_top_k=1)
    train(data, 0, epochs, folder, make(), first, saver)
    train(data, 0, 2 * epochs, folder, make(), second, resume=folder / "stop.ckpt")
    return {"before": first.shares, "after": second.shares}


def figure(zeros: dict[str, dict[str, list[float]]], accuracies: dict[str, list[float]], path: Path) -> None:
    """Left: zeros over a run that is resumed. Right: accuracy by method."""
    drawn = require("matplotlib.figure", extra="plot").Figure(figsize=(10, 4), dpi=150, layout="constrained")
    left, right = drawn.subplots(1, 2)
    for (name, parts), (colour, mark) in zip(zeros.items(), (("#0072B2", "o"), ("#D55E00", "s")), strict=True):
        shares = [*parts["before"], *parts["after"]]
        left.plot(range(1, len(shares) + 1), shares, color=colour, marker=mark, label=name)
        stop = len(parts["before"]) + 0.5
    left.axvline(stop, color="#999999", ls="--", lw=1)
    left.annotate("resumed", (stop, 58), xytext=(4, 0), textcoords="offset points", fontsize="small", color="#666666")
    left.set(xlabel="epochs trained", ylabel="zeros among the weights (%)", ylim=(-3, 63))
    left.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2, fontsize="small")
    left.set_xticks(range(1, len(shares) + 1))
    for x, (_, values) in enumerate(accuracies.items()):
        right.plot([x] * len(values), values, "o", color="#0072B2", ms=5, alpha=0.7)
        right.plot([x - 0.25, x + 0.25], [sum(values) / len(values)] * 2, color="#000000", lw=1.5)
    right.set_xticks(range(len(accuracies)), [name.replace(" ", "\n", 1) for name in accuracies], fontsize="small")
    right.set(ylabel="test accuracy after the last epoch (%)")
    for axes in (left, right):
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path)


def tables(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| zeros in % | before the stop | first epoch after the resume | at the end |", "|---|---:|---:|---:|"]
    for name, parts in result["zeros"].items():
        before, after = parts["before"], parts["after"]
        lines.append(f"| {name} | {before[-1]:.1f} | {after[0]:.1f} | {after[-1]:.1f} |")
    dense = result["accuracies"]["dense"]
    lines += ["", "| | test accuracy, % | minus dense, paired |", "|---|---:|---:|"]
    for name, values in result["accuracies"].items():
        mean, half = interval(values)
        paired = signed([a - b for a, b in zip(values, dense, strict=True)]) if name != "dense" else "–"
        lines.append(f"| {name} | {mean:.2f} ± {half:.2f} | {paired} |")
    seeds, epochs = result["seeds"], result["epochs"]
    lines += ["", f"{seeds} seeds, {epochs} epochs, last epoch. ± is the 95 % interval of the mean.", ""]
    lines += [f"`{result['command']}` on {result['machine']['processor']}; {result['machine']['versions']}"]
    return "\n".join(lines)


def main() -> None:
    """Run, and write docs/evidence/masks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    data = FashionMNIST(root=given.root, batch_size=512)
    accuracies: dict[str, list[float]] = {"dense": [], **{name: [] for name in VARIANTS}}
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        zeros = {
            "MagnitudePruning": resumed(
                data, lambda: MagnitudePruning(0.508, schedule=OneShot(at=1)), given.epochs // 2, folder / "ours"
            ),
            "Lightning's ModelPruning": resumed(
                data,
                # Once, after the first epoch, as ours.
                lambda: ModelPruning("l1_unstructured", amount=0.508, apply_pruning=lambda epoch: epoch == 0),
                given.epochs // 2,
                folder / "lightning",
            ),
        }
        for seed in range(given.seeds):
            accuracies["dense"].append(train(data, seed, given.epochs, folder))
            for variant, make in VARIANTS.items():
                accuracies[variant].append(train(data, seed, given.epochs, folder, make()))
    result = {
        "zeros": zeros,
        "accuracies": accuracies,
        "seeds": given.seeds,
        "epochs": given.epochs,
        "command": command("benchmarks.masks"),
        "machine": machine(),
    }
    home = EVIDENCE / "masks"
    home.mkdir(parents=True, exist_ok=True)
    (home / "masks.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    figure(zeros, accuracies, home / "masks.png")
    fill(home / "README.md", tables(result))


if __name__ == "__main__":
    main()
