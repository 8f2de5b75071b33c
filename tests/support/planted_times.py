"""Planted latencies, so that tests of budgets do not depend on the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.structure import TracedModel, latency, trace
from lightning_prune.structure.latency_file import plain_times
from lightning_prune.structure.time_layers import FORMAT, measure, torch_layer

__all__ = ["macs_of", "plant_times", "write_table"]


def plant_times(monkeypatch: pytest.MonkeyPatch, per_mac: float = 1e-6) -> None:
    """Let everything take as long as its multiply-accumulates, ``per_mac`` seconds each, and at least a nanosecond."""
    monkeypatch.setattr(latency, "median_seconds", lambda run, _: per_mac * macs_of(run) + 1e-9)


def macs_of(run: Callable[[], object]) -> float:
    """Multiply-accumulates of a run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


def write_table(folder: Path, net: nn.Module, example: Any, per_mac: float = 1e-6, device: str = "phone") -> str:
    """A file as the script writes it, in which everything takes ``per_mac`` milliseconds per multiply-accumulate."""
    traced = TracedModel.of(net, example)
    structure = trace(traced)
    plain = plain_times(type(net).__name__, latency.latency_times(traced, structure), structure.widths)

    def time_layer(kind: Any, rows: int, columns: int, seconds: float) -> float:
        return per_mac * macs_of(torch_layer(kind, torch.zeros(1), rows, columns))

    def time_network(number: int, seconds: float) -> float:
        return per_mac * structure.cost.macs(plain["networks"][number]["widths"])

    measured = measure(plain["kinds"], len(plain["networks"]), time_layer, time_network, limit=0.0)
    about = {"device": device, "runtime": "onnxruntime (CPUExecutionProvider)", "threads": 4, "versions": {}, "at": "x"}
    file = folder / f"{device}.json"
    file.write_text(json.dumps({"format": FORMAT, "about": about, **plain, "measured": measured}))
    return str(file)
