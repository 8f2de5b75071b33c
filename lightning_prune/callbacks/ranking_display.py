"""A progress bar while groups of units are ranked."""

from __future__ import annotations

from types import TracebackType

from lightning.pytorch import Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["RankingProgress"]


class RankingProgress:
    """A bar with the groups that are done and the time left, where the Trainer has a bar of its own.

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
        """A layer is finished.

        Args:
            name: Its name.
            done: Groups of units that were masked so far.
            total: How many there are.
        """
        self._bar.update(self._task, total=total, completed=done, description=name)
