"""What takes longer than two seconds says so: a clock in a terminal, one line elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["telling"]

# Seconds that nobody wonders about.
_PATIENCE = 2.0


@contextmanager
def telling(trainer: Trainer, what: str) -> Iterator[None]:
    """Say what is done, if it is not done in two seconds.

    Args:
        trainer: The run; its first process says it, with a clock where it has a progress bar in a terminal.
        what: "Tracing the network", say.
    """
    if not trainer.is_global_zero:
        yield
        return
    console = Console()
    bar = None
    if trainer.progress_bar_callback is not None and console.is_terminal:
        bar = Progress(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), console=console, transient=True)
        bar.add_task(what, total=None)
    timer = Timer(_PATIENCE, bar.start if bar else lambda: rank_zero_info(f"{what} ..."))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may just have begun
        if bar:
            bar.stop()
