"""A variational autoencoder that loses 30 % of its neurons during training: ``python -m benchmarks.vae``.

Fashion-MNIST, BCE + β·KLD with β = 1 and 4. Contribution, L1 and random pruning are compared with the unpruned network
and with one of the final widths from scratch, all trained equally long with the same seed. Needs the data set in
``--root`` or ``LIGHTNING_PRUNE_DATA``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import (
    EVIDENCE,
    add_resume,
    command,
    fill,
    here,
    interval,
    machine,
    quiet,
    quiet_fit,
    signed,
    stored,
)
from benchmarks.contribution import LOOKS, Held
from lightning_prune import L1, Contribution, Geometric, Random, StructuredPruning, prune
from lightning_prune.data import FashionMNIST
from lightning_prune.extras import require
from lightning_prune.models import VAE
from lightning_prune.scoring import Criterion

Point = dict[str, float]

CHANNELS, HIDDEN, LATENT = (16, 32), (256, 128), 16
BETAS = (1.0, 4.0)
RATIO, RATE, WARM_UP, EVERY = 0.3, 0.1, 3, 2
EPOCHS, BATCH_SIZE = 14, 64
DENSE, NARROW = "unpruned", "narrow from scratch"
PARTS = ("loss", "bce", "kld")
#: Test images of the curves; the tables have all.
FEW = 1000
LOOKS = {**LOOKS, NARROW: ("#009E73", "--")}


def criteria(seed: int) -> dict[str, Criterion]:
    """The criteria that are compared; the first is the callback's default."""
    return {"contribution": Contribution(), "L1": L1(), "random": Random(seed)}


@torch.no_grad()
def losses(vae: VAE, images: Tensor) -> Point:
    """What is trained, on images that are not: BCE and KLD in nats per image, with one sample of the latents each."""
    noise = torch.Generator().manual_seed(0)
    bce = kld = 0.0
    for batch in torch.split(images, 1000):
        mean, log_variance = vae.encode(batch)
        latents = mean + torch.randn(mean.shape, generator=noise) * (log_variance / 2).exp()
        bce += F.binary_cross_entropy_with_logits(vae.decoder(latents), batch, reduction="sum").item()
        kld += -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum().item()
    bce, kld = bce / len(images), kld / len(images)
    return {"loss": round(bce + vae.beta * kld, 3), "bce": round(bce, 3), "kld": round(kld, 3)}


@torch.no_grad()
def reconstructions(vae: VAE, images: Tensor) -> Tensor:
    """Pixels from the latent means."""
    return vae(images).sigmoid()


class Curve(Callback):
    """Losses after every epoch and right after every cut, and reconstructions before the first and after the last."""

    def __init__(self, images: Tensor, shown: Tensor) -> None:
        self.images, self.shown = images, shown
        self.points: list[Point] = []
        self.cuts: list[Point] = []
        self.pictures: dict[str, Tensor] = {}
        self._params = 0

    def on_train_batch_start(self, trainer: Trainer, module: VAE, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # cuts fall between epochs, and the pruning callback comes first
            params = sum(p.numel() for p in module.parameters())
            if params < self._params:
                self.cuts.append(self._measure(module, trainer.current_epoch))
                self.pictures["contribution, right after the last cut"] = reconstructions(module, self.shown)
            self._params = params

    def on_train_epoch_end(self, trainer: Trainer, module: VAE) -> None:
        self.points.append(self._measure(module, trainer.current_epoch + 1))
        if not self.cuts:
            self.pictures["contribution, before the first cut"] = reconstructions(module, self.shown)

    def _measure(self, module: VAE, epochs: int) -> Point:
        return {"epochs": epochs, **losses(module, self.images)}


def network(beta: float, seed: int, *, narrow: bool = False) -> VAE:
    """A new network, wide or of the final widths; the same seed gives the same weights."""
    seed_everything(seed, verbose=False)
    vae = VAE((1, 28, 28), CHANNELS, HIDDEN, LATENT, beta)
    if narrow:
        prune(vae, pruning_ratio=RATIO, ignore=["mean", "log_variance"])
        for layer in vae.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                layer.reset_parameters()  # as wide as these layers are now
    return vae


def train(vae: VAE, held: Held, batches: int, seed: int, callbacks: Sequence[Callback]) -> None:
    """One run; the same seed gives the same split, order of batches and noise."""
    seed_everything(seed, verbose=False)
    quiet_fit(vae, held.train_dataloader(), callbacks, max_epochs=EPOCHS, limit_train_batches=batches)


def one_seed(held: Held, batches: int, beta: float, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Numbers of all networks, and the reconstructions of some test images."""
    test = held.parts()["test"]
    shown = torch.stack([test.images[test.labels == label][0] for label in range(10)])
    pictures: dict[str, Tensor] = {"image": shown}
    runs: dict[str, Any] = {}
    began = time.perf_counter()

    def run(label: str, vae: VAE, callbacks: Sequence[Callback] = ()) -> None:
        curve = Curve(test.images[:FEW], shown)
        started = time.perf_counter()
        train(vae, held, batches, seed, [*callbacks, curve])
        seconds = time.perf_counter() - started
        runs[label] = {
            "params": sum(p.numel() for p in vae.parameters()),
            "widths": [p.shape[0] for p in vae.parameters() if p.dim() == 1],
            "final": losses(vae, test.images),
            "epochs": curve.points,
            "cuts": curve.cuts,
            "seconds": round(seconds, 1),
        }
        if label == "contribution":
            pictures.update(curve.pictures)
        pictures[f"{label}, at the end"] = reconstructions(vae, shown)

    for label, criterion in criteria(seed).items():
        schedule = Geometric(rate=RATE, start=WARM_UP, every=EVERY)
        run(label, network(beta, seed), [StructuredPruning(RATIO, criterion=criterion, schedule=schedule)])
    run(NARROW, network(beta, seed, narrow=True))
    if any(runs[label]["widths"] != runs[NARROW]["widths"] for label in criteria(seed)):
        raise RuntimeError(f"expected the widths of the pruned networks and the narrow one to agree, got {runs}")
    run(DENSE, network(beta, seed))
    return {"seed": seed, "beta": beta, "runs": runs, "seconds": round(time.perf_counter() - began, 1)}, pictures


# -- results ----------------------------------------------------------------------------------------------------------


def tables(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: one row per β and network."""
    yield (
        "| β | network | parameters | test loss | BCE | KLD | loss − unpruned | loss − narrow | "
        "lost by a cut, mean of all |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for beta in BETAS:
        mine = [r for r in results if r["beta"] == beta]
        for label in mine[0]["runs"] if len(mine) > 1 else ():
            runs = [r["runs"][label] for r in mine]
            numbers = [" ± ".join(f"{x:.2f}" for x in interval([run["final"][part] for run in runs])) for part in PARTS]
            against = ["" if label == other else signed(difference(mine, label, other)) for other in (DENSE, NARROW)]
            drops = [signed([lost_by_cuts(run) for run in runs])] if runs[0]["cuts"] else [""]
            yield f"| {beta:g} | {label} | {runs[0]['params']:,} | {' | '.join([*numbers, *against, *drops])} |"


def difference(results: Sequence[Mapping[str, Any]], label: str, other: str) -> list[float]:
    """Test loss of one network minus another's, seed by seed."""
    return [r["runs"][label]["final"]["loss"] - r["runs"][other]["final"]["loss"] for r in results]


def lost_by_cuts(run: Mapping[str, Any]) -> float:
    """How much a cut raises the loss, before any step."""
    before = {point["epochs"]: point["loss"] for point in run["epochs"]}
    return fmean(cut["loss"] - before[cut["epochs"]] for cut in run["cuts"])


def draw(results: Sequence[Mapping[str, Any]], batches: int, path: Path) -> None:
    """Loss, BCE and KLD over epochs, a row per β; every cut is a step upwards."""
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(len(BETAS), len(PARTS))
    for row, beta in zip(axes, BETAS, strict=True):
        mine = [r["runs"] for r in results if r["beta"] == beta]
        for axis, part in zip(row, PARTS, strict=True):
            for label in mine[0]:
                _band(axis, [with_cuts(runs[label], part) for runs in mine], label)
            end = [runs[label]["epochs"][-1][part] for runs in mine for label in runs]
            spread = max(max(c[part] for c in runs["random"]["cuts"]) for runs in mine) - min(end)
            if part != "kld":
                axis.set_ylim(min(end) - 0.05 * spread, min(end) + 1.1 * spread)
            name = part.upper() if part != "loss" else f"loss, β = {beta:g}"
            axis.set(xlabel=f"epochs of {batches} batches", ylabel=f"test {name} (nats per image)", xlim=(2, None))
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize="small")
    figure.suptitle("Fashion-MNIST, VAE, 30 % of neurons and channels removed in four cuts (bands: 95 %)")
    figure.savefig(path, dpi=90)


def with_cuts(run: Mapping[str, Any], part: str) -> list[tuple[float, float]]:
    """The curve of one run with a second point at the same place right after each cut."""
    points = [(p["epochs"], kind, p[part]) for kind, name in enumerate(("epochs", "cuts")) for p in run[name]]
    return [(epoch, height) for epoch, _, height in sorted(points)]


def _band(axis: Any, curves: Sequence[Sequence[tuple[float, float]]], label: str) -> None:
    colour, style = LOOKS[label]
    x = [at for at, _ in curves[0]]
    heights = list(zip(*([y for _, y in curve] for curve in curves), strict=True))
    axis.plot(x, [fmean(values) for values in heights], style, color=colour, label=label, lw=1.5)
    if len(curves) > 1:
        low, high = zip(*((m - h, m + h) for m, h in map(interval, heights)), strict=True)
        axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def draw_reconstructions(pictures: Mapping[str, Tensor], beta: float, path: Path) -> None:
    """One row per network, one column per class."""
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=(11, 1.05 * len(pictures)), layout="constrained")
    for axis, (label, images) in zip(figure.subplots(len(pictures)), pictures.items(), strict=True):
        axis.imshow(F.pad(images[:, 0], (1, 1)).permute(1, 0, 2).flatten(1), cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize="small")
    figure.suptitle(f"Fashion-MNIST test images, β = {beta:g}", fontsize="medium")
    figure.savefig(path, dpi=90)


def write(results: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], folder: Path) -> None:
    """Numbers, tables and figure."""
    facts = {"command": command("benchmarks.vae"), "settings": settings, "machine": machine()}
    text = json.dumps({**facts, "runs": results}, separators=(",", ":")).replace('{"seed"', '\n{"seed"')
    (folder / "results.json").write_text(f"{text}\n", encoding="utf-8")
    if {r["beta"] for r in results} == set(BETAS):
        fill(folder / "README.md", "\n".join(tables(results)))
        draw(results, settings["batches"], folder / "figure.png")


def main() -> None:
    """Run every seed, writing after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder of the data set, in torchvision's layout")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--batches", type=int, default=75, help="batches of 64 images in each of 14 epochs")
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    folder = EVIDENCE / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"epochs": EPOCHS, "batches": given.batches, "batch_size": BATCH_SIZE}
    results = stored(folder / "results.json", settings, resume=given.resume, rows="runs")
    there = {(r["seed"], r["beta"]) for r in results}
    sets = FashionMNIST(root=given.root, normalize=False).load()
    for seed in range(given.seeds):
        for beta in [beta for beta in BETAS if (seed, beta) not in there]:
            result, pictures = one_seed(Held(sets, BATCH_SIZE, 1 / 6, seed), given.batches, beta, seed)
            results = sorted([*results, {**result, "at": here()}], key=lambda r: (r["seed"], r["beta"]))
            print(f"seed {seed}, beta {beta:g}: {result['seconds']} s", flush=True)
            if seed == 0:
                draw_reconstructions(pictures, beta, folder / f"reconstructions-beta-{beta:g}.png")
            write(results, settings, folder)
    print(json.dumps(machine()), *tables(results), sep="\n")


if __name__ == "__main__":
    main()
