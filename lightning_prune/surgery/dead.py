"""Units that masks have left without effect: found by their weights, removed where the outputs stay the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.scoring import DataPass, unit_rows
from lightning_prune.structure.graph import Group, Structure
from lightning_prune.surgery.repairs import FoldMean, repaired
from lightning_prune.surgery.tensors import named

__all__ = ["dead_units", "without_dead"]

#: Relative to the largest output, in float64: only the order of summation may differ.
_TOLERANCE = 1e-10


def dead_units(group: Group, tensors: Mapping[str, Tensor]) -> list[int]:
    """Units of a group whose producing weights, or all weights that take them as input, are zero.

    The first unit is never among them if all are: a group cannot be empty.
    """
    sides = [[m for m in group.members if m.role == role] for role in ("out", "in")]
    dead = torch.zeros(group.width, dtype=torch.bool)
    for members in filter(None, sides):
        rows = [(unit_rows(tensors[m.tensor], m) == 0).all(1).cpu() for m in members]
        dead |= torch.stack(rows).all(0)
    if dead.all():
        dead[0] = False
    return dead.nonzero().flatten().tolist()


def without_dead(
    model: nn.Module, structure: Structure, run: Callable[[nn.Module], object]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """Which units stay when those that are dead leave, and what parameters and buffers then hold.

    What a unit gives that has no inputs left, a constant, is added to the next layer's bias. Group by group the
    narrower network is run beside the other in float64; where the outputs differ (a constant under zero padding, a norm
    over the units) the group stays whole.

    Args:
        model: A copy of the network in float64 and eval mode, which is not changed.
        structure: Its groups.
        run: A forward pass of it.

    Returns:
        Units kept by group, only of groups that change, and new contents by name, in the shapes after the cut.
    """
    expected = _outputs(model, run)
    once = DataPass([torch.zeros(1)]).using(call=lambda copied, _: run(copied))
    widths = structure.widths
    kept = {name: np.arange(width) for name, width in widths.items()}
    contents: dict[str, Tensor] = {}
    refused: set[str] = set()
    found = True
    while found:  # what fed only a dead unit is dead after it
        found = False
        for name in [name for name in widths if name not in refused]:
            dead = dead_units(structure.group(name), named(model))
            if not dead:
                continue
            stay = np.setdiff1d(np.arange(structure.widths[name]), dead)
            axes = structure.axes({name: stay})
            trial = copy.deepcopy(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a mean could not be folded: the outputs will tell
                new = repaired(iter([trial]).__next__, axes, [FoldMean(batches=1)], once)
            if not _same(expected, _outputs(trial, run)):
                refused.add(name)
                continue
            model, structure, found = trial, structure.take({name: stay}), True
            kept[name] = kept[name][stay]
            contents |= new
    present = named(model)
    changed = {name: tuple(k.tolist()) for name, k in kept.items() if len(k) < widths[name]}
    return changed, {name: present[name].detach() for name in contents}


def _outputs(model: nn.Module, run: Callable[[nn.Module], object]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(run(model)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        one.shape == other.shape and bool(((one - other).abs() <= _TOLERANCE * one.abs().amax().clamp_min(1)).all())
        for one, other in zip(first, second, strict=True)
    )
