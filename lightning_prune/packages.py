"""Lightning under both names of its package: ``lightning.pytorch`` and ``pytorch_lightning``.

The packages have the same code and separate classes, and a program may use either.
"""

from __future__ import annotations

import sys
from typing import TypeVar

__all__ = ["beside", "both"]

T = TypeVar("T")

_NAME, _OTHER_NAME = "lightning.pytorch", "pytorch_lightning"


def both(kind: type[T]) -> tuple[type[T], ...]:
    """A class of ``lightning.pytorch`` and the one of ``pytorch_lightning``, if that is imported, for ``isinstance``.

    Args:
        kind: The class, as ``lightning.pytorch`` has it.

    Example:
        >>> import lightning.pytorch, pytorch_lightning
        >>> isinstance(pytorch_lightning.LightningModule(), both(lightning.pytorch.LightningModule))
        True
    """
    twin = getattr(sys.modules.get(kind.__module__.replace(_NAME, _OTHER_NAME, 1)), kind.__name__, None)
    return (kind,) if twin is None else (kind, twin)


def beside(kind: type[T], instance: object) -> type[T]:
    """A class of ``lightning.pytorch``, or the one of ``pytorch_lightning`` if an object comes from there."""
    is_other = any(base.__module__.startswith(f"{_OTHER_NAME}.") for base in type(instance).__mro__)
    return both(kind)[-1] if is_other else kind
