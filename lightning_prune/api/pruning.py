"""Pruning without a Trainer: one call, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_prune.api.inspecting import traced_model_for
from lightning_prune.api.lightning_module import is_cut_extension, keep_history
from lightning_prune.arguments import require_names, require_type
from lightning_prune.planning import Plan, Scope, ScopeKind, Target, feasible, make_plan, notes_on_widths, select
from lightning_prune.reporting import (
    Cut,
    Report,
    backbone_modules,
    latency,
    note_latency_table,
    size_of,
    size_on_disk,
    timed,
    versions,
    warn_of_kept_units,
)
from lightning_prune.scoring import (
    L1,
    Batch,
    Criterion,
    DataPass,
    Statistic,
    bundles_of,
    criteria,
    score_groups,
    statistic_of,
)
from lightning_prune.scoring.contexts import preserved_state
from lightning_prune.scoring.data import forward
from lightning_prune.structure import Call, Size, Structure, StructureError, TracedModel, Tracing
from lightning_prune.structure.flow import with_flow
from lightning_prune.structure.latency import with_latency
from lightning_prune.structure.traced_model import require_network
from lightning_prune.surgery import (
    CutError,
    Repair,
    check,
    history_of,
    losses_of_plans,
    original_of,
    refuse,
    repaired,
    require_one_restart,
    table_of,
    transaction,
    with_history,
)
from lightning_prune.surgery.compiled import eager, reset_compiled
from lightning_prune.surgery.tensors import named

__all__ = ["prune"]


def prune(
    model: nn.Module,
    example: Any = None,
    *,
    pruning_ratio: float | dict[str, float] | None = None,
    budget: int | float | dict[str, int | float] | None = None,
    criterion: Criterion | None = None,
    scope: ScopeKind | Scope = "local",
    layers: str | list[str] | None = None,
    ignore: str | list[str] | None = None,
    data: DataPass | Iterable[Any] | None = None,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
    extensions: Sequence[Repair] = (),
    optimizers: Optimizer | Iterable[Optimizer] = (),
    measure: bool = False,
    latency_table: str | None = None,
) -> Report:
    """Prune a network in place, without training, and return a report.

    The pruned network equals the masked one exactly; optimizers keep their state. Amounts are relative to the dense
    network, even if the network was pruned before.

    Args:
        model: A LightningModule or any module.
        example: Input of ``forward``: a tensor, a tuple of arguments or a dict of keyword arguments. By default a
            LightningModule's ``example_input_array``, or a batch of ``data``.
        pruning_ratio: Share of the units to remove, in [0, 1), for all or per layer; see `StructuredPruning`.
        budget: What remains, instead of a ratio: ``{"params": 0.6}``, ``{"macs": 0.5}``, ``{"units": 40}``,
            ``{"memory": 0.5}``, ``{"latency": 0.6}`` or ``{"latency_ms": 2.5}``, or several, which are all met; see
            `StructuredPruning`.
        criterion: Criterion of importance; `L1` by default. Most others require ``data``, all of which is used, in eval
            mode.
        scope: ``"local"``, ``"global"``, ``"erk"``, ``"random"``, or a `Scope`; several draws are compared by the
            ``loss`` on ``data``.
        layers: Layers to prune: names, globs, or names of parent modules; all by default. Features of attention heads
            are pruned only if they are named: ``["*", "*#head_dim"]``.
        ignore: Layers not to prune; takes precedence over ``layers``.
        data: Samples for criteria and repairs: a `DataPass`, or batches (``(x, y)``, inputs alone, or dicts of keyword
            arguments), such as a `DataLoader` or a list. They are moved to the network's device.
        loss: Loss for gradient-based criteria (`Taylor`, `GraSP`, ...), ``loss(outputs, labels)``, such as
            ``torch.nn.functional.cross_entropy``; not needed for a `DataPass` with a loss.
        extensions: Repairs of the remaining weights, in order: `Ridge`, `SequentialRidge`, `Fold`, `FoldMean`,
            `ReestimateBatchNorm`, `RefitLayerNorm` from ``data``, or `Reinitialise`. They use the network's current
            mode, or train mode if it is in eval mode.
        optimizers: One or several optimizers of the network, whose state is pruned too.
        measure: Measure the latency of one sample before and after the cut, which takes longer than the cut.
        latency_table: File that a script of `latency_script` has written, so that a budget of latency is one on the
            device where it ran. By default the latency on the network's own device is measured.

    Returns:
            The report: sizes before and after, widths, seconds; with `measure`, latencies.

    Raises:
            ValueError: If an amount, a layer, the criterion, the example, an optimizer or the latency table is invalid;
                nothing has changed.
            FileNotFoundError: If there is no such latency table.
            StructureError: If the network computes something else at the new widths; nothing has changed.
            CutError: If the narrower network fails; nothing has changed.

    Example:
        >>> import torch
        >>> from lightning_prune import prune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = prune(net, torch.zeros(2, 4), pruning_ratio=0.5)
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
    repairs = _repairs(extensions)
    _require_loss(loss)
    require_type("prune", "measure", measure, bool)
    require_names("prune", layers=layers, ignore=ignore)
    require_type("prune", "latency_table", latency_table, str | None)
    passes = None if data is None else _ready(data, model, loss)
    steppers = _optimizers(optimizers)
    refuse(steppers)
    _require_own(model, steppers)
    reset_compiled(model)
    with eager(model):
        written = model._orig_mod if isinstance(model, OptimizedModule) else model
        cut = _Cut(target, criterion, scope, (layers, ignore), passes, repairs, measure, latency_table)
        return _prune(written, example, cut, steppers)


def _repairs(extensions: object) -> tuple[Repair, ...]:
    """Validate the extensions."""
    if not isinstance(extensions, Sequence) or isinstance(extensions, str):
        raise TypeError(
            f"prune: expected `extensions` to be a list, got {extensions!r}. Give `extensions=[Ridge()]`, say."
        )
    for extension in extensions:
        if is_cut_extension(extension):
            raise TypeError(
                f"prune: expected `extensions` to be repairs such as `Ridge()`, got {extension!r}, which goes with the "
                "cuts of a run. Use it with a callback."
            )
        if not isinstance(extension, Repair):
            raise TypeError(f"prune: expected `extensions` to be repairs such as `Ridge()`, got {extension!r}.")
    require_one_restart("prune", extensions)
    return tuple(extensions)


def _require_loss(loss: object) -> None:
    """Validate the loss."""
    if loss is not None and (not callable(loss) or isinstance(loss, type)):
        raise TypeError(
            f"prune: expected `loss` to be a function of outputs and labels, got {loss!r}. Give "
            "`loss=torch.nn.functional.cross_entropy`, say."
        )


def _optimizers(optimizers: object) -> tuple[Optimizer, ...]:
    if isinstance(optimizers, Optimizer):
        return (optimizers,)
    if not isinstance(optimizers, Iterable) or isinstance(optimizers, str):
        raise TypeError(
            f"prune: expected `optimizers` to be one or several optimizers of the network, got {optimizers!r}."
        )
    return tuple(optimizers)


@dataclass(frozen=True)
class _Cut:
    """Arguments of a cut."""

    target: Target
    criterion: Criterion
    scope: Scope
    names: tuple[str | list[str] | None, str | list[str] | None]
    data: DataPass | None
    repairs: tuple[Repair, ...]
    measure: bool
    latency_table: str | None


def _prune(model: nn.Module, example: Any, asked: _Cut, optimizers: tuple[Optimizer, ...]) -> Report:
    if example is None and asked.data is not None and getattr(model, "example_input_array", None) is None:
        first = next(iter(asked.data))
        example = dict(first.kwargs) or first.args
    traced = traced_model_for(model, example)
    tracing, call, scope = Tracing(traced), traced.calls[0], asked.scope
    structure, history = with_history(tracing.structure, traced), history_of(model)
    tracing.structure = structure
    if scope.min_width == 0 and structure.flow is None:
        structure = with_flow(structure, traced, history.vanished if history is not None else ())
    if asked.latency_table is not None or asked.target.uses_latency or scope.per == "latency":
        with _progress("Measuring the latency") as show:
            table = table_of(traced, structure, asked.latency_table, show)
        structure = with_latency(structure, table)
    original = original_of(model, structure)
    target, selected = asked.target.resolve(structure, select(structure, *asked.names, asked.target.names)[0])
    statistic, selected = _observed(asked, traced, structure, selected)
    groups = [structure.group(name) for name in selected]
    bundles = bundles_of(asked.criterion, groups, statistic)
    feasible(structure, target, scope, selected, original, bundles)
    began = perf_counter()
    scores = score_groups(asked.criterion, groups, named(model), statistic)
    plans = [make_plan(structure, scores, target, 1.0, drawn, original, bundles) for drawn in scope.drawn]
    plan = plans[0] if len(plans) == 1 else _best(asked, traced, structure, plans)
    with _example_errors(model, call):
        present = _size(traced, structure, measure=asked.measure)
    report, number = Report(dense=present, versions=versions(), config={"criterion": repr(asked.criterion)}), 0
    if history is not None:
        number = len({edit.cut for edit in history.edits})
        report.pruned_before(size_of(structure, original, backbone_modules(model)), present, number)
    report.notes += structure.notes
    note_latency_table(report, structure.cost.latency_table, is_given=asked.latency_table is not None)
    warn_of_kept_units(report, notes_on_widths(structure, target, scope, selected, original))
    after = structure
    if not plan.is_empty:
        tracing.verify_shapes(plan.kept)
        contents = _repaired(asked, traced, structure, plan)
        info = {name: value for repair in asked.repairs for name, value in repair.info.items()}
        with (
            _example_errors(model, call),
            transaction(model, optimizers, run=lambda: model(*call.args, **call.kwargs)) as change,
        ):
            after = change.keep(structure, plan.kept, info)
            change.verify()
            change.install(contents)
            if any(repair.restarts for repair in asked.repairs):
                change.forget()
        keep_history(model)
        report.cuts.append(
            Cut.of(
                size_of(after, backbone=backbone_modules(model)),
                number,
                0,
                0,
                plan.before,
                plan.widths,
                perf_counter() - began,
            )
        )
    report.final = _size(traced, after, measure=asked.measure)
    return report


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float], object]]:
    """A progress bar in a terminal; it goes when the work is done."""
    console = Console(stderr=True)
    bar = Progress(TextColumn(what), BarColumn(), TimeElapsedColumn(), console=console, transient=True)
    task = bar.add_task(what, total=1.0)
    bar.disable = not console.is_terminal
    with bar:
        yield lambda share: bar.update(task, completed=share)


def _best(asked: _Cut, traced: TracedModel, structure: Structure, plans: Sequence[Plan]) -> Plan:
    """The plan with the lowest loss; ties by order."""
    data = asked.data
    if data is None or data.loss is None:
        raise ValueError(
            f"prune: expected `data=` and `loss=` to compare {len(plans)} draws, got no "
            f"{'data' if data is None else 'loss'}. Give batches `(x, y)` and a loss, or `draws=1`."
        )
    with _data_errors():
        losses = losses_of_plans(traced.copy("real").module, structure, plans, data).tolist()
    return plans[min(range(len(plans)), key=losses.__getitem__)]


def _ready(data: DataPass | Iterable[Any], model: nn.Module, loss: Callable[[Any, Tensor], Tensor] | None) -> DataPass:
    """Prepare the data: on the network's device, with a loss."""
    passes = data if isinstance(data, DataPass) else DataPass(data)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        assert loss is not None
        if batch.labels is None:
            raise ValueError(
                "prune: expected data with labels for the loss, got none. Give batches `(x, y)`, or a "
                "`lightning_prune.scoring.DataPass` with `labels=`, a function of a batch that returns them."
            )
        return loss(forward(model, batch), batch.labels)

    def transfer(raw: Any) -> Any:
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, raw)

    has_transfer = passes.has_transfer
    return passes.using(loss=None if loss is None else loss_of, transfer=None if has_transfer else transfer)


def _observed(
    asked: _Cut, traced: TracedModel, structure: Structure, selected: tuple[str, ...]
) -> tuple[Statistic | None, tuple[str, ...]]:
    """Collect the criterion's statistic; also returns the groups that can be scored."""
    of_selected = replace(structure, groups=tuple(group for group in structure.groups if group.name in selected))
    statistic, criterion = statistic_of(asked.criterion, of_selected), asked.criterion
    if statistic is None:
        return None, selected
    data = asked.data
    if data is None and not (statistic.collects and not statistic.uses_data):
        raise ValueError(
            f"prune: expected `data=` for {criterion!r}, which looks at data, got none. Give batches such as a "
            f"DataLoader, or choose a criterion of weights ({', '.join(_of_weights())})."
        )
    if data is not None and statistic.uses_loss and data.loss is None:
        raise ValueError(
            f"prune: expected `loss=` for {criterion!r}, which looks at gradients, got none. Give "
            "`loss=torch.nn.functional.cross_entropy`, say."
        )
    if data is None:
        call = traced.calls[0]
        raw = {"args": call.args, "kwargs": dict(call.kwargs)}
        data = DataPass([raw], inputs=lambda raw: raw["kwargs"] or raw["args"])
    copy = traced.copy("real").module
    _require_runs(copy, data)
    with _data_errors():
        statistic.collect(copy, data)
    lost = {name: why for name, why in statistic.unobservable(copy).items() if name in selected}
    kept = tuple(name for name in selected if name not in lost)
    reasons = "; ".join(f"{name}: {why}" for name, why in lost.items())
    if lost and (asked.names[0] is not None or not kept):
        raise StructureError(
            f"{type(criterion).__name__} cannot score {reasons}. Choose other `layers`, or a criterion of weights."
        )
    if lost:
        warnings.warn(f"{type(criterion).__name__} cannot score, so these stay as they are: {reasons}", stacklevel=5)
    return statistic, kept


def _require_runs(copy: nn.Module, data: DataPass) -> None:
    """Raise an error if a copy of the network fails on the first batch."""
    len(data)  # reads the samples, whose errors say what they are about
    with _data_errors():
        try:
            data.run(copy, limit=1)
        except ValueError as error:  # as a batch norm raises it
            raise RuntimeError(str(error)) from error


@contextmanager
def _data_errors() -> Iterator[None]:
    """Convert errors of the network or loss on the data to a ValueError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"prune: the network or the loss fails on `data` ({type(error).__name__}: {error}). Nothing has changed. "
            "Give batches of what `forward` takes, and a `loss(outputs, labels)` that gives one number."
        ) from error


def _repaired(asked: _Cut, traced: TracedModel, structure: Structure, plan: Plan) -> dict[str, Tensor]:
    """Contents that the repairs change, in the shapes after the cut."""
    if not asked.repairs:
        return {}
    readers = [repair for repair in asked.repairs if repair.batches]
    if readers and asked.data is None:
        raise ValueError(f"prune: expected `data=` for {readers[0]!r}, which reads batches of it, got none.")

    if readers and asked.data is not None:
        _require_runs(traced.copy("real").module, asked.data)
    # A network wholly in eval mode is not frozen but evaluated. Of the model: its metrics are in train mode in a copy.
    is_training = any(module.training for module in traced.model.modules())

    def copied() -> nn.Module:
        copy: nn.Module = traced.copy("real").module
        return copy if is_training else copy.train()

    axes, drops, factors = structure.axes(plan.kept), structure.drops(plan.kept), structure.factors(plan.kept)
    return repaired(copied, axes, asked.repairs, asked.data, drops, factors)


def _of_weights() -> list[str]:
    """Names of the criteria that need no data."""
    kinds = {name: getattr(criteria, name) for name in criteria.__all__}
    return [name for name, kind in kinds.items() if kind.statistic is Criterion.statistic]


@contextmanager
def _example_errors(model: nn.Module, call: Call) -> Iterator[None]:
    """Raise a StructureError if the dense network fails on the example too."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError):
        try:
            check(lambda: model(*call.args, **call.kwargs), model)
        except CutError as error:
            cure = "Give an example of the shape, type and device that `forward` takes."
            if _runs_in_eval_mode(model, call):
                cure = "It runs in eval mode: call `.eval()` first, or give an example of two samples or more."
            raise StructureError(
                f"{type(model).__name__} fails on the example: {error}. Nothing has changed. {cure}"
            ) from error
        raise


def _runs_in_eval_mode(model: nn.Module, call: Call) -> bool:
    with preserved_state(model):
        try:
            check(lambda: model(*call.args, **call.kwargs), model)
        except CutError:
            return False
    return True


def _size(traced: TracedModel, structure: Structure, *, measure: bool) -> Size:
    timings = latency(traced, batch_sizes=(1,)) if measure else {}
    size = size_of(structure, backbone=backbone_modules(traced.model))
    return replace(timed(size, timings), bytes=size_on_disk(traced.model))


def _require_own(model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        if own.isdisjoint(id(parameter) for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                f"prune: expected optimizers of {type(model).__name__}, got a {type(optimizer).__name__} that steps "
                "none of its parameters. Make it from this network's `parameters()`."
            )
