"""Tables of `benchmarks.spvr`."""

from __future__ import annotations

from typing import Any

__all__ = ["tables"]


def tables(found: dict[str, list[dict[str, Any]]]) -> str:
    """All."""
    return str(found)
