"""Overhead and savings of pruning in training time: ``python -m benchmarks.overhead``.

Five parts: a step with the statistics of contribution pruning compared with one without; its formulas compared with
plain implementations; one cut of a ResNet-50; the import; and a step with half of the MACs removed, compared with the
dense network and Lightning's mask callback. Variants run in turn in one process, and ratios are taken within a round,
as medians over rounds. On a machine with other load, ``--clock processor --threads 1`` measures the processor time of
the one thread instead of wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import EVIDENCE, add_resume, command, fill, here, machine, quiet, quiet_fit
from lightning_prune import L1, Contribution, OneShot, StructuredPruning
from lightning_prune.extras import require
from lightning_prune.models import CNNClassifier, MLPClassifier
from lightning_prune.planning import Scope, Target, make_plan
from lightning_prune.scoring import contributions_of, score_groups
from lightning_prune.structure import Size, Structure, TracedModel, trace
from lightning_prune.surgery import transaction
from lightning_prune.surgery.tensors import named

# As many steps as lie between two observed batches by default, so that a block holds exactly one of them.
BLOCK, SKIPPED = 10, 2
NEVER = 10**6
CLOCKS: dict[str, Callable[[], float]] = {"wall": perf_counter, "processor": process_time}


_clock = ["wall"]


def now() -> float:
    """Seconds on the clock that was chosen."""
    return CLOCKS[_clock[0]]()


class Wrapped(LightningModule):
    """A torchvision network, cross entropy, SGD with momentum."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class Turns(Callback):
    """Times blocks of steps, by turns with the pruning callback away, at its default rate and on every step.

    The time of a block runs from the start of one step to that of the step ``BLOCK`` later: data, hooks and all.
    """

    def __init__(self, pruning: StructuredPruning, criterion: Contribution, rates: Sequence[int], rounds: int) -> None:
        self.pruning, self.criterion = pruning, criterion
        generator = random.Random(0)
        self.plan = [rate for _ in range(rounds + 1) for rate in generator.sample(rates, len(rates))]
        self.blocks: dict[int, list[float]] = {rate: [] for rate in rates}
        self._steps, self._began = 0, 0.0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        turn, step = divmod(self._steps, BLOCK + SKIPPED)
        if step == 0:
            if turn:
                self.blocks[self.plan[turn - 1]].append(now() - self._began)
            if turn == len(self.plan):
                trainer.should_stop = True
                turn -= 1
            self._turn_to(trainer, self.plan[turn])
        if step == SKIPPED:
            self._began = now()
        self._steps += 1

    def _turn_to(self, trainer: Trainer, rate: int) -> None:
        self.pruning.criterion = replace(self.criterion, every_n_batches=rate or NEVER)
        # A new list: Lightning is going through the old one, and finds the new one at its next hook.
        started = self._steps > 0
        vars(trainer)["callbacks"] = [self] if started and not rate else [self, self.pruning]


def statistics_cost(
    module: LightningModule, shape: Sequence[int], batch_size: int, criterion: Contribution, rounds: int
) -> dict[str, Any]:
    """Step times with the statistics against those without, in one run of Lightning."""
    pruning = StructuredPruning(pruning_ratio=0.5, criterion=criterion, schedule=OneShot(at=NEVER - 1, unit="step"))
    turns = Turns(pruning, criterion, (0, 10, 1), rounds)
    fit(module, shape, batch_size, [turns, pruning], max_steps=NEVER, max_epochs=-1)
    blocks = {rate: times[1:] for rate, times in turns.blocks.items()}  # the first round warms up
    return {
        "step_ms": round(1e3 * median(blocks[0]) / BLOCK, 3),
        "every_10th": ratio(blocks[10], blocks[0]),
        "every_step": ratio(blocks[1], blocks[0]),
    }


def fit(
    module: LightningModule, shape: Sequence[int], batch_size: int, callbacks: Sequence[Callback], **settings: Any
) -> None:
    """A run without anything that would disturb the clock; random images, because values do not change the time."""
    images = TensorDataset(torch.randn(40 * batch_size, *shape), torch.randint(10, (40 * batch_size,)))
    loader = DataLoader(images, batch_size, drop_last=True)
    quiet_fit(module, loader, callbacks, **settings)


def ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio within a round, and the ratio of the medians."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    whole = median(times) / median(base)
    named_values = {"median": middle, "q25": low, "q75": high, "of_medians": whole}
    return {name: round(value, 3) for name, value in named_values.items()}


# -- formulas ---------------------------------------------------------------------------------------------------------


def plain(layer: nn.Module, activation: Tensor) -> Tensor:
    """Shares as the formula has them, a tensor of passes × outputs × inputs (× positions)."""
    weight = layer.get_parameter("weight").detach().abs()
    if isinstance(layer, nn.Conv2d):
        columns = F.unfold(activation.abs(), layer.kernel_size, padding=layer.padding)  # type: ignore[arg-type]
        products = columns[:, None] * weight.flatten(1)[None, :, :, None]
        return products / products.sum(2, keepdim=True)
    products = activation.abs()[:, None] * weight
    return products / products.sum(2, keepdim=True)


def formulas(layer: nn.Module, shape: Sequence[int], rounds: int) -> dict[str, Any]:
    """Milliseconds and memory of both terms, absolute shares, by turns; memory beyond what is there before."""
    x = torch.rand(*shape)
    output = layer(x)
    maximum = torch.compile(_largest) if isinstance(layer, nn.Linear) else None
    ways = {
        "C_avg, plain": lambda: plain(layer, x).sum((0, 1)),
        "C_avg, ours": lambda: contributions_of(layer, x, output),
        "C_max, plain": lambda: plain(layer, x).amax((0, 1)),
        "C_max, ours": lambda: contributions_of(layer, x, output, average=False, maximum=True),
    }
    if maximum is not None:
        ways["C_max, plain through torch.compile"] = lambda: maximum(layer.get_parameter("weight"), x)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, work in ways.items():
            began = now()
            with torch.no_grad():
                work()
            times[name].append(now() - began)
    return {
        name: {"ms": round(1e3 * median(times[name][1:]), 2), "mib": peak_memory(work)} for name, work in ways.items()
    }


def _largest(weight: Tensor, activation: Tensor) -> Tensor:
    a, w = activation.abs(), weight.abs()
    return (a[:, None] * w / (a @ w.T)[..., None]).amax((0, 1))


def peak_memory(work: Callable[[], Any]) -> float | None:
    """MiB that the process grows by at most; None where the system does not tell."""
    forget, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not forget.is_file():
        return None

    def resident(which: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(which))

    forget.write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    with torch.no_grad():
        work()
    return round((resident("VmHWM") - before) / 1024, 1)


def formulas_parts(rounds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """The layers that both ways are timed on."""
    return {
        "Linear 512→512, batch 64": lambda: formulas(nn.Linear(512, 512), (64, 512), rounds),
        "Linear 2048→256, batch 128": lambda: formulas(nn.Linear(2048, 256), (128, 2048), rounds),
        "Conv 16→32, 3×3 on 16×16, batch 64": lambda: formulas(
            nn.Conv2d(16, 32, 3, padding=1), (64, 16, 16, 16), rounds
        ),
        "Conv 64→64, 3×3 on 16×16, batch 8": lambda: formulas(nn.Conv2d(64, 64, 3, padding=1), (8, 64, 16, 16), rounds),
    }


# -- one cut ----------------------------------------------------------------------------------------------------------


def one_cut(size: int, rounds: int) -> dict[str, float]:
    """Seconds of each part of a cut of half of all units of ResNet-50 with AdamW, medians; plus the analysis."""
    resnet50 = require("torchvision.models", extra="vision").resnet50
    parts: dict[str, list[float]] = {}
    images = torch.randn(2, 3, size, size)
    began = now()
    structure = trace(TracedModel.of(resnet50(num_classes=10), images))
    analysis = now() - began  # once per run, not per cut
    for _ in range(rounds):
        model = resnet50(num_classes=10)
        optimizer = torch.optim.AdamW(model.parameters())
        a_step(model, optimizer, images)
        for part, seconds in time_cut(structure, model, optimizer, images).items():
            parts.setdefault(part, []).append(seconds)
    medians = {part: round(median(seconds), 3) for part, seconds in parts.items()}
    return medians | {"for scale: the analysis, once per run": round(analysis, 3)}


def time_cut(
    structure: Structure, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor
) -> dict[str, float]:
    """What the callback does at a cut, one part after the other."""
    times: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = now()
        result = work()
        times[name] = now() - began
        return result

    tensors = {name: tensor.detach() for name, tensor in named(model).items()}
    scores = timed("scores", lambda: score_groups(L1(), structure.groups, tensors, None))
    target, original = Target.of(0.5), Size.of(structure)
    plan = timed("plan", lambda: make_plan(structure, scores, target, 1.0, Scope(), original))
    timed("axes", lambda: structure.axes(plan.kept))

    def surgery() -> None:
        with transaction(model, [optimizer], run=lambda: model(images)) as change:
            change.keep(structure, plan.kept)

    timed("surgery, migration, check", surgery)
    timed("structure after", lambda: structure.take(plan.kept))
    times["whole cut"] = sum(times.values())
    timed("for scale: a training step of the narrow network", lambda: a_step(model, optimizer, images))
    return times


def a_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(images), torch.tensor([0, 1])).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


# -- import -----------------------------------------------------------------------------------------------------------


def imports(rounds: int) -> dict[str, float]:
    """Seconds that a fresh interpreter takes for Lightning, then beyond it for the package and for its callback."""
    statements = ("import lightning", "import lightning_prune", "from lightning_prune import ContributionPruning")
    program = f"from time import {CLOCKS[_clock[0]].__name__} as now\nt = [now()]\n"
    program += "".join(f"{statement}\nt.append(now())\n" for statement in statements)
    program += "print(*(b - a for a, b in zip(t, t[1:])))"
    times = []
    for _ in range(rounds + 1):
        run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        times.append([float(number) for number in run.stdout.split()[-len(statements) :]])
    columns = zip(*times[1:], strict=True)  # the first fills the caches
    lightning, package, callback = (round(median(values), 3) for values in columns)
    return {statements[0]: lightning, f"then {statements[1]}": package, f"then {statements[2]}": callback}


# -- half of the MACs -------------------------------------------------------------------------------------------------


class Steps(Callback):
    """Seconds of every step but the first ones."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.starts.append(now())

    @property
    def seconds(self) -> float:
        """Median of a step."""
        return median(b - a for a, b in zip(self.starts[SKIPPED:-1], self.starts[SKIPPED + 1 :], strict=True))


def half_of_the_macs(size: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Step times of ResNet-18: dense, cut to half of the MACs, masked to half by Lightning's callback."""
    resnet18 = require("torchvision.models", extra="vision").resnet18
    shape = (3, size, size)
    networks = {name: Wrapped(resnet18(num_classes=10)) for name in ("dense", "narrow", "masked")}
    pruning = StructuredPruning(budget={"macs": 0.5}, schedule=OneShot(at=1, unit="step"))
    fit(networks["narrow"], shape, 2, [pruning], max_steps=2)
    convolutions = [(m, "weight") for m in networks["masked"].modules() if isinstance(m, nn.Conv2d)]
    mask = ModelPruning(
        "ln_structured",
        convolutions,
        use_global_unstructured=False,
        amount=0.5,
        pruning_dim=0,
        pruning_norm=1,
        make_pruning_permanent=False,  # as it is while it trains
        use_lottery_ticket_hypothesis=False,
    )
    fit(networks["masked"], shape, 2, [mask], max_epochs=1, limit_train_batches=1)
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds + 1):
        for name, network in networks.items():
            steps = Steps()
            fit(network, shape, batch_size, [steps], max_epochs=1, limit_train_batches=SKIPPED + 7)
            times[name].append(steps.seconds)
    dense = times["dense"][1:]
    macs = pruning.report.metrics()["pruning/macs"]
    return {
        "dense_step_ms": round(1e3 * median(dense), 1),
        "macs": round(macs / Size.of(trace(TracedModel.of(networks["dense"], torch.zeros(1, *shape)))).macs, 4),
        "narrow": ratio(times["narrow"][1:], dense),
        "masked": ratio(times["masked"][1:], dense),
    }


# -- all --------------------------------------------------------------------------------------------------------------


def statistics_parts(rounds: int, slow_rounds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """The networks whose statistics are timed."""
    vgg16_bn = require("torchvision.models", extra="vision").vgg16_bn
    absolute, both, signed = Contribution(), Contribution(lambda_max=1), Contribution(ratio="signed")
    mlp, cnn, vgg = (1, 28, 28), (3, 32, 32), (3, 32, 32)

    def big() -> LightningModule:
        network = vgg16_bn(num_classes=10)
        network.avgpool, network.classifier = nn.Flatten(), nn.Linear(512, 10)  # its usual form for 32×32 images
        return Wrapped(network)

    return {
        "MLP 784-50-30-10, batch 128": lambda: statistics_cost(MLPClassifier(), mlp, 128, absolute, rounds),
        "MLP, batch 128, C_avg and C_max": lambda: statistics_cost(MLPClassifier(), mlp, 128, both, rounds),
        "MLP, batch 5000 (the paper's)": lambda: statistics_cost(MLPClassifier(), mlp, 5000, absolute, slow_rounds),
        "MLP, batch 5000, signed ratio": lambda: statistics_cost(MLPClassifier(), mlp, 5000, signed, slow_rounds),
        "seed's CNN, 32×32, batch 128": lambda: statistics_cost(CNNClassifier(), cnn, 128, absolute, rounds),
        "seed's CNN, signed ratio": lambda: statistics_cost(CNNClassifier(), cnn, 128, signed, rounds),
        "VGG16-BN, 32×32, batch 16": lambda: statistics_cost(big(), vgg, 16, absolute, slow_rounds),
        "VGG16-BN, signed ratio": lambda: statistics_cost(big(), vgg, 16, signed, slow_rounds),
    }


def tables(results: Mapping[str, Any]) -> str:
    """Markdown tables of whatever was measured."""

    def shown(r: Mapping[str, float]) -> str:
        return f"{r['median']:.3f} ({r['q25']:.3f}–{r['q75']:.3f})"

    lines = ["| statistics | step without (ms) | every 10th batch, the default | every step |", "|---|---|---|---|"]
    for name, r in results.get("statistics", {}).items():
        lines.append(f"| {name} | {r['step_ms']:.2f} | {shown(r['every_10th'])} | {shown(r['every_step'])} |")
    lines += ["", "| one cut of ResNet-50 with AdamW (s) | 64×64 | 224×224 |", "|---|---|---|"]
    small, large = (results.get("cut", {}).get(size, {}) for size in ("64", "224"))
    lines += [f"| {part} | {seconds:.3f} | {large.get(part, '–')} |" for part, seconds in small.items()]
    lines += ["", "| import | seconds |", "|---|---|"]
    lines += [f"| `{name}` | {seconds:.3f} |" for name, seconds in results.get("import", {}).get("seconds", {}).items()]
    if "formulas" in results:
        lines += ["", "| formulas, one layer | time (ms) | memory (MiB) |", "|---|---|---|"]
    for name, ways in results.get("formulas", {}).items():
        lines += [f"| {name}: {way} | {r['ms']:.1f} | {r['mib']} |" for way, r in ways.items()]
    if "half" in results:
        lines += [
            "",
            "| ResNet-18 | MACs | dense step (ms) | cut | Lightning's mask callback |",
            "|---|---|---|---|---|",
        ]
    for name, r in results.get("half", {}).items():
        lines.append(
            f"| {name} | {r['macs']:.3f} | {r['dense_step_ms']:.0f} | {shown(r['narrow'])} | {shown(r['masked'])} |"
        )
    return "\n".join(lines)


class Results:
    """What was measured, written after every part, each with where that was."""

    def __init__(self, threads: int, *, resume: bool) -> None:
        self.folder = EVIDENCE / "overhead"
        self.threads = threads
        self.file = self.folder / "results.json"
        self.parts: dict[str, Any] = json.loads(self.file.read_text()) if resume and self.file.is_file() else {}

    def has(self, part: str, name: str) -> bool:
        return name in self.parts.get(part, {})

    def keep(self, part: str, name: str, value: Any) -> None:
        self.parts.setdefault(part, {})[name] = value
        self.parts.setdefault("at", {}).setdefault(part, {})[name] = here()
        self.parts["machine"] = machine() | {"threads": self.threads, "clock": _clock[0]}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.parts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        fill(self.folder / "README.md", tables(self.parts))
        print(part, name, value, flush=True)


def main() -> None:
    """Measure the parts asked for; with ``--resume`` those that are stored stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = ("import", "cut", "half", "formulas", "statistics")
    parser.add_argument("--parts", nargs="+", choices=known, default=list(known))
    parser.add_argument("--only", default="", help="only rows with this in their name")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--slow-rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    add_resume(parser)
    given = parser.parse_args()
    _clock[0] = given.clock
    quiet(given.threads)
    results = Results(given.threads, resume=given.resume)
    print(command("benchmarks.overhead"), json.dumps(machine()), flush=True)
    for part in given.parts:
        for name, measure in work(part, given.rounds, given.slow_rounds).items():
            if given.only in name and not results.has(part, name):
                results.keep(part, name, measure())
    print(tables(results.parts))


def work(part: str, rounds: int, slow_rounds: int) -> dict[str, Callable[[], Any]]:
    """What one part measures."""
    if part == "import":
        return {"seconds": lambda: imports(7)}
    if part == "cut":
        return {"64": lambda: one_cut(64, 5), "224": lambda: one_cut(224, 5)}
    if part == "half":
        return {
            "32×32, batch 64": lambda: half_of_the_macs(32, 64, slow_rounds),
            "64×64, batch 32": lambda: half_of_the_macs(64, 32, slow_rounds),
        }
    return formulas_parts(rounds) if part == "formulas" else statistics_parts(rounds, slow_rounds)


if __name__ == "__main__":
    main()
