"""Optional packages: imported where they are used, and named with their extra where they are missing."""

from __future__ import annotations

import importlib
from importlib.metadata import requires
from types import ModuleType

__all__ = ["require"]


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say how to install it.

    Args:
        module: Name to import, ``"matplotlib.pyplot"`` say.
        extra: Extra of ``lightning-prune`` that installs it.

    Returns:
        The imported module (the last part of a dotted name).

    Raises:
        ModuleNotFoundError: If the package is not installed. A package that is installed and fails inside raises its
            own error.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        packages = " ".join(f'"{name}"' for name in _packages(extra))
        raise ModuleNotFoundError(
            f"`{package}` is needed here and is not installed. It belongs to the extra `{extra}`: pip install "
            f"{packages}",
            name=error.name,
        ) from error


def _packages(extra: str) -> list[str]:
    """What an extra installs, by the metadata of the installed package: it may be on no index."""
    found = (line.partition(";") for line in requires("lightning-prune") or ())
    return [name.strip() for name, _, marker in found if marker.replace("'", '"').strip() == f'extra == "{extra}"']
