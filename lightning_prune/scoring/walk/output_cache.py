"""Cache of the outputs of layers in a first pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, final

from torch import Tensor

from lightning_prune.scoring.spool import Spool, Stored
from lightning_prune.scoring.walk.program import Program

__all__ = ["OutputCache"]


@final
class OutputCache:
    """Outputs of the operators with multiply-accumulates, by batch, while half of the memory is free.

    Args:
        program: The operators.
        spool: Tensor store, shared with other tensors.
    """

    def __init__(self, program: Program, spool: Spool) -> None:
        self.program, self.spool = program, spool
        self._stored: dict[int, dict[int, Stored]] = {}

    def recorders(self, number: int) -> dict[int, Callable[..., Any]]:
        """Replacements of operators, by position, that run the operator and cache its output.

        Args:
            number: Index of the batch.
        """
        steps = enumerate(self.program.steps)
        return {index: partial(self._run, number, index) for index, step in steps if step.macs and len(step.outs) == 1}

    def known(self, number: int, steps: Iterable[int]) -> dict[int, Callable[..., Any]]:
        """Replacements of operators, by position, that return the cached output.

        Args:
            number: Index of the batch.
            steps: Positions of the operators to run.
        """
        stored = self._stored.get(number, {})
        return {index: partial(_again, stored[index]) for index in steps if index in stored}

    def forget(self, number: int | None = None, up_to: int | None = None) -> None:
        """Free cached outputs.

        Args:
            number: Index of a batch; all by default.
            up_to: Free outputs up to this position; all by default.
        """
        for batch in [*self._stored] if number is None else [number]:
            stored = self._stored.get(batch, {})
            for index in [index for index in stored if up_to is None or index <= up_to]:
                stored.pop(index).free()

    def _run(self, number: int, index: int, *args: Any, **kwargs: Any) -> Tensor:
        func = self.program.steps[index].func
        assert func is not None
        found: Tensor = func(*args, **kwargs)
        size = found.numel() * found.element_size()
        if self.spool.in_memory + size <= self.spool.limit // 2:
            self._stored.setdefault(number, {})[index] = self.spool.put(found)
        return found


def _again(stored: Stored, *_: Any, **__: Any) -> Tensor:
    return stored.get().clone()  # it may be modified in place
