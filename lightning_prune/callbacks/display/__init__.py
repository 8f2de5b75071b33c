"""What a run shows: progress, tables, the report and the loggers' curves, pictures and files."""

from __future__ import annotations

__all__: list[str] = []
