"""Four pruning methods on one very small network: ``python -m benchmarks.four_methods``.

The network of Batra et al. (2024), four convolutions of three filters each, is trained on CIFAR-10, pruned once by each
method and amount, and fine-tuned. Accuracy right after the cut and after fine-tuning, speed-up and size on disk are
plotted against sparsity, with the unpruned network trained equally long. Some points are also fine-tuned at the paper's
learning rate. ``--resume`` continues a stopped run from ``--work``. Needs the data set in ``--root`` or
``LIGHTNING_PRUNE_DATA``.
"""

from __future__ import annotations

import argparse
import io
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from benchmarks.common import add_resume, computed, interval, publish, quiet, quiet_fit, shown, signed
from lightning_prune import L2, HybridPruning, Kernel, MagnitudePruning, OneShot, Scope, StructuredPruning
from lightning_prune.data import CIFAR10, ImageTensors
from lightning_prune.extras import require
from lightning_prune.models import FourConvClassifier

Row = dict[str, Any]

#: Dense training, and the two ways of fine-tuning: (learning rate, weight decay) of Adam.
DENSE, WORKS, REPORT = (3e-3, 0.0), (1e-3, 0.0), (1e-6, 1e-8)
BATCHES = (1, 128)
NOW = OneShot(at=0)


@dataclass(frozen=True)
class Method:
    """A curve: what is pruned, by which amounts, and the amount that is fine-tuned at the report's rate as well."""

    label: str
    colour: str
    mark: str
    make: Callable[[FourConvClassifier, float], Callback]
    amounts: tuple[float, ...]
    slow: float | None = None


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}


def filters(model: FourConvClassifier, amount: float) -> Callback:
    """The same number of filters of each layer; what is left over of the amount is taken from the first ones."""
    layers = convolutions(model)
    total = sum(layer.out_channels for layer in layers.values())
    each, rest = divmod(round(amount * total), len(layers))
    gone = {name: each + (i < rest) for i, name in enumerate(layers)}
    ratios = {name: count / layers[name].out_channels for name, count in gone.items() if count}
    return StructuredPruning(ratios, schedule=NOW)


def channels(model: FourConvClassifier, amount: float) -> Callback:
    layers, scope = list(convolutions(model)), Scope("global", normalize="none")
    return StructuredPruning(amount, criterion=L2(), schedule=NOW, scope=scope, layers=layers)


def kernels(model: FourConvClassifier, amount: float) -> Callback:
    return MagnitudePruning(amount, Kernel(), schedule=NOW, layers=list(convolutions(model)))


TWELFTHS = tuple(n / 12 for n in (1, 2, 4, 8))
METHODS = {
    "magnitude": Method(
        "magnitude: all weights, one threshold",
        "#0072B2",
        "o",
        lambda _, s: MagnitudePruning(s, schedule=NOW),
        (0.3, 0.5, 0.7, 0.9, 0.95),
        0.9,
    ),
    "filters": Method("filters: L1, the same share of each layer", "#D55E00", "s", filters, TWELFTHS, 4 / 12),
    "slimming, kernels": Method("slimming as reported: L2 of kernels", "#CC79A7", "v", kernels, (0.1, 0.25, 0.5)),
    "slimming, channels": Method("slimming, whole channels: L2", "#E69F00", "^", channels, TWELFTHS),
    "hybrid": Method(
        "hybrid: weights, a threshold per filter",
        "#009E73",
        "D",
        lambda model, s: HybridPruning(s, schedule=NOW, layers=list(convolutions(model))),
        (0.2, 0.4, 0.6, 0.8),
    ),
    "unpruned": Method("unpruned, trained as long", "#666666", "x", lambda *_: Callback(), (0.0,)),
}


class Right(Callback):
    """Accuracy right after the cut, before anything is trained."""

    def __init__(self, test: ImageTensors) -> None:
        self.test = test
        self.accuracy: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.accuracy is None:
            self.accuracy = accuracy(pl_module, self.test)


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageTensors) -> float:
    """Share of the images that are classified rightly, in %."""
    training, _ = model.training, model.eval()
    pairs = zip(images.images.split(500), images.labels.split(500), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
    model.train(training)
    return 100 * right / len(images)


def network(state: Mapping[str, torch.Tensor], rate: tuple[float, float]) -> FourConvClassifier:
    model = FourConvClassifier(optimizer="adam", lr=rate[0], weight_decay=rate[1])
    model.load_state_dict(state)
    return model


def left(model: nn.Module) -> int:
    """Parameters that are not zero; a trained one is zero only where it is masked."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of the saved ``state_dict``, as written and compressed."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return {"bytes": file.tell(), "compressed": len(zlib.compress(file.getvalue(), 9))}


@torch.no_grad()
def in_turn(dense: nn.Module, pruned: nn.Module, batch: int, rounds: int = 21) -> dict[str, float]:
    """Median milliseconds of both, timed in turn, and the median of the rounds' ratios; processor time, one thread."""
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    passes = max(1, 64 // batch)
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        pair = []
        for model in (dense, pruned):
            model(x)
            began = time.process_time()
            for _ in range(passes):
                model(x)
            pair.append(1e3 * (time.process_time() - began) / passes)
        times.append((pair[0], pair[1]))
    return {
        "dense": median(a for a, _ in times),
        "pruned": median(b for _, b in times),
        "speedup": median(a / b for a, b in times),
    }


def jobs(given: argparse.Namespace) -> Iterator[Row]:
    """Everything that is to be run; the report's rate for the first seed only, and last."""
    for seed in range(given.seeds):
        for name, method in METHODS.items():
            for amount in method.amounts:
                point = {"seed": seed, "method": name, "amount": round(amount, 4)}
                yield {**point, "rate": "works", "epochs": given.epochs}
    for name, method in METHODS.items():
        if method.slow is not None and given.report_epochs:
            point = {"seed": 0, "method": name, "amount": round(method.slow, 4)}
            yield {**point, "rate": "report", "epochs": given.report_epochs}


@cache
def loaded(root: str | None, seed: int, augment: bool = False) -> CIFAR10:
    data = CIFAR10(root=root, batch_size=128, augment=augment, seed=seed)
    data.setup("fit")
    return data


def dense_state(given: argparse.Namespace, seed: int) -> dict[str, torch.Tensor]:
    """The dense network of a seed, trained once."""
    file = Path(given.work / f"dense-{seed}-{given.dense_epochs}.pt")
    if not file.is_file():
        seed_everything(seed, verbose=False)
        model = FourConvClassifier(optimizer="adam", lr=DENSE[0], weight_decay=DENSE[1])
        quiet_fit(model, loaded(given.root, seed), max_epochs=given.dense_epochs)
        torch.save(model.state_dict(), file)
    return dict(torch.load(file))


def run(given: argparse.Namespace, job: Row) -> Row:
    """Prune, fine-tune and measure once."""
    seed, rate = job["seed"], WORKS if job["rate"] == "works" else REPORT
    state, data = dense_state(given, seed), loaded(given.root, seed)
    dense, model = network(state, rate).eval(), network(state, rate)
    test = data._splits["test"]
    right = Right(test)
    seed_everything(seed, verbose=False)
    method = METHODS[job["method"]].make(model, job["amount"])
    quiet_fit(model, data, [method, right], max_epochs=job["epochs"])
    total = sum(parameter.numel() for parameter in dense.parameters())
    return {
        "sparsity": 100 * (1 - left(model) / total),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "right after": right.accuracy,
        "accuracy": accuracy(model, test),
        "latency": {str(batch): in_turn(dense, model.eval(), batch) for batch in BATCHES},
        "size": sizes(model),
    }


def mean(rows: Iterable[Row], what: Callable[[Row], float]) -> float:
    return fmean(what(row) for row in rows)


def points(rows: Sequence[Row], name: str) -> list[list[Row]]:
    """The rows of a curve, those of all seeds together for each amount."""
    mine = [row for row in rows if row["method"] == name and row["rate"] == "works"]
    return [[row for row in mine if row["amount"] == amount] for amount in sorted({row["amount"] for row in mine})]


def control(rows: Sequence[Row], row: Row) -> float:
    """Accuracy of the unpruned network of the same seed, trained as long at the same rate."""
    same = ("seed", "rate", "epochs")
    fits = (r for r in rows if r["method"] == "unpruned" and all(r[key] == row[key] for key in same))
    return float(next(fits)["accuracy"])


def figure(rows: Sequence[Row]) -> Any:
    """Accuracy against the network's sparsity and against what was asked for; speed-up and size against sparsity."""
    drawn = require("matplotlib.figure", extra="plot").Figure(figsize=(12, 9.5), dpi=130, layout="constrained")
    panels = drawn.subplots(2, 2)
    (accuracies, asked), (speed, size) = panels
    (unpruned,) = points(rows, "unpruned")
    for name, method in METHODS.items():
        if name == "unpruned":
            continue
        curve = points(rows, name)
        style: dict[str, Any] = {"color": method.colour, "marker": method.mark, "ms": 5, "label": method.label}
        x = [mean(point, lambda row: row["sparsity"]) for point in curve]
        amounts = [100 * point[0]["amount"] for point in curve]
        centre = [mean(point, lambda row: row["accuracy"]) for point in curve]
        bars = [interval([row["accuracy"] for row in point])[1] if len(point) > 1 else 0.0 for point in curve]
        right = [mean(point, lambda row: row["right after"]) for point in curve]
        for axes, places in ((accuracies, x), (asked, amounts)):
            axes.errorbar(places, centre, bars, capsize=2, lw=1.5, elinewidth=0.8, **style)
            axes.plot(places, right, color=method.colour, ls=":", lw=1)
        speed.plot(x, [mean(p, lambda row: row["latency"]["128"]["speedup"]) for p in curve], **style)
        size.plot(x, [mean(p, lambda row: row["size"]["bytes"]) / 1024 for p in curve], lw=1.5, **style)
        packed = [mean(p, lambda row: row["size"]["compressed"]) / 1024 for p in curve]
        size.plot(x, packed, color=method.colour, marker=method.mark, ms=4, ls=":", lw=1)
    grey = METHODS["unpruned"].colour
    top = mean(unpruned, lambda row: row["accuracy"])
    for axes in (accuracies, asked):
        axes.axhline(top, color=grey, ls="--", lw=1, label="unpruned, trained as long")
        axes.set(ylabel="test accuracy (%)", ylim=(8, None))
    speed.axhline(1, color=grey, ls="--", lw=1)
    for key, style in (("bytes", "--"), ("compressed", ":")):
        size.axhline(unpruned[0]["size"][key] / 1024, color=grey, ls=style, lw=1)
    accuracies.set(xlabel="parameters of the network that are gone (%)", title="accuracy; dotted: right after the cut")
    asked.set(xlabel="share asked for, of what the method looks at (%)", title="the same by the share asked for")
    speed.set(xlabel="parameters gone (%)", ylabel="times as fast, batch 128", title="speed-up")
    size.set(xlabel="parameters gone (%)", ylabel="KiB", ylim=(0, None), title="size on disk; dotted: compressed")
    speed.legend(*asked.get_legend_handles_labels(), frameon=False, fontsize="small", loc="upper left")
    for axes in panels.flat:
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def tables(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| method | asked for, % | parameters gone, % | right after | fine-tuned | minus unpruned, paired "
        "| times as fast, batch 1 | batch 128 | KiB | compressed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in METHODS:
        for point in points(rows, name):
            right, after = ([row[key] for row in point] for key in ("right after", "accuracy"))
            less = [row["accuracy"] - control(rows, row) for row in point]
            paired = "–" if name == "unpruned" else signed(less, 1)
            times = [mean(point, lambda row, b=b: row["latency"][str(b)]["speedup"]) for b in BATCHES]
            disk = [mean(point, lambda row, k=k: row["size"][k]) / 1024 for k in ("bytes", "compressed")]
            lines.append(
                f"| {name} | {100 * point[0]['amount']:.0f} | {mean(point, lambda row: row['sparsity']):.1f} "
                f"| {fmean(right):.1f} | {shown(after, 1)} | {paired} "
                f"| {times[0]:.2f} | {times[1]:.2f} | {disk[0]:.1f} | {disk[1]:.1f} |"
            )
    (unpruned,) = points(rows, "unpruned")
    dense = {b: median(row["latency"][str(b)]["dense"] for row in rows) for b in BATCHES}
    lines += [
        "",
        f"Test accuracy in %, last epoch; mean over {facts['seeds']} seeds ± half its 95 % interval. The dense "
        f"networks have {shown([row['right after'] for row in unpruned], 1)} after {facts['dense epochs']} "
        f"epochs, before {facts['epochs']} epochs of fine-tuning. Milliseconds of the dense network: "
        f"{dense[1]:.3f} for one image, {dense[128]:.1f} for 128.",
    ]
    first = [row for row in rows if row["seed"] == 0]
    slow = [row for row in first if row["rate"] == "report"]
    if slow:
        lines += [
            "",
            f"| seed 0 | asked for, % | right after | {slow[0]['epochs']} epochs at the report's rate, 1e-6 "
            f"| {facts['epochs']} epochs at 1e-3 |",
            "|---|---:|---:|---:|---:|",
        ]
    for row in slow:
        keys = ("method", "amount")
        works = next(r for r in first if r["rate"] == "works" and all(r[key] == row[key] for key in keys))
        lines.append(
            f"| {row['method']} | {100 * row['amount']:.0f} | {row['right after']:.1f} | {row['accuracy']:.1f} "
            f"| {works['accuracy']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all jobs, and write docs/evidence/four_methods."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dense-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5, help="epochs of fine-tuning")
    parser.add_argument(
        "--report-epochs", type=int, default=20, help="epochs of fine-tuning at the paper's rate; 0: none"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/four_methods"), help="folder of finished rows")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    rows = list(
        computed(
            jobs(given), partial(run, given), given.work / "rows.jsonl", resume=given.resume, leftovers=["dense-*.pt"]
        )
    )
    facts = {"seeds": given.seeds, "dense epochs": given.dense_epochs, "epochs": given.epochs, "rows": rows}
    publish("four_methods", facts, tables(rows, facts), figure(rows))


if __name__ == "__main__":
    main()
