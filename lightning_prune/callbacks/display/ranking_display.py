"""Progress bar for rankings."""

from __future__ import annotations

from types import TracebackType

from lightning.pytorch import Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["RankingProgress"]


class RankingProgress:
    """Progress bar of a ranking, shown if the Trainer has a progress bar.

    Args:
        trainer: The run.
    """

    def __init__(self, trainer: Trainer) -> None:
        console = Console()
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None and console.is_terminal
        columns = (TextColumn("Ranking groups"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, TextColumn("{task.description}"), console=console, transient=True, disable=not shown
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> RankingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def see(self, name: str, done: int, total: int) -> None:
        """Update the bar.

        Args:
            name: Name of the finished layer.
            done: Number of masked bundles.
            total: Number of bundles.
        """
        self._bar.update(self._task, total=total, completed=done, description=name)
