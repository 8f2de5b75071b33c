"""What all errors of this package have in common."""

from collections.abc import Sequence

__all__ = ["PruningError", "listed"]


class PruningError(Exception):
    """Base of the errors that this package has classes for, each of which is a builtin error, too.

    Wrong arguments are a ``ValueError`` or ``TypeError`` as everywhere.
    """


def listed(parts: Sequence[str], most: int = 5) -> str:
    """The first of these parts of a message, and the number of the others."""
    return "; ".join([*parts[:most], *([f"and {len(parts) - most} more"] if len(parts) > most else [])])
