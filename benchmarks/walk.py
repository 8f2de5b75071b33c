"""What the walk wins, and whether it is exact: ``python -m benchmarks.walk``.

Networks with random weights and statistics, random images. Equal: the rest of the network from every station gives the
network's output bit by bit, in float32 and float64. Time: processor seconds of the rest of the network for groups of
eight channels at every station, against one full forward pass for each group; every so many groups are run and stand
for the others. Memory: anonymous memory of a process of its own that walks with a limit below its live tensors.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import publish, quiet
from lightning_prune.extras import require
from lightning_prune.models import VGG16CIFAR, ResNetCIFAR, SegNet
from lightning_prune.scoring import DataPass, Walk, stations_of

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
TIMED: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": lambda: ResNetCIFAR(20),
    "ResNet-56": lambda: ResNetCIFAR(56),
    "VGG16": VGG16CIFAR,
}


def network(make: Callable[[], nn.Module]) -> nn.Module:
    """With statistics of its norms that are no identity."""
    torch.manual_seed(0)
    model = make().eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(0.2 * torch.rand_like(buffer))
    return model


def exact(name: str, dtype: torch.dtype, every: int) -> Row:
    """The rest of the network from every so many-th station, on two batches."""
    make, size = EXACT[name]
    model = network(make).to(dtype)
    data = DataPass([torch.randn(6, 3, size, size, dtype=dtype)], batch_size=4)
    reference = copy.deepcopy(model)
    began = time.process_time()
    walk = Walk(model, data, stations_of(model, next(iter(data)))[::every])
    row: Row = {"network": name, "dtype": str(dtype)[6:], "stations": len(walk.stations)}
    row |= {"seconds to begin": time.process_time() - began, "equal": 0, "runs": 0}
    for visit in walk:
        for here in visit:
            with torch.no_grad():
                wanted: Tensor = reference(*here.batch.args)
            row["runs"] += 1
            row["equal"] += int(torch.equal(here.output, wanted))
    return row


def timed(name: str, images: int, groups: int) -> Row:
    """Seconds for all groups, from about so many at every station."""
    model = network(TIMED[name])
    x = torch.randn(images, 3, 32, 32)
    data = DataPass([x])
    walk = Walk(model, data, stations_of(model, next(iter(data)))[:-1], most_rows=images)
    with torch.no_grad():
        forward = min(_seconds(lambda: model(x)) for _ in range(5))
    ways: dict[str, dict[str, bool]] = {"rest": {}, "delta": {"delta": True}, "skip": {"delta": True, "skip": True}}
    row: Row = {"network": name, "groups": 0, "forward": forward, **dict.fromkeys(ways, 0.0)}
    macs = dict.fromkeys(ways, 0.0)
    for visit in walk:
        masks = 1 - torch.eye(visit.channels).view(visit.channels, -1)
        masks = torch.stack([masks[i : i + GROUP].amin(0) for i in range(0, visit.channels, GROUP)])
        row["groups"] += len(masks)
        step = max(1, len(masks) // groups)
        part = masks[::step]
        (here,) = visit
        here.output  # noqa: B018
        for way, options in ways.items():
            before = walk.macs
            row[way] += _seconds(lambda here=here, part=part, options=options: here.rest_masked(part, **options)) * (  # type: ignore[misc]
                len(masks) / len(part)
            )
            macs[way] += (walk.macs - before) * len(masks) / len(part)
    naive = row["groups"] * images * walk.forward_macs
    return row | {f"{way} macs": naive / spent for way, spent in macs.items()}


def remembered(limit: int, images: int) -> Row:
    """The largest anonymous memory of a process that walks ResNet-20."""
    words = [sys.executable, "-m", "benchmarks.walk", "--memory", str(limit), "--images", str(images)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def _remember(limit: int, images: int) -> None:
    model = network(TIMED["ResNet-20"])
    data = DataPass([torch.randn(128, 3, 32, 32) for _ in range(images // 128)])
    stations = stations_of(model, next(iter(data)))[:8]
    list(
        zip(Walk(model, DataPass([torch.randn(128, 3, 32, 32)]), stations), stations, strict=True)
    )  # libraries warm up
    peak, done, start = [_anonymous()], threading.Event(), _anonymous()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    held = 0
    walk = Walk(model, data, stations, memory_limit=limit)
    for _ in walk:
        spool = walk._engine.spool  # type: ignore[attr-defined]
        held = max(held, spool.in_memory + spool.on_disk)
    done.set()
    watcher.join()
    print(json.dumps({"limit": limit / 2**20, "live": held / 2**20, "peak": peak[0] - start}))


def _anonymous() -> float:
    """Memory of the process that no file stands behind, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def _seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def tables(found: dict[str, list[Row]]) -> str:
    """Three tables."""
    lines = ["| network | type | stations | runs equal bit by bit | seconds to begin |", "|---|---|---:|---:|---:|"]
    line = "| {network} | {dtype} | {stations} | {equal} of {runs} | {seconds to begin:.1f} |"
    lines += [line.format_map(row) for row in found["exact"]]
    lines += ["", "| network | groups | a full forward each (s) | rest | + delta | + skipping | in MACs |"]
    lines += ["|---|---:|---:|---:|---:|---:|---|"]
    for row in found["timed"]:
        naive = row["groups"] * row["forward"]
        ways = [f"{row[way]:.1f} s, 1/{naive / row[way]:.1f}" for way in ("rest", "delta", "skip")]
        macs = " · ".join(f"1/{row[f'{way} macs']:.2f}" for way in ("rest", "delta", "skip"))
        lines.append(f"| {row['network']} | {row['groups']} | {naive:.1f} | {' | '.join(ways)} | {macs} |")
    lines += ["", "| limit (MiB) | live tensors (MiB) | largest growth of anonymous memory (MiB) |", "|---:|---:|---:|"]
    lines += ["| {limit:.0f} | {live:.0f} | {peak:.0f} |".format_map(row) for row in found["memory"]]
    return "\n".join(lines)


def main() -> None:
    """All three, and their page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128, help="images in the batch that is timed")
    parser.add_argument("--groups", type=int, default=4, help="groups that are run at every station")
    parser.add_argument("--every", type=int, default=1, help="look at every so many-th station of the first table")
    parser.add_argument("--networks", nargs="+", default=list(TIMED), choices=list(TIMED), help="that are timed")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet()
    if given.memory is not None:
        _remember(given.memory, given.images)
        return
    found: dict[str, list[Row]] = {
        "exact": [exact(name, dtype, given.every) for name in EXACT for dtype in (torch.float32, torch.float64)],
        "timed": [timed(name, given.images, given.groups) for name in given.networks],
        "memory": [remembered(limit, 2560) for limit in (2**40, 64 * 2**20, 0)],
    }
    publish("walk", found, tables(found))


if __name__ == "__main__":
    main()
