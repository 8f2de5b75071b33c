"""Optional packages, imported where they are used; if one is missing, the error names the extra to install."""

from __future__ import annotations

import importlib
from functools import partial
from importlib.metadata import requires
from io import BytesIO
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure", "require"]

# Dots per inch of a figure in a notebook, where it shares a page with text.
_NOTEBOOK_DPI = 80


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say how to install it.

    Args:
        module: Name to import, such as ``"matplotlib.pyplot"``.
        extra: Extra of ``lightning-prune`` that installs it.

    Returns:
        The imported module (the last part of a dotted name).

    Raises:
        ModuleNotFoundError: If the package is not installed. An installed package that fails to import raises its own
            error.
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


def new_figure(**options: Any) -> Figure:
    """An empty figure that pyplot does not keep alive, and that a notebook shows as the last value of a cell.

    Args:
        options: Those of ``matplotlib.figure.Figure``.
    """
    figure: Figure = require("matplotlib.figure", extra="plot").Figure(**options)
    # A notebook shows figures by itself only after pyplot has drawn one.
    vars(figure)["_repr_png_"] = partial(_png, figure)
    return figure


def _png(figure: Figure) -> bytes:
    content = BytesIO()
    figure.savefig(content, format="png", dpi=_NOTEBOOK_DPI)
    return content.getvalue()


def _packages(extra: str) -> list[str]:
    """The packages of an extra, from the metadata of the installed package, which may not be on an index."""
    found = (line.partition(";") for line in requires("lightning-prune") or ())
    return [name.strip() for name, _, marker in found if marker.replace("'", '"').strip() == f'extra == "{extra}"']
