"""When cuts happen: every schedule found, run through its contract; then the moments themselves."""

import inspect
import pickle
import warnings
from itertools import pairwise

import jsonargparse
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.planning import schedules
from lightning_prune.planning.schedules import (
    AtStart,
    Cubic,
    CutPoint,
    Explicit,
    Geometric,
    LinearSchedule,
    OneShot,
    RunLength,
    Schedule,
    WhenStable,
    due,
    reaches,
)

SCHEDULES = [
    value
    for value in vars(schedules).values()
    if inspect.isclass(value) and issubclass(value, Schedule) and not inspect.isabstract(value)
]
remainings = st.floats(0.01, 0.99)


def moments(schedule: Schedule, run: RunLength, remaining: float = 0.5) -> list[int]:
    return [point.at for point in schedule.timeline(run, remaining)]


def shares(schedule: Schedule, run: RunLength, remaining: float = 0.5) -> list[float]:
    return [point.share for point in schedule.timeline(run, remaining)]


def test_discovery_finds_the_schedules():
    assert {AtStart, OneShot, LinearSchedule, Cubic, Geometric, Explicit, WhenStable} <= set(SCHEDULES)


@pytest.mark.parametrize("cls", SCHEDULES)
class TestContract:
    @given(a=st.floats(0, 1), b=st.floats(0, 1), remaining=remainings)
    def test_share_is_monotone_from_0_to_1(self, cls, a, b, remaining):
        share = cls().share
        assert share(0.0, remaining) == 0
        assert share(1.0, remaining) == pytest.approx(1, abs=1e-12)
        low, high = sorted((a, b))
        assert 0 <= share(low, remaining) <= share(high, remaining) + 1e-12 <= 1 + 2e-12

    @given(epochs=st.integers(2, 300), remaining=remainings)
    def test_timeline_ascends_inside_the_run_and_reaches_the_target(self, cls, epochs, remaining):
        run = RunLength(epochs)
        timeline = cls().timeline(run, remaining)
        assert timeline == cls().timeline(run, remaining)
        assert [point.index for point in timeline] == list(range(len(timeline)))
        at = [point.at for point in timeline]
        assert at == sorted(set(at))
        assert at[0] >= (0 if cls is AtStart else 1)
        assert at[-1] <= epochs - 1
        done = [point.share for point in timeline]
        assert done == sorted(done)
        assert done[0] > 0
        assert reaches(timeline) == pytest.approx(1, abs=1e-12)

    def test_nothing_to_remove_means_no_cuts(self, cls):
        assert cls().timeline(RunLength(10), 1.0) == ()

    def test_value(self, cls):
        schedule = cls()
        assert eval(repr(schedule)) == schedule
        assert pickle.loads(pickle.dumps(schedule)) == schedule
        assert hash(schedule) == hash(cls())

    def test_named_in_a_configuration_file(self, cls):
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--schedule", type=Schedule)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # renamed between the jsonargparse versions that we support
            made = parser.instantiate_classes(parser.parse_args([f"--schedule={cls.__name__}"])).schedule
        assert made == cls()

    def test_plot(self, cls):
        (axes,) = cls().plot().axes
        line, dots = axes.lines
        assert line.get_ydata()[0] == 100
        assert line.get_ydata()[-1] == pytest.approx(50)
        points = cls().timeline(RunLength(100), 0.5)
        assert list(dots.get_xdata()) == [point.at for point in points]
        assert list(dots.get_ydata()) == pytest.approx([100 - 50 * point.share for point in points])
        assert axes.get_ylim()[0] == 0, "half the size is half as high"


@pytest.mark.parametrize("run", [RunLength(1), RunLength(5, 40, 10), RunLength(None, 40), RunLength(None)], ids=repr)
def test_at_the_start_of_any_run(run):
    """Also where whole numbers would be ambiguous, or the length is not known."""
    assert AtStart().timeline(run, 0.5) == (CutPoint(0, 0, "step", 1.0),)


def test_cuts_spread_evenly_over_shares_of_the_run():
    assert moments(LinearSchedule(), RunLength(100)) == [10, 23, 35, 48, 60]
    assert moments(LinearSchedule(cuts=1), RunLength(100)) == [10]
    assert moments(LinearSchedule(start=0.0, end=1.0, cuts=2), RunLength(100)) == [0, 99]
    assert shares(LinearSchedule(cuts=4), RunLength(100)) == [0.25, 0.5, 0.75, 1]
    assert shares(Cubic(cuts=2), RunLength(100)) == [1 - 0.5**3, 1]


def test_every_replaces_cuts():
    assert moments(LinearSchedule(start=3, end=12, every=4), RunLength(20)) == [3, 7, 11]
    assert moments(LinearSchedule(start=0.1, end=0.5, every=0.1), RunLength(30)) == [3, 6, 9, 12, 15]


def test_absolute_moments():
    assert moments(OneShot(at=0), RunLength(5)) == [0]
    assert moments(OneShot(at=4), RunLength(5)) == [4]
    assert moments(Explicit(((2, 0.3), (9, 1.0))), RunLength(10)) == [2, 9]
    assert Explicit([[2, 0.3], [9, 1]]) == Explicit(((2, 0.3), (9, 1.0)))


def test_several_cuts_on_one_epoch_become_the_last_of_them():
    timeline = LinearSchedule(cuts=5).timeline(RunLength(4), 0.5)
    assert [(point.at, point.share) for point in timeline] == [(1, 0.4), (2, 1.0)]
    assert [point.index for point in timeline] == [0, 1]


def test_geometric_is_the_rate_of_the_current_size():
    # the seed's run: 10 % of the current width every 15 epochs from epoch 30, down to 32 %
    seed = Geometric(rate=0.1, start=30, every=15)
    timeline = seed.timeline(RunLength(300), 0.32)
    left = 1.0
    for i, point in enumerate(timeline):
        left = max(0.32, left * 0.9)
        assert point.at == 30 + 15 * i
        assert 1 - point.share * (1 - 0.32) == pytest.approx(left)
    assert len(timeline) == 11
    assert reaches(timeline) == 1


@pytest.mark.parametrize("cuts", range(1, 40))
def test_geometric_makes_no_cut_too_many(cuts):
    assert len(Geometric(rate=0.1, start=1, every=1).timeline(RunLength(100), 0.9**cuts)) == cuts


def test_geometric_that_does_not_reach_its_target_stops_and_tells():
    timeline = Geometric(rate=0.1, start=30, every=15).timeline(RunLength(60), 0.32)
    assert [point.at for point in timeline] == [30, 45]
    assert reaches(timeline) == pytest.approx((1 - 0.81) / (1 - 0.32))
    assert reaches(()) == 0
    assert moments(Geometric(start=2, every=2, end=5), RunLength(60)) == [2, 4]


@given(rate=st.floats(0.05, 0.9), remaining=remainings)
def test_geometric_spread_makes_no_cut_above_its_rate(rate, remaining):
    left = [1.0] + [
        1 - p.share * (1 - remaining)
        for p in Geometric(rate, start=1, end=9000, unit="epoch").timeline(RunLength(10**4), remaining)
    ]
    assert left[-1] == pytest.approx(remaining)
    assert all(after >= before * (1 - rate) - 1e-9 for before, after in pairwise(left))


@pytest.mark.parametrize(
    ("run", "unit", "first"),
    [
        (RunLength(30), "epoch", 3),
        (RunLength(30, steps_per_epoch=7), "epoch", 3),
        (RunLength(1, steps_per_epoch=50), "step", 5),
        (RunLength(None, steps=200), "step", 20),
        (RunLength(30, steps=200, steps_per_epoch=100), "step", 20),
        (RunLength(30, steps=10**6, steps_per_epoch=100), "epoch", 3),
    ],
)
def test_auto_counts_epochs_unless_there_is_one_or_max_steps(run, unit, first):
    point = OneShot().timeline(run, 0.5)[0]
    assert (point.unit, point.at) == (unit, first)


def test_run_lengths():
    assert RunLength(3, None, 10).total("step") == 30
    assert RunLength(3, 25, 10).total("step") == 25
    assert RunLength(None, 25, 10).total("epoch") == 3  # the third is cut short, but starts
    assert RunLength(None).total("epoch") is None
    assert RunLength(4).total("step") is None


def test_without_a_length_whole_numbers_are_needed():
    assert moments(Geometric(start=30, every=15), RunLength(None), 0.8) == [30, 45, 60]
    assert moments(LinearSchedule(start=1, end=5, cuts=2), RunLength(None)) == [1, 5]
    with pytest.raises(ValueError, match=r"length in epochs is not known\. Give whole numbers"):
        LinearSchedule().timeline(RunLength(None), 0.5)
    with pytest.raises(ValueError, match="length in steps is not known"):
        LinearSchedule().timeline(RunLength(1), 0.5)


def test_whole_numbers_under_max_steps_must_say_what_they_count():
    run = RunLength(None, steps=1000, steps_per_epoch=10)
    with pytest.raises(ValueError, match=r"limited by `max_steps=1000`. Say unit="):
        Geometric(start=30, every=15).timeline(run, 0.5)
    assert moments(Geometric(start=30, every=15, unit="epoch"), run, 0.8) == [30, 45, 60]
    assert Geometric(start=30, every=15, unit="step").timeline(run, 0.8)[0].unit == "step"


@pytest.mark.parametrize("schedule", [OneShot(at=30), LinearSchedule(start=30, end=40), Explicit(((50, 1.0),))])
def test_a_schedule_that_never_fires(schedule):
    with pytest.raises(
        ValueError, match=r"never fires: its first cut is due after epoch \d0, but the run has 30 epoch"
    ):
        schedule.timeline(RunLength(30), 0.5)


def test_a_run_of_one_moment_leaves_no_room():
    with pytest.raises(ValueError, match="never fires"):
        LinearSchedule(unit="epoch").timeline(RunLength(1), 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneShot(at=1.5), r"`at` in \[0, 1\] .* or a whole number .*, got 1.5"),
        (lambda: OneShot(at=-1), "`at` of at least 0 .*, got -1"),
        (lambda: LinearSchedule(start=0.7), "`end` not before `start`, got start=0.7, end=0.6"),
        (
            lambda: LinearSchedule(start=20).timeline(RunLength(30), 0.5),
            "`end` not before `start`, got moments 20 and 18",
        ),
        (lambda: Geometric(start=20).timeline(RunLength(30), 0.5), "`end` not before `start`, got moments 20 and 18"),
        (lambda: LinearSchedule(cuts=0), "`cuts` of at least 1, got 0"),
        (lambda: LinearSchedule(cuts=3, every=3), "`cuts` or `every`, got both"),
        (lambda: Cubic(every=0), "`every` of at least 1 epoch or step, got 0"),
        (lambda: Cubic(every=0.0), r"`every` in \(0, 1\]"),
        (lambda: Cubic(every=1.5), r"`every` in \(0, 1\]"),
        (lambda: Geometric(rate=10), r"`rate` in \(0, 1\), .*, got 10"),
        (lambda: Geometric(end=2.0), "`end` in"),
        (lambda: Explicit(()), r"a last one of 1, got \[\]"),
        (lambda: Explicit(((3, 0.5),)), r"a last one of 1, got \[0.5\]"),
        (lambda: Explicit(((3, 0.5), (4, 0.4), (5, 1.0))), "ascending shares"),
        (lambda: Explicit(((5, 0.5), (4, 1.0))), r"ascending moments in `cuts`, got \[5, 4\]"),
        (lambda: Explicit(((5, 0.5), (0.4, 1.0))), "all shares .* or all absolute"),
        (lambda: LinearSchedule().timeline(RunLength(30), 0.0), r"`remaining` in \(0, 1\], got 0.0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("cuts", [2.5, "3"])
def test_cuts_are_a_whole_number(cuts):
    with pytest.raises(TypeError, match="expected `cuts` to be a whole number or None, got "):
        Cubic(cuts=cuts)


@given(done=st.integers(-1, 5), now=st.integers(0, 30))
def test_due_is_idempotent_and_takes_the_latest(done, now):
    timeline = tuple(CutPoint(i, 5 * i, "epoch", (i + 1) / 5) for i in range(5))
    point = due(timeline, done, now)
    reference = [p for p in timeline if p.at <= now]
    if not reference or reference[-1].index <= done:
        assert point is None
    else:
        assert point == reference[-1]
        assert due(timeline, point.index, now) is None


def test_moments_of_plans_that_are_compared():
    """Every epoch from the first plan to the latest moment, which is always one of them."""
    assert WhenStable(start=2, latest=6).comparisons(RunLength(10)) == (2, 3, 4, 5, 6)
    assert WhenStable(start=2, latest=9, every=3).comparisons(RunLength(10)) == (2, 5, 8, 9)
    assert WhenStable().comparisons(RunLength(20)) == tuple(range(2, 13))
    assert WhenStable(start=0, latest=0.5, every=0.1).comparisons(RunLength(20)) == (0, 2, 4, 6, 8, 10)
    assert WhenStable(latest=0.2).comparisons(RunLength(1, steps_per_epoch=100)) == (10, 12, 14, 16, 18, 20)
    assert LinearSchedule().comparisons(RunLength(20)) == ()


def test_the_earliest_moment_of_a_cut_by_agreement():
    (point,) = WhenStable(window=3, start=2, latest=9).timeline(RunLength(10), 0.5)
    assert (point.at, point.earliest, point.share) == (9, 5, 1.0)
    assert LinearSchedule().timeline(RunLength(10), 0.5)[0].earliest is None


@given(values=st.lists(st.floats(0, 1), max_size=8), window=st.integers(1, 4), threshold=st.floats(0.01, 1))
def test_stable_from_the_mean_of_a_whole_window_on(values, window, threshold):
    schedule = WhenStable(threshold, window)
    if len(values) < window:
        assert schedule.stability(values) is None
        assert not schedule.is_stable(values)
        return
    mean = sum(values[len(values) - window :]) / window
    assert schedule.stability(values) == pytest.approx(mean)
    if abs(mean - threshold) > 1e-6:
        assert schedule.is_stable(values) == (mean > threshold)


def test_equal_plans_meet_a_threshold_of_one():
    assert WhenStable(1.0, 3).is_stable([0.2, 1.0, 1.0, 1.0])
    assert WhenStable(0.9, 3).is_stable([0.9] * 3), "despite rounding"
