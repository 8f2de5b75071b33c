"""Remaining shares of FLOPs of the thesis' networks: ``python -m benchmarks.study_shares``.

Every variant of the bundled studies of CIFAR-10 and ImageNet is pruned from a network with random weights, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import EVIDENCE, command, fill, machine
from lightning_prune import L1, Scope, prune
from lightning_prune.models import ImageClassifier, MobileNetV2CIFAR, ResNetCIFAR

UNIFORM, NON_UNIFORM = Scope("local"), Scope("global", normalize="none")
NETWORKS: tuple[tuple[str, Callable[[], nn.Module], L1, list[str], tuple[float, ...]], ...] = (
    ("ResNet-56", lambda: ResNetCIFAR(56), L1(), ["layer*.conv1"], (0.6, 0.2)),
    ("MobileNetV2", MobileNetV2CIFAR, L1("first"), ["blocks.*.body.0"], (0.6, 0.4)),
    (
        "ResNet-50",
        lambda: ImageClassifier("torchvision.resnet50", 1000),
        L1(),
        ["net.layer*.conv1", "net.layer*.conv2"],
        (0.4,),
    ),
)


def flops(model: nn.Module) -> int:
    """Of one sample, counted by PyTorch while it runs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(model.example_input_array[:1])  # type: ignore[operator, index]
    return int(counter.get_total_flops())


def main() -> None:
    """Cut, count, publish."""
    rows, facts = [], []
    for name, build, criterion, layers, shares in NETWORKS:
        for share in shares:
            for scope in (UNIFORM, NON_UNIFORM):
                torch.manual_seed(0)
                model = build()
                before, params = flops(model), sum(p.numel() for p in model.parameters())
                report = prune(model, budget={"macs": share}, criterion=criterion, scope=scope, layers=layers)
                after = flops(model)
                outside = [group for group in report.cuts[0].after if not any(w in group for w in ("layer", "blocks"))]
                kind = "uniform" if scope is UNIFORM else "non-uniform"
                facts.append({"network": name, "kind": kind, "asked": share, "kept": after / before})
                rows.append(
                    f"| {name} | {params / 1e6:.2f} M | {before:.3g} | {kind} | {share} | {after / before:.4f} | "
                    f"{'none' if not outside else ', '.join(outside)} |"
                )
                print(rows[-1], flush=True)
                if abs(after / before - share) > 0.01 or outside:
                    raise SystemExit(f"{name}: expected {share} of the FLOPs within 0.01, inside blocks: {rows[-1]}")
    head = "| network | parameters | FLOPs | | asked | kept | cut outside blocks |\n|---|---|---|---|---|---|---|"
    home: Path = EVIDENCE / "study_shares"
    home.mkdir(parents=True, exist_ok=True)
    found = {"command": command("benchmarks.study_shares"), "machine": machine(), "rows": facts}
    (home / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    ran = f"`{found['command']}`, seed 0, on {found['machine']['processor']}; {found['machine']['versions']}"
    fill(home / "README.md", "\n".join([head, *rows]) + f"\n\n{ran}")


if __name__ == "__main__":
    main()
