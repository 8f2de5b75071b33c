"""Seeded, stratified selection of samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from lightning_prune.scoring.contexts import seeded_rng
from lightning_prune.scoring.samples import Samples

__all__ = [
    *("NO_CLASS", "Choice", "batch_size_of", "choose", "class_members", "draw", "hold_back", "is_indexed"),
    "targets_of",
]

#: Label of pixels to ignore, by the convention of PASCAL VOC and Cityscapes.
NO_CLASS = 255

#: Positions of samples.
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """Settings of a selection of samples.

    Attributes:
        samples: Number of samples, stratified by class if the labels are classes; all if None.
        per_class: Number of samples of every class.
        seed: Seed of selection and order.
        labels: Returns the labels of a batch, or None.
        known: Whether these are the dataset's own labels, so that its ``targets`` can be used without reading it.
    """

    samples: int | None
    per_class: int | None
    seed: int
    labels: Callable[[Any], Tensor | None]
    known: bool


def draw(batches: Iterable[Any], choice: Choice, limit: int) -> tuple[Samples, list[int]]:
    """Read the selected samples.

    Of a loader over a map-style dataset, only the selected samples are read: stratified if the labels are known without
    reading (``targets``, `TensorDataset`, subsets and concatenations of these), at random otherwise. Other iterables
    are read completely, once, as are such loaders if ``per_class`` needs unknown labels.

    Args:
        batches: A `DataLoader` or any iterable of batches.
        choice: Settings of the selection.
        limit: Bytes of samples to keep in memory.

    Returns:
        The samples, and their indices in shuffled order.
    """
    store, rng = Samples(limit), np.random.default_rng(choice.seed)
    with seeded_rng(choice.seed):
        if is_indexed(batches) and isinstance(batches, DataLoader):
            positions = _candidates(batches)
            known = targets_of(batches.dataset) if choice.known else None
            if known is not None or choice.per_class is None:
                known = None if known is None else known[torch.from_numpy(positions)]
                positions = positions[np.sort(choose(len(positions), known, choice, rng))]
                _read(batches, positions, store)
                return store, rng.permutation(len(store)).tolist()
            _read(batches, positions, store)
        else:
            for raw in batches:
                store.add(raw)
    found = store.labels(choice.labels)
    known = None if not found or len({one.shape for one in found}) > 1 else torch.stack(found)
    chosen = np.sort(choose(len(store), known, choice, rng)).tolist()
    store = store if len(chosen) == len(store) else store.only(chosen)
    return store, rng.permutation(len(store)).tolist()


def is_indexed(batches: Any) -> bool:
    """Whether samples can be read by index."""
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return False
    return batches.batch_sampler is not None and hasattr(batches.dataset, "__len__")


def batch_size_of(batches: Any) -> int | None:
    """Batch size of a loader, if it has one."""
    size = getattr(batches, "batch_size", None) or getattr(getattr(batches, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def choose(total: int, labels: Tensor | None, choice: Choice, rng: np.random.Generator) -> Indices:
    """Select positions among ``total`` samples, with a warning if there are fewer than requested.

    Labels of more than one dimension (segmentation masks) are sets of classes: each class is in at least ``per_class``
    of the samples; ``samples`` are selected regardless of them.

    Raises:
        ValueError: If ``per_class`` is given and the labels are not classes.
    """
    if choice.per_class is not None:
        return _of_every_class(class_members(labels), choice.per_class, rng)
    if choice.samples is None:
        return np.arange(total)
    if choice.samples > total:
        warnings.warn(f"expected {choice.samples} samples, got {total}, which is all there are", stacklevel=2)
    if choice.samples >= total:
        return np.arange(total)
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        return rng.choice(total, choice.samples, replace=False)
    return _taken(class_members(labels), choice.samples, rng)


def hold_back(total: int, labels: Tensor | None, count: int, rng: np.random.Generator) -> Indices:
    """Select ``count`` of ``total`` samples, stratified by class, with a warning for classes without a sample."""
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        return rng.choice(total, count, replace=False)
    members = class_members(labels)
    chosen = _taken(members, count, rng)
    missing = [label for label, positions in members.items() if not np.isin(positions, chosen).any()]
    if missing:
        warnings.warn(
            f"the part held back has no sample of class {', '.join(map(str, missing))}: each of them has too few. Give "
            "more samples, or a larger share",
            stacklevel=3,
        )
    return chosen


def class_members(labels: Tensor | None) -> dict[int, Indices]:
    """Positions of the samples of every class, by class.

    Negative labels are ignored, and so is 255 in labels of more than one dimension (pixels). Floating-point labels that
    are all 0 or 1, as for ``binary_cross_entropy``, are two classes.

    Raises:
        ValueError: If the labels are not classes.
    """
    if labels is not None and labels.is_floating_point() and bool(((labels == 0) | (labels == 1)).all()):
        labels = labels.long()
    if labels is None or labels.is_floating_point() or labels.is_complex():
        got = "no labels" if labels is None else f"labels of type {labels.dtype}"
        raise ValueError(
            f"expected labels that are classes (integers), got {got}. Give `labels=`, a function of a batch that "
            "returns them, or choose by `samples=`."
        )
    flat = labels.reshape(len(labels), math.prod(labels.shape[1:])).cpu().numpy()
    none = NO_CLASS if labels.ndim > 1 else -1
    classes = [int(label) for label in np.unique(flat) if label >= 0 and label != none]
    if not classes and len(labels):
        raise ValueError(f"expected labels that are classes, from 0 on, got none: {len(labels)} samples have no class.")
    return {label: np.flatnonzero((flat == label).any(1)) for label in classes}


def _of_every_class(members: Mapping[int, Indices], count: int, rng: np.random.Generator) -> Indices:
    short = {label: len(positions) for label, positions in members.items() if len(positions) < count}
    if short:
        text = ", ".join(f"{label} ({n})" for label, n in short.items())
        warnings.warn(f"expected {count} samples of every class, got fewer of: {text}", stacklevel=3)
    chosen: set[int] = set()
    # Rare classes first: their samples often contain common classes too.
    for positions in sorted(members.values(), key=len):
        missing = count - len(chosen.intersection(positions.tolist()))
        others = np.array([p for p in rng.permutation(positions).tolist() if p not in chosen], np.int64)
        chosen.update(others[: max(missing, 0)].tolist())
    return np.array(sorted(chosen), np.int64)


def _taken(members: Mapping[int, Indices], count: int, rng: np.random.Generator) -> Indices:
    """Select ``count`` members, stratified by class by the method of largest remainders."""
    sizes = np.array([len(positions) for positions in members.values()])
    exact = count * sizes / sizes.sum()
    shares = np.floor(exact).astype(int)
    # Ties go to the earlier class.
    shares[np.argsort(-(exact - shares), kind="stable")[: count - shares.sum()]] += 1
    taken = [rng.permutation(positions)[:n] for positions, n in zip(members.values(), shares, strict=True)]
    return np.concatenate(taken)


def _candidates(loader: DataLoader[Any]) -> Indices:
    """Indices that the loader can yield: those of a `SubsetRandomSampler`, else all."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        return np.sort(np.array(list(sampler.indices), np.int64))
    return np.arange(len(loader.dataset))  # type: ignore[arg-type]


def _read(loader: DataLoader[Any], positions: Indices, store: Samples) -> None:
    """Read samples by index, without workers, whose random numbers for augmentation would differ."""
    size = batch_size_of(loader) or 64
    chunks = [positions[first : first + size].tolist() for first in range(0, len(positions), size)]
    for raw in DataLoader(loader.dataset, batch_sampler=chunks, collate_fn=loader.collate_fn):
        store.add(raw)


def targets_of(dataset: Any) -> Tensor | None:
    """Labels of a dataset that are known without reading samples."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1] if len(dataset.tensors) == 2 else None
    if isinstance(dataset, Subset):
        whole = targets_of(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [targets_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat([p for p in parts if p is not None])
    targets = getattr(dataset, "targets", None)
    try:
        found = torch.as_tensor(targets) if targets is not None else None
    except (TypeError, ValueError, RuntimeError):  # annotations of another kind (boxes, say)
        return None
    return found if found is not None and found.ndim and len(found) == len(dataset) else None
