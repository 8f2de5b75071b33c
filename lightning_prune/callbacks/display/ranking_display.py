"""Progress bar for rankings."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_prune.callbacks.display.layer_progress import LayerProgress

__all__ = ["RankingProgress"]


class RankingProgress(LayerProgress):
    """Progress bar of a ranking, shown if the Trainer has a progress bar.

    Args:
        trainer: The run.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, "Ranking groups")

    def see(self, name: str, done: int, total: int) -> None:
        """Update the bar.

        Args:
            name: Name of the finished layer.
            done: Number of masked bundles.
            total: Number of bundles.
        """
        self._bar.update(self._task, total=total, completed=done, description=name)
