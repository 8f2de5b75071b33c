"""Progress bars of what a callback computes before training goes on."""

from __future__ import annotations

from types import TracebackType

from lightning.pytorch import Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import Self

__all__ = ["LayerProgress"]


class LayerProgress:
    """Base class of progress bars over layers, shown if the Trainer has a progress bar.

    Args:
        trainer: The run.
        title: Text in front of the bar.
    """

    def __init__(self, trainer: Trainer, title: str) -> None:
        console = Console()
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None and console.is_terminal
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, TextColumn("{task.description}"), console=console, transient=True, disable=not shown
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
