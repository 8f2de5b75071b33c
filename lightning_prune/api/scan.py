"""Sensitivity analysis: metric of the network with one layer cut at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from lightning_prune.api.inspecting import traced_model_for
from lightning_prune.planning import Scope, Target, make_plan, select
from lightning_prune.reporting import Sensitivity
from lightning_prune.scoring import L1, Criterion, score_groups
from lightning_prune.scoring.contexts import preserved_state
from lightning_prune.structure import Size, Structure, trace
from lightning_prune.surgery import cut, with_history
from lightning_prune.surgery.tensors import named

__all__ = ["sensitivity"]


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    example: Any = None,
    *,
    criterion: Criterion | None = None,
    shares: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    layers: str | list[str] | None = None,
    ignore: str | list[str] | None = None,
) -> Sensitivity:
    """Measure a network with one layer cut at a time, to choose pruning ratios per layer.

    Args:
        model: A LightningModule or any module, which is restored afterwards.
        evaluate: Returns the metric of a network, such as an accuracy on validation batches. It is called for the dense
            network and for each layer and share, with the model itself, cut, in eval mode and without gradients.
        example: Input of ``forward``; by default a LightningModule's ``example_input_array``.
        criterion: A criterion of weights; `L1` by default.
        shares: Shares of a layer's units to remove, ascending, in (0, 1).
        layers: Layers to measure: names, globs, or names of parent modules; all by default.
        ignore: Layers not to measure.

    Returns:
        The metrics, which can be printed, plotted with ``figure()``, and converted to ratios with ``ratios()``.

    Raises:
        ValueError: If shares, layers or the criterion are invalid.
        TypeError: If the criterion has another type, or ``evaluate`` does not return a number.

    Example:
        >>> import torch
        >>> from lightning_prune import sensitivity
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> scan = sensitivity(net, lambda m: float(m(torch.ones(2, 4)).sum()), torch.zeros(2, 4), shares=(0.5,))
        >>> list(scan.metrics), net[0].out_features
        (['0'], 8)
    """
    criterion, shares = L1() if criterion is None else criterion, tuple(shares)
    traced = traced_model_for(model, example)
    structure = with_history(trace(traced), traced)
    _check(criterion, shares, structure)
    selected, _ = select(structure, layers, ignore)
    scores = score_groups(criterion, [structure.group(name) for name in selected], named(model), None)

    @torch.no_grad()
    def measured() -> float:
        with preserved_state(model):
            metric = evaluate(model)
        try:
            return float(metric)
        except (TypeError, ValueError) as error:
            raise TypeError(f"expected `evaluate` to return a number, got {metric!r}") from error

    original, dense = Size.of(structure), measured()
    metrics: dict[str, tuple[float, ...]] = {}
    # No bar without a terminal: before rich 14.3, a disabled one prints an empty line.
    for name in track(selected, "Sensitivity", transient=True) if Console().is_terminal else selected:
        values: list[float] = []
        for share in shares:
            target = Target("units", {name: 1 - share})
            plan = make_plan(structure, {name: scores[name]}, target, 1.0, Scope(), original)
            if plan.is_empty:  # less than one unit
                values.append(values[-1] if values else dense)
                continue
            with cut(model, structure.axes(plan.kept), factors=structure.factors(plan.kept)):
                values.append(measured())
        metrics[name] = tuple(values)
    return Sensitivity(dense, shares, metrics, type(criterion).__name__)


def _check(criterion: Criterion, shares: tuple[float, ...], structure: Structure) -> None:
    if not isinstance(criterion, Criterion):
        raise TypeError(f"expected `criterion` to be an instance of Criterion, got {criterion!r}. Give `L1()`.")
    if criterion.statistic(structure) is not None:
        raise ValueError(
            f"expected a criterion of weights (L1, L2, Random), got {criterion!r}, which has to observe training."
        )
    if not shares or list(shares) != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] < 1:
        raise ValueError(f"expected ascending `shares` in (0, 1), got {shares}. Give (0.1, 0.3, 0.5).")
