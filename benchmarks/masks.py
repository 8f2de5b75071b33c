"""Masks compared with Lightning's ``ModelPruning``: ``python -m benchmarks.masks``.

The MLP 784-128-64-10 on Fashion-MNIST. First, the share of zeros at the end of every epoch of a run that is stopped and
resumed from its checkpoint, in the result of ``torch.export``, and in an average of the weights. Then test accuracy at
several sparsities, with the dense network trained equally long, over seeds. ``--resume`` continues after the last
finished seed. Needs the data set in ``--root`` or ``LIGHTNING_PRUNE_DATA``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning
from torch import Tensor, nn

from benchmarks.common import EVIDENCE, add_resume, command, fill, here, interval, machine, quiet, signed, stored
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
# At once after the first epoch.
RIVALS: dict[str, Callable[[], Callback]] = {
    "MagnitudePruning": lambda: MagnitudePruning(0.508, schedule=OneShot(at=1)),
    "Lightning's ModelPruning": lambda: ModelPruning(
        "l1_unstructured", amount=0.508, apply_pruning=lambda epoch: epoch == 0
    ),
}


class Zeros(Callback):
    """Share of zeros in the weights of the linear layers, as multiplied, after each epoch."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.shares.append(share(layer.weight for layer in pl_module.modules() if isinstance(layer, nn.Linear)))


def share(weights: Iterable[Tensor]) -> float:
    """Zeros in %."""
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    return 100 * float((flat == 0).double().mean())


def train(
    data: ImageData, seed: int, epochs: int, folder: Path, *callbacks: Callback, resume: Path | None = None
) -> tuple[Any, float]:
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
    return model, 100 * trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"]


def resumed(data: ImageData, make: Callable[[], Callback], epochs: int, folder: Path) -> dict[str, Any]:
    """Zeros by epoch, before and after the stop in the middle, in the exported program, and in an average's weights."""
    first, second = Zeros(), Zeros()
    saver = ModelCheckpoint(folder, filename="stop", save_top_k=1)
    train(data, 0, epochs, folder, make(), first, saver)
    model, _ = train(data, 0, 2 * epochs, folder, make(), second, resume=folder / "stop.ckpt")
    program = torch.export.export(model.eval(), (torch.zeros(2, *data.train_dataloader().dataset[0][0].shape),))
    exported = share(tensor for name, tensor in program.state_dict.items() if name.endswith("weight"))
    average, _ = train(data, 0, epochs, folder, make(), EMAWeightAveraging(decay=0.99))
    averaged = share(layer.weight for layer in average.modules() if isinstance(layer, nn.Linear))
    return {"before": first.shares, "after": second.shares, "exported": exported, "average": averaged}


def figure(zeros: dict[str, dict[str, Any]], accuracies: dict[str, list[float]], path: Path) -> None:
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
    lines = [
        "| zeros in % | before the stop | first epoch after the resume | at the end | exported | average of weights |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, parts in result["zeros"].items():
        found = [parts["before"][-1], parts["after"][0], parts["after"][-1], parts["exported"], parts["average"]]
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in found)} |")
    accuracies = by_variant(result["rows"])
    dense = accuracies["dense"]
    lines += ["", "| | test accuracy, % | minus dense, paired |", "|---|---:|---:|"]
    for name, values in accuracies.items():
        mean, half = interval(values)
        paired = signed([a - b for a, b in zip(values, dense, strict=True)]) if name != "dense" else "–"
        lines.append(f"| {name} | {mean:.2f} ± {half:.2f} | {paired} |")
    seeds, epochs = len(dense), result["settings"]["epochs"]
    lines += ["", f"{seeds} seeds, {epochs} epochs, last epoch. ± is the 95 % interval of the mean.", ""]
    lines += [f"`{result['command']}` on {result['machine']['processor']}; {result['machine']['versions']}"]
    return "\n".join(lines)


def by_variant(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Accuracies of all seeds."""
    return {name: [row["accuracy"][name] for row in rows if "accuracy" in row] for name in ("dense", *VARIANTS)}


def main() -> None:
    """Run, and write docs/evidence/masks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    data = FashionMNIST(root=given.root, batch_size=512)
    home = EVIDENCE / "masks"
    home.mkdir(parents=True, exist_ok=True)
    file, epochs = home / "masks.json", given.epochs
    result = {"settings": {"epochs": epochs}, "command": command("benchmarks.masks"), "machine": machine()}
    rows = stored(file, result["settings"], resume=given.resume)

    def keep(row: dict[str, Any]) -> None:
        rows.append({**row, "at": here()})
        file.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        for label, make in RIVALS.items():
            if not any(row.get("zeros") == label for row in rows):
                keep({"zeros": label, **resumed(data, make, epochs // 2, folder / label)})
        for seed in range(given.seeds):
            if not any(row.get("seed") == seed for row in rows):
                accuracy = {"dense": train(data, seed, epochs, folder)[1]}
                accuracy |= {
                    variant: train(data, seed, epochs, folder, make())[1] for variant, make in VARIANTS.items()
                }
                keep({"seed": seed, "accuracy": accuracy})
    zeros = {row["zeros"]: row for row in rows if "zeros" in row}
    figure(zeros, by_variant(rows), home / "masks.png")
    fill(home / "README.md", tables({**result, "rows": rows, "zeros": zeros}))


if __name__ == "__main__":
    main()
