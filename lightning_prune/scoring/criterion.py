"""Base classes of criteria, which assign a score to every unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_prune.arguments import Settings
from lightning_prune.scoring.statistics import Statistic
from lightning_prune.structure.graph import Group, Member, Structure

__all__ = [
    "Criterion",
    "ObservingCriterion",
    "bundles_of",
    "crossings",
    "score_groups",
    "statistic_of",
    "unit_members",
    "unit_rows",
    "unit_weights",
]


class Criterion(Settings, ABC):
    """Base class of criteria, which score the importance of units: the lowest are removed first.

    Concrete criteria are final frozen dataclasses that hold settings only; what they observe during training is
    accumulated by their ``statistic``.

    Attributes:
        every_n_batches: Observe every ``n``-th training batch; ignored without a statistic. A subclass declares it as a
            field to make it a setting (``every_n_batches: int = 10``); otherwise every batch is observed.
        comparable: Whether scores of different groups are comparable under a global scope.
    """

    every_n_batches: int = 1
    comparable: ClassVar[bool] = False

    @property
    def waived(self) -> Mapping[str, str]:
        """Properties that the criterion does not have, each with the reason.

        Properties: ``"dead_is_lowest"`` (a unit whose weights are all 0 scores lowest), ``"equivariant"`` (permuting
            units permutes scores), ``"merges"`` (statistics of two halves of the data merge into those of all of it).
        """
        return {}

    def statistic(self, structure: Structure) -> Statistic | None:  # noqa: ARG002
        """Statistic to observe during training; None if scores depend on the weights alone."""
        return None

    def bundles(self, group: Group, statistic: Statistic | None) -> Sequence[Sequence[int]] | None:  # noqa: ARG002
        """Bundles of units of a group that are removed together; None if units are removed one by one.

        Args:
            group: The group.
            statistic: Result of ``self.statistic``; before it has seen data, bundles have the expected sizes.
        """
        return None

    @property
    def amount(self) -> Mapping[str, int]:
        """Amount of training data for a statistic that collects data at a cut.

        ``{"batches": 1}``, or a number of ``samples`` or samples ``per_class``; see `DataPass`.
        """
        return {"batches": 1}

    @abstractmethod
    def score(self, group: Group, tensors: Mapping[str, Tensor], statistic: Statistic | None) -> Tensor:
        """Score every unit of a group.

        Args:
            group: The group.
            tensors: Parameters and buffers of the network by qualified name, detached.
            statistic: Result of ``self.statistic``, after it observed the training.

        Returns:
            Floating-point scores of shape ``(width,)``; the lowest are removed first.
        """


@dataclass(frozen=True)
class ObservingCriterion(Criterion):
    """Base class of criteria whose score is the value of their statistic.

    Raises:
        ValueError: If ``every_n_batches`` is below 1.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every_n_batches < 1:
            raise ValueError(
                f"{type(self).__name__}: expected `every_n_batches` to be 1 (every batch) or more, got "
                f"{self.every_n_batches}."
            )

    @abstractmethod
    def statistic(self, structure: Structure) -> Statistic:
        """Statistic to observe during training."""

    def score(self, group: Group, tensors: Mapping[str, Tensor], statistic: Statistic | None) -> Tensor:  # noqa: ARG002
        """Value of the statistic, shape ``(width,)``."""
        if statistic is None:
            raise ValueError(
                f"{type(self).__name__}: expected the statistic that `statistic(structure)` returned, got None."
            )
        return statistic.value(group.name)


def statistic_of(criterion: Criterion, structure: Structure) -> Statistic | None:
    """The statistic of a criterion.

    Raises:
        TypeError: If the criterion returns anything else.
    """
    found: object = criterion.statistic(structure)
    if found is None or isinstance(found, Statistic):
        return found
    raise TypeError(
        f"{type(criterion).__name__}.statistic: expected a `lightning_prune.scoring.Statistic`, or None for a "
        f"criterion of weights, got {type(found).__name__}. Derive it from `ActivationStatistic`."
    )


def score_groups(
    criterion: Criterion, groups: Iterable[Group], tensors: Mapping[str, Tensor], statistic: Statistic | None
) -> dict[str, Tensor]:
    """Score groups and check the scores: ``{group: scores}``, float64 on the CPU.

    Raises:
        FloatingPointError: If a score is NaN or infinite.
        ValueError: If a criterion returns anything but one number per unit.
    """
    scores: dict[str, Tensor] = {}
    with torch.no_grad():
        for group in groups:
            score = criterion.score(group, tensors, statistic)
            if score.shape != (group.width,):
                raise ValueError(
                    f"{type(criterion).__name__}: expected a score for each of the {group.width} units of group "
                    f"'{group.name}', got a tensor of shape {tuple(score.shape)}. Return a tensor of shape (width,)."
                )
            bad = int((~score.isfinite()).sum())
            if bad:
                raise FloatingPointError(
                    f"{type(criterion).__name__}: expected finite scores, got {bad} of {group.width} in group "
                    f"'{group.name}' that are NaN or infinite. Have the weights diverged? A lower learning rate or "
                    "gradient clipping may help."
                )
            scores[group.name] = score.detach().to("cpu", torch.float64)
    return scores


def bundles_of(
    criterion: Criterion, groups: Iterable[Group], statistic: Statistic | None
) -> dict[str, Sequence[Sequence[int]]]:
    """Bundles of units that are removed together, by group; without groups whose units are removed one by one."""
    found = ((group.name, criterion.bundles(group, statistic)) for group in groups)
    return {name: bundles for name, bundles in found if bundles is not None}


def unit_rows(tensor: Tensor, member: Member) -> Tensor:
    """Slices of a member, one row per unit: shape ``(width, k · elements of a slice)``, at least float32.

    The result may be a view of the tensor.
    """
    slices = tensor.detach().movedim(member.dim, 0)
    if member.index.size != len(slices) or (member.index.ravel() != np.arange(len(slices))).any():
        slices = slices[torch.as_tensor(member.index.ravel(), device=tensor.device)]
    # Contiguous rows: the sum of a row must not depend on its position.
    rows = slices.reshape(len(member.index), -1).contiguous()
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def crossings(earlier: Iterable[Member], member: Member, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Elements of a tensor that belong to a unit twice.

    A layer that consumes and produces the same units (in a residual sum) has weights from each unit to itself.

    Args:
        earlier: Other members of the same group.
        member: One of them.
        tensor: Values in the shape of the member's tensor.

    Yields:
        Rows and columns of the units' weights to themselves, shapes ``(width, k, 1)`` and ``(width, 1, l)``, and a view
        of the tensor that they index.
    """
    for other in earlier:
        if other.tensor == member.tensor and other.dim != member.dim:
            rows, columns = (torch.as_tensor(m.index, device=tensor.device) for m in (other, member))
            yield rows[:, :, None], columns[:, None, :], tensor.movedim((other.dim, member.dim), (0, 1))


def unit_weights(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """Weights that produce each unit, one row per unit: shape ``(width, n)``.

    Without biases and normalisation. Weights of coupled producers (a residual sum) are concatenated. For units without
    a producer (a bare parameter), the weights that consume them are used.

    Raises:
        ValueError: If no weight produces or takes the group's units.
    """
    return torch.cat(list(unit_members(group, tensors)), dim=1)


def unit_members(group: Group, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The parts of :func:`unit_weights`, one of shape ``(width, n)`` per weight; views where possible."""
    for role in ("out", "in"):
        members = [member for member in group.members if member.role == role]
        if members:
            yield from (unit_rows(tensors[m.tensor], m) for m in members)
            return
    raise ValueError(
        f"group '{group.name}': expected a weight that produces its units or takes them as input, got only "
        f"{', '.join(m.tensor for m in group.members)}. Exclude the layer from pruning."
    )
