"""Every criterion on a pretrained ResNet at MACs ÷ 2.1, no training: ``python -m benchmarks.criteria --weights FILE``.

The inner width of every residual block shrinks by the same share (uniform), or the lowest scores of all blocks go
(global). Test accuracy right after the cut, after BatchNorm's statistics were estimated again, and after ridge
regression of the consumers as well. Torch-Pruning's L1, Taylor and BatchNorm importance choose in the same run by the
same gradients, if it is installed. Needs CIFAR-10 under ``--root`` or ``LIGHTNING_PRUNE_DATA``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import EVIDENCE, command, fill, machine
from benchmarks.repair import BATCH, accuracy, calibration, normalised
from lightning_prune.data import CIFAR10, ImageTensors
from lightning_prune.extras import require
from lightning_prune.models import ResNetCIFAR
from lightning_prune.planning import Original, Scope, Target, make_plan, select
from lightning_prune.scoring import Criterion, criteria, score_groups
from lightning_prune.structure import Call, Structure, Subject, trace
from lightning_prune.surgery import ReestimateBatchNorm, Repair, Ridge, cut, install, repaired
from lightning_prune.surgery.tensors import named

Row = dict[str, Any]

STATES: dict[str, tuple[type[Repair], ...]] = {
    "right after": (),
    "BN": (ReestimateBatchNorm,),
    "ridge + BN": (Ridge, ReestimateBatchNorm),
}


def observed(
    criterion: Criterion, structure: Structure, module: ResNetCIFAR, images: ImageTensors, rows: Tensor
) -> Any:
    """The criterion's statistic after training batches, weights as they are."""
    statistic = criterion.statistic(structure)
    if statistic is None:
        return None
    for batch in rows.split(BATCH):
        model, drawn = copy.deepcopy(module).train(), images.take(batch)
        if statistic.examines:  # on the batch at hand when a cut is due, as in the callback
            model.training_step = lambda pair, model=model: F.cross_entropy(model(pair.images), pair.labels)
            loss = statistic.examines_loss
            statistic.examine(model, Call((drawn,), method="training_step") if loss else Call((drawn.images,)))
            break
        handles = statistic.attach(model)
        F.cross_entropy(model(drawn.images), drawn.labels).backward()
        for handle in handles:
            handle.remove()
    return statistic


def ours(given: argparse.Namespace, module: ResNetCIFAR, images: ImageTensors, test: ImageTensors) -> Iterator[Row]:
    """One row per criterion and state of repair; every cut is undone."""
    structure = trace(Subject.of(module, module.example_input_array))
    names, _ = select(structure, ignore="conv1")
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(given.seed))[: given.observe * BATCH]
    _, run = calibration(images, given.batches)
    for name in given.criteria or sorted(criteria.__all__):
        criterion = getattr(criteria, name)()
        began = time.process_time()
        statistic = observed(criterion, structure, module, images, rows)
        tensors = {key: tensor.detach() for key, tensor in named(module).items()}
        scores = score_groups(criterion, [structure.group(group) for group in names], tensors, statistic)
        seconds = time.process_time() - began
        target = Target.of(budget={"macs": 1 / given.divide})
        plan = make_plan(structure, scores, target, 1.0, Scope.of(given.scope), Original.of(structure))
        axes, after = structure.axes(plan.kept), structure.take(plan.kept)
        size = {"params": after.cost.params(after.widths), "macs": after.cost.macs(after.widths)}
        for state, kinds in STATES.items():
            repairs = [kind(given.batches) for kind in kinds]  # type: ignore[call-arg]
            contents = repaired(copy.deepcopy(module).train(), axes, repairs, run)
            with cut(module, axes) as change:
                install(change, module, contents)
                yield {
                    "criterion": name,
                    "state": state,
                    "accuracy": accuracy(module, test),
                    **size,
                    "seconds": seconds,
                }


def theirs(given: argparse.Namespace, module: ResNetCIFAR, images: ImageTensors, test: ImageTensors) -> Iterator[Row]:
    """Torch-Pruning's choice at the same widths (uniform) or budget (global), by the gradients of the same batches."""
    try:
        import torch_pruning as tp
    except ModuleNotFoundError:
        print("Torch-Pruning is not installed: `pip install torch-pruning==1.6.1` to have it beside", flush=True)
        return
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(given.seed))[: given.observe * BATCH]
    _, run = calibration(images, given.batches)
    dense = trace(Subject.of(module, module.example_input_array)).cost
    kinds = {
        "L1": tp.importance.MagnitudeImportance(p=1),
        "Taylor": tp.importance.TaylorImportance(),
        "BNScale": tp.importance.BNScaleImportance(),
    }
    for name, importance in kinds.items():
        model, began = copy.deepcopy(module).eval(), time.process_time()
        if name == "Taylor":
            for batch in rows.split(BATCH):
                drawn = images.take(batch)
                F.cross_entropy(model(drawn.images), drawn.labels).backward()
        keep = [model.conv1, model.linear, *(b.conv2 for b in model.modules() if hasattr(b, "conv2"))]
        example = torch.zeros(1, 3, 32, 32)
        steps = 200 if given.scope == "global" else 1
        pruner = tp.pruner.MetaPruner(
            *(model, example, importance),
            **{"pruning_ratio": 1 - 1 / given.divide if steps == 1 else 0.95, "ignored_layers": keep},
            **{"global_pruning": steps > 1, "iterative_steps": steps},
        )
        for _ in range(steps):
            pruner.step()
            model.zero_grad()  # gradients keep their old shapes
            cost = trace(Subject.of(model, example)).cost
            widths = trace(Subject.of(model, example)).widths
            if cost.macs(widths) <= dense.macs(trace(Subject.of(module, example)).widths) / given.divide:
                break
        seconds = time.process_time() - began
        size = {"params": sum(p.numel() for p in model.parameters()), "macs": cost.macs(widths)}
        row = {"criterion": f"Torch-Pruning {name}", **size, "seconds": seconds}
        yield {**row, "state": "right after", "accuracy": accuracy(model, test)}
        contents = repaired(copy.deepcopy(model).train(), {}, [ReestimateBatchNorm(given.batches)], run)
        with cut(model, {}) as change:
            install(change, model, contents)
            yield {**row, "state": "BN", "accuracy": accuracy(model, test)}


def table(rows: Sequence[Row], dense: float) -> str:
    """Markdown: a line per criterion, best first by the last state."""
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row["criterion"], {})[row["state"]] = row
    lines = [
        f"Dense: {dense:.2f} %.\n",
        f"| criterion | parameters | MACs | {' | '.join(STATES)} | seconds to score |",
        "|---|---:|---:|" + "---:|" * (len(STATES) + 1),
    ]
    for name, states in sorted(cells.items(), key=lambda item: -max(r["accuracy"] for r in item[1].values())):
        first = next(iter(states.values()))
        shown = [f"{states[state]['accuracy']:.2f}" if state in states else "–" for state in STATES]
        size = f"{first['params']:,} | {first['macs'] / 1e6:.1f} M"
        lines.append(f"| {name} | {size} | {' | '.join(shown)} | {first['seconds']:.1f} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], title: str) -> Any:
    """A dot per criterion and state."""
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=(8, 6.5), layout="constrained", dpi=130)
    axes = figure.subplots()
    best: dict[str, float] = {}
    for row in rows:
        best[row["criterion"]] = max(best.get(row["criterion"], 0.0), row["accuracy"])
    order = sorted(best, key=lambda name: best[name])
    for (state, marker), colour in zip(
        zip(STATES, ("o", "s", "D"), strict=True), ("#999999", "#56B4E9", "#D55E00"), strict=True
    ):
        points = [(row["accuracy"], order.index(row["criterion"])) for row in rows if row["state"] == state]
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=state)
    axes.set(yticks=range(len(order)), yticklabels=order, xlim=(0, 100), title=title)
    axes.set_xlabel("test accuracy, no training (%)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right")
    return figure


def write(given: argparse.Namespace, settings: Mapping[str, Any], rows: Sequence[Row], dense: float) -> None:
    """Numbers, picture and table under docs/evidence/criteria, named after network and scope."""
    folder, name = EVIDENCE / "criteria", f"resnet{given.depth}-{given.scope}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    facts = json.dumps({**settings, "dense": dense, "machine": machine()})
    (folder / f"{name}.json").write_text(f'{facts[:-1]},\n "rows": [\n  {lines}\n ]}}\n', encoding="utf-8")
    draw(rows, f"ResNet-{given.depth}, MACs ÷ {given.divide:g}, {given.scope}").savefig(folder / f"{name}.png")
    fill(folder / f"{name}.md", f"`{settings['command']}`\n\n![{name}]({name}.png)\n\n{table(rows, dense)}")


def main() -> None:
    """One network, writing after each criterion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder of CIFAR-10, in torchvision's layout")
    parser.add_argument("--weights", type=Path, required=True, help="weights of a ResNet trained on CIFAR-10")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--divide", type=float, default=2.1, help="what the MACs are divided by")
    parser.add_argument("--scope", choices=("local", "global"), default="local")
    parser.add_argument("--criteria", nargs="*", help="all by default")
    parser.add_argument("--test-limit", type=int, default=10000, help="test images, the first so many")
    parser.add_argument("--observe", type=int, default=10, help=f"training batches of {BATCH} that statistics see")
    parser.add_argument("--batches", type=int, default=16, help=f"training batches of {BATCH} that repairs see")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    seed_everything(given.seed, verbose=False)
    source = CIFAR10(root=given.root)
    images, test = (normalised(part, source) for part in source.load())
    test = test.take(torch.arange(min(given.test_limit, len(test))))
    module = ResNetCIFAR(given.depth)
    module.load_pretrained(torch.load(given.weights, map_location="cpu", weights_only=True)["state_dict"])
    settings = {name: value for name, value in vars(given).items() if name not in ("root", "weights")}
    settings["command"] = command("benchmarks.criteria").replace(str(given.weights), given.weights.name)
    dense, rows = accuracy(module, test), []
    print(f"dense: {dense} %", flush=True)
    for source_of in (ours, theirs):
        for row in source_of(given, module, images, test):
            rows.append(row)
            print(row, flush=True)
    write(given, settings, rows, dense)
    print(table(rows, dense))


if __name__ == "__main__":
    main()
