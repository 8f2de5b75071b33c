"""Weights of C_avg and C_max, with absolute and signed shares: ``python -m benchmarks.lambdas``.

The contribution paper's MLP is trained once per seed on MNIST or Fashion-MNIST, with both terms observed on every tenth
batch, with absolute and with signed shares. Then it is cut once by every mixture: at nine shares without further
training, and at 68 % with some epochs of training. Needs the data set in ``--root`` or ``LIGHTNING_PRUNE_DATA``.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import interval, publish, quiet, signed
from benchmarks.contribution import PAPER_MLP, SHARES, Held, accuracy, loaded, minus
from lightning_prune import L1, Contribution, Random
from lightning_prune.data import ImageTensors
from lightning_prune.extras import require
from lightning_prune.planning import Plan, Scope, Target, make_plan
from lightning_prune.scoring import ContributionStatistic, Criterion, Ratio, score_groups
from lightning_prune.structure import Size, Structure, TracedModel, trace
from lightning_prune.surgery import cut
from lightning_prune.surgery.tensors import named

RATIOS: tuple[Ratio, ...] = ("absolute", "signed")
WEIGHTS = ((1.0, 0.0), (3.0, 1.0), (1.0, 1.0), (1.0, 3.0), (0.0, 1.0))  # of C_avg and C_max
LR, OBSERVED = 0.1, 10


def mixtures(seed: int) -> dict[str, Criterion]:
    """Everything that is compared."""
    grid = {
        name(weights, ratio): Contribution(*weights, ratio=ratio, every_n_batches=OBSERVED)
        for ratio in RATIOS
        for weights in WEIGHTS
    }
    return {**grid, "L1": L1(), "random": Random(seed)}


def name(weights: tuple[float, float], ratio: Ratio) -> str:
    average, maximum = weights
    mixed = {(1.0, 0.0): "C_avg only", (0.0, 1.0): "C_max only"}.get(weights, f"{average:g} : {maximum:g}")
    return f"{ratio}, {mixed}"


def train(
    model: nn.Module, held: Held, epochs: int, first: int, statistics: Sequence[ContributionStatistic] = ()
) -> None:
    """SGD as in the paper; epochs are counted from ``first``, so that their order of batches goes on."""
    optimizer = torch.optim.SGD(model.parameters(), LR)
    loader, steps = held.train_dataloader(), 0
    model.train()
    for epoch in range(first, first + epochs):
        cast(Any, loader.sampler).set_epoch(epoch)
        for images, labels in loader:
            observed = statistics if steps % OBSERVED == 0 else ()
            handles = [handle for statistic in observed for handle in statistic.attach(model)]
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for handle in handles:
                handle.remove()
            steps += 1


def one_seed(sets: tuple[ImageTensors, ImageTensors], epochs: int, after: int, seed: int) -> dict[str, Any]:
    """Accuracies of every mixture: after a cut at each share, and after a cut at 68 % and training."""
    began = time.perf_counter()
    held = Held(sets, 500, PAPER_MLP.val_share, seed)
    test = held.parts()["test"]
    seed_everything(seed, verbose=False)
    model = PAPER_MLP.build(PAPER_MLP.wide)
    structure = trace(TracedModel.of(copy.deepcopy(model), model.example_input_array))
    statistics = {ratio: ContributionStatistic(structure, 1.0, 1.0, ratio) for ratio in RATIOS}
    train(model, held, epochs, 0, list(statistics.values()))
    result: dict[str, Any] = {"seed": seed, "dense": accuracy(model, test), "one_shot": {}, "recovered": {}}
    for label, criterion in mixtures(seed).items():
        scores = scores_of(criterion, structure, model, statistics)
        heights = []
        for share in SHARES:
            with cut(model, structure.axes(planned(structure, scores, share).kept)):
                heights.append(accuracy(model, test))
        narrow = copy.deepcopy(model)
        cut(narrow, structure.axes(planned(structure, scores, PAPER_MLP.ratio).kept))
        train(narrow, held, after, epochs)
        result["one_shot"][label], result["recovered"][label] = heights, accuracy(narrow, test)
    return {**result, "seconds": round(time.perf_counter() - began, 1)}


def scores_of(
    criterion: Criterion, structure: Structure, model: nn.Module, statistics: Mapping[Ratio, ContributionStatistic]
) -> Mapping[str, Tensor]:
    """Scores of all groups; the terms were observed once per ratio and are weighed here."""
    statistic = None
    if isinstance(criterion, Contribution):
        statistic = statistics[criterion.ratio]
        statistic.lambda_avg, statistic.lambda_max = criterion.lambda_avg, criterion.lambda_max
    tensors = {key: tensor.detach() for key, tensor in named(model).items()}
    return score_groups(criterion, structure.groups, tensors, statistic)


def planned(structure: Structure, scores: Mapping[str, Tensor], share: float) -> Plan:
    return make_plan(structure, scores, Target.of(share), 1.0, Scope(), Size.of(structure))


# -- results ----------------------------------------------------------------------------------------------------------


def area(results: Sequence[Mapping[str, Any]], label: str) -> list[float]:
    """Mean test accuracy over the shares removed, 0 to 90 % by the trapezoidal rule, per seed."""
    heights = [[r["dense"], *r["one_shot"][label]] for r in results]
    return [(sum(h) - (h[0] + h[-1]) / 2) / (len(h) - 1) for h in heights]


def recovered(results: Sequence[Mapping[str, Any]], label: str) -> list[float]:
    return [r["recovered"][label] for r in results]


def table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: a line per mixture."""
    base = name(WEIGHTS[0], "absolute")
    yield f"| weights C_avg : C_max | area right after one cut | − {base} | 68 % gone, then trained | − {base} |"
    yield "|---|---|---|---|---|"
    for label in results[0]["one_shot"]:
        cells = []
        for measure in (area, recovered):
            mine = measure(results, label)
            mean, half = interval(mine)
            cells += [f"{mean:.2f} ± {half:.2f}", "" if label == base else signed(minus(mine, measure(results, base)))]
        yield f"| {label} | {' | '.join(cells)} |"


def draw(results: Sequence[Mapping[str, Any]], title: str) -> Any:
    """Both measures against the weight of C_max, a line per ratio."""
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=(10, 4), layout="constrained", dpi=110)
    panels = figure.subplots(1, 2)
    measures = {"area right after one cut": area, "68 % gone, then trained": recovered}
    for axes, (what, measure) in zip(panels, measures.items(), strict=True):
        for ratio, colour in zip(RATIOS, ("#0072B2", "#CC79A7"), strict=True):
            summary = [interval(measure(results, name(weights, ratio))) for weights in WEIGHTS]
            middles, halves = zip(*summary, strict=True)
            axes.errorbar(range(len(WEIGHTS)), middles, halves, fmt="o-", color=colour, capsize=3, label=ratio)
        for label, colour, style in (("L1", "#D55E00", "--"), ("random", "#999999", ":")):
            axes.axhline(interval(measure(results, label))[0], color=colour, ls=style, label=label)
        axes.set_xticks(range(len(WEIGHTS)), [f"{average:g} : {maximum:g}" for average, maximum in WEIGHTS])
        axes.set(xlabel="weights of C_avg : C_max", ylabel="test accuracy (%)", title=what)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize="small")
    figure.suptitle(f"{title} ({len(results)} seeds, bars: 95 %)")
    return figure


def main() -> None:
    """All seeds, then the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=["MNIST", "FashionMNIST"], default="MNIST")
    parser.add_argument("--root", help="folder of the data set, in torchvision's layout")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, from 0")
    parser.add_argument("--epochs", type=int, default=16, help="epochs before the cut")
    parser.add_argument("--after", type=int, default=4, help="epochs after the cut at 68 %%")
    given = parser.parse_args()
    quiet()
    results: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        results.append(one_seed(loaded(given.data, given.root), given.epochs, given.after, seed))
        print(f"seed {seed}: {results[-1]['seconds']} s", flush=True)
    settings = {key: value for key, value in vars(given).items() if key != "root"}
    figure = draw(results, f"{given.data}, MLP 784-50-30-10")
    publish("lambdas", {"settings": settings, "seeds": results}, "\n".join(table(results)), figure)


if __name__ == "__main__":
    main()
