"""Accuracy of pretrained CIFAR-10 ResNets in this package's models, with and without their dead channels."""

from __future__ import annotations

from typing import Any

from lightning_prune.data import CIFAR10
from tests.support.pretrained import PUBLISHED, dead, load, normalised, without


def pretrained(depths: list[int]) -> tuple[dict[str, Any], str]:
    """Both networks: dead on every training image, cut, tested."""
    source = CIFAR10()
    images, test = (normalised(part, source) for part in source.load())
    rows = {}
    for depth in depths or PUBLISHED:
        model = load(depth)
        rows[depth] = without(model, dead(model, images.images), test)
        print(depth, rows[depth], flush=True)
    lines = [
        "Inner channels of the residual blocks that the ReLU leaves at zero at every position of all "
        f"{len(images):,} training images are dead. Accuracy on all {len(test):,} test images, in %; FLOPs = 2 MACs.",
        "",
        "| network | published | ours | parameters | FLOPs | dead channels | without them | parameters | FLOPs "
        "| answers changed | largest difference of a logit |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for depth, row in rows.items():
        lines.append(
            f"| ResNet-{depth} | {PUBLISHED[depth]} | {row['accuracy']} | {row['params']:,} | {row['flops']:.2e} "
            f"| {row['dead']} of {row['of']} | {row['accuracy_after']} | {row['params_after']:,} "
            f"| {row['flops_after']:.2e} | {row['answers_changed']} "
            f"| {row['largest_difference']:.1e} of {row['largest_logit']:.0f} |"
        )
    return {"rows": rows}, "\n".join(lines)
