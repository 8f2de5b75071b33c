"""The hyperparameter performance space of pruned networks: a grid of runs, its figures, tables and pictures.

`InitialNetwork` is imported when it is first used: launchers, tables and statistics need no Lightning.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.study.initial import InitialNetwork

__all__ = ["InitialNetwork"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_prune.study import initial

    return getattr(initial, name)
