"""Progress of a running study: finished runs, the best so far, and the remaining time."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from lightning_prune.study.store import Result

__all__ = ["Progress"]


class Progress:
    """Prints a line for every finished run.

    Args:
        say: Takes a line.
        clock: Seconds from some moment on.
    """

    def __init__(self, say: Callable[[str], None] = print, clock: Callable[[], float] = monotonic) -> None:
        self._say, self._clock = say, clock
        self._total = self._done = self._now = 0
        self._best: tuple[float, str] | None = None
        self._began = clock()

    def stage(self, total: int, done: int) -> None:
        """Start a group of runs, some of which may be done already."""
        self._total, self._done, self._now = total, done, 0
        self._began = self._clock()
        if done < total:
            self._say(f"{total - done} of {total} runs to do")

    def ended(self, label: str, result: Result | None, metric: str) -> None:
        """Print a run's result or error."""
        self._done, self._now = self._done + 1, self._now + 1
        accuracy = None if result is None else result.metrics.get(metric)
        if accuracy is not None and (self._best is None or accuracy > self._best[0]):
            self._best = accuracy, label
        outcome = "failed" if result is None else "done" if accuracy is None else f"{100 * accuracy:.2f} %"
        best = "" if self._best is None else f" · best {100 * self._best[0]:.2f} % ({self._best[1]})"
        left = (self._clock() - self._began) / self._now * (self._total - self._done)
        self._say(f"{self._done}/{self._total} · {label}: {outcome}{best} · {_duration(left)} left")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"
