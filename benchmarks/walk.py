"""Savings of a walk through a network, and whether it is exact: ``python -m benchmarks.walk``.

Networks with random weights and statistics, random images. Rows are stored as they are computed; ``--resume`` continues
a stopped run.

- Turn: layer-wise scoring with every second unit masked, without surrogates, compared with running from the input to
  every layer: MACs in passes, processor seconds, and bit-identical features.
- Exact: running the rest of the network from some stations gives its output bit by bit, in float32 and float64.
- Rest: processor seconds of the rest of the network for groups of eight channels at every station, compared with one
  full forward pass per group; some groups of a station are timed and represent the others.
- Memory: anonymous memory of a separate process that walks, or scores layer by layer in a fit, with a limit below the
  size of the data it has to store.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import EVIDENCE, add_resume, command, fill, here, quiet, quiet_fit, stored
from lightning_prune import XGBoost, XGBPruning, inspect
from lightning_prune.extras import require
from lightning_prune.models import VGG16CIFAR, ResNetCIFAR, SegNet
from lightning_prune.scoring import DataPass, Station, Walk, stations_of
from lightning_prune.scoring.spool import Spool
from lightning_prune.scoring.surrogates import split_samples
from lightning_prune.scoring.xgb import LayerScore, LayerScorer, score_layers_in_turn

Row = dict[str, Any]
GROUP = 8


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: require("torchvision.models", extra="vision").get_model(name, num_classes=10)  # type: ignore[no-any-return]


#: Network and size of its images.
EXACT: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20": (lambda: ResNetCIFAR(20), 32),
    "VGG16": (VGG16CIFAR, 32),
    "SegNet": (lambda: SegNet(5, ((8, 2), (16, 2), (32, 3)), (3, 64, 64)), 64),
    "DenseNet-121": (_torchvision("densenet121"), 64),
    "EfficientNet-B0": (_torchvision("efficientnet_b0"), 64),
}
TURNS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: EXACT[name] for name in ("ResNet-20", "VGG16", "DenseNet-121", "EfficientNet-B0")},
    "ResNet-56": (lambda: ResNetCIFAR(56), 32),
}
TIMED: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": lambda: ResNetCIFAR(20),
    "VGG16": VGG16CIFAR,
    "ResNet-56": lambda: ResNetCIFAR(56),
}


def network(make: Callable[[], nn.Module]) -> nn.Module:
    """With statistics of its norms that are no identity."""
    torch.manual_seed(0)
    model = make().eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(0.2 * torch.rand_like(buffer))
    return model


class _Seen(LayerScorer):
    """Keeps the features in place of fitting anything to them."""

    def __init__(self, samples: int) -> None:
        labels = np.arange(samples) % 2
        super().__init__(XGBoost(), labels, split_samples(labels, "classification"))
        self.tables: list[Tensor] = []

    def score(self, station: Station, features: Tensor) -> LayerScore:
        self.tables.append(features)
        even = np.full(features.shape[1], 1 / features.shape[1])
        return LayerScore(station, 0.0, even, even)


def turn(name: str, images: int) -> Row:
    """Layer-wise scoring with half of every layer gone, on the walk and from the input for every layer."""
    make, size = TURNS[name]
    model = network(make)
    x = torch.randn(images, 3, size, size)
    data = DataPass((x, torch.arange(images) % 2), batch_size=32)
    groups = inspect(model, x[:2]).structure.groups
    order = stations_of(model, next(iter(data)))
    producers = {layer for group in groups for layer in group.producers}
    stations = [station for station in order if station.layer in producers]
    row: Row = {"images": images, "layers": len(stations)}
    tables = []
    for way, plain in (("walk", False), ("input", True)):
        scorer, began = _Seen(images), time.process_time()
        walk = Walk(model, data, stations, plain=plain)
        prepared = time.process_time() - began
        score_layers_in_turn(
            walk, order, groups, scorer, lambda visit: visit.features(), lambda group, _: range(0, group.width, 2)
        )
        row[f"{way} seconds"] = time.process_time() - began - prepared
        row[f"{way} passes"] = walk.macs / (images * walk.forward_macs)
        row[f"{way} prepared"] = prepared
        row["forward macs"] = walk.forward_macs
        tables.append(scorer.tables)
    row["equal"] = sum(map(torch.equal, *tables))
    return row


def exact(name: str, dtype: str, most: int) -> Row:
    """The rest of the network from at most so many stations, on two batches."""
    make, size = EXACT[name]
    model = network(make).to(getattr(torch, dtype))
    data = DataPass([torch.randn(6, 3, size, size, dtype=getattr(torch, dtype))], batch_size=4)
    reference = copy.deepcopy(model)
    began = time.process_time()
    stations = stations_of(model, next(iter(data)))
    walk = Walk(model, data, stations[:: -(-len(stations) // most)])
    row: Row = {"stations": len(walk.stations), "of": len(stations)}
    row |= {"seconds to begin": time.process_time() - began, "equal": 0, "runs": 0}
    for visit in walk:
        for batch in visit:
            with torch.no_grad():
                wanted: Tensor = reference(*batch.batch.args)
            row["runs"] += 1
            row["equal"] += int(torch.equal(batch.output, wanted))
    return row


def timed(name: str, images: int, groups: int) -> Row:
    """Seconds for all groups, from at most so many at every station."""
    model = network(TIMED[name])
    x = torch.randn(images, 3, 32, 32)
    data = DataPass([x])
    walk = Walk(model, data, stations_of(model, next(iter(data)))[:-1], most_rows=images)
    with torch.no_grad():
        forward = min(_seconds(lambda: model(x)) for _ in range(3))
    ways: dict[str, dict[str, bool]] = {"rest": {}, "delta": {"delta": True}, "skip": {"delta": True, "skip": True}}
    row: Row = {"groups": 0, "forward": forward, **dict.fromkeys(ways, 0.0)}
    macs = dict.fromkeys(ways, 0.0)
    for visit in walk:
        masks = 1 - torch.eye(visit.channels).view(visit.channels, -1)
        masks = torch.stack([masks[i : i + GROUP].amin(0) for i in range(0, visit.channels, GROUP)])
        row["groups"] += len(masks)
        step = -(-len(masks) // groups)
        part = masks[::step]
        (batch,) = visit
        batch.output  # noqa: B018
        for way, options in ways.items():
            before = walk.macs
            row[way] += _seconds(lambda batch=batch, part=part, options=options: batch.rest_masked(part, **options)) * (  # type: ignore[misc]
                len(masks) / len(part)
            )
            macs[way] += (walk.macs - before) * len(masks) / len(part)
    naive = row["groups"] * images * walk.forward_macs
    return row | {f"{way} macs": naive / spent for way, spent in macs.items()}


def remembered(what: str, limit: int, images: int) -> Row:
    """The largest growth of anonymous memory of a process that walks or scores ResNet-20."""
    words = [sys.executable, "-m", "benchmarks.walk", "--memory", what, str(limit), "--images", str(images)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def _remember(what: str, limit: int, images: int) -> None:
    run = {"walk": _walked, "fit": _fitted}[what]
    run(2**40, 128)  # libraries warm up
    peak, done, start = [_anonymous()], threading.Event(), _anonymous()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = run(limit, images)
    done.set()
    watcher.join()
    print(json.dumps({**found, "peak": peak[0] - start}))


def _walked(limit: int, images: int) -> Row:
    """Walk to the first eight stations."""
    model = network(TIMED["ResNet-20"])
    batches = [torch.randn(128, 3, 32, 32) for _ in range(images // 128)]
    with _spooled() as most:
        data = DataPass(batches, memory_limit=limit // 2)
        stations = stations_of(model, next(iter(data)))[:8]
        list(Walk(model, data, stations, memory_limit=limit - data.in_memory))
    return most


def _fitted(limit: int, images: int) -> Row:
    """Score layer by layer in a fit."""
    model = network(TIMED["ResNet-20"])
    x = torch.randn(images, 3, 32, 32)
    labels = (x[:, 0].mean((1, 2)) > 0).long()
    pruning = XGBPruning(
        "layer_wise",
        pruning_ratio=0.5,
        surrogate=XGBoost(rounds=3, threads=1),
        samples=images,
        extensions=[],
        memory_limit=limit,
    )
    with _spooled() as most:
        data = DataLoader(TensorDataset(x, labels), batch_size=128)
        quiet_fit(cast(LightningModule, model), data, [pruning], max_epochs=1, limit_train_batches=1)
    assert pruning.scored is not None
    digest = hashlib.sha256(repr(pruning.scored.plan).encode()).hexdigest()
    return {**most, "plan": digest[:12]}


@contextmanager
def _spooled() -> Iterator[Row]:
    """The most bytes that all spools together have held in memory, and in memory and files, in MiB."""
    spools: weakref.WeakSet[Spool] = weakref.WeakSet()
    most: Row = {"held": 0.0, "live": 0.0}
    put = Spool.put

    def counted(spool: Spool, tensor: Tensor) -> Any:
        spools.add(spool)
        stored = put(spool, tensor)
        held, on_disk = (sum(getattr(one, name) for one in spools) / 2**20 for name in ("in_memory", "on_disk"))
        most["held"], most["live"] = max(most["held"], held), max(most["live"], held + on_disk)
        return stored

    Spool.put = counted  # type: ignore[method-assign]
    try:
        yield most
    finally:
        Spool.put = put  # type: ignore[method-assign]


def _anonymous() -> float:
    """Memory of the process that no file stands behind, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def _seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def jobs(given: argparse.Namespace) -> Iterator[tuple[str, Row, Callable[[], Row]]]:
    """The rows to compute, the most telling first: of which table, what names them, how."""
    for name in TURNS:
        yield "turn", {"network": name}, partial(turn, name, given.images)
    for what in ("walk", "fit"):
        for limit in (2**40, 64 * 2**20, 0):
            yield "memory", {"what": what, "bytes": limit}, partial(remembered, what, limit, 2560)
    for name in EXACT:
        for dtype in ("float32", "float64"):
            yield "exact", {"network": name, "dtype": dtype}, partial(exact, name, dtype, given.stations)
    for name in given.networks:
        yield "rest", {"network": name}, partial(timed, name, given.images, given.groups)


def tables(rows: Sequence[Row]) -> str:
    """Four tables."""
    of = {kind: [row for row in rows if row["table"] == kind] for kind in ("turn", "exact", "rest", "memory")}
    lines = ["| network | layers | layer-wise on the walk | from the input | seconds | preparation | equal tables |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    line = (
        "| {network} | {layers} | {walk passes:.2f} passes | {input passes:.2f} passes "
        "| {walk seconds:.1f} against {input seconds:.1f} | {walk prepared:.1f} | {equal} of {layers} |"
    )
    lines += [line.format_map(row) for row in of["turn"]]
    lines += [
        "",
        "| network | type | stations | runs equal bit by bit | seconds to begin |",
        "|---|---|---:|---:|---:|",
    ]
    line = "| {network} | {dtype} | {stations} of {of} | {equal} of {runs} | {seconds to begin:.1f} |"
    lines += [line.format_map(row) for row in of["exact"]]
    lines += ["", "| network | groups | a full forward each (s) | rest | + delta | + skipping | in MACs |"]
    lines += ["|---|---:|---:|---:|---:|---:|---|"]
    for row in of["rest"]:
        naive = row["groups"] * row["forward"]
        ways = [f"{row[way]:.1f} s, 1/{naive / row[way]:.1f}" for way in ("rest", "delta", "skip")]
        macs = " · ".join(f"1/{row[f'{way} macs']:.2f}" for way in ("rest", "delta", "skip"))
        lines.append(f"| {row['network']} | {row['groups']} | {naive:.1f} | {' | '.join(ways)} | {macs} |")
    lines += ["", "| run | limit (MiB) | stored (MiB) | of it in memory | growth of the process (MiB) | plan |"]
    lines += ["|---|---:|---:|---:|---:|---|"]
    for row in of["memory"]:
        limit = "none" if row["bytes"] == 2**40 else f"{row['bytes'] / 2**20:.0f}"
        numbers = f"{row['live']:.0f} | {row['held']:.0f} | {row['peak']:.0f} | {row.get('plan', '–')}"
        lines.append(f"| {row['what']} | {limit} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """All rows, and their page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="images for the first and third table")
    parser.add_argument("--groups", type=int, default=4, help="groups to time at every station")
    parser.add_argument("--stations", type=int, default=10, help="stations per network in the second table")
    parser.add_argument(
        "--networks", nargs="+", default=list(TIMED), choices=list(TIMED), help="networks of the third table"
    )
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    if given.memory is not None:
        _remember(given.memory[0], int(given.memory[1]), given.images)
        return
    folder = EVIDENCE / "walk"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(given, name) for name in ("images", "groups", "stations")}
    rows = stored(folder / "results.json", settings, resume=given.resume)
    for table, job, run in jobs(given):
        named = {"table": table, **job}
        if any(named.items() <= row.items() for row in rows):
            continue
        rows.append({**named, **run(), "at": here()})
        print(rows[-1], flush=True)
        said = {"command": command("benchmarks.walk"), "settings": settings, "rows": rows}
        draft = folder / "results.json.new"
        draft.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        draft.replace(folder / "results.json")
        on = f"{here()['processor']}; {here()['versions']}"
        fill(folder / "README.md", f"{tables(rows)}\n\n`{said['command']}` on {on}")


if __name__ == "__main__":
    main()
