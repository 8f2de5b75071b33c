"""The structural engine on torchvision's networks, and beside Torch-Pruning.

``python -m benchmarks.engine compare`` measures analysis and cut of both, one after the other in one process (needs
``pip install torch-pruning==1.6.1``). ``python -m benchmarks.engine survey`` cuts half of every group of every
torchvision network, and checks it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import EVIDENCE, command, machine
from lightning_prune.structure import Frozen, Structure, Subject, trace
from lightning_prune.surgery import cut, mask

COMPARED = ("resnet18", "resnet50", "densenet121", "vgg16_bn")


def build(name: str) -> nn.Module:
    """An untrained torchvision network."""
    options: dict[str, Any] = {"weights": None}
    if any(part in name for part in ("rcnn", "retinanet", "fcos", "ssd", "deeplab", "fcn", "lraspp")):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    torch.manual_seed(0)
    return torchvision.models.get_model(name, **options)


def half(structure: Structure) -> dict[str, tuple[int, ...]]:
    """A drawn half of every group."""
    draw = np.random.default_rng(0)
    return {g.name: tuple(sorted(draw.permutation(g.width)[: (g.width + 1) // 2].tolist())) for g in structure.groups}


# -- beside Torch-Pruning ---------------------------------------------------------------------------------------------


def ours(model: nn.Module, x: Tensor) -> None:
    """Analyse and cut half of every group."""
    structure = trace(Subject.of(model, x))
    cut(model, structure.axes(half(structure)))


def theirs(model: nn.Module, x: Tensor) -> None:
    """The same with Torch-Pruning."""
    import torch_pruning

    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=[last],
    )
    pruner.step()


def seconds(method: Callable[[nn.Module, Tensor], None], name: str) -> float:
    """Processor time, on one thread, of one analysis and cut of a fresh network: other processes do not count."""
    model, x = build(name).eval(), torch.randn(1, 3, 224, 224)
    gc.collect()
    start = time.process_time()
    method(model, x)
    return time.process_time() - start


def compare(repeats: int) -> tuple[dict[str, Any], str]:
    """Both in turn, several times; the median of each and of their ratios."""
    rows = {}
    torch.set_num_threads(1)
    for name in COMPARED:
        seconds(ours, name), seconds(theirs, name)  # what is imported and cached at first use is no matter of either
        pairs = [(seconds(ours, name), seconds(theirs, name)) for _ in range(repeats)]
        mine, rival = (median(side) for side in zip(*pairs, strict=True))
        rows[name] = {"ours": mine, "torch_pruning": rival, "ratio": median(a / b for a, b in pairs), "pairs": pairs}
        print(name, {key: round(value, 3) for key, value in rows[name].items() if key != "pairs"}, flush=True)
    lines = ["| network | lightning_prune (s) | Torch-Pruning 1.6.1 (s) | ratio |", "|---|---|---|---|"]
    lines += [f"| {n} | {r['ours']:.3f} | {r['torch_pruning']:.3f} | {r['ratio']:.3f} |" for n, r in rows.items()]
    text = f"Analysis and cut of half of every group: processor time, one thread, median of {repeats} runs, in turn."
    return {"rows": rows, "threads": torch.get_num_threads()}, "\n".join([text, "", *lines])


# -- all of torchvision -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def still_norms(model: nn.Module) -> Iterator[None]:
    """Layer norms without their statistics, which a mask does not leave as a cut does: weight · x + bias."""

    def affine(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        channels_second = isinstance(module, torchvision.models.convnext.LayerNorm2d)
        shape = (-1, 1, 1) if channels_second else (-1,)
        return args[0] * module.weight.view(shape) + module.bias.view(shape)

    handles = [module.register_forward_hook(affine) for module in model.modules() if isinstance(module, nn.LayerNorm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def settle(model: nn.Module) -> None:
    """Running statistics and affine parameters of batch norms that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)


def inputs(name: str) -> tuple[Any, ...]:
    """An example for a network by the kind of its task."""
    module = torchvision.models.get_model_builder(name).__module__
    if ".detection" in module:
        return ([torch.rand(3, 224, 224, dtype=torch.float64)],)
    if ".video" in module:
        return (torch.randn(1, 3, 16, *((112, 112) if "resnet" in module else (224, 224)), dtype=torch.float64),)
    if ".optical_flow" in module:
        return tuple(torch.randn(1, 3, 128, 128, dtype=torch.float64) for _ in range(2))
    size = 299 if name == "inception_v3" else 128 if ".segmentation" in module else 224
    return (torch.randn(2, 3, size, size, dtype=torch.float64),)


def tensors(out: Any) -> list[Tensor]:
    """Every tensor of a nested output."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def error(model: nn.Module, small: nn.Module, axes: Any, args: tuple[Any, ...]) -> float:
    """Largest difference between the masked and the cut network, as a share of the largest output."""
    with torch.no_grad(), still_norms(model), still_norms(small):
        change = mask(model, axes)
        expected = tensors(model.eval()(*args))
        change.undo()
        found = tensors(small.eval()(*args))
    return max(
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)) for a, b in zip(expected, found, strict=True)
    )


def reason(frozen: Frozen) -> str:
    """Why an axis is frozen, without the place and the numbers."""
    return re.sub(r"[\d, ]*\d", " n", frozen.reason.partition(" in `")[0])


def examine(name: str) -> dict[str, Any]:
    """One network: trace, cut half of every group, compare with the mask, run in both modes, step back, count."""
    model, args = build(name).double(), inputs(name)
    if len(args) > 1:  # optical flow makes its coordinates in float32
        model, args = model.float(), tuple(x.float() for x in args)
    settle(model)
    start = time.perf_counter()
    structure = trace(Subject.of(model, *args))
    took = time.perf_counter() - start
    kept = half(structure)
    axes = structure.axes(kept)
    small = copy.deepcopy(model)
    cut(small, axes)
    row: dict[str, Any] = {"seconds": took, "groups": len(structure.groups), "error": error(model, small, axes, args)}
    widths = {name: len(units) for name, units in kept.items()}
    parameters = sum(p.numel() for p in small.parameters())
    example = tuple(x[:1] for x in args)
    with FlopCounterMode(display=False) as counter:
        small.eval()(*example)
    row["params_agree"] = structure.cost.params(widths) == parameters
    row["macs_agree"] = structure.cost.macs(widths) * 2 == counter.get_total_flops()
    sum(out.square().mean() for out in tensors(small.train()(*args))).backward()
    row["trained"] = sum(p.grad is not None for p in small.parameters()) / sum(1 for _ in small.parameters())
    reached = {m.tensor for group in structure.groups for m in group.members}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    row["left"] = parameters / sum(sizes.values())
    row["reached"] = sum(n for name, n in sizes.items() if name in reached) / sum(sizes.values())
    row["frozen"] = dict(Counter(reason(f) for f in structure.frozen).most_common())
    row["masked_with_still_norms"] = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    return row


def survey(names: list[str]) -> tuple[dict[str, Any], str]:
    """Every network of torchvision, or those named."""
    rows: dict[str, Any] = {}
    for name in names or torchvision.models.list_models():
        if ".quantization" in torchvision.models.get_model_builder(name).__module__:
            continue
        try:
            rows[name] = examine(name)
        except Exception as failure:  # a survey goes on
            rows[name] = {"failure": f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"}
        gc.collect()
        print(name, json.dumps(rows[name]), flush=True)
    return {"rows": rows}, survey_table(rows)


def survey_table(rows: dict[str, Any]) -> str:
    """The survey as a table, and what is frozen and why."""
    lines = [
        "Half of every group removed, drawn; float64 (optical flow: float32). *error*: largest difference to the",
        "masked network over its largest output (\\* with layer norms stilled on both sides, since statistics",
        "differ by design). *reached*: share of the parameters that lie on an axis that can shrink.",
        "",
        "| network | groups | trace (s) | error | params | MACs | parameters left | reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "failure" in row:
            lines.append(f"| {name} | {row['failure']} | | | | | | |")
            continue
        star = " \\*" if row["masked_with_still_norms"] else ""
        agree = " | ".join("equal" if row[key] else "**differ**" for key in ("params_agree", "macs_agree"))
        lines.append(
            f"| {name} | {row['groups']} | {row['seconds']:.2f} | {row['error']:.1e}{star} | {agree} | "
            f"{row['left']:.2f} | {row['reached']:.2f} |"
        )
    reasons = Counter(reason for row in rows.values() for reason in row.get("frozen", ()))
    lines += ["", "Why axes are frozen, and in how many networks:", ""]
    return "\n".join([*lines, *(f"- {reason}: {n}" for reason, n in reasons.most_common())])


def main() -> None:
    """Run, print, and write to ``docs/evidence/engine``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("compare", "survey"))
    parser.add_argument("names", nargs="*", help="networks to survey (all of them by default)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    result, table = compare(options.repeats) if options.what == "compare" else survey(options.names)
    result = {"command": command("benchmarks.engine"), "machine": machine(), **result}
    header = f"`{result['command']}` on {result['machine']['processor']}, {result['machine']['cores']} cores."
    folder = EVIDENCE / "engine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{options.what}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{options.what}.md").write_text(f"{header}\n\n{table}\n")
    print(f"{header}\n\n{table}")


if __name__ == "__main__":
    main()
