"""The extensions of a run, in the given order."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_prune.callbacks.calibration import Calibration
from lightning_prune.callbacks.extensions.extension import CutExtension, RunContext
from lightning_prune.planning import Plan
from lightning_prune.reporting import require
from lightning_prune.structure import Structure
from lightning_prune.surgery import Edit, Repair, repaired

__all__ = ["Extensions"]


class Extensions:
    """Calls the hooks of all extensions of a run, and computes their repairs together.

    Args:
        given: Extensions as passed by the user. Those with state are copied.
    """

    def __init__(self, given: Sequence[Repair | CutExtension]) -> None:
        self._all = tuple(copy.deepcopy(one) if isinstance(one, CutExtension) else one for one in given)
        self.parts = tuple(one for one in self._all if isinstance(one, CutExtension))

    @property
    def waits(self) -> bool:
        """Whether an extension postpones the next cut."""
        return any(part.waits for part in self.parts)

    def prepare(self, run: RunContext) -> None:
        """Check the run before its first training step.

        Raises:
            ValueError: If an extension does not support it.
        """
        self._calibration(run, [one for one in self._all if isinstance(one, Repair)])
        for part in self.parts:
            part.prepare(run)

    def before_step(self, run: RunContext, batch: Any, batch_idx: int) -> None:
        """Call the hook of each extension."""
        for part in self.parts:
            part.before_step(run, batch, batch_idx)

    def after_step(self, run: RunContext) -> None:
        """Call the hook of each extension."""
        for part in self.parts:
            part.after_step(run)

    def finish_step(self) -> None:
        """Call the hook of each extension."""
        for part in self.parts:
            part.finish_step()

    def prepare_cut(self, run: RunContext, plan: Plan) -> bool:
        """Whether all extensions are ready for a planned cut."""
        ready = [part.prepare_cut(run, plan) for part in self.parts]
        return all(ready)

    def cancel_cut(self) -> None:
        """Call the hook of each extension."""
        for part in self.parts:
            part.cancel_cut()

    def before_cut(self, run: RunContext) -> None:
        """Call the hook of each extension."""
        for part in self.parts:
            part.before_cut(run)

    def repairs(self, run: RunContext) -> list[Repair]:
        """Return all repairs of the next cut, in order."""
        lists = ([one] if isinstance(one, Repair) else one.repairs(run) for one in self._all)
        return [repair for found in lists for repair in found]

    def contents(
        self, run: RunContext, repairs: Sequence[Repair], structure: Structure, plan: Plan
    ) -> dict[str, Tensor]:
        """Compute the new values of parameters and buffers that these repairs change at a cut, by name.

        Args:
            run: The run, before the cut.
            repairs: The repairs returned by `repairs`.
            structure: Structure of the network.
            plan: What the cut keeps.

        Raises:
            CutError: If a value is not finite.
        """
        if not repairs:
            return {}
        batches = self._calibration(run, repairs)
        axes, drops, factors = structure.axes(plan.kept), structure.drops(plan.kept), structure.factors(plan.kept)
        return repaired(batches.copy, axes, repairs, batches.data, drops, factors)

    def after_cut(self, edits: Sequence[Edit]) -> None:
        """Call the hook of each extension."""
        for part in self.parts:
            part.after_cut(edits)

    def after_take_back(self) -> None:
        """Call the hook of each extension."""
        for part in self.parts:
            part.after_take_back()

    def on_train_end(self, run: RunContext) -> None:
        """Call the hook of each extension."""
        for part in self.parts:
            part.on_train_end(run)

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the state for a checkpoint, by extension."""
        return {name: state for name, part in self._named() if (state := part.state())}

    def restore(self, states: Mapping[str, Any]) -> None:
        """Restore the states; an extension without one keeps its initial state.

        Raises:
            TypeError: If a value is of another type.
        """
        for name, part in self._named():
            if name in states:
                require(states[name], dict[str, Any], name)
                part.restore(states[name])

    def snapshot_state(self) -> Callable[[], None]:
        """Return a function that restores the current state of every extension."""
        known = [dict(vars(part)) for part in self.parts]

        def back() -> None:
            for part, values in zip(self.parts, known, strict=True):
                for name in vars(part).keys() - values.keys():
                    del vars(part)[name]
                vars(part).update(values)

        return back

    def _named(self) -> list[tuple[str, CutExtension]]:
        """Extensions by class name, numbered if there are several of a class."""
        seen: Counter[str] = Counter()
        found = []
        for part in self.parts:
            name = type(part).__name__
            seen[name] += 1
            found.append((name if seen[name] == 1 else f"{name}-{seen[name]}", part))
        return found

    def _calibration(self, run: RunContext, repairs: Sequence[Repair]) -> Calibration:
        readers = [repair for repair in repairs if repair.batches]
        reader, batches = (repr(readers[0]) if readers else None), max((one.batches for one in readers), default=0)
        return Calibration(run.trainer, run.module, run.traced, batches=batches, reader=reader)
