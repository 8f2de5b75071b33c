"""What all errors of this package have in common."""

__all__ = ["PruningError"]


class PruningError(Exception):
    """Base of the errors that this package has classes for, each of which is a builtin error, too.

    Wrong arguments are a ``ValueError`` or ``TypeError`` as everywhere.
    """
