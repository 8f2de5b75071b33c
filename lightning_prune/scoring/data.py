"""A fixed set of samples on which a network can be run repeatedly without side effects."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.scoring.contexts import preserved_state
from lightning_prune.scoring.samples import Samples, batch_length
from lightning_prune.scoring.sampling import Choice, batch_size_of, class_members, draw, hold_back

__all__ = ["Batch", "DataPass", "Forward", "forward"]

#: Arguments and keywords of ``forward``.
Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of samples.

    Attributes:
        args: Positional arguments of ``forward``.
        kwargs: Keyword arguments of ``forward``.
        labels: One entry per sample; None if the data has none.
        raw: The batch as yielded by the data, for a training step.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    raw: Any = None

    def __len__(self) -> int:
        length = batch_length((self.args, dict(self.kwargs)))
        return 1 if length is None else length

    def rows(self, numbers: Sequence[int]) -> Batch:
        """Select samples, in this order, without ``raw``."""
        length = len(self)

        def taken(leaf: Any) -> Any:
            has_rows = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == length
            return leaf[torch.as_tensor(numbers, device=leaf.device)] if has_rows else leaf

        args, kwargs, labels = tree_map(taken, (self.args, dict(self.kwargs), self.labels))
        return Batch(args, kwargs, labels)


#: Runs a network on a batch.
Forward = Callable[[nn.Module, Batch], Any]


def forward(model: nn.Module, batch: Batch) -> Any:
    """``model(*batch.args, **batch.kwargs)``."""
    return model(*batch.args, **batch.kwargs)


@final
class DataPass:
    """A fixed set of samples that can be iterated over repeatedly, in the same order.

    Samples are read once, when first needed: by index if possible (a `DataLoader` over a map-style dataset), else by
        iterating over ``batches`` once. Selection and order depend on the seed alone, so that a resumed run has the
        same.

    Args:
        batches: A `DataLoader`, a list or another finite iterable of batches, or one batch: tensors ``(x, y)`` or a
            mapping of them.
        samples: Number of samples, stratified by class if the labels are classes; all by default.
        per_class: Number of samples of every class, instead of ``samples``. For labels of more than one dimension
            (segmentation), the number of samples that contain the class.
        seed: Seed of selection and order, and of random numbers drawn while reading and running.
        labels: Function that returns the labels of a batch, one entry per sample; by default the second element of a
            pair ``(x, y)``.
        inputs: Function that returns the input of ``forward`` for a batch: a tensor, a tuple of arguments or a mapping
            of keyword arguments. By default the first element of a pair, else the batch itself.
        batch_size: Samples per batch; by default as in ``batches``.
        loss: Scalar loss of a batch, ``loss(model, batch)``, for statistics that use gradients.
        transfer: Applied to every batch before use, for instance to move it to a device.
        memory_limit: Bytes of samples to keep in memory; the rest is kept in memory-mapped temporary files.
        rank: Rank of this process among ``world_size``; each process gets a part of the samples.
        world_size: Number of processes.
        progress: Called after each batch of a `run` with the number of samples done and in total.

    Attributes:
        call: Runs a network on a batch; `forward` by default, see `using`.
        macs: Multiply-accumulates (1 MAC = 2 FLOPs) of all runs that count them.

    Raises:
        ValueError: If an argument is out of range; when samples are read, if there are none, or if ``per_class`` is
            given and the labels are not classes.

    Example:
        >>> import torch
        >>> from lightning_prune.scoring import DataPass
        >>> data = DataPass([(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))] * 5, samples=6)
        >>> len(data), data.classes, [len(batch) for batch in data]
        (6, {0: 3, 1: 3}, [4, 2])
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        samples: int | None = None,
        per_class: int | None = None,
        seed: int = 0,
        labels: Callable[[Any], Any] | None = None,
        inputs: Callable[[Any], Any] | None = None,
        batch_size: int | None = None,
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
        transfer: Callable[[Any], Any] | None = None,
        memory_limit: int = 2**30,
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        _require_positive(samples=samples, per_class=per_class, batch_size=batch_size, world_size=world_size)
        if samples is not None and per_class is not None:
            raise ValueError(
                f"DataPass: expected `samples` or `per_class`, got both ({samples} and {per_class}). Leave one out."
            )
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world_size:
            raise ValueError(f"DataPass: expected `rank` to be an int in [0, {world_size}), got {rank!r}.")
        _require_kinds(batches=batches, seed=seed, memory_limit=memory_limit)
        _require_callable(labels=labels, inputs=inputs, loss=loss, transfer=transfer, progress=progress)
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.loss = loss
        self.call: Forward = forward
        self.macs = 0
        self.progress = progress
        self._batches = [batches] if _is_batch(batches) else batches
        self._choice = samples, per_class
        self._memory_limit = memory_limit
        self._labels, self._inputs, self._transfer = labels, inputs, transfer
        self._batch_size = batch_size
        self._drawn: tuple[Samples, list[int]] | None = None
        self._all_labels: list[Tensor] | None = None

    # -- samples ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of samples of this process."""
        return len(self._order[self.rank :: self.world_size])

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of this process, always in the same order."""
        for group in self._groups:
            yield self._batch(self._samples.batch(group))

    def batch(self, number: int) -> Batch:
        """The batch at this position."""
        return self._batch(self._samples.batch(self._groups[number]))

    @property
    def batch_sizes(self) -> list[int]:
        """Samples in each batch of this process."""
        return [len(group) for group in self._groups]

    def rearranged(self, order: Sequence[int], batch_size: int) -> DataPass:
        """A pass over samples of this process in another order, for this process alone.

        Args:
            order: Positions of the samples in the current order.
            batch_size: Samples in a batch.
        """
        _require_positive(batch_size=batch_size)
        mine = [number for group in self._groups for number in group]
        other = self._part([mine[position] for position in order])
        other.rank, other.world_size, other._batch_size = 0, 1, batch_size
        return other

    @property
    def has_transfer(self) -> bool:
        """Whether batches are transferred before use."""
        return self._transfer is not None

    @property
    def in_memory(self) -> int:
        """Bytes of the samples kept in memory."""
        return self._samples.spool.in_memory

    @property
    def total(self) -> int:
        """Number of samples of all processes."""
        return len(self._order)

    @property
    def batch_size(self) -> int:
        """Samples per batch; the last batch, and batches of another structure, may have fewer."""
        if self._batch_size is None:
            self._batch_size = batch_size_of(self._batches) or self._samples.first_length
        return self._batch_size

    @property
    def labels(self) -> Tensor:
        """Labels of this process's samples, in the order of the batches.

        Raises:
            ValueError: If the data has none.
        """
        labels = self._known_labels([number for group in self._groups for number in group])
        if labels is None:
            raise ValueError(
                "DataPass: expected data with labels of one shape, got none. Give batches `(x, y)`, or `labels=`, a "
                "function of a batch that returns them."
            )
        return labels

    @property
    def classes(self) -> dict[int, int]:
        """Number of this process's samples of every class.

        Raises:
            ValueError: If the data has no labels, or these are no classes.
        """
        return {label: len(positions) for label, positions in class_members(self.labels).items()}

    def fingerprint(self) -> str:
        """Hexadecimal digest of the content of this process's samples."""
        return self._samples.fingerprint([number for group in self._groups for number in group])

    def split(self, held_back: float = 0.2, seed: int | None = None) -> tuple[DataPass, DataPass]:
        """Split into two passes, stratified by class; the second has the share ``held_back`` of the samples.

        Args:
            held_back: Share of the samples, in (0, 1).
            seed: Seed of the split; by default that of the pass.

        Raises:
            ValueError: If one of the parts would be empty.
        """
        if not isinstance(held_back, (int, float)) or not 0 < held_back < 1:
            raise ValueError(f"DataPass.split: expected `held_back` between 0 and 1, got {held_back!r}.")
        order, rng = self._order, np.random.default_rng(self.seed if seed is None else seed)
        count = round(held_back * len(order))
        if not 0 < count < len(order):
            raise ValueError(
                f"DataPass.split: expected at least one sample in each part, got {count} held back of {len(order)}. "
                "Give more samples."
            )
        chosen = set(hold_back(len(order), self._known_labels(order), count, rng).tolist())
        parts = [[number for i, number in enumerate(order) if (i in chosen) is held] for held in (False, True)]
        return self._part(parts[0]), self._part(parts[1])

    def using(
        self,
        *,
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
        inputs: Callable[[Any], Any] | None = None,
        transfer: Callable[[Any], Any] | None = None,
        call: Forward | None = None,
    ) -> DataPass:
        """The same samples with another loss, inputs, transfer or call; None keeps the current one."""
        other = copy.copy(self)
        other.macs = 0
        other.loss = self.loss if loss is None else loss
        other._inputs = self._inputs if inputs is None else inputs
        other._transfer = self._transfer if transfer is None else transfer
        other.call = self.call if call is None else call
        return other

    # -- running ------------------------------------------------------------------------------------------------------

    def run(
        self,
        model: nn.Module,
        see: Callable[[Batch, Any], None] | None = None,
        *,
        call: Callable[[nn.Module, Batch], Any] | None = None,
        keep_modes: bool = False,
        grad: bool = False,
        limit: int | None = None,
        macs: int = 0,
    ) -> int:
        """Run a network on the samples, then restore its modes, buffers, gradients and the random states.

        Args:
            model: The network.
            see: Called with each batch and its output.
            call: Runs a batch; by default ``self.call``.
            keep_modes: Keep train and eval modes instead of setting eval mode.
            grad: Record gradients.
            limit: Run only this many batches.
            macs: Multiply-accumulates per sample, added to ``self.macs``.

        Returns:
            The number of samples.
        """
        call, done = self.call if call is None else call, 0
        with preserved_state(model, keep_modes=keep_modes, seed=self.seed), torch.inference_mode(False):
            for index, batch in enumerate(self):
                if limit is not None and index >= limit:
                    break
                with torch.set_grad_enabled(grad):
                    output = call(model, batch)
                    if see is not None:
                        see(batch, output)
                done += len(batch)
                self.macs += len(batch) * macs
                if self.progress is not None:
                    self.progress(done, len(self))
        return done

    def loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch.

        Raises:
            ValueError: If the pass has no loss, or the loss is not a scalar with a gradient.
        """
        if self.loss is None:
            raise ValueError("expected data with a loss, got none. Give `loss=`.")
        loss = self.loss(model, batch)
        if isinstance(loss, Tensor) and loss.numel() == 1 and (loss.requires_grad or not torch.is_grad_enabled()):
            return loss
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        got += " without a gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise ValueError(
            f"expected a loss that is a tensor with one number, and a gradient where one is taken, got {got}"
        )

    # -- internals
    # -------------------------------------------------------------------------------------------------------

    @property
    def _samples(self) -> Samples:
        return self._draw()[0]

    @property
    def _order(self) -> list[int]:
        return self._draw()[1]

    @property
    def _groups(self) -> list[list[int]]:
        """Numbers of this process's samples, batch by batch."""
        return self._samples.groups(self._order[self.rank :: self.world_size], self.batch_size)

    def _draw(self) -> tuple[Samples, list[int]]:
        if self._drawn is None:
            choice = Choice(*self._choice, self.seed, self._labels_in, known=self._labels is None)
            samples, order = draw(self._batches, choice, self._memory_limit)
            if not order:
                raise ValueError("DataPass: expected at least one sample, got an empty data set or loader.")
            self._drawn = samples, order
        return self._drawn

    def _part(self, order: list[int]) -> DataPass:
        part = copy.copy(self)
        part._drawn, part.macs, part._batch_size = (self._samples, order), 0, self.batch_size
        return part

    def _batch(self, raw: Any) -> Batch:
        raw = raw if self._transfer is None else self._transfer(raw)
        args, kwargs = self._inputs_in(raw)
        return Batch(args, kwargs, self._labels_in(raw), raw)

    def _inputs_in(self, raw: Any) -> Inputs:
        taken = raw[0] if self._inputs is None and _is_pair(raw) else raw
        taken = taken if self._inputs is None else self._inputs(raw)
        if isinstance(taken, Mapping):
            return (), dict(taken)
        return (tuple(taken) if isinstance(taken, (tuple, list)) else (taken,)), {}

    def _labels_in(self, raw: Any) -> Tensor | None:
        if self._labels is None and not _is_pair(raw):
            return None
        found = raw[1] if self._labels is None else self._labels(raw)
        labels = _as_tensor(found)
        length = batch_length(raw)
        if labels.ndim == 0 or len(labels) != length:
            raise ValueError(
                f"DataPass: expected a label for each of the {length} samples of a batch, got a tensor of shape "
                f"{tuple(labels.shape)}. Give batches, not single samples, or `labels=`, a function of a batch that "
                "returns them."
            )
        return labels

    def _known_labels(self, numbers: list[int]) -> Tensor | None:
        """Labels in the order of ``numbers``."""
        if self._all_labels is None:
            self._all_labels = self._samples.labels(self._labels_in) or []
        found = self._all_labels
        if not found or len({found[number].shape for number in numbers}) > 1:
            return None
        return torch.stack([found[number] for number in numbers]) if numbers else torch.stack(found[:1])[:0]


def _is_pair(raw: Any) -> bool:
    return isinstance(raw, (tuple, list)) and len(raw) == 2


def _is_batch(batches: Any) -> bool:
    """Whether it is a single batch: a tensor, a mapping, or a tuple that starts with a tensor."""
    return isinstance(batches, (Tensor, Mapping)) or (
        isinstance(batches, tuple) and bool(batches) and isinstance(batches[0], Tensor)
    )


def _as_tensor(labels: Any) -> Tensor:
    if isinstance(labels, Tensor):
        return labels
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"DataPass: expected labels that are numbers, got {type(labels).__name__} ({error}). Give `labels=`, a "
            "function of a batch that returns a number for each sample."
        ) from error


def _require_kinds(*, batches: object, seed: object, memory_limit: object) -> None:
    if isinstance(batches, str) or not (_is_batch(batches) or hasattr(batches, "__iter__") or _has_items(batches)):
        raise ValueError(
            "DataPass: expected `batches` to be a DataLoader, a list of batches or one batch `(x, y)`, got "
            f"{type(batches).__name__}."
        )
    for name, value in (("seed", seed), ("memory_limit", memory_limit)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"DataPass: expected `{name}` to be an int of at least 0, got {value!r}.")


def _has_items(batches: object) -> bool:
    """Whether it can be gone through by position, as a data set or a sequence of batches."""
    return hasattr(batches, "__getitem__") and hasattr(batches, "__len__")


def _require_callable(**functions: object) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ValueError(f"DataPass: expected `{name}` to be a function, got {function!r}.")


def _require_positive(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"DataPass: expected `{name}` to be an int of at least 1, got {count!r}.")
