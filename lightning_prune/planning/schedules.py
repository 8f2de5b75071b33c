"""Schedules: when cuts are made and how much of the target each one completes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from lightning_prune.arguments import Settings
from lightning_prune.extras import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "AtStart",
    "Cubic",
    "CutPoint",
    "Explicit",
    "Geometric",
    "LinearSchedule",
    "OneShot",
    "RunLength",
    "Schedule",
    "Spread",
    "Unit",
    "WhenStable",
    "due",
    "reaches",
]

#: Unit of the moments of a schedule.
Unit = Literal["auto", "epoch", "step"]

# Defaults: the network is trained first, and recovers in the last 40 % of the run.
_START, _END, _CUTS = 0.1, 0.6, 5

# Distance between two plans that are compared, as a share of a run that is counted in steps.
_SHARE_OF_STEPS = 0.02

# Tolerance, so that 0.1 * 30 is moment 3.
_EPSILON = 1e-9


@dataclass(frozen=True)
class RunLength:
    """Length of a training run; None for unlimited or unknown.

    Attributes:
        epochs: ``max_epochs`` of the run.
        steps: ``max_steps`` of the run (optimizer steps).
        steps_per_epoch: Optimizer steps per epoch; None for data of unknown length.
    """

    epochs: int | None
    steps: int | None = None
    steps_per_epoch: int | None = None

    @property
    def limited_by_steps(self) -> bool:
        """Whether ``steps`` ends the run before ``epochs`` (assumed if unknown)."""
        if self.steps is None:
            return False
        if self.epochs is None or self.steps_per_epoch is None:
            return True
        return self.steps < self.epochs * self.steps_per_epoch

    def total(self, unit: Literal["epoch", "step"]) -> int | None:
        """Number of epochs (including a partial one) or steps of the run; None if unknown."""
        per_epoch = self.steps_per_epoch
        if unit == "epoch":
            limits = [self.epochs, math.ceil(self.steps / per_epoch) if self.steps and per_epoch else None]
        else:
            limits = [self.steps, self.epochs * per_epoch if self.epochs and per_epoch else None]
        return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True)
class CutPoint:
    """A scheduled cut.

    Attributes:
        index: Index of the cut, from 0.
        at: Number of epochs or optimizer steps trained before the cut: with ``at=3``, it is made before the first batch
            of epoch 3 in Lightning's numbering.
        unit: Unit of ``at``.
        share: Share of the way from the dense size to the target that is done after this cut, in (0, 1].
        earliest: When the cut can be made at the earliest, if ``at`` is the latest moment.
    """

    index: int
    at: int
    unit: Literal["epoch", "step"]
    share: float
    earliest: int | None = None


class Schedule(Settings, ABC):
    """Base class of schedules: when cuts are made in a run, and how much of the target each one completes.

    Subclasses are frozen dataclasses of settings. Moments are a *float*, a share of the run in [0, 1], or an *int*, an
    absolute epoch or step. Shares are rounded to whole epochs (steps); a share above 0 is at least one epoch, and none
    is later than the start of the last epoch.
    """

    #: Whether the moment of the cut depends on plans that are made before it; see `comparisons`.
    decides_by_plans: ClassVar[bool] = False

    unit: Unit

    @abstractmethod
    def share(self, progress: float, remaining: float) -> float:
        """Share of the way to the target at ``progress``: pure, monotone, 0 at 0 and 1 at 1.

        Args:
            progress: Share of the cuts that are done, in [0, 1].
            remaining: Share of the network that the target leaves, in (0, 1].
        """

    @abstractmethod
    def cut_moments(self, length: int | None, remaining: float) -> list[tuple[float, float]]:
        """All cuts in order as ``(moment, progress)``, with unrounded moments.

        Args:
            length: Epochs or steps of the run; None if unknown.
            remaining: Share of the network that the target leaves, in (0, 1).
        """

    @property
    @abstractmethod
    def marks(self) -> tuple[int | float | None, ...]:
        """Moments and intervals of the schedule's arguments."""

    def comparisons(self, run: RunLength) -> tuple[int, ...]:  # noqa: ARG002
        """Moments at which a plan is made and compared with the one before, ascending; by default there are none."""
        return ()

    def stability(self, agreements: Sequence[float]) -> float | None:  # noqa: ARG002
        """How well the last plans agree, in [0, 1], or None while there are too few; see `Plan.agreement`."""
        return None

    def is_stable(self, agreements: Sequence[float]) -> bool:  # noqa: ARG002
        """Whether the cut is made now, as plans agree."""
        return False

    def resolve_unit(self, run: RunLength) -> Literal["epoch", "step"]:
        """The unit in this run: ``"auto"`` means epochs, or steps if there is one epoch or ``max_steps``.

        Raises:
            ValueError: If ``"auto"`` is ambiguous for absolute numbers because of ``max_steps``.
        """
        if self.unit != "auto":
            return self.unit
        if run.epochs == 1:
            return "step"
        if not run.limited_by_steps:
            return "epoch"
        if any(isinstance(mark, int) for mark in self.marks):
            raise ValueError(
                f"{self!r}: expected to know what its whole numbers count, because the run is limited by "
                f'`max_steps={run.steps}`. Say unit="epoch" or unit="step".'
            )
        return "step"

    def timeline(self, run: RunLength, remaining: float) -> tuple[CutPoint, ...]:
        """The cuts of a run, ascending; of several at one moment, only the last is kept.

        Cuts beyond the end of the run are omitted, see `reaches`. There are none for ``remaining=1``.

        Args:
            run: Length of the run.
            remaining: Share of the network that the target leaves, in (0, 1].

        Raises:
            ValueError: If the run's length is needed but unknown, or no cut is within the run.
        """
        if not 0 < remaining <= 1:
            raise ValueError(f"expected `remaining` in (0, 1], got {remaining}")
        if remaining == 1:
            return ()
        unit = self.resolve_unit(run)
        length = run.total(unit)
        if length is None and any(isinstance(mark, float) for mark in self.marks):
            raise ValueError(
                f"{self!r} counts in shares of the run, but the run's length in {unit}s is not known. Give "
                f"whole numbers (start=10, every=10, end=50) and `unit`, or the Trainer `max_epochs` or `max_steps`."
            )
        shares: dict[int, float] = {}
        for moment, progress in self.cut_moments(length, remaining):
            shares[_whole(moment)] = self.share(progress, remaining)
        inside = [(at, share) for at, share in shares.items() if length is None or at < length]
        if not inside:
            raise ValueError(
                f"{self!r} never fires: its first cut is due after {unit} {min(shares)}, but the run has {length} "
                f"{unit}(s) and the last cut can fall after {(length or 0) - 1}. Let it start earlier, or train longer."
            )
        return tuple(CutPoint(index, at, unit, share) for index, (at, share) in enumerate(inside))

    def plot(self, run: RunLength | None = None, remaining: float = 0.5) -> Figure:
        """Plot the size of the network over a run (requires the extra ``plot``).

        Args:
            run: Length of the run; 100 epochs by default.
            remaining: Share of the network that the target leaves, in (0, 1).
        """
        run = run or RunLength(epochs=100)
        points = self.timeline(run, remaining)
        unit = self.resolve_unit(run)
        end = run.total(unit) or max(round(points[-1].at * 1.25), 1)
        left = [100.0] + [100 * (1 - point.share * (1 - remaining)) for point in points]
        figure = new_figure(figsize=(6, 3), layout="constrained")
        axes = figure.add_subplot()
        axes.step([0, *(point.at for point in points), end], [*left, left[-1]], where="post", color="#0072B2", lw=2)
        axes.plot([point.at for point in points], left[1:], "o", color="#0072B2", ms=5)
        axes.set(xlabel=f"{unit}s trained", ylabel="size (% of dense)", xlim=(0, end), ylim=(0, 105))
        axes.set_title(repr(self), fontsize="small")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        return figure


@dataclass(frozen=True)
class OneShot(Schedule):
    """A single cut.

    Args:
        at: Moment of the cut: a share of the run (float) or an absolute epoch or step (int).
        unit: What an int counts; ``"auto"`` = epochs, steps where there is one epoch or ``max_steps``.
    """

    at: int | float = _START
    unit: Unit = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moment("at", self.at)

    @property
    @override
    def marks(self) -> tuple[int | float | None, ...]:
        return (self.at,)

    @override
    def share(self, progress: float, remaining: float) -> float:
        return float(progress >= 1)

    @override
    def cut_moments(self, length: int | None, remaining: float) -> list[tuple[float, float]]:
        return [(_position(self.at, length), 1.0)]


@dataclass(frozen=True)
class AtStart(Schedule):
    """A single cut before the first training batch of the run.

    The cut is made after training data and optimizers are set up and a checkpoint is loaded, before any step; a resumed
    run does not repeat it. A criterion that observes training (`SNIP`, `Contribution`) is given one batch.
    """

    unit: Unit = field(default="step", init=False, repr=False)

    @property
    @override
    def marks(self) -> tuple[int | float | None, ...]:
        return (0,)

    @override
    def share(self, progress: float, remaining: float) -> float:
        return float(progress >= 1)

    @override
    def cut_moments(self, length: int | None, remaining: float) -> list[tuple[float, float]]:
        return [(0, 1.0)]


@dataclass(frozen=True)
class Spread(Schedule):
    """Base class of schedules with evenly spaced cuts: a number of ``cuts``, or one at ``every`` interval.

    Args:
        start: Moment of the first cut: a share of the run (float) or an absolute epoch or step (int).
        end: Moment of the last cut (with ``every``: at the latest).
        cuts: Number of cuts; 5 if ``every`` is not given either.
        every: Distance between two cuts, instead of ``cuts``: a share of the run (float) or epochs or steps (int).
        unit: What ints count; ``"auto"`` = epochs, steps where there is one epoch or ``max_steps``.
    """

    start: int | float = _START
    end: int | float = _END
    cuts: int | None = None
    every: int | float | None = None
    unit: Unit = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moment("start", self.start)
        _check_moment("end", self.end)
        _check_interval(self.every)
        if self.cuts is not None and self.every is not None:
            raise ValueError(f"expected `cuts` or `every`, got both: cuts={self.cuts}, every={self.every}")
        if self.cuts is not None and self.cuts < 1:
            raise ValueError(f"expected `cuts` of at least 1, got {self.cuts}")
        if type(self.start) is type(self.end) and self.end < self.start:
            raise ValueError(f"expected `end` not before `start`, got start={self.start}, end={self.end}")

    @property
    @override
    def marks(self) -> tuple[int | float | None, ...]:
        return (self.start, self.end, self.every)

    @override
    def cut_moments(self, length: int | None, remaining: float) -> list[tuple[float, float]]:
        first, last = _position(self.start, length), _position(self.end, length)
        if last < first:
            raise ValueError(f"{self!r}: expected `end` not before `start`, got moments {first:g} and {last:g}")
        if self.every is None:
            moments = _evenly(first, last, self.cuts or _CUTS)
        else:
            step = _step(self.every, length)
            moments = [first + i * step for i in range(math.floor((last - first) / step + _EPSILON) + 1)]
        return [(moment, (i + 1) / len(moments)) for i, moment in enumerate(moments)]


@dataclass(frozen=True)
class LinearSchedule(Spread):
    """Cuts of equal amounts: share = progress."""

    @override
    def share(self, progress: float, remaining: float) -> float:
        return progress


@dataclass(frozen=True)
class Cubic(Spread):
    """Cuts of decreasing amounts: share = 1 − (1 − progress)³.

    Zhu & Gupta, *To prune, or not to prune* (2017), eq. 1, where nothing is removed at the first moment; here, the
    first moment is the first cut.
    """

    @override
    def share(self, progress: float, remaining: float) -> float:
        return 1 - (1 - progress) ** 3


@dataclass(frozen=True)
class Geometric(Schedule):
    """Cuts of a constant share of the *current* size, until the target is met (the last cut may be smaller).

    After cut i, max(R, (1 − rate)^i) of the network is left, where R is the share that the target leaves. The number of
    cuts is ⌈ln R / ln(1 − rate)⌉, and share = (1 − R^progress) / (1 − R).

    ``Geometric(rate=0.1, start=30, every=15)`` removes 10 % of the current width every 15 epochs, first after 30.

    Args:
        rate: Share of the current size that one cut removes, in (0, 1).
        start: Moment of the first cut: a share of the run (float) or an absolute epoch or step (int).
        end: Moment of the last cut (with ``every``: at the latest). By default 0.6 of the run; with ``every`` there is
            no limit but the end of the run, which may come before the target: see `reaches`.
        every: Distance between two cuts: a share of the run (float) or epochs or steps (int). By default the cuts are
            spread evenly from ``start`` to ``end``.
        unit: What ints count; ``"auto"`` = epochs, steps where there is one epoch or ``max_steps``.
    """

    rate: float = 0.1
    start: int | float = _START
    end: int | float | None = None
    every: int | float | None = None
    unit: Unit = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise ValueError(
                f"expected `rate` in (0, 1), the share of the current size one cut removes, got {self.rate}"
            )
        _check_moment("start", self.start)
        if self.end is not None:
            _check_moment("end", self.end)
        _check_interval(self.every)

    @property
    @override
    def marks(self) -> tuple[int | float | None, ...]:
        return (self.start, self._last, self.every)

    @property
    def _last(self) -> int | float | None:
        return _END if self.end is None and self.every is None else self.end

    @override
    def share(self, progress: float, remaining: float) -> float:
        if remaining == 1:
            return progress  # the limit for R → 1
        return float((1 - remaining**progress) / (1 - remaining))

    @override
    def cut_moments(self, length: int | None, remaining: float) -> list[tuple[float, float]]:
        needed = math.log(remaining) / math.log(1 - self.rate)
        count = max(1, math.ceil(needed - _EPSILON))
        first = _position(self.start, length)
        last = math.inf if self._last is None else _position(self._last, length)
        if last < first:
            raise ValueError(f"{self!r}: expected `end` not before `start`, got moments {first:g} and {last:g}")
        if self.every is None:
            moments = _evenly(first, last, count)
        else:
            step = _step(self.every, length)
            moments = [first + i * step for i in range(count) if first + i * step <= last + _EPSILON]
        return [(moment, min(1.0, (i + 1) / needed)) for i, moment in enumerate(moments)]


@dataclass(frozen=True)
class Explicit(Schedule):
    """A list of cuts: ``Explicit(((10, 0.5), (20, 1.0)))`` is halfway to the target after epoch 10, and there after 20.

    Args:
        cuts: Pairs of a moment — a share of the run (float) or an absolute epoch or step (int) — and the share of the
            way to the target that is done from then on; both ascending, the last share 1.
        unit: What ints count; ``"auto"`` = epochs, steps where there is one epoch or ``max_steps``.
    """

    cuts: tuple[tuple[int | float, float], ...] = ((_START, 0.5), (_END, 1.0))
    unit: Unit = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        cuts = tuple((moment, float(share)) for moment, share in self.cuts)
        object.__setattr__(self, "cuts", cuts)  # lists, as they come from YAML, become comparable and hashable
        for moment, _ in cuts:
            _check_moment("cuts", moment)
        shares = [0.0, *(share for _, share in cuts)]
        if not all(a < b for a, b in pairwise(shares)) or shares[-1] != 1:
            raise ValueError(f"expected `cuts` with ascending shares above 0 and a last one of 1, got {shares[1:]}")
        if len({type(moment) for moment, _ in cuts}) > 1:
            raise ValueError(f"expected moments in `cuts` all shares (float) or all absolute (int), got {cuts}")
        if any(a >= b for (a, _), (b, _) in pairwise(cuts)):
            raise ValueError(f"expected ascending moments in `cuts`, got {[moment for moment, _ in cuts]}")

    @property
    @override
    def marks(self) -> tuple[int | float | None, ...]:
        return tuple(moment for moment, _ in self.cuts)

    @override
    def share(self, progress: float, remaining: float) -> float:
        done = math.floor(progress * len(self.cuts) + _EPSILON)
        return self.cuts[done - 1][1] if done else 0.0

    @override
    def cut_moments(self, length: int | None, remaining: float) -> list[tuple[float, float]]:
        return [(_position(at, length), (i + 1) / len(self.cuts)) for i, (at, _) in enumerate(self.cuts)]


@dataclass(frozen=True)
class WhenStable(Schedule):
    r"""A single cut, made as soon as successive plans agree (OCSPruner: Ghimire et al., WACV 2026).

    From ``start`` on, the method makes a plan ``every`` epoch without cutting. Let :math:`K^t_g` be the units of group
    :math:`g` that plan :math:`t` keeps and :math:`R^t_g` those it removes. Its agreement with the plan before is

    .. math:: J_t = \frac{1}{|G_t|} \sum_{g \in G_t} \min\left(
        \frac{|K^t_g \cap K^{t-1}_g|}{|K^t_g \cup K^{t-1}_g|},
        \frac{|R^t_g \cap R^{t-1}_g|}{|R^t_g \cup R^{t-1}_g|}\right)

    over the groups :math:`G_t` that one of the two plans narrows. The cut is made by plan t once the mean of the last
    ``window`` agreements is at least ``threshold``, and at ``latest`` in any case, with a warning. One unit swapped in
    one of nine groups, 16 of 32 units each, is :math:`J = 0.987`.

    The paper compares the units that are kept. If 10 % are removed, two random plans still have 82 % of them in common,
    and if 90 % are removed, the same holds of those that go; the lower of both indices is at most 1/3 for random plans
    of any amount. A criterion that observes training is reset after every plan, so that no batch counts in two plans.
    Criteria that read data at a cut read it for each plan. Agreements are logged as ``pruning/agreement``, their means
    as ``pruning/stability``.

    For `StructuredPruning` and its presets, not for methods that act once or set masks.

    Args:
        threshold: Mean agreement from which on plans are stable, in (0, 1].
        window: Number of successive agreements that are averaged, at least 1.
        start: Moment of the first plan: a share of the run (float) or an absolute epoch or step (int).
        every: Distance between two plans: a share of the run (float) or epochs or steps (int); by default one epoch, or
            2 % of the run if it is counted in steps.
        latest: Moment of the cut if plans do not agree before.
        unit: What ints count; ``"auto"`` = epochs, steps where there is one epoch or ``max_steps``.

    Raises:
        ValueError: On construction for settings out of range; before the first training step if there are fewer than
            ``window`` comparisons until ``latest``.

    Example:
        >>> from lightning_prune import StructuredPruning, WhenStable
        >>> callback = StructuredPruning(0.5, schedule=WhenStable(threshold=0.95, window=3, latest=0.5))
    """

    decides_by_plans = True

    threshold: float = 0.95
    window: int = 3
    start: int | float = _START
    every: int | float | None = None
    latest: int | float = _END
    unit: Unit = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"WhenStable: expected `threshold` in (0, 1], the agreement of successive plans, got {self.threshold}. "
                "Give 0.95."
            )
        if self.window < 1:
            raise ValueError(f"WhenStable: expected `window` of at least 1 comparison, got {self.window}")
        _check_moment("start", self.start)
        _check_moment("latest", self.latest)
        _check_interval(self.every)
        if type(self.start) is type(self.latest) and self.latest < self.start:
            raise ValueError(
                f"WhenStable: expected `latest` not before the first plan, got start={self.start}, latest={self.latest}"
            )

    @property
    @override
    def marks(self) -> tuple[int | float | None, ...]:
        return (self.start, self.latest, self.every)

    @override
    def share(self, progress: float, remaining: float) -> float:
        return float(progress >= 1)

    @override
    def cut_moments(self, length: int | None, remaining: float) -> list[tuple[float, float]]:
        return [(_position(self.latest, length), 1.0)]

    @override
    def timeline(self, run: RunLength, remaining: float) -> tuple[CutPoint, ...]:
        points = super().timeline(run, remaining)
        plans = self._plans(run)
        return tuple(replace(point, earliest=plans[min(self.window, len(plans) - 1)]) for point in points)

    @override
    def comparisons(self, run: RunLength) -> tuple[int, ...]:
        """Moments at which a plan is made; the first one has none to be compared with.

        Raises:
            ValueError: If there are fewer than ``window`` comparisons.
        """
        plans = self._plans(run)
        if len(plans) <= self.window:
            unit = self.resolve_unit(run)
            raise ValueError(
                f"{self!r}: expected `window + 1` plans until `latest`, got {len(plans)}, after {unit} "
                f"{', '.join(map(str, plans))}. Let it start earlier, plan more often (`every`), give a later `latest` "
                "or a smaller `window`, or train longer."
            )
        return plans

    @override
    def stability(self, agreements: Sequence[float]) -> float | None:
        """Mean of the last ``window`` agreements."""
        last = agreements[-self.window :]
        return sum(last) / self.window if len(last) == self.window else None

    @override
    def is_stable(self, agreements: Sequence[float]) -> bool:
        found = self.stability(agreements)
        return found is not None and found >= self.threshold - _EPSILON

    def _plans(self, run: RunLength) -> tuple[int, ...]:
        """Moments of the plans, the last one at ``latest``."""
        unit = self.resolve_unit(run)
        length = run.total(unit)
        first, last = _position(self.start, length), _position(self.latest, length)
        if last < first:
            raise ValueError(
                f"{self!r}: expected `latest` not before the first plan, got moments {last:g} and {first:g}"
            )
        every = self.every
        if every is None:
            every = 1 if unit == "epoch" or length is None else _SHARE_OF_STEPS
        step = _step(every, length)
        moments = [first + i * step for i in range(math.floor((last - first) / step + _EPSILON) + 1)]
        return tuple(sorted({_whole(moment) for moment in (*moments, last)}))


def due(timeline: Sequence[CutPoint], done: int, now: int) -> CutPoint | None:
    """The latest cut at or before ``now`` after cut ``done``, or None.

    Of several missed cuts only the last is due, as its share includes theirs.

    Args:
        timeline: The cuts of the run.
        done: Index of the last cut that was made, -1 before the first.
        now: Epochs or steps trained so far, in the timeline's unit.
    """
    open_points = [point for point in timeline if point.index > done and point.at <= now]
    return open_points[-1] if open_points else None


def reaches(timeline: Sequence[CutPoint]) -> float:
    """Share of the way to the target at the end of the timeline; below 1 if the run ends too early."""
    return timeline[-1].share if timeline else 0.0


def _position(value: int | float, length: int | None) -> float:
    """A moment in epochs or steps; shares are clipped to stay within the run."""
    if isinstance(value, int):
        return value
    assert length is not None  # checked by `timeline`
    first = 1 if value > 0 else 0
    return max(first, min(value * length, length - 1))


def _step(every: int | float, length: int | None) -> float:
    """An interval in epochs or steps, at least one."""
    if isinstance(every, int):
        return every
    assert length is not None
    return max(1.0, every * length)


def _evenly(first: float, last: float, count: int) -> list[float]:
    return [first + (last - first) * i / max(1, count - 1) for i in range(count)]


def _whole(moment: float) -> int:
    """Round half up."""
    return math.floor(moment + 0.5 + _EPSILON)


def _check_moment(name: str, value: int | float) -> None:
    if isinstance(value, int) and value < 0:
        raise ValueError(f"expected `{name}` of at least 0 (an absolute epoch or step), got {value}")
    if isinstance(value, float) and not 0 <= value <= 1:
        raise ValueError(
            f"expected `{name}` in [0, 1] (a share of the run) or a whole number (an epoch or step), got {value}"
        )


def _check_interval(every: int | float | None) -> None:
    if isinstance(every, float) and not 0 < every <= 1:
        raise ValueError(f"expected `every` in (0, 1] (a share of the run) or a whole number, got {every}")
    if isinstance(every, int) and every < 1:
        raise ValueError(f"expected `every` of at least 1 epoch or step, got {every}")
