"""Base class of repairs, which compute new contents for the remaining layers on copies of the network.

Sums are computed in float64.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.arguments import Settings
from lightning_prune.scoring import DataPass
from lightning_prune.structure.graph import Axes, Factors
from lightning_prune.surgery.change import Change, CutError
from lightning_prune.surgery.depth import stays
from lightning_prune.surgery.shrink import cut
from lightning_prune.surgery.tensors import named, rescaled, take

__all__ = ["Repair", "Run", "install", "repaired", "require_one_restart", "require_positive"]

#: Runs the first n batches of the data, always the same, through a network.
Run = Callable[[nn.Module, int], None]


class Repair(Settings, ABC):
    """Base class of repairs.

    Attributes:
        batches: Number of batches of training data.
        restarts: Whether training restarts from the new contents, so that the optimizer state is cleared.
    """

    batches: int
    restarts: ClassVar[bool] = False

    @property
    def info(self) -> Mapping[str, float]:
        """Additional numbers for the history."""
        return {}

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:  # noqa: ARG002
        """New contents by name, in the shapes before the cut, computed from the network before it.

        Args:
            model: A copy of the network in eval mode.
            axes: Positions that the cut keeps; for a layer that becomes constant, no inputs.
            run: Runs batches through the network.
        """
        return {}

    def between(
        self,
        dense: nn.Module,  # noqa: ARG002
        narrow: nn.Module,  # noqa: ARG002
        axes: Axes,  # noqa: ARG002
        data: DataPass,  # noqa: ARG002
        factors: Factors,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """New contents, computed from the networks before and after the cut.

        Args:
            dense: A copy of the network before the cut.
            narrow: A copy of the network after it, which may be modified.
            axes: Positions that the cut keeps.
            data: Batches for both.
            factors: What rows of tensors were multiplied by in the cut.
        """
        return {}

    def after(self, model: nn.Module, run: Run) -> dict[str, Tensor]:  # noqa: ARG002
        """New contents, computed from a copy of the network after the cut, in its training mode."""
        return {}


def repaired(
    copied: Callable[[], nn.Module],
    axes: Axes,
    repairs: Sequence[Repair],
    data: DataPass | None,
    drops: Mapping[str, str] | None = None,
    factors: Factors | None = None,
) -> dict[str, Tensor]:
    """Contents of parameters and buffers that repairs change, by name, in the shapes after the cut.

    Args:
        copied: Returns a copy of the network before the cut, in its training mode.
        axes: Positions that the cut keeps.
        repairs: Repairs in order; a later one overrides earlier ones.
        data: Batches for the repairs; None if no repair needs any.
        drops: Layers that the cut removes (``structure.drops(kept)``).
        factors: What it multiplies rows of tensors by (``structure.factors(kept)``).

    Raises:
        CutError: If a content is not finite.
        ValueError: If a repair needs batches, and there are none.
    """
    drops, factors, model = drops or {}, factors or {}, copied()
    compares = [type(repair).between is not Repair.between for repair in repairs]
    dense = copied().eval() if any(compares) else model

    def run(model: nn.Module, n: int) -> None:
        _required(data, repairs).run(model, keep_modes=True, limit=n)

    inputs = {f"{name}.weight": {1: np.empty(0, np.int64)} for name, kind in drops.items() if kind == "constant"}
    emptied = {**axes, **{name: {**axes.get(name, {}), **none} for name, none in inputs.items()}}
    modes = [(module, module.training) for module in model.modules()]
    contents: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        model.eval()
        for repair in repairs:
            contents |= repair.before(model, emptied, run)
        for module, training in modes:
            module.training = training
        cut(model, axes, drops=drops, factors=factors)
        taken = {name: take(new, axes.get(name, {})) for name, new in contents.items() if stays(name, drops)}
        contents = {name: rescaled(new, factors.get(name)) for name, new in taken.items()}
        _copy_into(model, contents)
        for repair, does_compare in zip(repairs, compares, strict=True):
            if does_compare:
                contents |= repair.between(dense, model, axes, _required(data, repairs), factors)
                _copy_into(model, contents)
            later = repair.after(model, run)
            _copy_into(model, later)
            contents |= later
    broken = [name for name, content in contents.items() if not content.isfinite().all()]
    if broken:
        raise CutError(
            f"{', '.join(map(repr, repairs))}: expected finite new contents, got NaN or infinity for "
            f"{', '.join(broken)}. Look for NaN or infinity in the data, and for activations that overflow."
        )
    return contents


def _required(data: DataPass | None, repairs: Sequence[Repair]) -> DataPass:
    if data is None:
        raise ValueError(f"expected batches of data for {', '.join(map(repr, repairs))}, got none")
    return data


def install(change: Change, model: nn.Module, contents: Mapping[str, Tensor]) -> None:
    """Set the contents of parameters and buffers of a network, as part of a ``change``."""
    present = named(model)
    for name, content in contents.items():
        tensor = present[name]
        with torch.no_grad():
            data = torch.empty_like(tensor.detach()).copy_(content)
        change.assign(tensor, data, tensor.grad)


def _copy_into(model: nn.Module, contents: Mapping[str, Tensor]) -> None:
    present = named(model)
    for name, content in contents.items():
        present[name].copy_(content)


def require_positive(repair: Any) -> None:
    """Check that every setting is above 0."""
    for name in repair.__dataclass_fields__:
        if getattr(repair, name) <= 0:
            raise ValueError(
                f"{type(repair).__name__}: expected `{name}` above 0, got {getattr(repair, name)}. Omit it for "
                "the default."
            )


def require_one_restart(asker: str, extensions: Sequence[Any]) -> None:
    """Check that at most one of the extensions of a cut sets all weights.

    Raises:
        ValueError: If several do.
    """
    several = [one for one in extensions if one.restarts]
    if len(several) > 1:
        raise ValueError(
            f"{asker}: expected at most one of `extensions` that sets all weights, got "
            f"{', '.join(map(repr, several))}. Each would override the previous one: keep only one."
        )
