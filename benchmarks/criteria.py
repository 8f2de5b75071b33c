"""Every criterion on pretrained ResNets at MACs ÷ 2.1: ``python -m benchmarks.criteria --weights FILE...``.

The inner width of every residual block is reduced by the same share; criteria only choose the channels. Test accuracy
is measured right after the cut, after re-estimating BatchNorm statistics, and after ridge regression of the consumers
as well, over several draws of the training batches that criteria observe and repairs use. Torch-Pruning's L1, Taylor
and BatchNorm importance run with the same widths and batches. ``--finetune EPOCHS`` trains some of the pruned networks,
with the same batches in the same order for each. ``--resume`` continues a stopped run. Needs CIFAR-10 in ``--root`` or
``LIGHTNING_PRUNE_DATA``, and Torch-Pruning (1.6.1).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import EVIDENCE, add_resume, command, fill, here, machine, signed, stored
from benchmarks.repair import BATCH, calibration
from lightning_prune.data import CIFAR10, ImageTensors
from lightning_prune.data.tensors import crop_and_mirror
from lightning_prune.extras import require
from lightning_prune.models import ResNetCIFAR, load_pretrained
from lightning_prune.planning import Scope, Target, make_plan, select
from lightning_prune.scoring import Criterion, DataPass, criteria, score_groups
from lightning_prune.structure import Axes, Size, Structure, TracedModel, trace
from lightning_prune.surgery import ReestimateBatchNorm, Repair, Ridge, cut, install, repaired
from lightning_prune.surgery.tensors import named
from tests.support.pretrained import accuracy, normalised

Row = dict[str, Any]

STATES: dict[str, tuple[type[Repair], ...]] = {
    "right after": (),
    "BN": (ReestimateBatchNorm,),
    "ridge + BN": (Ridge, ReestimateBatchNorm),
}
THEIRS = ("L1", "Taylor", "BNScale")
PREFIX = "Torch-Pruning "
# Trained on after the cut; "+ridge": from the repaired state.
TRAINED = (
    *("L1", PREFIX + "L1", "L1+ridge", "Taylor", PREFIX + "Taylor", "BNScale", PREFIX + "BNScale"),
    *("Fisher", "Contribution", "Random"),
)


class Bench:
    """One pretrained network, cut by one criterion after the other."""

    def __init__(self, given: argparse.Namespace, module: ResNetCIFAR, train: ImageTensors, test: ImageTensors) -> None:
        self.given, self.module, self.train, self.test = given, module, train, test
        self.structure = trace(TracedModel.of(module, module.example_input_array))
        # The residual stream stays: two of its stages are padded.
        self.names, _ = select(self.structure, ignore="conv1")
        self.dense = accuracy(module, test)
        self._known: dict[Any, float] = {}

    def batches(self, seed: int) -> list[ImageTensors]:
        """What criteria observe."""
        drawn = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return [self.train.take(rows) for rows in drawn[: self.given.observe * BATCH].split(BATCH)]

    def axes(self, name: str, seed: int) -> tuple[Axes, Structure]:
        """What a criterion keeps, and the structure that it leaves."""
        if name.startswith(PREFIX):
            scores = self._their_scores(name.removeprefix(PREFIX), seed)
        else:
            scores = self._our_scores(name, seed)
        target = Target.of(budget={"macs": 1 / self.given.divide})
        plan = make_plan(self.structure, scores, target, 1.0, Scope(), Size.of(self.structure))
        return self.structure.axes(plan.kept), self.structure.take(plan.kept)

    def contents(self, axes: Axes, state: str, seed: int) -> dict[str, Tensor]:
        """What the repairs of a state write."""
        _, data = calibration(self.train, self.given.batches, seed)
        repairs = [kind(self.given.batches) for kind in STATES[state]]  # type: ignore[call-arg]
        return repaired(lambda: copy.deepcopy(self.module).train(), axes, repairs, data)

    def rows(self, name: str, seed: int) -> list[Row]:
        """One row per state of repair; every cut is undone."""
        began = time.process_time()
        axes, after = self.axes(name, seed)
        row = {"criterion": name, "draw": seed, "seconds": round(time.process_time() - began, 2)}
        row |= {"params": after.cost.params(after.widths), "macs": after.cost.macs(after.widths)}
        return [{**row, "state": state, "accuracy": self._accuracy(axes, state, seed)} for state in STATES]

    def finetuned(self, label: str, epochs: int) -> Row:
        """A cut network trained for some epochs: SGD with momentum, the learning rate from 0.01 to 0 by a cosine."""
        name, _, repair = label.partition("+")
        state = "ridge + BN" if repair else "right after"
        axes, _ = self.axes(name, 0)
        model, contents = copy.deepcopy(self.module), self.contents(axes, state, 0)
        install(cut(model, axes), model, contents)
        began = time.process_time()
        by_epoch = finetune(model, self.train, epochs, lambda: accuracy(model, self.test))
        seconds = round(time.process_time() - began)
        return {"criterion": label, "by_epoch": by_epoch, "seconds": seconds}

    def _accuracy(self, axes: Axes, state: str, seed: int) -> float:
        # Criteria often agree on what goes, and without repair there is nothing to draw.
        kept = {tensor: {dim: tuple(positions) for dim, positions in by.items()} for tensor, by in axes.items()}
        key = (state, seed if STATES[state] else None, str(kept))
        if key not in self._known:
            contents = self.contents(axes, state, seed)
            with cut(self.module, axes) as change:
                install(change, self.module, contents)
                self._known[key] = accuracy(self.module, self.test)
        return self._known[key]

    def _our_scores(self, name: str, seed: int) -> Mapping[str, Tensor]:
        kind = getattr(criteria, name)
        criterion = kind(seed=seed) if name == "Random" else kind()
        statistic = observed(criterion, self.structure, self.module, self.batches(seed))
        tensors = {key: tensor.detach() for key, tensor in named(self.module).items()}
        return score_groups(criterion, [self.structure.group(group) for group in self.names], tensors, statistic)

    def _their_scores(self, name: str, seed: int) -> Mapping[str, Tensor]:
        import torch_pruning as tp

        importance = {
            "L1": lambda: tp.importance.MagnitudeImportance(p=1),
            "Taylor": tp.importance.TaylorImportance,
            "BNScale": tp.importance.BNScaleImportance,
        }[name]()
        model = copy.deepcopy(self.module).eval()
        if name == "Taylor":
            for batch in self.batches(seed):
                F.cross_entropy(model(batch.images), batch.labels).backward()
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=self.module.example_input_array)
        scores = {}
        for group in self.names:
            (layer,) = (
                m.tensor.removesuffix(".weight") for m in self.structure.group(group).members if m.role == "out"
            )
            root = model.get_submodule(layer)
            units = [*range(root.out_channels)]
            scores[group] = importance(graph.get_pruning_group(root, tp.prune_conv_out_channels, idxs=units)).double()
        return scores


def observed(criterion: Criterion, structure: Structure, module: ResNetCIFAR, batches: Sequence[ImageTensors]) -> Any:
    """The criterion's statistic after training batches, weights as they are."""
    statistic = criterion.statistic(structure)
    if statistic is None:
        return None
    for drawn in batches:
        model = copy.deepcopy(module).train()
        if statistic.collects:  # from a batch when a cut is due
            data = DataPass(
                [(drawn.images, drawn.labels)],
                loss=lambda model, batch: F.cross_entropy(model(*batch.args), batch.labels),
            )
            statistic.collect(model, data)
            break
        handles = statistic.attach(model)
        F.cross_entropy(model(drawn.images), drawn.labels).backward()
        for handle in handles:
            handle.remove()
    return statistic


def finetune(model: ResNetCIFAR, images: ImageTensors, epochs: int, show: Callable[[], float]) -> list[float]:
    """Train as every network here is trained, under bfloat16 autocast; what ``show`` says after each epoch."""
    generator = torch.Generator().manual_seed(0)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shown = []
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(images), generator=generator).split(BATCH)[: len(images) // BATCH]:
            batch = images.take(rows)
            inputs = crop_and_mirror(batch.images, generator).contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(inputs)
            F.cross_entropy(logits.float(), batch.labels).backward()
            optimizer.step()
            schedule.step()
        shown.append(show())
        print(f"{len(shown)}: {shown[-1]}", flush=True)
    return shown


def line() -> str:
    """The command that was run, without the place of the weights."""
    return " ".join(
        Path(word).name if word.endswith(".th") else word for word in command("benchmarks.criteria").split()
    )


class Pages:
    """Rows on disk, and what is drawn of them."""

    def __init__(self, name: str, settings: Mapping[str, Any], show: Callable[[Pages], None], *, resume: bool) -> None:
        self.file, self.settings, self.show = EVIDENCE / "criteria" / f"{name}.json", settings, show
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = stored(self.file, settings, resume=resume)

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows and draw anew."""
        self.rows += [{**row, "at": here()} for row in rows]
        lines = ",\n  ".join(json.dumps(row) for row in self.rows)
        facts = json.dumps({"settings": self.settings, "command": line(), "machine": machine()})
        self.file.write_text(f'{facts[:-1]},\n "rows": [\n  {lines}\n ]}}\n', encoding="utf-8")
        self.show(self)


def accuracies(rows: Sequence[Row], criterion: str, state: str) -> list[float]:
    """By draw."""
    return [row["accuracy"] for row in rows if (row["criterion"], row["state"]) == (criterion, state)]


def order(rows: Sequence[Row]) -> list[str]:
    """Criteria, the best first by re-estimated statistics, which all have."""
    names = dict.fromkeys(row["criterion"] for row in rows)
    return sorted(names, key=lambda name: -fmean(accuracies(rows, name, "BN")))


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per criterion, means over draws; then the paired differences."""
    lines = [f"| criterion | {' | '.join(STATES)} | seconds to score |", "|---|" + "---:|" * (len(STATES) + 1)]
    for name in order(rows):
        shown = [f"{fmean(accuracies(rows, name, state)):.2f}" for state in STATES]
        seconds = fmean(row["seconds"] for row in rows if row["criterion"] == name)
        lines.append(f"| {name} | {' | '.join(shown)} | {seconds:.1f} |")
    lines += ["", f"| ours − Torch-Pruning's | {' | '.join(STATES)} | our ridge + BN − their BN |"]
    lines.append("|---|" + "---:|" * (len(STATES) + 1))
    for name in THEIRS:
        pairs = [(state, state) for state in STATES] + [("ridge + BN", "BN")]
        found = [(accuracies(rows, name, a), accuracies(rows, PREFIX + name, b)) for a, b in pairs]
        if all(len(mine) == len(rival) > 1 for mine, rival in found):
            cells = [signed([a - b for a, b in zip(mine, rival, strict=True)]) for mine, rival in found]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], title: str, dense: float) -> Any:
    """A dot per criterion, state and draw."""
    names = order(rows)[::-1]
    height = 1.5 + 0.27 * len(names)
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=(8, height), layout="constrained", dpi=130)
    axes = figure.subplots()
    looks = zip(STATES, ("o", "s", "D"), ("#999999", "#56B4E9", "#D55E00"), strict=True)
    for state, marker, colour in looks:
        points = [(row["accuracy"], names.index(row["criterion"])) for row in rows if row["state"] == state]
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=state, ms=5, alpha=0.75)
    axes.axvline(dense, color="black", lw=0.8, ls=(0, (4, 3)), label="dense")
    axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 100), title=title)
    axes.set_xlabel("test accuracy, no training (%)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def show_cuts(title: str, dense: float) -> Callable[[Pages], None]:
    """Table and picture of what was cut."""

    def show(pages: Pages) -> None:
        first, name = pages.rows[0], pages.file.stem
        facts = f"Dense: {dense:.2f} %. Cut: {first['params']:,} parameters, {first['macs'] / 1e6:.1f} M MACs."
        draws = len({row["draw"] for row in pages.rows})
        facts += f" Means over {draws} draws of the training batches; ± is the 95 % interval of the mean over draws."
        draw(pages.rows, title, dense).savefig(pages.file.with_suffix(".png"))
        body = f"`{line()}`\n\n![{name}]({name}.png)\n\n{facts}\n\n{table(pages.rows)}"
        fill(pages.file.with_suffix(".md"), body)

    return show


def show_training(title: str, dense: float) -> Callable[[Pages], None]:
    """Table of what was trained on."""

    def show(pages: Pages) -> None:
        epochs = range(1, 1 + len(pages.rows[0]["by_epoch"]))
        lines = [f"{title}. Dense: {dense:.2f} %. Test accuracy in % after each epoch; one seed.\n"]
        lines.append(f"| criterion | {' | '.join(f'epoch {epoch}' for epoch in epochs)} | minutes |")
        lines.append("|---|" + "---:|" * (len(epochs) + 1))
        for row in sorted(pages.rows, key=lambda row: -row["by_epoch"][-1]):
            cells = " | ".join(f"{value:.2f}" for value in row["by_epoch"])
            lines.append(f"| {row['criterion']} | {cells} | {row['seconds'] / 60:.1f} |")
        fill(pages.file.with_suffix(".md"), f"`{line()}`\n\n" + "\n".join(lines))

    return show


def run(given: argparse.Namespace, weights: Path, train: ImageTensors, test: ImageTensors) -> None:
    """One network."""
    state_dict = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    depth = 1 + sum("conv" in name for name in state_dict)
    module = ResNetCIFAR(depth)
    load_pretrained(module, state_dict)
    bench = Bench(given, module, train, test)
    print(f"ResNet-{depth}: {bench.dense} % dense", flush=True)
    title = f"ResNet-{depth}, MACs ÷ {given.divide:g}"
    settings = {name: getattr(given, name) for name in ("divide", "observe", "batches")}
    pages = Pages(f"resnet{depth}", {**settings, "test": len(test)}, show_cuts(title, bench.dense), resume=given.resume)
    names = [*sorted(criteria.__all__), *(PREFIX + name for name in THEIRS)]
    names.sort(key=lambda name: name.removeprefix(PREFIX) not in THEIRS)  # a run that is stopped has what is compared
    done = {(row["criterion"], row["draw"]) for row in pages.rows}
    for seed in range(given.draws):
        for name in names:
            if (name, seed) not in done:
                pages.add(bench.rows(name, seed))
                print(pages.rows[-len(STATES) :], flush=True)
    if given.finetune:
        settings |= {"test": len(test), "epochs": given.finetune}
        pages = Pages(f"resnet{depth}-finetuned", settings, show_training(title, bench.dense), resume=given.resume)
        done = {row["criterion"] for row in pages.rows}
        for label in given.finetuned:
            if label not in done:
                pages.add([bench.finetuned(label, given.finetune)])


def main() -> None:
    """Every network, writing after each criterion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder of CIFAR-10, in torchvision's layout")
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="state dicts of ResNets on CIFAR-10")
    parser.add_argument("--divide", type=float, default=2.1, help="divisor of the MACs")
    parser.add_argument("--draws", type=int, default=3, help="draws of the training batches, seeds 0, 1, …")
    parser.add_argument("--observe", type=int, default=10, help=f"training batches of {BATCH} for criteria")
    parser.add_argument("--batches", type=int, default=16, help=f"training batches of {BATCH} for repairs")
    parser.add_argument("--test-limit", type=int, default=10000, help="use only the first test images")
    parser.add_argument("--finetune", type=int, default=0, metavar="EPOCHS", help="train the pruned networks")
    parser.add_argument(
        "--finetuned",
        nargs="+",
        default=TRAINED,
        metavar="NAME",
        help="criteria whose networks are trained; NAME+ridge: after repair",
    )
    add_resume(parser)
    given = parser.parse_args()
    source = CIFAR10(root=given.root)
    train, test = (normalised(part, source) for part in source.load())
    test = test.take(torch.arange(min(given.test_limit, len(test))))
    test = ImageTensors(test.images.contiguous(memory_format=torch.channels_last), test.labels)
    for weights in given.weights:
        run(given, weights, train, test)


if __name__ == "__main__":
    main()
