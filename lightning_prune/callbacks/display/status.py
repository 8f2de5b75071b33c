"""Status messages of slow operations: a spinner in a terminal, a log line elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["log_status"]

# Seconds before the message is shown.
_DELAY = 2.0


@contextmanager
def log_status(trainer: Trainer, what: str) -> Iterator[None]:
    """Show a status message if the block takes longer than two seconds.

    Args:
        trainer: The trainer of the run; rank zero shows the message, with a clock if it has a progress bar in
            a terminal.
        what: The message, such as "Tracing the network".
    """
    if not trainer.is_global_zero:
        yield
        return
    console = Console()
    bar = None
    if trainer.progress_bar_callback is not None and console.is_terminal:
        bar = Progress(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), console=console, transient=True)
        bar.add_task(what, total=None)
    timer = Timer(_DELAY, bar.start if bar else lambda: rank_zero_info(f"{what} ..."))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may just have started
        if bar:
            bar.stop()
