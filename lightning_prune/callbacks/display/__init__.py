"""Display of a run: progress, tables, the report, and curves, pictures and files for loggers."""

from __future__ import annotations

__all__: list[str] = []
