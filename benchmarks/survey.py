"""Structure analysis of networks of other libraries: half of every group is removed, and everything is checked."""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import EVIDENCE, computed, fill
from benchmarks.survey_networks import Network, build, catalogue, coordinates_in_double, settle
from lightning_prune.reporting import Inspection
from lightning_prune.structure import Axes, Frozen, Structure, trace
from lightning_prune.surgery import cut, mask

ROWS = EVIDENCE / "engine" / "survey.jsonl"

#: Below this a difference in float64 is one of rounding.
_EXACT = 1e-10

#: What a network may take: seconds, and bytes of memory.
_SECONDS, _MEMORY = 600, 16 * 2**30

#: Smallest share of a network's parameters that the table of reasons counts.
_SHOWN = 0.005


# -- one network ------------------------------------------------------------------------------------------------------


def half(structure: Structure) -> dict[str, tuple[int, ...]]:
    """A drawn half of every group."""
    draw = np.random.default_rng(0)
    return {g.name: tuple(sorted(draw.permutation(g.width)[: (g.width + 1) // 2].tolist())) for g in structure.groups}


def _uneven(module: nn.Module) -> bool:
    """Whether a norm's statistics run over units, so that a cut leaves others than a mask does."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups < module.num_channels
    own = ("ConvNextV2GRN", "GlobalResponseNorm", "RmsNorm", "RmsNorm2d")
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__ in own


@contextlib.contextmanager
def still_norms(model: nn.Module) -> Iterator[None]:
    """Norms over units without their statistics: weight · x + bias."""

    def affine(module: Any, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        x, shape = args[0], [-1]
        weight = getattr(module, "weight", None)
        is_of_channels = isinstance(weight, Tensor) and len(weight) == x.shape[1] != x.shape[-1]
        if isinstance(module, nn.GroupNorm) or "Norm2d" in type(module).__name__ or is_of_channels:
            shape = [-1, *[1] * (x.dim() - 2)]
        shape = list(getattr(module, "wb_shape", shape))  # timm's global response norm
        for name, combine in (("weight", torch.mul), ("bias", torch.add)):
            if getattr(module, name, None) is not None:
                x = combine(x, getattr(module, name).view(shape))
        return x

    def function(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
        return x if weight is None else layer_norm(x, shape, weight, *rest, **options)

    layer_norm = F.layer_norm  # also called outside of modules, without weights
    # A group norm of several channels may have single ones after the cut.
    uneven = [module for module in model.modules() if vars(module).setdefault("_uneven", _uneven(module))]
    handles = [module.register_forward_hook(affine) for module in uneven]
    try:
        with mock.patch.object(F, "layer_norm", function):
            yield
    finally:
        for handle in handles:
            handle.remove()


def outputs(network: Network, axes: Axes | None = None) -> list[Tensor]:
    """What comes out in eval mode, norms stilled; with slices set to zero for the time being."""
    with torch.no_grad(), still_norms(network.model), contextlib.ExitStack() as stack:
        if axes is not None:
            stack.enter_context(mask(network.model, axes))
        return network()


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference, as a share of the largest number of each output."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a.numel()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)) for a, b in pairs)


def reason(frozen: Frozen) -> str:
    """Why an axis is frozen, without the place and the numbers."""
    text = re.sub(r" in `[^`]*`", "", frozen.reason)
    return re.sub(r"[\d, ]*\d", " n", text).strip()


def counted_macs(network: Network) -> float:
    """MACs of one sample by PyTorch's own counter, which does not know every fused operator."""
    one = replace(network, args=_first(network.args), kwargs=_first(network.kwargs))
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        one()
    return counter.get_total_flops() / 2


def _first(tree: Any) -> Any:
    """The first sample of every tensor, and of every list."""
    if isinstance(tree, (Tensor, list)):
        return tree[:1]
    if isinstance(tree, tuple):
        return tuple(map(_first, tree))
    return {name: _first(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


def examine(network: Network) -> dict[str, Any]:
    """Trace, cut half of every group, compare with the mask, run in both modes, step back, count."""
    model = network.model
    settle(model)
    start = time.perf_counter()
    structure = trace(network.traced())
    row: dict[str, Any] = {"groups": len(structure.groups), "seconds": time.perf_counter() - start}
    before = structure.cost.params(structure.widths)
    counted = sum(p.numel() for p in model.parameters())
    kept = half(structure)
    axes, widths = structure.axes(kept), {name: len(units) for name, units in kept.items()}
    dense, expected = outputs(network), outputs(network, axes)
    cut(model, axes, factors=structure.factors(kept))
    row["error"] = difference(expected, outputs(network))
    row["effect"] = difference(dense, expected)
    row["stilled"] = any(map(_uneven, model.modules()))
    after = sum(p.numel() for p in model.parameters())
    row["params_agree"] = (before, structure.cost.params(widths)) == (counted, after)
    row["macs_counted"] = counted_macs(network)
    row["macs_predicted"] = structure.cost.macs(widths)
    losses = network(training=True)
    torch.stack([loss.square().mean() for loss in losses if loss.requires_grad]).sum().backward()
    row["trained"] = sum(p.grad is not None for p in model.parameters()) / sum(1 for _ in model.parameters())
    row |= {"params": before, "left": after / before, "reached": Inspection(structure).reachable}
    row["frozen"] = dict(Counter(reason(f) for f in structure.frozen).most_common())
    row["out_of_reach"] = out_of_reach(structure, [name for name, _ in model.named_parameters()])
    return row


def out_of_reach(structure: Structure, parameters: Sequence[str]) -> dict[str, float]:
    """Share of the parameters that lie on no axis that can shrink, by the reason of the axis that produces them."""
    free = Counter[tuple[str, int]]()
    for member in (member for group in structure.groups if not group.within for member in group.members):
        free[member.tensor, member.dim] += member.index.size
    reasons = {frozen.tensor: reason(frozen) for frozen in reversed(structure.frozen)}
    lost = Counter[str]()
    for name in parameters:
        shape = structure.cost.shapes[name]
        why = reasons.get(name, "lies along another frozen axis")
        lost[why] += math.prod(n - free[name, dim] for dim, n in enumerate(shape))
    total = sum(math.prod(structure.cost.shapes[name]) for name in parameters)
    return {why: n / total for why, n in lost.most_common() if n}


# -- all of them ------------------------------------------------------------------------------------------------------


def survey(names: Sequence[str], *, resume: bool) -> tuple[dict[str, Any], str]:
    """Every network, or those named (a family's name stands for its networks).

    Each row is stored as soon as it is there; with `resume`, those that are stored are taken.
    """
    jobs = [
        {"network": name, "family": family}
        for family, members in catalogue().items()
        for name in members
        if not names or name in names or family in names
    ]
    run = computed(jobs, lambda job: _apart(job["network"], job["family"]), ROWS, resume=resume)
    rows = {row["network"]: row for row in run}
    fill(EVIDENCE.parent / "architectures.md", f"{summary(rows)}\n\n{by_reason(rows)}")
    return {"rows": rows}, survey_table(rows)


def _apart(name: str, family: str) -> dict[str, Any]:
    """One network in a process of its own, which may be killed for time or memory without harm to the others."""
    command = [sys.executable, "-m", "benchmarks.survey", name, family]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"family": family, "failure": f"not done after {_SECONDS} s"}
    if done.returncode:
        return {"family": family, "failure": f"its process ended with code {done.returncode}"}
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def _attempt(name: str, family: str) -> dict[str, Any]:
    try:
        with coordinates_in_double(family):
            return {"family": family, **examine(build(name, family))}
    except Exception as failure:  # a survey goes on
        text = (str(failure).strip().splitlines() or [""])[0][:200]
        return {"family": family, "failure": f"{type(failure).__name__}: {text}"}


def survey_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table per family, and what is frozen and why."""
    lines = [
        "Half of every group removed, drawn; float64; every number that starts out constant drawn anew. *error*:",
        "largest difference to the masked network over its largest output (\\* with norms over units stilled on both",
        "sides, since their statistics differ by design; detectors: at their heads); *effect*: the same between masked",
        "and dense network. *reached*: share of the parameters that lie on an axis that can shrink. MACs: predicted",
        "against `FlopCounterMode` / 2 on the cut network.",
    ]
    for family in dict.fromkeys(row["family"] for row in rows.values()):
        members = {name: row for name, row in rows.items() if row["family"] == family}
        lines += ["", f"## {family.capitalize()}", ""]
        lines += ["| network | groups | trace (s) | error | effect | params | MACs | parameters left | reached |"]
        lines += ["|---|---:|---:|---:|---:|---|---|---:|---:|", *map(_line, members, members.values())]
        reasons = Counter(reason for row in members.values() for reason in row.get("frozen", ()))
        lines += ["", "Why axes are frozen, and in how many of these networks:", ""]
        lines += [f"- {reason}: {n}" for reason, n in reasons.most_common()]
    return "\n".join(lines)


def summary(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per family: how many work, how exactly, and how much of them can shrink."""
    lines = [
        "| family | networks | exact | largest error | parameters and MACs as predicted | reached, median | least |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for family in dict.fromkeys(row["family"] for row in rows.values()):
        members = {name: row for name, row in rows.items() if row["family"] == family}
        done = {name: row for name, row in members.items() if "failure" not in row and row["error"] < _EXACT}
        agree = sum(row["params_agree"] and row["macs_counted"] == row["macs_predicted"] for row in done.values())
        least = min(done, key=lambda name: done[name]["reached"])
        lines.append(
            f"| {family} | {len(members)} | {len(done)} | {max(row['error'] for row in done.values()):.0e} | {agree} "
            f"| {100 * median(row['reached'] for row in done.values()):.1f} % "
            f"| {100 * done[least]['reached']:.0f} % ({least}) |"
        )
    return "\n".join(lines)


def by_reason(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per reason why parameters lie on no axis that can shrink, and the share of them in the networks."""
    lost = {name: {w: n for w, n in row.get("out_of_reach", {}).items() if n >= _SHOWN} for name, row in rows.items()}
    reasons = Counter(why for shares in lost.values() for why in shares)
    lines = ["| reason | networks | share of their parameters, median | most |", "|---|---:|---:|---|"]
    for why, n in reasons.most_common():
        shares = {name: 100 * shares[why] for name, shares in lost.items() if why in shares}
        most = max(shares, key=lambda name: shares[name])
        lines.append(f"| {why} | {n} | {median(shares.values()):.1f} % | {shares[most]:.0f} % ({most}) |")
    return "\n".join(lines)


def _line(name: str, row: Mapping[str, Any]) -> str:
    if "failure" in row:
        return f"| {name} | {row['failure']} | | | | | | | |"
    star = " \\*" if row["stilled"] else ""
    counted, predicted = row["macs_counted"], row["macs_predicted"]
    macs = "equal" if counted == predicted else f"{predicted / max(counted, 1) - 1:+.1e}"
    return (
        f"| {name} | {row['groups']} | {row['seconds']:.2f} | {row['error']:.1e}{star} | {row['effect']:.1e} "
        f"| {'equal' if row['params_agree'] else '**differ**'} | {macs} | {row['left']:.2f} | {row['reached']:.2f} |"
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    print(json.dumps(_attempt(*sys.argv[1:])))
