"""Tests and measurements that need a GPU: every callback compared with the CPU, speed and memory.

``make gpu`` or ``python -m benchmarks.gpu``; ``--resume`` continues a stopped run. ``--device cpu --short`` checks the
command without a GPU. Images and weights are random, because time and rounding do not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18, resnet50, vit_b_16

import lightning_prune
from benchmarks.common import EVIDENCE, add_resume, computed, publish, quiet
from benchmarks.spvr_speed import sites_of
from lightning_prune import Contribution, OneShot, XGBoost, prune
from lightning_prune.models import ResNetCIFAR
from lightning_prune.scoring import DataPass
from lightning_prune.scoring.spvr.walk_ranking import RankingOptions, rank
from lightning_prune.structure import TracedModel, trace
from lightning_prune.surgery import history_of, masks_of
from tests.support.image_network import Images

Row = dict[str, Any]

#: Kinds of training steps: whether the dtype is bfloat16, channels come last, the network is compiled.
STEPS = {
    "float32": (False, False, False),
    "bfloat16": (True, False, False),
    "bfloat16, channels last": (True, True, False),
    "bfloat16, compiled": (True, False, True),
}
#: What a callback is built with, where it takes an argument of that name.
ARGUMENTS: dict[str, Any] = {
    "pruning_ratio": 0.5,
    "sparsity": 0.5,
    "budget": 0.5,
    "schedule": OneShot(1),
    "samples_per_class": 8,
    "e_f": 1.0,
    "e_u": 0.5,
}


def callbacks() -> dict[str, Callable[[], Callback]]:
    """Every pruning callback of the package, by its name."""
    found = {}
    for name in lightning_prune.__all__:
        kind = getattr(lightning_prune, name)
        if isinstance(kind, type) and issubclass(kind, Callback) and not inspect.isabstract(kind):
            taken = inspect.signature(kind).parameters
            given = {argument: value for argument, value in ARGUMENTS.items() if argument in taken}
            if "pruning_ratio" in given:
                given.pop("budget", None)
            found[name] = partial(kind, **given)
    return found


def trained(make: Callable[[], Callback], device: str, precision: Any) -> tuple[Images, float]:
    """A network after three epochs with a callback, and its last loss."""
    labels = torch.arange(64) % 4
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)) + labels[:, None, None, None] / 2
    module = Images((16, 32), 4, partial(torch.optim.AdamW, lr=1e-3))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision=precision,
            max_epochs=3,
            default_root_dir=folder,
            callbacks=[make()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(x, labels), batch_size=16))
    return module.cpu(), float(trainer.callback_metrics["train_loss"])


def _kept(module: Images) -> set[tuple[str, int]]:
    """What is left: units of every cut, and weights that are not masked."""
    history = history_of(module)
    cuts = enumerate(history.edits if history is not None else ())
    units = {(f"{n} {g}", unit) for n, edit in cuts for g, left in getattr(edit, "kept", {}).items() for unit in left}
    masks = masks_of(module).items()
    return units | {(name, row) for name, mask in masks for row in (~mask).flatten().nonzero().flatten().tolist()}


def callback_row(device: str, *, name: str, precision: str) -> Row:
    """A callback on the device against the CPU in float32."""
    make = callbacks()[name]
    there, loss = trained(make, device, precision)
    here, expected = trained(make, "cpu", "32-true")
    mine, theirs = _kept(there), _kept(here)
    params = [sum(p.numel() for p in module.parameters()) for module in (there, here)]
    same = len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0
    return {"params": params[0], "params_cpu": params[1], "same": same, "loss": loss, "loss_cpu": expected}


def _timed(work: Callable[[], object], device: str, repeats: int) -> float:
    """Seconds of one call, the median of some; what is queued on the GPU is waited for."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def cut_row(device: str, *, network: str, size: int) -> Row:
    """Half of every group of a large network goes, with AdamW's moments."""
    torch.manual_seed(0)
    model = {"ResNet-50": resnet50, "ViT-B/16": partial(vit_b_16, image_size=size)}[network]().to(device)
    x = torch.randn(2, 3, size, size, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(x).sum().backward()
    optimizer.step()
    seconds = _timed(lambda: prune(model, x, pruning_ratio=0.5, optimizers=optimizer), device, 1)
    return {"seconds": seconds, "params": sum(p.numel() for p in model.parameters())}


def step_row(device: str, *, kind: str, size: int, batch: int, repeats: int) -> Row:
    """Training steps of ResNet-18: plain, observed, and with half of the MACs gone; and the peak of memory."""
    half, last, compiled = STEPS[kind]
    torch.manual_seed(0)
    model: nn.Module = resnet18().to(device)
    x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(1000, (batch,), device=device)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if compiled:
        model.compile(backend="inductor" if device == "cuda" else "eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    row = _measured("", step, device, repeats)
    if not compiled:  # a batch that is observed runs as it is written
        statistic = Contribution().statistic(trace(TracedModel.of(model, x)))
        row |= _measured("observed_", partial(_observed, statistic, model, step), device, repeats)
    torch.compiler.reset()
    prune(model, x, budget={"macs": 0.5}, optimizers=optimizer)
    return row | _measured("pruned_", step, device, repeats)


def _observed(statistic: Any, model: nn.Module, step: Callable[[], None]) -> None:
    handles = statistic.attach(model, 1.0)
    step()
    for handle in handles:
        handle.remove()


def _measured(name: str, work: Callable[[], None], device: str, repeats: int) -> Row:
    """Milliseconds and the peak of memory in MiB, after three calls to warm up."""
    for _ in range(3):
        work()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _timed(work, device, repeats)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return {f"{name}ms": 1000 * seconds, f"{name}peak": peak}


def spvr_row(device: str, *, n: int, images: int) -> Row:
    """A ranking of SPvR against a full forward pass for each group, and one image with other masks in each row."""
    torch.manual_seed(0)
    model = ResNetCIFAR(depth=n).to(device).eval()
    x, y = torch.randn(images, 3, 32, 32, device=device), torch.arange(images, device=device) % 10
    sites = sites_of(model, DataPass([(x, y)]))
    found: list[Any] = []
    ours = _timed(lambda: found.append(rank(model, DataPass([(x, y)]), sites, RankingOptions(group_size=8))), device, 1)
    groups = sum(map(len, found[0].bundles.values()))
    with torch.no_grad():
        full = _timed(lambda: model(x), device, 5) * (groups + 1)
        rows = x[:1].expand(256, *x.shape[1:])
        expanded = _timed(lambda: model(rows), device, 5) * groups * images / 256  # its masks are free of charge
    return {"groups": groups, "seconds": ours, "full": full, "expanded": expanded}


def xgb_row(device: str, *, samples: int) -> Row:
    """Trees on one layer's features, on the device and on the CPU."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, 256, generator=draw).numpy(), (torch.arange(samples) % 10).numpy()
    x[:, :10] += 2 * (y[:, None] == torch.arange(10).numpy())
    fit, rest = slice(0, samples * 4 // 5), slice(samples * 4 // 5, samples)

    def train(where: str) -> None:
        XGBoost(device=where).train(x[fit], y[fit], x[rest], y[rest])

    return {"seconds": _timed(lambda: train(device), "cpu", 1), "cpu": _timed(lambda: train("cpu"), "cpu", 1)}


PARTS: Mapping[str, Callable[..., Row]] = {
    "callback": callback_row,
    "cut": cut_row,
    "step": step_row,
    "spvr": spvr_row,
    "xgb": xgb_row,
}


def jobs(device: str, *, short: bool) -> list[Row]:
    """What names a row, cheap ones first."""
    precisions = ("32-true", "bf16-mixed")
    each: list[Row] = [{"part": "callback", "name": n, "precision": p} for n in callbacks() for p in precisions]
    size = 32 if short else 224
    each += [{"part": "cut", "network": network, "size": size} for network in ("ResNet-50", "ViT-B/16")]
    steps = {"size": size, "batch": 8 if short else 128, "repeats": 2 if short else 20}
    each += [{"part": "step", "kind": kind, **steps} for kind in STEPS]
    each += [{"part": "spvr", "n": 20 if short else 56, "images": 10 if short else 200}]
    each += [{"part": "xgb", "samples": 500 if short else 20000}]
    return [{"device": device, **job} for job in each]


def run(job: Row) -> Row:
    """One row."""
    given = {key: value for key, value in job.items() if key not in ("part", "device")}
    return {**PARTS[job["part"]](job["device"], **given)}


def page(rows: list[Row]) -> str:
    """A table for each part."""

    def table(head: str, part: str, line: Callable[[Row], str]) -> list[str]:
        columns = head.count("|") - 1
        lines = [line(row) for row in rows if row["part"] == part]
        return [f"| {head[1:-1].strip()} |", "|---" * columns + "|", *lines, ""]

    def ms(row: Row, name: str) -> str:
        if f"{name}ms" not in row:
            return "– | –"
        peak = row[f"{name}peak"]
        return f"{row[f'{name}ms']:.1f} | {'–' if peak is None else f'{peak:.0f}'}"

    device = rows[0]["device"]
    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU only: no GPU was at hand"
    return "\n".join(
        [
            f"On {name}.",
            "",
            *table(
                "| callback | precision | parameters, and on the CPU in float32 | kept alike | last loss, and there |",
                "callback",
                lambda r: (
                    f"| {r['name']} | {r['precision']} | {r['params']:,} · {r['params_cpu']:,} | {r['same']:.0%} | "
                    f"{r['loss']:.4f} · {r['loss_cpu']:.4f} |"
                ),
            ),
            *table(
                "| one cut, half of every group | pixels | seconds | parameters left |",
                "cut",
                lambda r: f"| {r['network']} | {r['size']} | {r['seconds']:.2f} | {r['params']:,} |",
            ),
            *table(
                "| step of ResNet-18 | ms | peak, MiB | observed, ms | peak | half of the MACs, ms | peak |",
                "step",
                lambda r: f"| {r['kind']} | {ms(r, '')} | {ms(r, 'observed_')} | {ms(r, 'pruned_')} |",
            ),
            *table(
                "| ranking of SPvR | groups | seconds | a full forward each | one image, 256 rows |",
                "spvr",
                lambda r: (
                    f"| ResNet-{r['n']}, {r['images']} images | {r['groups']} | {r['seconds']:.1f} | {r['full']:.1f} | "
                    f"{r['expanded']:.1f} |"
                ),
            ),
            *table(
                "| XGBoost, samples | seconds | on the CPU |",
                "xgb",
                lambda r: f"| {r['samples']:,} | {r['seconds']:.1f} | {r['cpu']:.1f} |",
            ),
        ]
    ).rstrip()


def main() -> None:
    """Compute, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--short", action="store_true", help="small sizes, to check the command")
    add_resume(parser)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a machine with CUDA. Give `--device cpu --short` to see that it works.")
    quiet()
    file = EVIDENCE / "gpu" / "rows.jsonl"
    rows = list(computed(jobs(given.device, short=given.short), run, file, resume=given.resume))
    publish("gpu", {"rows": rows}, page(rows))


if __name__ == "__main__":
    main()
