"""Pruning without a Trainer: one call, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch._dynamo import OptimizedModule
from torch.optim import Optimizer

from lightning_prune.callbacks.checkpoints import keep_history
from lightning_prune.callbacks.compiled import as_written, forget_code
from lightning_prune.callbacks.scheduled import note_what_stays
from lightning_prune.callbacks.subjects import require_network, subject_for
from lightning_prune.planning import Scope, ScopeKind, Target, feasible, make_plan, select, staying
from lightning_prune.reporting import Cut, Report, Size, latency, size_on_disk, versions
from lightning_prune.scoring import L1, Criterion, criteria, score_groups
from lightning_prune.structure import Call, Structure, StructureError, Subject, rehearse, trace
from lightning_prune.structure.flow import with_flow
from lightning_prune.structure.latency import with_latency
from lightning_prune.surgery import (
    CutError,
    check,
    history_of,
    latency_table,
    original_of,
    refuse,
    transaction,
)
from lightning_prune.surgery.tensors import named

__all__ = ["prune"]


def prune(
    model: nn.Module,
    example: Any = None,
    *,
    pruning_ratio: float | dict[str, float] | None = None,
    budget: float | int | dict[str, float | int] | None = None,
    criterion: Criterion | None = None,
    scope: ScopeKind | Scope = "local",
    layers: str | list[str] | None = None,
    ignore: str | list[str] | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    measure: bool = False,
) -> Report:
    """Remove units from a network at once, in place, and tell what that won.

    The network that remains is the masked one, exactly: what is kept has its weights, and an optimizer keeps its state.
    Every amount is a share of the dense network, also where the network was pruned before.

    Args:
        model: A LightningModule or any module.
        example: What ``forward`` takes: a tensor, a tuple of arguments or a dict of keywords. By default a
            LightningModule's ``example_input_array``.
        pruning_ratio: Share of the units to remove, in [0, 1), for all or per layer; see `StructuredPruning`.
        budget: Instead of a ratio, what remains: ``{"params": 0.6}``, ``{"macs": 0.5}``, ``{"units": 40}``,
            ``{"memory": 0.5}`` or ``{"latency": 0.6}``; see `StructuredPruning`.
        criterion: How much each unit matters, by the weights alone; by default `L1`.
        scope: ``"local"``, ``"global"``, ``"erk"``, or a `Scope`.
        layers: Only these layers: names, globs, or names of modules that contain them.
        ignore: Not these layers.
        optimizers: One or several optimizers of the network, whose state follows.
        measure: Time a forward pass of one sample before and after the cut, on copies of the network, for the report.
            That takes longer than the cut.

    Returns:
        The report: sizes before and after, widths, seconds; with `measure`, milliseconds of a forward pass.

    Raises:
        ValueError: If an amount, a layer, the criterion, the example or an optimizer does not fit; nothing has changed
            then.
        StructureError: If the network computes otherwise at the new widths; nothing has changed then.
        CutError: If the narrower network fails; it is taken back whole.

    Example:
        >>> import torch
        >>> from lightning_prune import prune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = prune(net, torch.zeros(1, 4), pruning_ratio=0.5)
        >>> net[0], report.widths
        (Linear(in_features=4, out_features=4, bias=True), {'0': 4})
    """
    target = Target.of(pruning_ratio, budget)
    criterion = L1() if criterion is None else criterion
    if not isinstance(criterion, Criterion):
        raise TypeError(f"prune: expected `criterion` to be an instance of Criterion, got {criterion!r}. Give `L1()`.")
    scope = Scope.of(scope, comparable=criterion.comparable)
    require_network(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"prune: expected a {type(model).__name__} with weights, got one on the meta device. Load it first."
        )
    steppers = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
    refuse(steppers)
    _require_own(model, steppers)
    forget_code(model)
    with as_written(model):
        written = model._orig_mod if isinstance(model, OptimizedModule) else model
        return _prune(written, example, target, criterion, scope, (layers, ignore), steppers, measure=measure)


def _prune(
    model: nn.Module,
    example: Any,
    target: Target,
    criterion: Criterion,
    scope: Scope,
    names: tuple[str | list[str] | None, str | list[str] | None],
    optimizers: tuple[Optimizer, ...],
    *,
    measure: bool,
) -> Report:
    subject = subject_for(model, example)
    structure, call = trace(subject), subject.calls[0]
    history = history_of(model)
    if scope.min_width == 0:
        structure = with_flow(structure, subject, history.vanished if history is not None else ())
    if criterion.statistic(structure) is not None:
        raise ValueError(
            f"expected a criterion of weights ({', '.join(_of_weights())}), got {criterion!r}, which has to observe "
            "training. Use it with the callback `StructuredPruning`."
        )
    if target.quantity == "latency":
        structure = with_latency(structure, latency_table(subject, structure))
    original = original_of(model, structure)
    target, selected = target.resolve(structure, select(structure, *names)[0])
    feasible(structure, target, scope, selected, original)
    began = perf_counter()
    groups = [structure.group(name) for name in selected]
    scores = score_groups(criterion, groups, named(model), None)
    plan = make_plan(structure, scores, target, 1.0, scope, original)
    with _runs_on_the_example(model, call):
        present = _size(subject, structure, measure=measure)
    report, number = Report(dense=present, versions=versions()), 0
    if history is not None:
        number = len({edit.cut for edit in history.edits})
        report.pruned_before(Size.of(structure, original), present, number)
    note_what_stays(report, staying(structure, target, scope, selected, original))
    after = structure
    if not plan.is_empty:
        rehearse(subject, structure, plan.kept)
        with (
            _runs_on_the_example(model, call),
            transaction(model, optimizers, run=lambda: model(*call.args, **call.kwargs)) as change,
        ):
            after = change.keep(structure, plan.kept)
        if isinstance(model, LightningModule):
            keep_history(model)
        report.cuts.append(Cut.of(Size.of(after), number, 0, 0, plan.before, plan.widths, perf_counter() - began))
    report.final = _size(subject, after, measure=measure)
    return report


def _of_weights() -> list[str]:
    """Names of the criteria that need nothing but the weights."""
    kinds = {name: getattr(criteria, name) for name in criteria.__all__}
    return [name for name, kind in kinds.items() if kind.statistic is Criterion.statistic]


@contextmanager
def _runs_on_the_example(model: nn.Module, call: Call) -> Iterator[None]:
    """Tell an example on which the network fails from a cut that fails."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError):
        try:
            check(lambda: model(*call.args, **call.kwargs), model)
        except CutError as error:
            raise StructureError(
                f"{type(model).__name__} fails on the example: {error}. Nothing has changed. Give an example of the "
                "shape, type and device that `forward` takes."
            ) from error
        raise


def _size(subject: Subject, structure: Structure, *, measure: bool) -> Size:
    milliseconds = latency(subject, batch_sizes=(1,)) if measure else {}
    return replace(Size.of(structure), bytes=size_on_disk(subject.model), latency=milliseconds)


def _require_own(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        if own.isdisjoint(id(parameter) for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                f"prune: expected optimizers of {type(model).__name__}, got a {type(optimizer).__name__} that steps "
                "none of its parameters. Make it from this network's `parameters()`."
            )
