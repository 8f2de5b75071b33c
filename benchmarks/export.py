"""Export of the survey's networks, untrained and cut by half: a row per network and format, verified in its runtime."""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_prune
from benchmarks.common import EVIDENCE, add_resume, computed, publish, rows_in
from benchmarks.survey_networks import build, catalogue, settle

ROWS = EVIDENCE / "export" / "rows.jsonl"
SUFFIXES = (".onnx", ".pt2", ".pte", ".xml")
_SIDE, _SAMPLES = 64, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks, or families (default: classification, timm)")
    parser.add_argument("--suffixes", nargs="*", default=[".onnx"], choices=SUFFIXES)
    add_resume(parser)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = given.names or ["classification", "timm"]
    jobs = [
        {"network": name, "family": family, "suffix": suffix}
        for family, members in catalogue().items()
        for name in members
        if name in wanted or family in wanted
        for suffix in given.suffixes
    ]
    sizes = {row["network"]: row.get("params", 0) for row in rows_in(EVIDENCE / "engine" / "survey.jsonl")}
    jobs.sort(key=lambda job: sizes.get(job["network"], 0))
    try:
        for _ in computed(jobs, lambda job: exported(**job), ROWS, resume=given.resume):
            pass
    finally:  # a stopped run has a table, too
        rows = rows_in(ROWS) if ROWS.is_file() else []
        publish("export", {"files": len(rows)}, tables(rows))


def exported(network: str, family: str, suffix: str) -> dict[str, Any]:
    """One network: cut by half, written and verified; or why not."""
    began = time.perf_counter()
    try:
        model, images = prepared(network, family)
        before = sum(parameter.numel() for parameter in model.parameters())
        lightning_prune.prune(model, images, pruning_ratio=0.5)
        estimate(model, images)
        with tempfile.TemporaryDirectory() as folder:
            done = lightning_prune.export(model, Path(folder, f"small{suffix}"), images)
    except Exception as failure:
        return {"failure": f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0][:400]}"}
    return {
        "params": before,
        "left": sum(parameter.numel() for parameter in model.parameters()) / before,
        "side": images.shape[-1],
        "bytes": done.bytes,
        "runtime": done.runtime,
        "batch_size": done.batch_size,
        "difference": done.difference,
        "latency_ms": done.latency_ms,
        "seconds": time.perf_counter() - began,
    }


def prepared(name: str, family: str) -> tuple[nn.Module, Tensor]:
    """A network in eval mode and images, small ones if it takes them."""
    network = build(name, family)
    model, side = network.model.float().eval(), network.args[0].shape[-1]
    settle(model)
    for images in (torch.randn(_SAMPLES, 3, _SIDE, _SIDE), torch.randn(_SAMPLES, 3, side, side)):
        try:
            estimate(model, images)
        except (RuntimeError, AssertionError, ValueError):
            if images.shape[-1] == side:
                raise
            continue
        return model, images
    raise AssertionError("the last one returns or raises")


@torch.no_grad()
def estimate(model: nn.Module, images: Tensor) -> None:
    """Take the statistics of batch normalization from these images, as training would leave them."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(images)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
        norm.eval()


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """ONNX of all networks, and the formats of a few."""
    onnx = [row for row in rows if row["suffix"] == ".onnx"]
    others = [row for row in rows if row["suffix"] != ".onnx"]
    done = [row for row in onnx if "failure" not in row]
    anysize = sum(row["batch_size"] is None for row in done)
    lines = [
        f"{len(done)} of {len(onnx)} networks agree in onnxruntime, {anysize} of them for batches of any size.",
        "",
    ]
    return "\n".join([*lines, *listed(onnx), *(["", "Other formats:", "", *listed(others)] if others else [])])


def listed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = ["network", "format", "image", "parameters left", "batch", "file, KiB", "largest difference"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for row in rows:
        cells = [row["network"], f"`{row['suffix']}`"]
        if "failure" in row:
            cells += [row["failure"].replace("|", "/"), *[""] * 4]
        else:
            batch = "any" if row["batch_size"] is None else str(row["batch_size"])
            cells += [str(row["side"]), f"{row['left']:.2f}", batch, f"{row['bytes'] / 1024:,.0f}"]
            cells += [f"{row['difference']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
