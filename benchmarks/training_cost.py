"""Training cost to reach an accuracy, in MACs and seconds: ``python -m benchmarks.training_cost``.

An MLP 784-512-256-10 is trained on MNIST four times per seed: dense; losing 60 % of its hidden units in the first
epochs (``StructuredPruning``); with the same share masked by Lightning's ``ModelPruning``; and with the final widths
from the start. Costs are compared when validation accuracy first reaches a level. Needs the data set in ``--root`` or
``LIGHTNING_PRUNE_DATA``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from time import process_time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelPruning
from torch import nn

from benchmarks.common import interval, publish, quiet, quiet_fit
from benchmarks.contribution import Held, accuracy, loaded
from lightning_prune import LinearSchedule, StructuredPruning
from lightning_prune.data import ImageTensors
from lightning_prune.extras import require
from lightning_prune.models import MLPClassifier

WIDE, NARROW, RATIO = (784, 512, 256, 10), (784, 205, 102, 10), 0.6
BATCH, VAL_SHARE, LEVELS = 128, 1 / 3, (93.0, 94.0, 95.0)
# Cuts at the start of the second, third and fourth epoch.
LAST_CUT = 3
SCHEDULE = LinearSchedule(start=1, end=LAST_CUT, every=1)
#: Forward and backward pass against the forward pass alone.
TRAINING = 3

Point = dict[str, float]


class Meter(Callback):
    """What was spent by the end of each epoch: multiplications of all samples, and processor seconds without tests.

    First among callbacks, so that what the others do counts.
    """

    def __init__(self, parts: Mapping[str, ImageTensors]) -> None:
        self.parts = parts
        self.points: list[Point] = []
        self._macs, self._seconds, self._since = 0, 0.0, 0.0

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._since = process_time()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
        self._macs += TRAINING * len(batch[1]) * sum(layer.in_features * layer.out_features for layer in layers)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._seconds += process_time() - self._since
        spent = {"epochs": trainer.current_epoch + 1, "macs": self._macs, "seconds": round(self._seconds, 3)}
        self.points.append({**spent, **{part: accuracy(module, self.parts[part]) for part in ("val", "test")}})
        self._since = process_time()


def ways() -> dict[str, tuple[Sequence[int], Callable[[LightningModule], list[Callback]]]]:
    """Widths at the start, and the callbacks, of everything that is compared."""

    def masks(module: LightningModule) -> list[Callback]:
        hidden = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][:-1]
        return [
            ModelPruning(
                "ln_structured",
                [(layer, "weight") for layer in hidden],
                use_global_unstructured=False,
                amount=lambda epoch: RATIO if epoch == LAST_CUT - 1 else 0,  # after an epoch, as our last cut
                pruning_dim=0,
                pruning_norm=1,
                use_lottery_ticket_hypothesis=False,
            )
        ]

    return {
        "dense": (WIDE, lambda _: []),
        "shrinking": (WIDE, lambda _: [StructuredPruning(pruning_ratio=RATIO, schedule=SCHEDULE)]),
        "masked by ModelPruning": (WIDE, masks),
        "205-102 from scratch": (NARROW, lambda _: []),
    }


def run(way: str, held: Held, epochs: int, seed: int) -> list[Point]:
    """One training; the same seed gives the same order of batches."""
    sizes, callbacks = ways()[way]
    seed_everything(seed, verbose=False)
    module, meter = MLPClassifier(sizes), Meter(held.parts())
    quiet_fit(module, held.train_dataloader(), [meter, *callbacks(module)], max_epochs=epochs)
    return meter.points


# -- results ----------------------------------------------------------------------------------------------------------


def spent(points: Sequence[Point], level: float) -> Point | None:
    """What was spent at the first epoch whose validation accuracy reaches the level, if any does."""
    return next((point for point in points if point["val"] >= level), None)


def levels(seed: Mapping[str, Any]) -> dict[str, float]:
    """The fixed levels, and where the dense network of the same seed ends."""
    return {f"{level:g} %": level for level in LEVELS} | {"dense at its end": seed["runs"]["dense"][-1]["val"]}


def table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: cost relative to the dense network's cost to the same level, per seed, then mean and interval."""
    yield "| validation accuracy | network | seeds that reach it | epochs | MACs ÷ dense | seconds ÷ dense |"
    yield "|---|---|---|---|---|---|"
    for name in levels(results[0]):
        for way in results[0]["runs"]:
            pairs = [
                (spent(r["runs"][way], levels(r)[name]), spent(r["runs"]["dense"], levels(r)[name])) for r in results
            ]
            reached = [(mine, dense) for mine, dense in pairs if mine and dense]
            row = f"| {name} | {way} | {len(reached)} of {len(results)} |"
            if len(reached) > 1:
                ratios = [interval([mine[key] / dense[key] for mine, dense in reached]) for key in ("macs", "seconds")]
                shown = " | ".join(f"{mean:.2f} ± {half:.2f}" for mean, half in ratios)
                row += f" {fmean(mine['epochs'] for mine, _ in reached):.1f} | {shown} |"
            else:
                row += " – | – | – |"
            yield row
    yield ""
    yield "| network | validation, last epoch | test, last epoch | MACs of all (10¹²) | processor seconds of all |"
    yield "|---|---|---|---|---|"
    for way in results[0]["runs"]:
        last = [r["runs"][way][-1] for r in results]
        scores = (interval([p[part] for p in last]) for part in ("val", "test"))
        shown = " | ".join(f"{mean:.2f} ± {half:.2f}" for mean, half in scores)
        macs, seconds = (fmean(p[key] for p in last) for key in ("macs", "seconds"))
        yield f"| {way} | {shown} | {macs / 1e12:.3f} | {seconds:.1f} |"


def draw(results: Sequence[Mapping[str, Any]]) -> Any:
    """Validation accuracy against what was spent: MACs on the left, seconds on the right; a thin line per seed."""
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=(10, 4), layout="constrained", dpi=110)
    panels = figure.subplots(1, 2, sharey=True)
    colours = dict(zip(ways(), ("#000000", "#0072B2", "#D55E00", "#009E73"), strict=True))
    for axes, (key, unit, label) in zip(
        panels, (("macs", 1e12, "training MACs (10¹²)"), ("seconds", 1, "processor seconds")), strict=True
    ):
        for way, colour in colours.items():
            for r in results:
                points = r["runs"][way]
                axes.plot([p[key] / unit for p in points], [p["val"] for p in points], color=colour, lw=0.5, alpha=0.5)
            middles = [
                [fmean(r["runs"][way][i][k] for r in results) for i in range(len(results[0]["runs"][way]))]
                for k in (key, "val")
            ]
            axes.plot([x / unit for x in middles[0]], middles[1], color=colour, lw=2, label=way)
        axes.set(xlabel=label, ylim=(93, 98))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation accuracy (%)")
    panels[0].legend(fontsize="small", loc="lower right")
    figure.suptitle(f"MNIST, MLP 784-512-256-10, 60 % of hidden units gone after three epochs ({len(results)} seeds)")
    return figure


def main() -> None:
    """All seeds, then the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder of the data set, in torchvision's layout")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=30000, help="images, a third of them for validation")
    given = parser.parse_args()
    quiet()
    train, test = loaded("MNIST", given.root)
    sets = (train.take(torch.arange(given.images)), test)
    results: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        held = Held(sets, BATCH, VAL_SHARE, seed)
        results.append({"seed": seed, "runs": {way: run(way, held, given.epochs, seed) for way in ways()}})
        print(f"seed {seed} done", flush=True)
    settings = {key: value for key, value in vars(given).items() if key != "root"}
    publish("training_cost", {"settings": settings, "seeds": results}, "\n".join(table(results)), draw(results))


if __name__ == "__main__":
    main()
