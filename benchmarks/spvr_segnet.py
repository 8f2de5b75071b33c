"""Segmentation before and after SPvR: part ``segnet`` of `benchmarks.spvr`.

The small SegNet of the recipe ``shapes_segnet_spvr`` and its generated images (1,000, of which 200 are the test set).
The dense network is trained for 40 epochs with Adam and a cosine schedule. SPvR or a control keeps a fifth of its
parameters; all weights are reinitialised, and the small network is trained in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_jaccard_index

from benchmarks.common import quiet_fit, shown
from lightning_prune import L1, Random, Reinitialise, SPvRPruning, prune
from lightning_prune.callbacks.display.report_writer import ReportWriter
from lightning_prune.data import Shapes
from lightning_prune.extras import require
from lightning_prune.models import SegNet
from lightning_prune.scoring import Criterion

__all__ = ["METHODS", "SEEDS", "picture", "segment", "table"]

Row = dict[str, Any]
EPOCHS, BUDGET, CLASSES, LR = 40, 0.2, 4, 0.003
#: Of the controls, criterion and scope; SPvR is a callback.
CONTROLS: dict[str, tuple[Callable[[], Criterion], str]] = {
    "random units": (Random, "global"),
    "every layer alike": (L1, "local"),
}
METHODS = ("dense", "SPvR", *CONTROLS)
SEEDS = (0, 1, 2)
_SHOWN = 6  # images of the picture


class _Cosine(Callback):
    """The learning rate falls to 0 over the epochs of a fit."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.max_epochs is not None
        share = (1 + math.cos(math.pi * trainer.current_epoch / trainer.max_epochs)) / 2
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = LR * share


def segment(method: str, seed: int, work: Path) -> Row:
    """Intersection over union in the test images, averaged over classes; the dense network's row comes first."""
    began = process_time()
    torch.manual_seed(seed)
    model = SegNet(CLASSES, ((16, 2), (32, 2), (32, 2)), (3, 32, 32), optimizer="adam", lr=LR)
    data = Shapes(1000, seed=seed)
    whole, callbacks = _params(model), list[Callback]([_Cosine()])
    if method != "dense":
        model.load_state_dict(torch.load(work / f"segnet-{seed}.pt", weights_only=True))
    if method == "SPvR":
        ReportWriter.measure = lambda self, traced, size: size  # type: ignore[method-assign]
        folder = work / "rankings" / f"segnet-{seed}-{torch.randint(2**31, ()).item()}"
        pruning = SPvRPruning(BUDGET, 4, 20, reinit=Reinitialise(rule="own", seed=seed), dirpath=str(folder))
        callbacks.append(pruning)
    elif method != "dense":
        criterion, scope = CONTROLS[method]
        prune(
            model,
            budget=BUDGET,
            criterion=criterion(),
            scope=scope,  # type: ignore[arg-type]
            extensions=[Reinitialise(rule="own", seed=seed)],
        )
    torch.manual_seed(seed)
    quiet_fit(model, data, callbacks, max_epochs=EPOCHS)
    if method == "dense":
        torch.save(model.state_dict(), work / f"segnet-{seed}.pt")
    images, truth = _test(data)
    found = _classes(model.eval(), images)
    torch.save(found[:_SHOWN].byte(), work / f"segnet-{method}-{seed}.pt")
    each = multiclass_jaccard_index(found, truth, CLASSES, average="none").tolist()
    row: Row = {"params": _params(model), "of": whole, "form": form(model), "iou": sum(each) / CLASSES, "each": each}
    return row | {"accuracy": float((found == truth).float().mean()), "seconds": process_time() - began}


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def form(model: SegNet) -> str:
    """Widths of encoder and decoder, stage by stage."""
    widths = [
        " ".join(str(layer.out_channels) for layer in stage.modules() if isinstance(layer, nn.Conv2d)) or "–"
        for stage in (*model.encoder, *model.decoder)
    ]
    half = len(widths) // 2
    return f"{' | '.join(widths[:half])} → {' | '.join(widths[half:])}"


def _test(data: Shapes) -> tuple[Tensor, Tensor]:
    batches = [*data.test_dataloader()]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@torch.inference_mode()
def _classes(model: SegNet, images: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in images.split(50)])


def table(rows: list[Row]) -> list[str]:
    """Of the seeds in which all methods are there."""
    by = {(row["method"], row["seed"]): row for row in rows}
    seeds = [seed for seed in SEEDS if all((method, seed) in by for method in METHODS)]
    lines = [
        f"## Segmentation: intersection over union (IoU) in test images, %, 95 % intervals of {len(seeds)} seeds",
        "",
        "| network | parameters | mean IoU | minus dense | ground | disc | square | triangle | pixels right "
        "| what is left, encoder → decoder, one seed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for method in METHODS:
        found = [by[method, seed] for seed in seeds]
        gaps = [100 * (row["iou"] - by["dense", row["seed"]]["iou"]) for row in found]
        cells = [
            method,
            " · ".join(sorted({f"{row['params']:,}" for row in found})),
            shown([100 * row["iou"] for row in found], 1),
            "" if method == "dense" else shown(gaps, 1, "+"),
            *(f"{100 * fmean(row['each'][kind] for row in found):.1f}" for kind in range(CLASSES)),
            f"{100 * fmean(row['accuracy'] for row in found):.1f}",
            found[0]["form"].replace("|", "/"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def picture(work: Path) -> Any:
    """Test images, their truth, and what networks of the first seed see; None where a row is missing."""
    files = [work / f"segnet-{method}-{SEEDS[0]}.pt" for method in METHODS]
    if not all(file.is_file() for file in files):
        return None
    data = Shapes(1000, seed=SEEDS[0])
    data.setup("test")
    images, truth = _test(data)
    rows = {"input": images, "truth": truth} | {
        method: torch.load(file, weights_only=True) for method, file in zip(METHODS, files, strict=True)
    }
    figure = require("matplotlib.figure", extra="plot").Figure(
        (1.5 * _SHOWN + 1, 1.5 * len(rows)), layout="constrained"
    )
    axes = figure.subplots(len(rows), _SHOWN)
    for line, (name, found) in zip(axes, rows.items(), strict=True):
        for place, one in zip(line, found, strict=False):
            pixels = (one.permute(1, 2, 0) / 4 + 0.5).clamp(0, 1) if one.ndim == 3 else one
            place.imshow(pixels, cmap="viridis", vmin=0, vmax=CLASSES - 1)
            place.set_xticks([])
            place.set_yticks([])
        line[0].set_ylabel(name)
    return figure
