"""What leans on the inner parts of Lightning: checkpoints, processes, strategies, other callbacks, counters."""

from __future__ import annotations

__all__: list[str] = []
