"""Networks on which indices are easily confused: is the cut exact, here and with Torch-Pruning?"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure import TracedModel, trace
from tests.support.architectures import CASES, Case
from tests.support.cutting import half, masked, shrunk

__all__ = ["wrong"]

NAMES = (
    "concat with the input",
    "channel shuffle",
    "flatten channels last",
    "attention heads, three layers",
    "bare parameters and attention",
    "gate of halves",
    "tied weights",
    "functional",
    "depthwise multiplier",
    "buffers as wide as a layer",
    "slicing",
)


def wrong() -> tuple[dict[str, Any], str]:
    """Every case with both, in float64."""
    rows = {case.name: {"ours": _ours(case), "torch_pruning": _theirs(case)} for case in CASES if case.name in NAMES}
    lines = [
        "Half of the units removed, float64. An error is the largest difference to the same network with the removed",
        "outputs set to zero, as a share of its largest output.",
        "",
        "| network | lightning_prune | Torch-Pruning 1.6.1 |",
        "|---|---|---|",
        *(f"| {name} | {row['ours']} | {row['torch_pruning']} |" for name, row in rows.items()),
    ]
    return {"rows": rows}, "\n".join(lines)


def _ours(case: Case) -> str:
    model, x = case.model(), case.example()
    structure = trace(TracedModel.of(model, x))
    axes = structure.axes(half(structure))
    return _verdict(shrunk(model, axes), masked(model, axes), model, x)


def _theirs(case: Case) -> str:
    import torch_pruning

    model, x = case.model(), case.example()
    small, zeros = copy.deepcopy(model), copy.deepcopy(model)
    names = {id(module): name for name, module in small.named_modules()}
    names |= {id(parameter): name for name, parameter in small.named_parameters()}
    layers = {name: module for name, module in small.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    head = [layers.get("head") or layers.get("out") or list(layers.values())[-1]] if layers else []
    _untie(zeros)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = torch_pruning.pruner.BasePruner(
                small,
                x,
                importance=torch_pruning.importance.RandomImportance(),
                pruning_ratio=0.5,
                ignored_layers=head,
            )
            for group in pruner.step(interactive=True):
                for item in group:
                    _zero(zeros, names.get(id(item.dep.target.module), ""), item)
                group.prune()
        return _verdict(small, zeros, model, x)
    except Exception as error:  # what a rival raises is what the table says
        return f"raises {type(error).__name__}: {str(error).splitlines()[0][:80]}"


def _untie(model: nn.Module) -> None:
    """Give every layer weights of its own, as Torch-Pruning does when it cuts them."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))


def _tied(model: nn.Module) -> int:
    return sum(1 for _ in model.named_parameters(remove_duplicate=False)) - sum(1 for _ in model.parameters())


def _zero(model: nn.Module, name: str, item: Any) -> None:
    """Set to zero what Torch-Pruning says that it removes from the outputs of a layer, or of a bare parameter."""
    target = dict(model.named_modules()).get(name) if name not in dict(model.named_parameters()) else None
    with torch.no_grad():
        if target is None:
            parameter = dict(model.named_parameters()).get(name)
            if parameter is not None:
                parameter.index_fill_(parameter.dim() - 1, torch.tensor(item.idxs), 0)
        elif "out" in item.dep.handler.__name__ and not isinstance(target, nn.MultiheadAttention):
            for tensor in target.parameters(recurse=False):
                tensor.index_fill_(0, torch.tensor(item.idxs), 0)


def _verdict(small: nn.Module, zeros: nn.Module, model: nn.Module, x: Tensor) -> str:
    removed = 1 - sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    if not removed:
        return "nothing removed"
    with torch.no_grad():
        found, expected = small(x), zeros(x)
    if found.shape != expected.shape:
        return f"**the output has another shape**, {removed:.0%} of the parameters removed"
    error = float((found - expected).abs().max() / expected.abs().max())
    verdict = "exact" if error < 1e-9 else "**wrong**"
    ties = ", **no longer tied**" if _tied(small) != _tied(model) else ""
    return f"{verdict} ({error:.1e}), {removed:.0%} of the parameters removed{ties}"
