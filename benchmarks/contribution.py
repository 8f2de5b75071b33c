"""Contribution pruning of the paper's networks and its controls: ``python -m benchmarks.contribution``.

On MNIST and Fashion-MNIST the MLP 784-50-30-10 loses 68 % of its hidden neurons during training, on CIFAR-10 the CNN
loses 41 % of its dense ones, once per criterion and seed. The same network is also cut once, without further training,
at nine shares. Controls: the unpruned network, and one with the final widths, trained equally long from scratch. Needs
the data set in ``--root`` or ``LIGHTNING_PRUNE_DATA``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from benchmarks.common import (
    EVIDENCE,
    add_resume,
    command,
    fill,
    here,
    machine,
    quiet,
    quiet_fit,
    shown,
    stored,
    summary,
)
from lightning_prune import L1, Contribution, Geometric, Random, StructuredPruning, data
from lightning_prune.data import ImageData, ImageTensors
from lightning_prune.extras import require
from lightning_prune.models import CNNClassifier, MLPClassifier
from lightning_prune.planning import Scope, Target, make_plan, select
from lightning_prune.scoring import Criterion, Statistic, score_groups
from lightning_prune.structure import Size, Structure, TracedModel, trace
from lightning_prune.surgery import cut
from lightning_prune.surgery.tensors import named

Point = dict[str, float]  # accuracies in % of one moment, and the parameters left

RATE = 0.1  # of the present width, at every cut
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DENSE = "unpruned"

LOOKS = {  # colours that colour-blind readers can tell apart
    "contribution": ("#0072B2", "-"),
    "contribution, C_max": ("#56B4E9", "-"),
    "contribution, signed": ("#CC79A7", "-"),
    "L1": ("#D55E00", "-"),
    "random": ("#999999", "-"),
    DENSE: ("#000000", ":"),
}
NARROW_LOOK, OTHER_LOOK = ("#009E73", "--"), ("#E69F00", "-.")


@dataclass(frozen=True)
class Task:
    """One of the paper's networks, and how it is trained and pruned here.

    Attributes:
        name: What the network is called.
        build: Gives the network with these widths of its two hidden dense layers.
        wide: The widths before pruning.
        narrow: And after.
        layers: What is pruned.
        ratio: Share of the hidden dense units that goes.
        warm_up: Epochs before the first cut.
        every: Epochs from cut to cut.
        epochs: Epochs of every network, unless asked otherwise.
        batch_size: Images in a batch, likewise.
        val_share: Share of the training images that validates.
        sample: Training and validation accuracy are of so many images only, until all are taken after the last epoch.
        precision: Lightning's; accuracies are always measured in float32.
        trained: Criteria that networks are trained with; one cut of the dense network is made by all of them.
    """

    name: str
    build: Callable[[tuple[int, int]], LightningModule]
    wide: tuple[int, int]
    narrow: tuple[int, int]
    layers: str | None
    ratio: float
    warm_up: int
    every: int
    epochs: int
    batch_size: int
    val_share: float
    sample: int
    precision: str = "32-true"
    trained: tuple[str, ...] = ("contribution", "contribution, C_max", "contribution, signed", "L1", "random")

    @property
    def control(self) -> str:
        """Name of the run that has the final widths from the start."""
        return f"{'-'.join(map(str, self.narrow))} from scratch"


def mlp(hidden: tuple[int, int]) -> LightningModule:
    return MLPClassifier((784, *hidden, 10))


def cnn(hidden: tuple[int, int]) -> LightningModule:
    # This memory layout saves a third of the time on a CPU, and half precision half of what is left.
    return CNNClassifier(hidden=hidden).to(memory_format=torch.channels_last)


PAPER_MLP = Task("MLP 784-50-30-10", mlp, (50, 30), (16, 10), None, 0.68, 4, 2, 32, 500, 1 / 6, 60000)
PAPER_CNN = Task(
    *("CNN", cnn, (256, 128), (151, 76), "classifier.*", 0.409, 3, 1, 20, 128, 0.1, 2500),
    precision="bf16-mixed",
    trained=("contribution", "L1", "random"),
)
TASKS = {"MNIST": PAPER_MLP, "FashionMNIST": PAPER_MLP, "CIFAR10": PAPER_CNN}


def criteria(seed: int) -> dict[str, Criterion]:
    """The criteria that are compared; the first is the callback's default."""
    return {
        "contribution": Contribution(),
        "contribution, C_max": Contribution(lambda_avg=0, lambda_max=1),
        "contribution, signed": Contribution(ratio="signed"),
        "L1": L1(),
        "random": Random(seed),
    }


class Held(ImageData):
    """A set that is in memory already, split by the seed."""

    def __init__(self, sets: tuple[ImageTensors, ImageTensors], batch_size: int, val_share: float, seed: int) -> None:
        super().__init__(batch_size=batch_size, val_share=val_share, seed=seed)
        self.sets = sets
        self.setup("fit")

    def load(self) -> tuple[ImageTensors, ImageTensors]:
        """Training and test images."""
        return self.sets

    def parts(self) -> dict[str, ImageTensors]:
        """Training, validation and test images."""
        return dict(self._splits)


class Curve(Callback):
    """Accuracy in eval mode after every epoch, and right after every cut, before the next training step."""

    def __init__(self, parts: Mapping[str, ImageTensors], sample: int) -> None:
        self.parts = parts
        self.sample = {
            part: images if part == "test" else images.take(torch.arange(min(sample, len(images))))
            for part, images in parts.items()
        }
        self.points: list[Point] = []
        self.cuts: list[Point] = []
        self._params = 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # cuts fall between epochs, and the pruning callback comes first
            params = sum(p.numel() for p in module.parameters())
            if params < self._params:
                self.cuts.append(self._measure(module, trainer.current_epoch))
            self._params = params

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.points.append(self._measure(module, trainer.current_epoch + 1, trainer.max_epochs))

    def _measure(self, module: LightningModule, epochs: int, last: int | None = None) -> Point:
        parts = self.parts if epochs == last else self.sample
        numbers = {part: accuracy(module, images) for part, images in parts.items()}
        return {"epochs": epochs, "params": sum(p.numel() for p in module.parameters()), **numbers}


class Observer(Callback):
    """Lets statistics see every tenth batch, as the pruning callback does, from a given epoch on."""

    def __init__(self, statistics: Mapping[str, tuple[Statistic, int]]) -> None:
        self.statistics = statistics
        self._handles: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % 10 == 0:
            for statistic, first in self.statistics.values():
                if trainer.current_epoch >= first:
                    self._handles += statistic.attach(module)

    def on_train_batch_end(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


@torch.no_grad()
def accuracy(module: LightningModule, images: ImageTensors) -> float:
    """Share of images classified right, in %."""
    was_training = module.training
    module.eval()
    right = int((torch.cat([module(x).argmax(1) for x in torch.split(images.images, 1000)]) == images.labels).sum())
    module.train(was_training)
    return round(100 * right / len(images), 3)


def train(module: LightningModule, task: Task, held: Held, epochs: int, callbacks: Sequence[Callback]) -> Curve:
    """One run; the same seed gives the same split and order of batches."""
    curve = Curve(held.parts(), task.sample)
    quiet_fit(module, held.train_dataloader(), [*callbacks, curve], max_epochs=epochs, precision=task.precision)
    return curve


def built(task: Task, hidden: tuple[int, int], seed: int) -> LightningModule:
    """The same seed gives the same initial weights."""
    seed_everything(seed, verbose=False)
    return task.build(hidden)


@cache
def loaded(name: str, root: str | None) -> tuple[ImageTensors, ImageTensors]:
    return getattr(data, name)(root=root).load()  # type: ignore[no-any-return]


def one_run(name: str, root: str | None, epochs: int, batch_size: int, seed: int, label: str) -> dict[str, Any]:
    """One run of one seed; the unpruned network's has the cuts without training."""
    quiet()
    task = TASKS[name]
    held = Held(loaded(name, root), batch_size, task.val_share, seed)
    began = time.perf_counter()
    result: dict[str, Any] = {"seed": seed, "label": label}
    if label == DENSE:
        curve, result["one_shot"] = observed_and_cut(task, held, epochs, seed)
        result["run"] = {"epochs": curve.points}
    elif label == task.control:
        result["run"] = {"epochs": train(built(task, task.narrow, seed), task, held, epochs, []).points}
    else:
        module, criterion = built(task, task.wide, seed), criteria(seed)[label]
        schedule = Geometric(rate=RATE, start=task.warm_up, every=task.every)
        pruning = StructuredPruning(
            pruning_ratio=task.ratio, layers=task.layers, criterion=criterion, schedule=schedule
        )
        curve = train(module, task, held, epochs, [pruning])
        narrow = built(task, task.narrow, seed)
        if [p.shape for p in module.parameters()] != [p.shape for p in narrow.parameters()]:
            raise RuntimeError(f"expected the final widths {task.narrow}, got {module}")
        result["run"] = {"epochs": curve.points, "cuts": curve.cuts}
    return {**result, "seconds": round(time.perf_counter() - began, 1)}


def observed_and_cut(task: Task, held: Held, epochs: int, seed: int) -> tuple[Curve, dict[str, list[float]]]:
    """The dense network's curve, and its test accuracy after one cut at each share, nothing trained after it."""
    module = built(task, task.wide, seed)
    structure = trace(TracedModel.of(module, module.example_input_array))
    chosen = criteria(seed) | {"contribution, last epoch only": Contribution()}
    first = {"contribution, last epoch only": epochs - 1}
    statistics = {
        label: (statistic, first.get(label, 0))
        for label, criterion in chosen.items()
        if (statistic := criterion.statistic(structure)) is not None
    }
    module = built(task, task.wide, seed)
    curve = train(module, task, held, epochs, [Observer(statistics)])
    names, _ = select(structure, task.layers)
    one_shot = {}
    for label, criterion in chosen.items():
        scores = score(criterion, structure, names, module, statistics.get(label, (None, 0))[0])
        one_shot[label] = [cut_accuracy(module, structure, scores, share, held) for share in SHARES]
    return curve, one_shot


def score(
    criterion: Criterion,
    structure: Structure,
    names: Sequence[str],
    module: LightningModule,
    statistic: Statistic | None,
) -> Mapping[str, Tensor]:
    tensors = {name: tensor.detach() for name, tensor in named(module).items()}
    return score_groups(criterion, [structure.group(name) for name in names], tensors, statistic)


def cut_accuracy(
    module: LightningModule, structure: Structure, scores: Mapping[str, Tensor], share: float, held: Held
) -> float:
    """Test accuracy right after a cut, which is then undone."""
    plan = make_plan(structure, scores, Target.of(share), 1.0, Scope(), Size.of(structure))
    with cut(module, structure.axes(plan.kept)):
        return accuracy(module, held.parts()["test"])


# -- results ----------------------------------------------------------------------------------------------------------


def final(results: Sequence[Mapping[str, Any]], label: str, part: str) -> list[float]:
    """Accuracy after the last epoch, per seed."""
    return [r["runs"][label]["epochs"][-1][part] for r in results]


def best(results: Sequence[Mapping[str, Any]], label: str) -> list[float]:
    """Best test accuracy of an epoch at the final size, per seed: an upper bound that saw the test images."""
    runs = [r["runs"][label]["epochs"] for r in results]
    return [max(p["test"] for p in points if p["params"] == points[-1]["params"]) for points in runs]


def area(results: Sequence[Mapping[str, Any]], label: str) -> list[float]:
    """Mean test accuracy over the shares removed, 0 to 90 % by the trapezoidal rule, per seed."""
    areas = []
    for r in results:
        heights = [r["runs"][DENSE]["epochs"][-1]["test"], *r["one_shot"][label]]
        areas.append((sum(heights) - (heights[0] + heights[-1]) / 2) / (len(heights) - 1))
    return areas


def minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def tables(results: Sequence[Mapping[str, Any]], control: str) -> Iterator[str]:
    """Markdown tables of the comparison; the runs of all seeds are alike."""
    runs = results[0]["runs"]
    others = [other for other in (control, DENSE, "random") if other in runs]
    against = [f"test − {other.removesuffix(' from scratch')}" for other in others]
    yield f"| network | training | validation | test, last epoch | best test epoch | {' | '.join(against)} |"
    yield f"|{'---|' * (5 + len(others))}"
    for label in runs:
        test = final(results, label, "test")
        against = [
            "" if label == other else shown(minus(test, final(results, other, "test")), sign="+") for other in others
        ]
        columns = [shown(final(results, label, "train")), shown(final(results, label, "val")), shown(test)]
        yield f"| {label} | {' | '.join(columns)} | {shown(best(results, label))} | {' | '.join(against)} |"
    if results[0]["one_shot"]:
        yield ""
        yield from table_of_cuts(results)
    yield ""
    yield "| during training | test lost by a cut, mean of all | lost by the worst cut | left after recovery, mean |"
    yield "|---|---|---|---|"
    for label in [label for label, run in runs.items() if "cuts" in run]:
        lost = [losses(r["runs"][label]) for r in results]
        drops = [[drop for drop, _ in cuts] for cuts in lost]
        left = [fmean(left for _, left in cuts) for cuts in lost]
        yield f"| {label} | {shown([*map(fmean, drops)])} | {shown([*map(max, drops)])} | {shown(left)} |"


def table_of_cuts(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Test accuracy of the unpruned network after one cut."""
    yield "| one cut, nothing trained after it | 10 % | 30 % | 50 % | 70 % | 90 % | area | area − random | area − L1 |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for label in results[0]["one_shot"]:
        at = [fmean(r["one_shot"][label][SHARES.index(share)] for r in results) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
        mine = area(results, label)
        against = [
            "" if label == other else shown(minus(mine, area(results, other)), 1, "+") for other in ("random", "L1")
        ]
        yield f"| {label} | {' | '.join(f'{a:.1f}' for a in at)} | {shown(mine, 1)} | {' | '.join(against)} |"


def losses(run: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Points lost by each cut, and those still missing when the next cut is due (or at the end)."""
    points = {int(p["epochs"]): p["test"] for p in run["epochs"]}
    cuts = [(int(p["epochs"]), p["test"]) for p in run["cuts"]]
    ends = [at for at, _ in cuts[1:]] + [max(points)]
    return [(points[at] - test, points[at] - points[end]) for (at, test), end in zip(cuts, ends, strict=True)]


def with_troughs(run: Mapping[str, Any], part: str) -> list[tuple[float, float]]:
    """The curve of one run: every epoch, and a second point at the same place right after a cut."""
    points = [(p["epochs"], kind, p[part]) for kind, name in enumerate(("epochs", "cuts")) for p in run.get(name, [])]
    return [(epoch, height) for epoch, _, height in sorted(points)]


def draw(results: Sequence[Mapping[str, Any]], task: Task, title: str, path: Path) -> None:
    """Training and test accuracy over epochs, accuracy against share removed before and after recovery."""
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=(12, 8.4), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, part in zip(axes[0], ("train", "test"), strict=True):
        for label in results[0]["runs"]:
            curves = [with_troughs(r["runs"][label], part) for r in results]
            band(axis, [x for x, _ in curves[0]], [[y for _, y in curve] for curve in curves], label)
        name = {"train": "training"}.get(part, part)
        floor = min((fmean(p[part] for p in points) for points in _after_cuts(results)), default=4)
        axis.set(xlabel="epochs trained", ylabel=f"{name} accuracy (%)", xlim=(1, None), ylim=(max(floor - 4, 0), 100))
    axes[0, 0].legend(fontsize="small", loc="lower right")
    axes[0, 0].set_title("every cut is a trough: points right after it, before the next step", fontsize="small")
    for label in results[0]["one_shot"]:
        heights = [[r["runs"][DENSE]["epochs"][-1]["test"], *r["one_shot"][label]] for r in results]
        band(axes[1, 0], [0, *(100 * share for share in SHARES)], heights, label)
    axes[1, 0].set(xlabel="hidden neurons removed at once (%)", ylabel="test accuracy (%)", ylim=(0, 100))
    axes[1, 0].set_title("trained network, one cut, nothing trained after it", fontsize="small")
    axes[1, 0].legend(fontsize="small", loc="lower left")
    for label in [label for label, run in results[0]["runs"].items() if "cuts" in run]:
        _before_and_after(axes[1, 1], results, label, task)
    axes[1, 1].set(xlabel="hidden neurons removed so far (%)", ylabel="test accuracy (%)", ylim=axes[0, 1].get_ylim())
    axes[1, 1].set_title("during training: right after the cut (dashed), and recovered (solid)", fontsize="small")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _after_cuts(results: Sequence[Mapping[str, Any]]) -> list[list[Point]]:
    """The moments right after every cut of every criterion, over seeds."""
    return [
        [r["runs"][label]["cuts"][i] for r in results]
        for label, run in results[0]["runs"].items()
        if "cuts" in run
        for i in range(len(run["cuts"]))
    ]


def _before_and_after(axis: Any, results: Sequence[Mapping[str, Any]], label: str, task: Task) -> None:
    gone, low, high = [], [], []
    for r in results:
        run = r["runs"][label]
        points = {int(p["epochs"]): p["test"] for p in run["epochs"]}
        cuts = run["cuts"]
        ends = [int(p["epochs"]) for p in cuts[1:]] + [int(cuts[-1]["epochs"]) + task.every]
        gone = [100 * (1 - max((1 - RATE) ** (i + 1), 1 - task.ratio)) for i in range(len(cuts))]
        low.append([p["test"] for p in cuts])
        high.append([points[end] for end in ends])
    band(axis, gone, low, label, style="--")
    band(axis, gone, high, label, style="-")


def band(
    axis: Any, x: Sequence[float], curves: Sequence[Sequence[float]], label: str, style: str | None = None
) -> None:
    """The mean over seeds and its 95 % interval."""
    colour, usual = LOOKS.get(label, NARROW_LOOK if label.endswith("from scratch") else OTHER_LOOK)
    middles = [summary(values) for values in zip(*curves, strict=True)]
    axis.plot(x, [mean for mean, _ in middles], style or usual, color=colour, label=label, lw=1.5)
    axis.fill_between(x, [m - h for m, h in middles], [m + h for m, h in middles], color=colour, alpha=0.18, lw=0)


def write(results: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], folder: Path) -> None:
    """Numbers of all seeds; tables and figure of those that have every run."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"command": command("benchmarks.contribution"), "settings": settings, "machine": machine()}
    text = json.dumps({**facts, "seeds": results}, separators=(",", ":")).replace('{"seed"', '\n{"seed"')
    (folder / "results.json").write_text(f"{text}\n", encoding="utf-8")
    task = TASKS[settings["data"]]
    # A seed that is not through yet waits; the first shows what there is.
    like_first = [result for result in results if result["runs"].keys() >= results[0]["runs"].keys()]
    fill(folder / "README.md", "\n".join(tables(like_first, task.control)))
    what = "hidden neurons" if task.layers is None else "dense hidden neurons"
    share = f"{100 * task.ratio:.0f} % of {what} removed"
    of = f"{len(like_first)} seeds, bands: 95 %" if len(like_first) > 1 else "one seed"
    draw(like_first, task, f"{settings['data']}, {task.name}, {share} ({of})", folder / "figure.png")


def labels(task: Task) -> list[str]:
    """The runs of a seed."""
    return [*task.trained, task.control, DENSE]


def added(results: Sequence[dict[str, Any]], run: Mapping[str, Any], task: Task) -> list[dict[str, Any]]:
    """The results with one run more."""
    by_seed = {result["seed"]: result for result in results}
    mine = by_seed.setdefault(run["seed"], {"seed": run["seed"], "runs": {}, "one_shot": {}, "seconds": 0.0})
    runs = {**mine["runs"], run["label"]: {**run["run"], "at": here()}}
    mine["runs"] = {label: runs[label] for label in labels(task) if label in runs}
    mine["one_shot"] = run.get("one_shot", mine["one_shot"])
    mine["seconds"] = round(mine["seconds"] + run["seconds"], 1)
    return [by_seed[seed] for seed in sorted(by_seed)]


def main() -> None:
    """Run every seed, writing after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=list(TASKS), default="MNIST")
    parser.add_argument("--root", help="folder of the data set, in torchvision's layout")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, from 0")
    parser.add_argument("--epochs", type=int, help="epochs of every network (MLP: 32, CNN: 20)")
    parser.add_argument("--batch-size", type=int, help="images per batch (MLP: 500, CNN: 128)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after this time; `--resume` continues")
    add_resume(parser)
    given = parser.parse_args()
    task = TASKS[given.data]
    epochs, batch_size = given.epochs or task.epochs, given.batch_size or task.batch_size
    settings = {"data": given.data, "epochs": epochs, "batch_size": batch_size}
    if task.precision != "32-true":
        settings["precision"] = task.precision
    folder = EVIDENCE / given.data.lower()
    results = stored(folder / "results.json", settings, resume=given.resume, rows="seeds")
    done = {(result["seed"], label) for result in results for label in result["runs"]}
    missing = [(seed, label) for seed in range(given.seeds) for label in labels(task) if (seed, label) not in done]
    ends = time.monotonic() + 60 * given.minutes
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        fixed = (given.data, given.root, epochs, batch_size)
        futures = [pool.submit(one_run, *fixed, seed, label) for seed, label in missing]
        for future in as_completed(futures):
            if future.cancelled():
                continue
            run = future.result()
            results = added(results, run, task)
            print(f"seed {run['seed']}, {run['label']}: {run['seconds']} s", flush=True)
            write(results, settings, folder)
            if time.monotonic() > ends:
                for waiting in futures:
                    waiting.cancel()
    write(results, settings, folder)
    print(f"{len(missing)} runs were missing; the tables are in {folder.name}/README.md")


if __name__ == "__main__":
    main()
