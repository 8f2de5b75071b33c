"""Size and accuracy against the threshold ρ, with depth on: ``python -m benchmarks.thresholds --root F --work G``.

Figures 6 and 7 of Ratajczyk & Horzyk (2024), in both modes. ResNet-20 from CIFAR-10 (weights in ``resnet_cifar10`` of
LIGHTNING_PRUNE_DATA) learns small photographs of five flowers (``--root``: the folder ``flowers_small``), from some of
them only: pruned at the first batch with one threshold or another, repaired, then by Algorithm 2. One scoring serves
all thresholds in one-shot mode; layer-wise each needs its own. A run that was stopped goes on with ``--resume``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from matplotlib.figure import Figure

from benchmarks.common import add_resume, computed, publish, quiet, rows_in
from lightning_prune import GradualUnfreezing, XGBPruning
from lightning_prune.data import ImageFolder
from lightning_prune.models import ResNetCIFAR, load_pretrained
from lightning_prune.reporting import layer_parameters
from lightning_prune.scoring import XGBoost
from tests.support import pretrained

THRESHOLDS = (None, 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
MODES = ("one_shot", "layer_wise")
E_F, E_U, TOLERANCE = 1.0, 0.1, 0.05


def train(job: dict[str, Any], root: str, work: Path) -> dict[str, Any]:
    """One threshold in one mode; None is the reference."""
    seed_everything(job["seed"], verbose=False)
    data = ImageFolder(
        root, job["pixels"], batch_size=32, val_share=0, train_limit=job["images"], augment=True, seed=job["seed"],
        cache=str(work / "images"),
    )  # fmt: skip
    data.setup("fit")
    model = ResNetCIFAR(20, classes=5, size=job["pixels"], lr=0.05, momentum=0.9, weight_decay=1e-4)
    weights = pretrained.weights(20)
    assert weights is not None
    load_pretrained(model, weights)
    dense = layer_parameters(model)
    threshold = job["threshold"]
    pruning = XGBPruning(
        job["mode"], threshold=threshold or 0.0, depth=TOLERANCE, surrogate=XGBoost(rounds=20, threads=1),
        dirpath=str(work / "runs" / "-".join(str(value) for value in job.values())),
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_epochs=ceil(E_F + len(dense) * E_U), default_root_dir=work, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
        callbacks=[*([] if threshold is None else [pruning]), GradualUnfreezing(E_F, E_U)],
    )  # fmt: skip
    trainer.fit(model, data)
    left = layer_parameters(model)
    return {
        "backbone": sum(left.values()), "dense": sum(dense.values()), "convolutions": len(left),
        "accuracy": accuracy(model, data),
    }  # fmt: skip


@torch.no_grad()
def accuracy(model: ResNetCIFAR, data: ImageFolder) -> float:
    """Share of the test images that are classified right, in %."""
    model.eval()
    pairs = list(data.test_dataloader())
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in pairs)
    return 100 * right / sum(len(labels) for _, labels in pairs)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a row per mode and threshold."""
    yield "| mode | ρ | convolutions | parameters of the backbone | share | test accuracy, % |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in rows:
        mode, rho = (row["mode"].replace("_", "-"), row["threshold"])
        words = ("reference", "") if rho is None else (mode, f"{rho:g}")
        share = 100 * row["backbone"] / row["dense"]
        yield (
            f"| {' | '.join(words)} | {row['convolutions']} | {row['backbone']:,} | {share:.1f} % "
            f"| {row['accuracy']:.1f} |"
        )


def figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Accuracy (left) and size (right, logarithmic) against ρ, a line per mode."""
    drawn = Figure(figsize=(10, 4), dpi=130)
    drawn.set_layout_engine("constrained")
    left, right = drawn.subplots(1, 2)
    for mode, colour in zip(MODES, ("#0072B2", "#D55E00"), strict=True):
        mine = [row for row in rows if row["mode"] == mode and row["threshold"] is not None]
        at = [row["threshold"] for row in mine]
        word = mode.replace("_", "-")
        left.plot(at, [row["accuracy"] for row in mine], "o-", color=colour, label=word)
        right.plot(at, [100 * row["backbone"] / row["dense"] for row in mine], "o-", color=colour, label=word)
    for row in rows:
        if row["threshold"] is None:
            left.axhline(row["accuracy"], color="0.5", ls="--", lw=1, label="reference")
    right.axhline(0.5, color="0.5", ls=":", lw=1, label="0.5 %")
    left.set(ylabel="test accuracy (%)")
    right.set(ylabel="parameters of the backbone left (%)", yscale="log")
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=0.01)
        axes.set(xlabel="threshold ρ")
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", frameon=False)
    return drawn


def main() -> None:
    """All thresholds in both modes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True, help="folder of `flowers_small`")
    parser.add_argument("--work", required=True, type=Path, help="folder for what is done so far")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--table", action="store_true", help="train nothing")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    shared = {"images": given.images, "pixels": given.pixels, "seed": 0}
    jobs = [
        {"mode": mode, "threshold": threshold, **shared}
        for mode in given.modes
        for threshold in THRESHOLDS
        if threshold is not None or mode == MODES[0]
    ]
    file = given.work / "rows.jsonl"
    if not given.table:
        run = partial(train, root=given.root, work=given.work)
        list(computed(jobs, run, file, resume=given.resume))
    rows = rows_in(file, **shared)
    publish("thresholds", {"rows": rows}, "\n".join(table(rows)), figure(rows))


if __name__ == "__main__":
    main()
