"""What of a good cut survives training, and its controls: ``python -m benchmarks.cifar_training --work FOLDER``.

Pretrained ResNet-20 and ResNet-56 on CIFAR-10 lose inner channels of their blocks until their MACs are divided by 2.1
and 2.55, and are trained on. Every ingredient by itself: what is chosen and how widths are allocated (L1 with uniform
widths, `Reconstruction` per MAC), the repair (none, `Ridge`, `SequentialRidge`), and training with or without
`Distill`. Runs of 1, 3 and 10 epochs, each with a cosine of its own length; accuracy before the first step is that of
the cut. The controls belong to the run with all ingredients: the dense network and L1 at the same widths, trained on
for the same MACs in all (scoring, repair and teacher counted), L1 also for the same epochs; with ``--scratch`` the same
widths from random weights too, for a long run such as ``--epochs 300 --accelerator gpu``.

Accuracy is that of all test images: last epoch, and beside it the best one, which test images have chosen. A stopped
run goes on after its last epoch, and finished rows are in ``--work``. ``--depths``, ``--divide``, ``--epochs`` and
``--ways`` select rows; ``--table`` only writes the tables of what is there. Needs CIFAR-10 and
``resnet_cifar10/resnet20-….th`` in the folder that ``LIGHTNING_PRUNE_DATA`` names.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from statistics import fmean
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.common import add_resume, computed, publish, quiet, rows_in, shown, signed
from lightning_prune import (
    L1,
    Distill,
    OneShot,
    Reconstruction,
    Reinitialise,
    Ridge,
    Scope,
    SequentialRidge,
    StructuredPruning,
)
from lightning_prune.data import CIFAR10, ImageTensors
from lightning_prune.data.tensors import ImageData
from lightning_prune.models import ResNetCIFAR
from lightning_prune.structure import Size, TracedModel, trace
from lightning_prune.study.training_macs import MacCounter, TrainingMacs
from lightning_prune.surgery import Repair
from tests.support.pretrained import MEAN, STD, load, normalised

BATCH, BATCHES = 128, 16
#: What stays: two stages of the residual stream are padded.
STREAM = "conv1"
AT_ONCE = OneShot(at=0, unit="step")

REPAIRS: dict[str, Callable[[], list[Repair]]] = {
    "no repair": list,
    "ridge": lambda: [Ridge(BATCHES)],
    "sequential ridge": lambda: [SequentialRidge(BATCHES, strength=0.01)],
}
CHOICES: dict[str, Callable[[], dict[str, Any]]] = {
    "L1": lambda: {"criterion": L1(), "scope": Scope()},
    "Reconstruction per MAC": lambda: {
        "criterion": Reconstruction(BATCHES),
        "scope": Scope("global", per="macs"),
    },
}


@dataclass(frozen=True)
class Way:
    """What is done to the pretrained network.

    Attributes:
        choice: Of units and widths, for an ingredient.
        repair: At the cut.
        distill: Whether the dense network teaches.
        control: What it is a control of, if it is one: ``"dense"``, ``"L1"`` or ``"scratch"``.
        equal: What it shares with the run with all ingredients: ``"epochs"`` or ``"MACs"``.
    """

    choice: str = "L1"
    repair: str = "no repair"
    distill: bool = False
    control: str | None = None
    equal: str = "epochs"


INGREDIENTS = {
    ", ".join((choice, repair, *(("distilled",) if distill else ()))): Way(choice, repair, distill)
    for choice in CHOICES
    for repair in REPAIRS
    for distill in (False, True)
}
#: The run with all ingredients, which the controls belong to.
MAIN = "Reconstruction per MAC, sequential ridge, distilled"
CONTROLS = {
    "dense, equal MACs": Way(control="dense", equal="MACs"),
    "L1 at the same widths, equal epochs": Way(control="L1"),
    "L1 at the same widths, equal MACs": Way(control="L1", equal="MACs"),
}
SCRATCH = {
    "the same widths from scratch, equal epochs": Way(control="scratch"),
    "the same widths from scratch, equal MACs": Way(control="scratch", equal="MACs"),
}
# The run that controls belong to comes first, so that the comparison is there early.
WAYS = {MAIN: INGREDIENTS[MAIN], **CONTROLS, **SCRATCH, **INGREDIENTS}


class Images(ImageData):
    """CIFAR-10 as the pretrained networks expect it, all training images for training, tested on the test images."""

    def __init__(self, sets: tuple[ImageTensors, ImageTensors], seed: int) -> None:
        super().__init__(BATCH, val_share=0.0, augment=True, seed=seed)
        self.sets = sets

    def load(self) -> tuple[ImageTensors, ImageTensors]:
        """Training and test images."""
        return self.sets

    @property
    def _black(self) -> Tensor:
        return -torch.tensor(MEAN) / torch.tensor(STD)


class Tested(Callback):
    """Test accuracy before the first step, after every epoch and at the end; in the checkpoints of a stopped run."""

    def __init__(self, images: ImageTensors) -> None:
        self.images = images
        self.by_epoch: list[float] = []
        self.last: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not trainer.global_step and not self.by_epoch:  # the pruning callback comes before
            self.by_epoch.append(accuracy(pl_module, self.images))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.by_epoch.append(accuracy(pl_module, self.images))

    def state_dict(self) -> dict[str, Any]:
        return {"by_epoch": list(self.by_epoch)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.by_epoch = list(state_dict["by_epoch"])


@torch.no_grad()
def accuracy(module: LightningModule, images: ImageTensors) -> float:
    """Share of images classified right, in %, in float32; does not count as training."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    with _disable_current_modes():
        right = sum(
            int((module(x.to(module.device)).argmax(1) == y.to(module.device)).sum())
            for x, y in zip(images.images.split(500), images.labels.split(500), strict=True)
        )
    for part, training in modes.items():
        part.training = training
    return round(100 * right / len(images), 2)


def widths_of(module: LightningModule) -> dict[str, int]:
    """Widths of all groups, the inner channels of the blocks among them."""
    return dict(trace(TracedModel.of(module, module.example_input_array)).widths)


def dense_step(module: LightningModule) -> int:
    """MACs of a training step of the dense network."""
    network, images = copy.deepcopy(module).train(), torch.zeros(BATCH, 3, 32, 32)
    with MacCounter() as counter:
        network(images).sum().backward()
    return counter.macs


def callbacks_of(way: Way, job: Mapping[str, Any], main: Mapping[str, Any] | None, dense: Mapping[str, int]) -> Any:
    """The pruning callback of a way, if any."""
    common: dict[str, Any] = {"schedule": AT_ONCE, "ignore": STREAM}
    if way.control is None:
        teacher = [Distill(weight=job["weight"], temperature=job["temperature"])] if way.distill else []
        extensions = [*REPAIRS[way.repair](), *teacher]
        return [
            StructuredPruning(
                budget={"macs": 1 / job["divide"]}, extensions=extensions, **CHOICES[way.choice](), **common
            )
        ]
    if way.control == "dense" or main is None:
        return []
    ratios = {name: 1 - width / dense[name] for name, width in main["widths"].items() if width < dense[name]}
    extensions = [Reinitialise(job["seed"])] if way.control == "scratch" else []
    return [StructuredPruning(ratios, criterion=L1(), extensions=extensions, **common)]


def length_of(
    way: Way, job: Mapping[str, Any], batches: int, main: Mapping[str, Any] | None, dense: int
) -> tuple[int, int]:
    """Epochs and batches in each, of so many: as long as the run with all ingredients, or at the same MACs.

    Epochs are shortened, because Lightning resumes a run that is limited by ``max_steps`` at the wrong batch.
    """
    if way.equal == "epochs" or main is None:
        return int(job["epochs"]), batches
    steps = main["macs"] / (dense if way.control == "dense" else main["macs_step"])
    epochs = ceil(steps / batches)
    return epochs, round(steps / epochs)


def train(
    job: dict[str, Any], sets: tuple[ImageTensors, ImageTensors], given: argparse.Namespace, rows: Path
) -> dict[str, Any]:
    """One row."""
    way = WAYS[job["way"]]
    main = None
    if way.control is not None:
        shared = {key: value for key, value in job.items() if key != "way"}
        (main,) = rows_in(rows, way=MAIN, **shared)
    seed_everything(job["seed"], verbose=False)
    model: ResNetCIFAR = load(job["depth"]).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    dense, data = widths_of(model), Images(sets, job["seed"])
    data.setup("fit")
    epochs, batches = length_of(way, job, len(data.train_dataloader()), main, dense_step(model))
    steps = epochs * batches
    rate = job["lr"] if way.control != "scratch" else given.scratch_lr

    def configure_optimizers(module: LightningModule) -> Any:
        optimizer = SGD(module.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, steps), "interval": "step"}]

    model.configure_optimizers = MethodType(configure_optimizers, model)
    home = given.work / "runs" / "-".join(str(value) for value in job.values()).replace(" ", "_").replace(",", "")
    counted, tested = TrainingMacs(), Tested(sets[1])
    saver = ModelCheckpoint(home, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = Trainer(
        accelerator=given.accelerator, devices=1, precision="bf16-mixed", max_epochs=epochs,
        limit_train_batches=batches, limit_val_batches=0,
        default_root_dir=home, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[counted, *callbacks_of(way, job, main, dense), tested, saver],
    )  # fmt: skip
    last = home / "last.ckpt"
    with contextlib.redirect_stdout(io.StringIO()):  # the report
        trainer.fit(model, data, ckpt_path=last if last.is_file() else None)
    last.unlink(missing_ok=True)
    structure = trace(TracedModel.of(model.cpu(), model.example_input_array))
    size = Size.of(structure)
    return {
        "accuracy": tested.by_epoch[-1], "best": max(tested.by_epoch[1:]), "by_epoch": tested.by_epoch,
        "steps": steps, "params": size.params, "macs_forward": size.macs, "widths": dict(structure.widths),
        "macs": counted.macs, "macs_around": counted.around, "macs_step": round(counted.steps / counted.batches),
    }  # fmt: skip


# -- tables -----------------------------------------------------------------------------------------------------------


def ingredients(rows: Sequence[Mapping[str, Any]], epochs: Sequence[int]) -> Iterator[str]:
    """Markdown: accuracy before training and at the end of runs of several lengths, a line for each ingredient."""
    lengths = " | ".join(f"after {n}" for n in epochs)
    yield f"| ingredients | seeds | parameters | before | {lengths} | best of {epochs[-1]} |"
    yield "|---|---:|---:|---:|" + "---:|" * (len(epochs) + 1)
    for name in INGREDIENTS:
        mine = [row for row in rows if row["way"] == name]
        if not mine:
            continue
        before = shown(list({row["seed"]: row["by_epoch"][0] for row in mine}.values()))
        after = [[row["accuracy"] for row in mine if row["epochs"] == n] for n in epochs]
        best = [row["best"] for row in mine if row["epochs"] == epochs[-1]]
        cells = [shown(values) if values else "" for values in (*after, best)]
        seeds, params = len({row["seed"] for row in mine}), fmean(row["params"] for row in mine)
        yield f"| {name} | {seeds} | {params:,.0f} | {before} | {' | '.join(cells)} |"


def controls(rows: Sequence[Mapping[str, Any]], epochs: int) -> Iterator[str]:
    """Markdown: the run with all ingredients and its controls, with the paired differences."""
    mine = [row for row in rows if row["epochs"] == epochs]
    main = {row["seed"]: row for row in mine if row["way"] == MAIN}
    heads = ("pairs", "training MACs, 10¹²", "last epoch", "all ingredients − it", "best epoch", "all − it")
    yield f"| run of {epochs} epochs | {' | '.join(heads)} |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name in (MAIN, *CONTROLS, *SCRATCH):
        found = [row for row in mine if row["way"] == name and row["seed"] in main]
        if not found:
            continue
        cells = [f"{fmean(row['macs'] for row in found) / 1e12:.1f}"]
        for key in ("accuracy", "best"):
            against = [main[row["seed"]][key] - row[key] for row in found]
            cells += [shown([row[key] for row in found]), signed(against) if name != MAIN else ""]
        yield f"| {name} | {len(found)} | {' | '.join(cells)} |"


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """All tables of what is there."""
    parts = []
    for depth, divide in sorted({(row["depth"], row["divide"]) for row in rows}):
        mine = [row for row in rows if (row["depth"], row["divide"]) == (depth, divide)]
        epochs = sorted({row["epochs"] for row in mine})
        parts.append(f"## ResNet-{depth}, MACs ÷ {divide:g}\n")
        parts.append("\n".join(ingredients(mine, epochs)) + "\n")
        for n in epochs:
            lines = list(controls(mine, n))
            parts += ["\n".join(lines) + "\n"] if len(lines) > 3 else []
    return "\n".join(parts)


def write(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows and tables of what is there, as evidence."""
    publish("cifar_training", {"rows": list(rows)}, tables(rows))


def main() -> None:
    """The rows that are asked for, one after the other, and their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of CIFAR-10, in torchvision's layout")
    parser.add_argument("--work", required=True, type=Path, help="folder of finished rows and stopped runs")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--divide", type=float, nargs="+", default=[2.1, 2.55])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3, 10])
    parser.add_argument("--ways", nargs="+", default=[w for w in WAYS if w not in SCRATCH], choices=list(WAYS))
    parser.add_argument("--scratch", action="store_true", help="the same widths from random weights, too")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument(
        "--lr", type=float, default=0.01, help="learning rate at the start, of networks that are trained"
    )
    parser.add_argument("--scratch-lr", type=float, default=0.1, help="the same from random weights")
    parser.add_argument("--weight", type=float, default=1.0, help="weight of the distillation term")
    parser.add_argument("--temperature", type=float, default=2.0, help="its temperature")
    parser.add_argument("--images", type=int, help="of training and test, the first ones only, to try it out")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only write the tables")
    add_resume(parser)
    given = parser.parse_args()
    quiet(given.threads)
    shared = {name: getattr(given, name) for name in ("lr", "weight", "temperature", "images")}
    file = given.work / "rows.jsonl"
    if not given.table:
        source = CIFAR10(root=given.root)
        train_images, test = (normalised(part, source) for part in source.load())
        if given.images is not None:
            train_images, test = (part.take(torch.arange(given.images)) for part in (train_images, test))
        test = ImageTensors(test.images.contiguous(memory_format=torch.channels_last), test.labels)
        jobs = [
            {"depth": depth, "divide": divide, "epochs": epochs, "seed": seed, "way": way, **shared}
            for depth in given.depths
            for divide in given.divide
            for epochs in given.epochs
            for seed in range(given.seeds)
            for way in [*given.ways, *(SCRATCH if given.scratch else ())]
        ]
        run = partial(train, sets=(train_images, test), given=given, rows=file)
        for _ in computed(jobs, run, file, resume=given.resume, leftovers=["runs/*/last.ckpt"]):
            with contextlib.redirect_stdout(io.StringIO()):
                write(rows_in(file, **shared))
    write(rows_in(file, **shared))


if __name__ == "__main__":
    main()
