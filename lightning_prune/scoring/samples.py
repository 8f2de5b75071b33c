"""Samples of batches of any form: kept one by one, put together to batches of the same form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from lightning_prune.scoring.spool import Spool, Stored

__all__ = ["Samples", "batch_length"]


def batch_length(raw: Any) -> int | None:
    """Number of samples of a batch: the length of its first tensor or array with a dimension; None if it has none."""
    return next((len(leaf) for leaf in tree_leaves(raw) if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim), None)


@dataclass(frozen=True)
class _Rows:
    """What was taken from one batch.

    Attributes:
        form: Equal for rows that fit into one batch.
        spec: How the leaves make up a batch.
        leaves: Per leaf the samples' part of it (stored, or a list), or the leaf that they share.
        is_row: Per leaf, whether it has a part for every sample.
    """

    form: str
    spec: TreeSpec
    leaves: tuple[Any, ...]
    is_row: tuple[bool, ...]


@final
class Samples:
    """Samples, numbered in the order in which they were added.

    A leaf of a batch whose first dimension is the batch's length (a tensor, an array), or a list of that length without
    tensors in it, has a part for every sample; any other is shared. A batch without a tensor is one sample.

    Args:
        limit: Bytes of tensors that are kept in memory; the others lie in memory-mapped temporary files.

    Attributes:
        first_length: Number of samples of the batch that was added first.
    """

    def __init__(self, limit: int) -> None:
        self.spool = Spool(limit)
        self.first_length = 0
        self._rows: list[_Rows] = []
        self._places: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._places)

    def add(self, raw: Any) -> None:
        """Add all samples of a batch."""
        length = batch_length(raw)
        count = 1 if length is None else length
        leaves, spec = tree_flatten(raw, is_leaf=lambda leaf: _is_list_of(leaf, length))
        is_row = tuple(length is not None and _has_rows(leaf, length) for leaf in leaves)
        kept = tuple(self._kept(leaf) if own else leaf for leaf, own in zip(leaves, is_row, strict=True))
        number = len(self._rows)
        form = repr((str(spec), *(_form(leaf, own, number) for leaf, own in zip(leaves, is_row, strict=True))))
        self._rows.append(_Rows(form, spec, kept, is_row))
        self._places += [(number, row) for row in range(count)]
        self.first_length = self.first_length or count

    def only(self, numbers: Sequence[int]) -> Samples:
        """A store of these samples alone, numbered anew."""
        kept = Samples(self.spool.limit)
        for group in self.groups(numbers, 256):
            kept.add(self.batch(group))
        kept.first_length = self.first_length
        return kept

    def groups(self, numbers: Sequence[int], size: int) -> list[list[int]]:
        """Parts of at most ``size`` samples that fit into one batch, nearly in order."""
        found: list[list[int]] = []
        for first in range(0, len(numbers), size):
            part = sorted(numbers[first : first + size], key=self._form)  # stable: the order stays within a form
            found += [list(group) for _, group in groupby(part, key=self._form)]
        return found

    def batch(self, numbers: Sequence[int]) -> Any:
        """These samples as a batch; they have to fit into one."""
        places = [self._places[number] for number in numbers]
        first = self._rows[places[0][0]]
        columns = [
            self._column(places, index) if own else first.leaves[index] for index, own in enumerate(first.is_row)
        ]
        return tree_unflatten(columns, first.spec)

    def labels(self, labels: Callable[[Any], Tensor | None]) -> list[Tensor] | None:
        """Labels of all samples by number, as a function of a batch gives them; None if it gives none."""
        found: dict[int, Tensor] = {}
        for group in self.groups(range(len(self)), 256):
            part = labels(self.batch(group))
            if part is None:
                return None
            found.update(zip(group, part, strict=True))
        return [found[number] for number in range(len(self))]

    def fingerprint(self, numbers: Sequence[int]) -> str:
        """Hexadecimal digest of the samples' content, in order."""
        digest = hashlib.sha256()
        for group in self.groups(numbers, 256):
            for leaf in tree_leaves(self.batch(group)):
                if isinstance(leaf, Tensor):
                    content = leaf.detach().cpu().contiguous()
                    digest.update(repr((content.dtype, tuple(content.shape))).encode())
                    digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
                else:
                    digest.update(repr(leaf).encode())
        return digest.hexdigest()

    def _form(self, number: int) -> str:
        return self._rows[self._places[number][0]].form

    def _kept(self, leaf: Any) -> Any:
        return self.spool.put(leaf) if isinstance(leaf, Tensor) else list(leaf)

    def _column(self, places: Sequence[tuple[int, int]], index: int) -> Any:
        """One leaf of a batch: the parts of its samples together."""
        sources: dict[int, Any] = {number: self._rows[number].leaves[index] for number, _ in places}
        sample = next(iter(sources.values()))
        if isinstance(sample, Stored):
            tensors = {number: stored.get() for number, stored in sources.items()}
            return torch.stack([tensors[number][row] for number, row in places])
        rows = [sources[number][row] for number, row in places]
        return np.stack(rows) if isinstance(rows[0], (np.ndarray, np.generic)) else rows


def _has_rows(leaf: Any, length: int) -> bool:
    is_array = isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 0
    return (is_array and len(leaf) == length) or _is_list_of(leaf, length)


def _is_list_of(leaf: Any, length: int | None) -> bool:
    """Whether it is a list (of names, say) with an entry for every sample."""
    known = isinstance(leaf, (list, tuple)) and len(leaf) == length
    return known and not any(isinstance(part, (Tensor, np.ndarray, list, tuple, dict)) for part in leaf)


def _form(leaf: Any, own: bool, number: int) -> object:
    if isinstance(leaf, Tensor) and own:
        return tuple(leaf.shape[1:]), str(leaf.dtype), str(leaf.device)
    if isinstance(leaf, np.ndarray) and own:
        return leaf.shape[1:], str(leaf.dtype)
    if own:
        return "list"
    return repr(leaf) if isinstance(leaf, (bool, int, float, str, type(None))) else number
