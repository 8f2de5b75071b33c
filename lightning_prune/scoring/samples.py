"""Storage of single samples from batches of any structure, collated into batches of equal structure."""

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
    """Batch size: the length of the first tensor or array with a dimension; None without one."""
    return next((len(leaf) for leaf in tree_leaves(raw) if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim), None)


@dataclass(frozen=True)
class _Rows:
    """The stored samples of one batch.

    Attributes:
        form: Key that is equal for samples that can be collated.
        spec: Tree structure of the batch.
        leaves: Leaves with a row per sample (stored, or a list), or shared by all samples.
        is_row: Whether each leaf has a row per sample.
    """

    form: str
    spec: TreeSpec
    leaves: tuple[Any, ...]
    is_row: tuple[bool, ...]


@final
class Samples:
    """Samples, indexed in the order in which they were added.

    Leaves of a batch have a row per sample if they are tensors or arrays whose first dimension is the batch size, or
    lists of that length without tensors; other leaves are shared. A batch without tensors is one sample.

    Args:
        limit: Bytes of tensors to keep in memory; the rest is kept in memory-mapped temporary files.

    Attributes:
        first_length: Number of samples of the first batch.
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
        """A new store of these samples."""
        kept = Samples(self.spool.limit)
        for group in self.groups(numbers, 256):
            kept.add(self.batch(group))
        kept.first_length = self.first_length
        return kept

    def groups(self, numbers: Sequence[int], size: int) -> list[list[int]]:
        """Split samples into batches of at most ``size`` samples of equal structure, nearly in order."""
        found: list[list[int]] = []
        for first in range(0, len(numbers), size):
            part = sorted(numbers[first : first + size], key=self._form)  # stable: the order stays within a form
            found += [list(group) for _, group in groupby(part, key=self._form)]
        return found

    def batch(self, numbers: Sequence[int]) -> Any:
        """Collate samples of equal structure into a batch."""
        places = [self._places[number] for number in numbers]
        first = self._rows[places[0][0]]
        columns = [
            self._column(places, index) if own else first.leaves[index] for index, own in enumerate(first.is_row)
        ]
        return tree_unflatten(columns, first.spec)

    def labels(self, labels: Callable[[Any], Tensor | None]) -> list[Tensor] | None:
        """Labels of all samples, from a function of a batch; None if it returns None."""
        found: dict[int, Tensor] = {}
        for group in self.groups(range(len(self)), 256):
            part = labels(self.batch(group))
            if part is None:
                return None
            found.update(zip(group, part, strict=True))
        return [found[number] for number in range(len(self))]

    def fingerprint(self, numbers: Sequence[int]) -> str:
        """Hexadecimal digest of the contents of samples, in order."""
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
        """Collate one leaf of a batch."""
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
    """Whether a leaf is a list (of names, say) with an entry per sample."""
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
