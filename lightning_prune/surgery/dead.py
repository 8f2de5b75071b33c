"""Removal of dead units, which masks have left without effect, where the outputs stay the same."""

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
    """Units of a group whose producing weights, or all consuming weights, are zero.

    The first unit is excluded if all are dead, as a group cannot be empty.
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
    """Units to keep if dead units are removed, and the new contents of parameters and buffers.

    The constant output of a unit without inputs is added to the next layer's bias. Each group is verified in float64;
    if the outputs differ (a constant under zero padding, a norm over the units), the group is left whole.

    Args:
        model: A copy of the network in float64 and eval mode, which is not changed.
        structure: Structure of the network.
        run: Runs a forward pass.

    Returns:
        Units to keep, for groups that change, and new contents by name, in the shapes after the cut.
    """
    expected = _outputs(model, run)
    once = DataPass([torch.zeros(1)]).using(call=lambda copied, _: run(copied))
    widths = structure.widths
    kept = {name: np.arange(width) for name, width in widths.items()}
    contents: dict[str, Tensor] = {}
    refused: set[str] = set()
    found = True
    while found:  # units that feed only dead units are dead too
        found = False
        for name in [name for name in widths if name not in refused]:
            dead = dead_units(structure.group(name), named(model))
            if not dead:
                continue
            stay = np.setdiff1d(np.arange(structure.widths[name]), dead)
            axes, factors = structure.axes({name: stay}), structure.factors({name: stay})
            trial = copy.deepcopy(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a mean that cannot be folded shows in the outputs
                new = repaired(iter([trial]).__next__, axes, [FoldMean(batches=1)], once, factors=factors)
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
