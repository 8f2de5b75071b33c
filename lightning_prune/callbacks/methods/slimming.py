"""Network slimming: train with an L1 penalty on the scales of normalisation layers, then remove the smallest."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Unpack, override

from lightning_prune.callbacks.methods.structured import StructuredOptions, StructuredPruning
from lightning_prune.callbacks.scheduled import instance_of
from lightning_prune.planning import AtStart, NoEffectWarning, OneShot, Schedule, Scope, ScopeKind
from lightning_prune.scoring import BNScale, Criterion
from lightning_prune.structure import Structure
from lightning_prune.surgery import Penalty, ScaleL1
from lightning_prune.surgery.optimizers import unwrap
from lightning_prune.surgery.tensors import named

__all__ = ["NetworkSlimming"]


@final
class NetworkSlimming(StructuredPruning):
    """Trains with an L1 penalty on BatchNorm's scales, then prunes all layers by one threshold on them.

        Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (2017). The penalty's gradient
        is added to that of the loss right before each optimizer step: once per step with gradient accumulation, after
        gradients are averaged over processes and unscaled, and before they are clipped. The penalty ends with the last
        cut; training continues without it.

    Other penalties give other methods: `GroupLasso` over everything that is cut with a unit, `GrowingL2` (growing
        regularisation), `HalfSpace` (half-space projection). Combine them with a criterion on the same weights: `L2`.

    Args:
        pruning_ratio: Share of the units to remove, in [0, 1), over all layers together; see `StructuredPruning`.
        budget: Instead of a ratio, what remains; see `StructuredPruning`.
        penalty: The penalty; by default `ScaleL1()`, which needs layers with normalisation. Layers it does not apply to
            are not pruned.
        criterion: Score of the units; by default `BNScale`.
        schedule: When to cut; by default once, after 60 % of the run.
        scope: By default one threshold over all layers, without normalising the scales.
        **options: ``layers``, ``ignore``, ``reset_monitors``, ``dirpath``, ``extensions`` and ``latency_table``, see
            `StructuredPruning`.

    Raises:
        ValueError: Before the first training step if the penalty applies to no layer.

    Example:
        >>> from lightning_prune import NetworkSlimming
        >>> callback = NetworkSlimming(pruning_ratio=0.5)
    """

    default_criterion = BNScale

    def __init__(
        self,
        pruning_ratio: float | dict[str, float] | None = None,
        budget: int | float | dict[str, int | float] | None = None,
        penalty: Penalty | None = None,
        criterion: Criterion | None = None,
        schedule: Schedule | None = None,
        scope: ScopeKind | Scope | None = None,
        **options: Unpack[StructuredOptions],
    ) -> None:
        self.penalty = ScaleL1() if penalty is None else penalty
        instance_of(self, "penalty", self.penalty, Penalty, "ScaleL1()")
        if isinstance(schedule, AtStart):
            raise ValueError(
                f"{type(self).__name__}: expected a schedule that leaves time to pull units to zero, got AtStart(), "
                "which cuts before the first step. Give `OneShot(0.6)`, or take `StructuredPruning`."
            )
        self._hooks: list[RemovableHandle] = []
        super().__init__(
            pruning_ratio=pruning_ratio,
            budget=budget,
            criterion=criterion,
            schedule=OneShot(0.6) if schedule is None else schedule,
            scope=Scope.of("global" if scope is None else scope, comparable=True),
            **options,
        )

    @override
    def _reset_fit(self) -> None:
        super()._reset_fit()
        self._steps: dict[int, Callable[[], None]] = {}  # the penalty's work after a step, by optimizer

    @override
    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "penalty": repr(self.penalty)}

    @property
    @override
    def needs_whole_network(self) -> str | None:
        return f"`penalty={self.penalty!r}`"

    @override
    def _eligible(self, structure: Structure) -> tuple[str, ...]:
        selected = super()._eligible(structure)
        lost = {name: why for name in selected if (why := self.penalty.unsuited(structure.group(name)))}
        if lost and (self.layers is not None or len(lost) == len(selected)):
            reasons = "; ".join(f"{name}: {why}" for name, why in lost.items())
            raise ValueError(
                f"{type(self).__name__}: expected layers that {self.penalty!r} can pull on, got {reasons}. Without "
                "normalisation use `penalty=GroupLasso()` with `criterion=L2()`, or "
                "`StructuredPruning(criterion=L2())`."
            )
        return tuple(name for name in selected if name not in lost)

    @override
    def _prepare(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        super()._prepare(trainer, module, batch)
        assert self.structure is not None
        trained = {name for name, tensor in named(module).items() if tensor.requires_grad}
        pulled = {n: {m.tensor for m in self.penalty.members(self.structure.group(n))} for n in self._selected}
        fixed = [name for name, tensors in pulled.items() if trained.isdisjoint(tensors)]
        if fixed and self.pending:
            warnings.warn(
                f"{type(self).__name__}: {self.penalty!r} does not pull on {', '.join(fixed)} as long as what it pulls "
                "on there is frozen (`requires_grad` is False). Unfreeze it, or leave these layers out by `ignore`.",
                NoEffectWarning,
                stacklevel=2,
            )

    # -- the penalty --------------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._hooks = [unwrap(o).register_step_post_hook(self._after_step) for o in trainer.optimizers]

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.structure is None or not self.pending:
            return
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        parameters = {
            name: p for name, p in named(pl_module).items() if id(p) in mine and p.requires_grad and p.grad is not None
        }
        groups = [self.structure.group(name) for name in self._selected]
        step = trainer.global_step
        self.penalty.before_step(groups, parameters, step, _scale(trainer, optimizer))
        before = self.penalty.remember(groups, parameters)
        if before:
            self._steps[id(unwrap(optimizer))] = partial(self.penalty.after_step, groups, parameters, step, before)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        correct = self._steps.pop(id(optimizer), None)
        if correct is not None:
            correct()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._unhook()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._unhook()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Factor on the gradients, where the optimizer itself unscales them (fused, under fp16)."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(unwrap(optimizer), "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
