"""What layers gave in a first pass, kept so that they need not be run again on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, final

from torch import Tensor

from lightning_prune.scoring.spool import Spool, Stored
from lightning_prune.scoring.walk.program import Program

__all__ = ["Kept"]


@final
class Kept:
    """Results of the operators that have multiply-accumulates, by batch, as long as half of the memory is free.

    Args:
        program: The operators.
        spool: Where they are, among other tensors.
    """

    def __init__(self, program: Program, spool: Spool) -> None:
        self.program, self.spool = program, spool
        self._stored: dict[int, dict[int, Stored]] = {}

    def recorders(self, number: int) -> dict[int, Callable[..., Any]]:
        """By position, functions that run an operator and keep what it gives.

        Args:
            number: Of the batch.
        """
        steps = enumerate(self.program.steps)
        return {index: partial(self._run, number, index) for index, step in steps if step.macs and len(step.outs) == 1}

    def known(self, number: int, steps: Iterable[int]) -> dict[int, Callable[..., Any]]:
        """By position, functions that give what an operator gave.

        Args:
            number: Of the batch.
            steps: The operators that are to be run.
        """
        stored = self._stored.get(number, {})
        return {index: partial(_again, stored[index]) for index in steps if index in stored}

    def forget(self, number: int | None = None, up_to: int | None = None) -> None:
        """Free what operators gave.

        Args:
            number: Of a batch; of all by default.
            up_to: Up to this position; all by default.
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
    return stored.get().clone()  # others may write into it
