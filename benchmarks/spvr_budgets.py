"""Parameter budgets: the remaining network, in the form of the paper's appendix C, and its latency.

Parts ``budgets`` and ``latency`` of `benchmarks.spvr`. VGG16-BN as trained there, and ResNet-56 with projection
shortcuts (the pretrained network's function), ranked in the paper's groups of two on two training images of every class
of CIFAR-10, in a Lightning run; VGG16-BN with ``coupling="group"``, ResNet-56 with ``"stage"`` and with ``"group"``.
"""

from __future__ import annotations

import gc
import io
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import quantiles
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import quiet_fit
from benchmarks.spvr_networks import balanced, cifar10, resnet56_projection, vgg16
from lightning_prune import L1, Random, SPvRPruning, prune
from lightning_prune.callbacks.display.report_writer import ReportWriter
from lightning_prune.callbacks.methods import spvr as callback_file
from lightning_prune.models.classifier import Classifier
from lightning_prune.planning import ranked
from lightning_prune.scoring import Criterion

__all__ = ["NETWORKS", "SHARES", "cut", "latencies", "size_on_disk"]

Row = dict[str, Any]
STREAMS = "ResNet-56, streams as one"
NETWORKS: dict[str, tuple[Callable[[Path], Classifier], str]] = {
    "VGG16-BN": (vgg16, "group"),
    "ResNet-56": (lambda _: resnet56_projection(), "stage"),
    STREAMS: (lambda _: resnet56_projection(), "group"),
}
SHARES = (1.0, 0.3, 0.1, 0.05, 0.02)
#: At the same number of parameters: criterion and scope.
OTHERS: dict[str, tuple[Callable[[], Criterion], str]] = {
    "L1, all layers together": (L1, "global"),
    "random units": (Random, "global"),
    "L1, every layer alike": (L1, "local"),
}
OTHER_SHARE = 0.1
RUNS, WARM, TURN = 1500, 100, 50


def cut(name: str, share: float, work: Path) -> Row:
    """One network at one budget; at 1 as it is."""
    whole = _params(NETWORKS[name][0](work))
    model, plan = pruned(name, share, work)
    row: Row = {} if plan is None else {"before_last": plan.params_before, "limit": int(share * whole + 1e-9)}
    row |= {"params": _params(model), "of": whole, "form": form(model), "layers": len(_convolutions(model))}
    return row | {"bytes": size_on_disk(model)}


def pruned(name: str, share: float, work: Path) -> tuple[Classifier, ranked.RankedPlan | None]:
    """A network at a budget, in eval mode, with what was planned; the ranking is made once for all budgets."""
    make, coupling = NETWORKS[name]
    model = make(work)
    if share == 1:
        return model.eval(), None
    x, y = balanced(cifar10(train=True), 2)
    plans: list[ranked.RankedPlan] = []
    planned = callback_file.plan_ranked

    def watched(*args: Any) -> ranked.RankedPlan:
        plans.append(planned(*args))
        return plans[-1]

    folder = work / "rankings" / f"{name}-{share}"  # rankings lie beside it
    shutil.rmtree(folder, ignore_errors=True)
    pruning = SPvRPruning(share, group_size=2, samples_per_class=5, coupling=coupling, race=None, dirpath=str(folder))
    ReportWriter.measure = lambda self, traced, size: size  # type: ignore[method-assign]
    callback_file.plan_ranked = watched  # type: ignore[assignment]
    try:
        loader = DataLoader(TensorDataset(x, y), batch_size=20)
        quiet_fit(model, loader, [pruning], max_epochs=1, limit_train_batches=1)
    finally:
        callback_file.plan_ranked = planned
    return model.eval(), plans[-1]


def latencies(name: str, work: Path) -> Row:
    """Quartiles of milliseconds with one image, on the clock and of the processor, of one network at several sizes.

    The networks take turns, so that other work on the machine meets them alike.
    """
    models: dict[str, nn.Module] = {
        f"{share:.0%}, SPvR" if share < 1 else "100%": pruned(name, share, work)[0] for share in SHARES
    }
    for method, (criterion, scope) in OTHERS.items() if name != STREAMS else ():
        torch.manual_seed(0)
        model = NETWORKS[name][0](work)
        prune(model, budget=OTHER_SHARE, criterion=criterion(), scope=scope)  # type: ignore[arg-type]
        models[f"{OTHER_SHARE:.0%}, {method}"] = model.eval()
    spent = _timed(models)
    return {
        "cases": {
            case: {
                "params": _params(model),
                "bytes": size_on_disk(model),
                "milliseconds": quantiles(spent[case][0], n=4),
                "processor": quantiles(spent[case][1], n=4),
            }
            for case, model in models.items()
        }
    }


@torch.inference_mode()
def _timed(models: Mapping[str, nn.Module]) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds of every run, on the clock and of the processor."""
    x = torch.randn(1, 3, 32, 32)
    found: dict[str, tuple[list[float], list[float]]] = {case: ([], []) for case in models}
    for model in models.values():
        for _ in range(WARM):
            model(x)
    gc.disable()
    for _ in range(RUNS // TURN):
        for case, model in models.items():
            model(x)  # its weights are in the caches again
            for _ in range(TURN):
                began, used = perf_counter(), thread_time()
                model(x)
                found[case][1].append(1000 * (thread_time() - used))
                found[case][0].append(1000 * (perf_counter() - began))
    gc.enable()
    return found


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


def form(model: nn.Module) -> str:
    """Widths of a chain with "M" for its pooling; of a residual network those of the blocks that are left."""
    if hasattr(model, "features"):
        marks = {nn.Conv2d: lambda layer: str(layer.out_channels), nn.MaxPool2d: lambda _: "M"}
        return ", ".join(marks[type(layer)](layer) for layer in model.features if type(layer) in marks)
    found: list[tuple[str, int]] = []
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage.children():
            layers = [layer.out_channels for layer in _convolutions(block)]
            text = str(layers[:2]) if len(layers) > 1 else ""
            if text and found and found[-1][0] == text:
                found[-1] = text, found[-1][1] + 1
            elif text:
                found.append((text, 1))
    return ", ".join(f"{text} × {count}" for text, count in found) or "no block"


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the state dict."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()
