"""A growing penalty on the units that the next cut removes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from typing_extensions import override

from lightning_prune.callbacks.display.report_writer import log_now
from lightning_prune.callbacks.extensions.extension import CutExtension, RunContext
from lightning_prune.callbacks.lightning.progress import now, run_length
from lightning_prune.callbacks.stored_plan import stored_plan
from lightning_prune.planning import CutPoint, Plan
from lightning_prune.reporting import require
from lightning_prune.surgery import Edit, shrink_units
from lightning_prune.surgery.tensors import named

__all__ = ["GrowPenalty"]

# Times that the weights are shrunk, and how many of these are followed by a check. Smaller steps would be lost in the
# rounding of bfloat16 weights.
_STAGES, _CHECKED = 100, 10

# Relative change of a loss that may be rounding, as sums of fewer terms are added in another order.
_ROUNDING = 1e-6

_STEP = CutPoint(0, 0, "step", 1.0)


@final
@dataclass
class GrowPenalty(CutExtension):
    r"""Postpones each cut until it changes the held-out loss by less than a share, and shrinks its units until then.

    When a cut is due, it is planned but not made. From then on all weights of the units that the plan removes decay:
    those that produce a unit, its bias and norm, and those that read it. With :math:`T` the optimizer steps of ``over``
    and :math:`t` those since the plan,

    .. math:: w \leftarrow \left(1 - \frac{1}{T - t}\right) w,

    a decay that grows until the weights are zero at :math:`t = T`, whatever the gradients. It is applied between
    steps in 100 stages and so is independent of learning rate, optimizer, gradient accumulation and mixed precision. At
    every tenth stage the loss :math:`L` on validation data is measured for the network as it is and with the cut. The
    cut is made once :math:`|L_{cut} - L| \le` ``jump`` :math:`\cdot L`, and at :math:`t = T` in any case, with a
    warning if it still changes more: so for units whose norm is taken over all of them, as LayerNorm's.

    Wang et al., "Neural Pruning via Growing Regularization" (2021), grow an L2 penalty on the weights to remove; Chen
    et al., "Only Train Once" (2021), define the groups of weights that can be removed without a change once they are
    zero together.

    The loss may rise while the units shrink, instead of at the cut: compare it with its value when the cut was planned,
    which is in the report, and leave time to train after the cut. Let the schedule begin earlier by ``over`` than
    without the penalty, so that as many epochs follow the cut.

    The loss is that of ``training_step``, in eval mode. What a cut would change is logged as ``pruning/jump`` at every
    check, what it has changed (with the repairs of other extensions) as ``pruning/jump_at_cut``, and is in the report.
    The cost is twenty forward passes over ``samples`` samples per cut.

    Args:
        jump: Accepted relative change of the held-out loss by a cut, above 0.
        over: Time in which the units shrink to zero: a share of the run (float), in (0, 1], or epochs (int). The last
            cut must be due at least as long before the end of the run.
        samples: Number of validation samples, or all if there are fewer; of several loaders, the first one's.

    Raises:
        ValueError: On construction for settings out of range; before the first training step if there is not enough
            time before the end of the run, no validation data, or no finite loss.

    Example:
        >>> from lightning_prune import GrowPenalty, OneShot, StructuredPruning
        >>> callback = StructuredPruning(0.5, schedule=OneShot(0.3), extensions=[GrowPenalty(jump=0.01, over=0.2)])
    """

    delays = True

    jump: float = 0.01
    over: int | float = 0.1
    samples: int = 2000
    #: The plan, the steps at which it was made and the relative change that its cut would have made then.
    _plan: Plan | None = field(default=None, init=False, repr=False, compare=False)
    _begun: int = field(default=0, init=False, repr=False, compare=False)
    _first: tuple[float, float] = field(default=(math.nan, math.nan), init=False, repr=False, compare=False)
    #: Stages done, and losses without and with the cut at the last check.
    _stage: int = field(default=0, init=False, repr=False, compare=False)
    _last: tuple[float, float] = field(default=(math.nan, math.nan), init=False, repr=False, compare=False)
    _was_cut: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jump <= 0:
            raise ValueError(f"GrowPenalty: expected `jump` above 0, a share of the loss, got {self.jump}. Give 0.01.")
        if (isinstance(self.over, int) and self.over < 1) or not 0 < self.over <= (
            1 if isinstance(self.over, float) else math.inf
        ):
            raise ValueError(
                f"GrowPenalty: expected `over` in (0, 1], a share of the run, or at least 1 epoch, got {self.over}"
            )
        if self.samples < 1:
            raise ValueError(f"GrowPenalty: expected `samples` of at least 1, got {self.samples}")

    # -- hooks --------------------------------------------------------------------------------------------------------

    @override
    def prepare(self, run: RunContext) -> None:
        if not run.timeline:
            return
        steps, length = self._steps(run), run_length(run.trainer)
        total, per_epoch, end = length.total("step"), length.steps_per_epoch or 1, 0
        for point in run.timeline:
            end = max(end, point.at * (per_epoch if point.unit == "epoch" else 1)) + steps
        if total is not None and end >= total:
            raise ValueError(
                f"{self!r}: expected the last cut to be due at least {steps} steps before the end of the run, but it "
                f"would be made after {end} of {total} steps. Let the schedule end earlier, give a smaller `over`, or "
                "train longer."
            )
        (loss,) = run.held_out_losses((Plan({}, {}),), run.trainer.world_size)
        if not math.isfinite(loss):
            raise ValueError(
                f"{self!r}: expected a finite loss of `training_step` on validation data, in eval mode, got NaN or "
                "infinity. No cut changes it by a known share: check the data and the learning rate."
            )

    @override
    def prepare_cut(self, run: RunContext, plan: Plan) -> bool:
        passed = now(run.trainer, _STEP)
        if self._plan != plan:
            self._plan, self._begun, self._stage = plan, passed, 0
            self._first = self._last = self._measure(run, plan)
            return self._is_small()
        stage = min(_STAGES, _STAGES * (passed - self._begun) // self._steps(run))
        if stage > self._stage:
            shrink_units(run.groups, plan.kept, named(run.module), (_STAGES - stage) / (_STAGES - self._stage))
        checks, self._stage = (stage * _CHECKED // _STAGES) - (self._stage * _CHECKED // _STAGES), stage
        if not checks:
            return False
        self._last = self._measure(run, plan)
        return stage == _STAGES or self._is_small()

    @override
    def cancel_cut(self) -> None:
        self._plan = None

    @override
    def after_cut(self, edits: Sequence[Edit]) -> None:
        self._plan, self._was_cut = None, True

    @override
    def before_step(self, run: RunContext, batch: Any, batch_idx: int) -> None:
        if not self._was_cut:
            return
        self._was_cut = False
        (loss,) = run.held_out_losses((Plan({}, {}),), self.samples)
        before = self._last[0]
        change = _change(before, loss)
        log_now(run.trainer, {"pruning/jump_at_cut": change})
        note = (
            f"Cut {run.report.cuts[-1].index + 1} changed the held-out loss by {_percent(change)}, from {before:.4g} "
            f"to {loss:.4g}. When it was planned, it would have changed it by {_percent(_change(*self._first))}, from "
            f"{self._first[0]:.4g}."
        )
        run.report.notes.append(note)
        if abs(change) > max(self.jump, _ROUNDING):
            warnings.warn(
                f"{self!r}: more than `jump`. {note} Give a larger `over`, or cut less at once. Units whose norm is "
                "taken over all of them, and repairs, change the outputs in any case.",
                stacklevel=2,
            )

    @override
    def after_take_back(self) -> None:
        self._plan, self._was_cut = None, False

    @override
    def state(self) -> dict[str, Any]:
        if self._plan is None:
            return {}
        return {
            "plan": self._plan.to_plain(),
            "begun": self._begun,
            "stage": self._stage,
            "losses": [*self._first, *self._last],
        }

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        require(state["begun"], int, "the step of the plan")
        require(state["stage"], int, "the stage of the penalty")
        require(state["losses"], list[float], "held-out losses")
        self._plan = stored_plan(state["plan"])
        self._begun, self._stage = state["begun"], state["stage"]
        first, planned, last, cut = state["losses"]
        self._first, self._last = (first, planned), (last, cut)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _measure(self, run: RunContext, plan: Plan) -> tuple[float, float]:
        """Held-out loss of the network as it is, and with the cut."""
        before, after = run.held_out_losses((Plan({}, {}), plan), self.samples)
        log_now(run.trainer, {"pruning/jump": _change(before, after)})
        return before, after

    def _is_small(self) -> bool:
        return abs(_change(*self._last)) <= self.jump

    def _steps(self, run: RunContext) -> int:
        """Optimizer steps in which the units shrink to zero."""
        length = run_length(run.trainer)
        if isinstance(self.over, int):
            if length.steps_per_epoch is None:
                raise ValueError(f"{self!r}: the number of steps per epoch is not known. Give `limit_train_batches`.")
            return self.over * length.steps_per_epoch
        total = length.total("step")
        if total is None:
            raise ValueError(f"{self!r}: the length of the run is not known. Give the Trainer `max_steps`.")
        return max(1, round(self.over * total))


def _change(before: float, after: float) -> float:
    """Relative change of a loss; infinity if it is not known."""
    if not math.isfinite(before) or not math.isfinite(after):
        return math.inf
    if before == after:
        return 0.0
    return (after - before) / abs(before) if before else math.inf


def _percent(change: float) -> str:
    """With its sign, and zero as +0.00%."""
    return f"{change:+.2%}".replace("-0.00%", "+0.00%")
