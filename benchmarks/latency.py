"""Latency by the table compared with the measured one, for networks that budgets in milliseconds have chosen.

For each network and runtime a table is measured on the dense network only: in this process for torch, and by the
script of `latency_script` for onnxruntime and torch.compile. Then the network is cut to several budgets, and all
networks are timed in turn with one sample. What is reported is the lowest of the rounds' medians, since other load on
the machine makes a network only slower.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

import torch
from torch import nn
from torchvision.models import VisionTransformer, mobilenet_v2, resnet18

from benchmarks.common import EVIDENCE, add_resume, computed, publish, quiet, rows_in
from lightning_prune import Random, Scope, latency_script, prune
from lightning_prune.structure import TracedModel, trace
from lightning_prune.structure.latency import measure_latency, with_latency
from lightning_prune.structure.latency_file import read_table
from lightning_prune.structure.time_layers import median_ms
from lightning_prune.surgery import History, attach

ROWS = EVIDENCE / "latency" / "rows.jsonl"
# Rounds of timing, and seconds between them, since another load may last for some time.
_ROUNDS, _PAUSE = 40, 0.5

#: Networks, the height and width of their images, and shares of the dense latency that are asked for.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, tuple[float, float]]] = {
    "ResNet-18": (resnet18, 160, (0.75, 0.5)),
    "MobileNetV2": (mobilenet_v2, 160, (0.85, 0.65)),
    "ViT-B/16": (lambda: VisionTransformer(96, 16, 12, 12, 768, 3072), 96, (0.8, 0.65)),
}
RUNTIMES = ("torch", "onnxruntime", "torch.compile")


def main() -> None:
    """Measure, write rows.jsonl and the tables of README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=[*RUNTIMES[:2]])
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    jobs = [{"network": network, "runtime": runtime} for network in given.networks for runtime in given.runtimes]
    try:
        for _ in computed(jobs, lambda job: compare(**job), ROWS, resume=given.resume):
            pass
    finally:  # a stopped run has a table, too
        rows = rows_in(ROWS) if ROWS.is_file() else []
        publish("latency", {"rows": len(rows)}, _table(rows))


def compare(network: str, runtime: str) -> dict[str, Any]:
    """Cut a network to several budgets on a runtime, and time what is left."""
    make, size, shares = NETWORKS[network]
    x = torch.randn(1, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        file = None if runtime == "torch" else _measured_by_script(_built(make), x, runtime, folder)
        dense = _built(make)
        traced = TracedModel.of(dense, x)
        structure = trace(traced)
        table = measure_latency(traced, structure) if file is None else read_table(file, traced, structure)
        structure = with_latency(structure, table)
        whole, macs = structure.cost.latency(structure.widths), structure.cost.macs(structure.widths)
        cuts: list[tuple[dict[str, Any], Scope]] = [
            ({"latency_ms": shares[0] * whole}, Scope("local")),
            ({"latency_ms": shares[1] * whole}, Scope("local")),
            ({"latency_ms": shares[0] * whole}, Scope("global")),
            ({"macs": 0.75, "latency_ms": shares[1] * whole}, Scope("global")),
            ({"macs": 0.5}, Scope("local", round_to=16)),
        ]
        networks, rows = [dense], [{"cut": "dense", "macs": 1.0, "predicted": whole}]
        for budget, scope in cuts:
            narrow = _built(make)
            attach(narrow, History.begin(structure))  # which has the table
            report = prune(narrow, x, budget=budget, scope=scope, criterion=Random())
            assert report.final is not None
            name = ", ".join(f"{key} {value:.3g}" for key, value in budget.items())
            name += f", {scope.kind}" + (f", round_to={scope.round_to}" if scope.round_to > 1 else "")
            left = report.final.macs / macs
            after = with_latency(trace(TracedModel.of(narrow, x)), table)
            rows.append({"cut": name, "macs": left, "predicted": after.cost.latency(after.widths)})
            networks.append(narrow)
        runs = [_runner(narrow, x, runtime) for narrow in networks]
    rounds = []
    for _ in range(_ROUNDS):
        rounds.append([median_ms(run, 0.05) for run in runs])
        sleep(_PAUSE)
    for row, times in zip(rows, zip(*rounds, strict=True), strict=True):
        row |= {"measured": min(times), "median": median(times)}
    return {"cuts": rows, "size": size}


def _built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def _measured_by_script(model: nn.Module, x: torch.Tensor, runtime: str, folder: str) -> str:
    """The table that the script writes in a process of its own."""
    script, table = Path(folder, "time_layers.py"), Path(folder, "table.json")
    latency_script(model, x, str(script), runtime="onnxruntime" if runtime == "onnxruntime" else "torch")
    words = [sys.executable, str(script), "--threads", "1", "--out", str(table)]
    subprocess.run([*words, *(["--compile"] if runtime == "torch.compile" else [])], check=True)
    print(json.dumps(json.loads(table.read_text())["about"]))
    return str(table)


def _runner(model: nn.Module, x: torch.Tensor, runtime: str) -> Callable[[], object]:
    if runtime != "onnxruntime":
        run = torch.compile(model) if runtime == "torch.compile" else model

        def call() -> object:
            with torch.no_grad():
                return run(x)

        return call
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feeds)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| network | runtime | cut | MACs left | by the table, ms | measured, ms | error | of the share | faster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    errors, shares = [], []
    for row in rows:
        if "failure" in row:
            lines.append(f"| {row['network']} | {row['runtime']} | {row['failure']} | | | | | | |")
            continue
        dense, expected = (row["cuts"][0][key] for key in ("measured", "predicted"))
        for cut in row["cuts"]:
            error = cut["predicted"] / cut["measured"] - 1
            share = (error + 1) / (expected / dense) - 1
            errors.append(abs(error))
            shares.append(abs(share))
            lines.append(
                f"| {row['network']} | {row['runtime']} | {cut['cut']} | {cut['macs']:.2f} | {cut['predicted']:.2f} "
                f"| {cut['measured']:.2f} | {100 * error:+.0f} % | {100 * share:+.0f} % "
                f"| {dense / cut['measured']:.2f}× |"
            )
    if errors:
        both = [f"mean {100 * sum(e) / len(e):.1f} %, largest {100 * max(e):.1f} %" for e in (errors, shares)]
        lines += ["", f"Error: {both[0]}. Of the share of the dense network's latency: {both[1]}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
