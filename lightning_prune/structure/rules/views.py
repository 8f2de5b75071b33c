"""Views, permutations and repetitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_prune.structure.atoms import IndexArray, MismatchError
from lightning_prune.structure.rules.elementwise import same
from lightning_prune.structure.rules.registry import argument, dimensions, labelled, rule, unknown
from lightning_prune.structure.tracing import WILD, AxisLabel, Blocks, Tracer, Value

__all__: list[str] = []  # the rules register themselves


def _moved(t: Tracer, out: torch.Tensor, value: Value, dims: Sequence[int]) -> None:
    source = value.source and (value.source[0], tuple(value.source[1][d] for d in dims))
    t.label(out, [value.axes[d] for d in dims], zero=value.zero, source=source)


@rule("t", "transpose", "permute", "transpose_", "t_", "swapaxes", "movedim", "numpy_T")
def permute(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Permute dimensions."""
    value, ndim = t.value(args[0]), out.dim()
    dims = list(range(ndim))
    if len(args) == 3:
        i, j = args[1] % ndim, args[2] % ndim
        dims[i], dims[j] = dims[j], dims[i]
    elif len(args) == 2:
        dims = [d % ndim for d in args[1]]
    elif ndim == 2:
        dims = [1, 0]
    _moved(t, out, value, dims)


@rule(
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "unflatten",
    "flatten",
    "unsqueeze",
    "unsqueeze_",
    "view_as",
    "_reshape_copy",
    "view_copy",
    "unsqueeze_copy",
)
def view(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Merge and split dimensions, including added and dropped dimensions of length 1."""
    x = args[0]
    value = t.value(x)
    if x.dtype != out.dtype or x.numel() != out.numel():
        unknown(t, func, args, kwargs, out)
        return
    old, new = tuple(x.shape), tuple(out.shape)
    if not x.numel() and old != new:
        if not _views_rows(value, old, new):  # of a branch that was removed: its lengths do not say what is what
            t.freeze(value.axes, f"an empty tensor that {t.where(func)} views")
            t.label(out, [None] * out.dim(), zero=value.zero)
            return
        old, new = (tuple(n or 1 for n in shape) for shape in (old, new))
    blocks = _blocks_of_view(t, old, new, labelled(value.axes))
    if blocks is None:
        t.label(out, value.axes, zero=value.zero, source=value.source)
        return
    axes: list[AxisLabel] = []
    for before, after in blocks:
        axes += _regroup(t, func, [(old[d], value.axes[d]) for d in before], [new[d] for d in after])
    t.label(out, axes, zero=value.zero)


def _views_rows(value: Value, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether an empty tensor has no rows, where nothing was chosen, and each of them would be viewed alike."""
    is_rows = old.count(0) == new.count(0) == 1 and not isinstance(value.axes[old.index(0)], np.ndarray)
    return is_rows and math.prod(filter(None, old)) == math.prod(filter(None, new))


@rule("squeeze", "squeeze_copy")
def squeeze(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Drop dimensions of length 1."""
    value = t.value(args[0])
    dropped = [d for d in dimensions(args[1] if len(args) > 1 else None, args[0].dim()) if args[0].shape[d] == 1]
    t.freeze([value.axes[d] for d in dropped], f"a single unit, dropped in {t.where(func)}")
    _moved(t, out, value, [d for d in range(args[0].dim()) if d not in dropped])


@rule("view_as_complex", "view_as_real")
def complex_numbers(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Two real numbers, along the last dimension, as a complex one, and back."""
    value = t.value(args[0])
    axes = list(value.axes)
    if out.is_complex():
        t.freeze(axes[-1:], f"taken as parts of complex numbers in {t.where(func)}")
        t.label(out, axes[:-1], zero=value.zero)
    else:
        t.label(out, [*axes, None], zero=value.zero)


def _blocks_of_view(t: Tracer, old: tuple[int, ...], new: tuple[int, ...], labelled: list[int]) -> Blocks | None:
    """Old and new dimensions that correspond in a view; None if they are unchanged.

    A trial reuses those of the first trace, as lengths are ambiguous where a single unit is left.
    """
    if t.first_decisions is None:
        blocks = None if old == new else _blocks(old, new, labelled)
    elif len(t.views) < len(t.first_views):
        blocks = t.first_views[len(t.views)]
        if not (_fits(blocks, old, new) if blocks is not None else old == new):
            raise MismatchError("a view regroups other axes than before")
    else:
        raise MismatchError("an axis is viewed that was not viewed before")
    t.views.append(blocks)
    return blocks


def _fits(blocks: Blocks, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether the blocks are consistent with these lengths."""
    counts = sum(len(a) for a, _ in blocks), sum(len(b) for _, b in blocks)
    alike = (math.prod(old[d] for d in a) == math.prod(new[d] for d in b) for a, b in blocks)
    return counts == (len(old), len(new)) and all(alike)


def _blocks(old: tuple[int, ...], new: tuple[int, ...], labelled: list[int]) -> Blocks:
    """Smallest runs of old and new dimensions with the same number of elements, in order.

    A labelled dimension of length 1 without a counterpart was merged into the next one.
    """
    blocks: Blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        a = b = 1
        if i < len(old):
            left.append(i)
            a, i = old[i], i + 1
        if j < len(new) and (a == new[j] or a != 1 or not left):
            right.append(j)
            b, j = new[j], j + 1
        while a != b:
            if a < b:
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                right.append(j)
                b, j = b * new[j], j + 1
        if blocks and not blocks[-1][1] and set(blocks[-1][0]) & set(labelled):
            left = blocks.pop()[0] + left
        blocks.append((left, right))
    return blocks


def _regroup(t: Tracer, func: Any, old: list[tuple[int, AxisLabel]], new: list[int]) -> list[AxisLabel]:
    """Labels of the new dimensions of a view."""
    if len(new) == 1 and len(old) == 1:
        return [old[0][1]]
    labelled = [d for d, (_, axis) in enumerate(old) if isinstance(axis, np.ndarray)]
    if not labelled:
        wild = any(n > 1 for n, _ in old) and all(isinstance(axis, str) for n, axis in old if n > 1)
        return [WILD if wild else None for _ in new]
    if len(labelled) > 1:
        old, labelled = _merged(t, func, old, labelled)
    if len(labelled) > 1:
        t.freeze([old[d][1] for d in labelled], f"two axes that could shrink are merged in {t.where(func)}")
        return [None] * len(new)
    sizes, d = [n for n, _ in old], labelled[0]
    shape = [1] * len(old)
    shape[d] = sizes[d]
    label = old[d][1]
    assert isinstance(label, np.ndarray)
    t.note_lengths(sizes, [axis for _, axis in old])  # repetitions of each unit
    grid = np.broadcast_to(label.reshape(shape), sizes).reshape(new)
    if len(new) == 1:
        return [grid]
    varying = [k for k, n in enumerate(new) if n > 1 and not (grid == grid.take([0], axis=k)).all()]
    keep = t.choose(label, new, varying)
    if keep is None:
        t.freeze([label], f"the same unit at every index in {t.where(func)}")
        return [None] * len(new)
    # One axis carries the units; every block along the other axes loses the same ones.
    line = _line(grid, keep)
    if varying != [keep]:
        spread = np.moveaxis(grid, keep, -1).reshape(-1, new[keep])
        t.atoms.unite(spread[1:].ravel(), np.tile(spread[0], len(spread) - 1))
    return [line if k == keep else None for k in range(len(new))]


def _merged(
    t: Tracer, func: Any, old: list[tuple[int, AxisLabel]], labelled: list[int]
) -> tuple[list[tuple[int, AxisLabel]], list[int]]:
    """Dimensions that become one, and those with a label: one if the others cannot shrink."""
    if t.constant:  # the inputs of a convolution and the positions of its kernel
        only = t.decide(max(labelled, key=lambda d: old[d][0]))
        t.freeze([old[d][1] for d in labelled if d != only], f"merged with another axis in {t.where(func)}")
    else:  # positions after a class token, say
        free = [d for d in labelled if not t.atoms.are_frozen(old[d][1])]  # type: ignore[arg-type]
        only = t.decide(free[0] + 1 if len(free) == 1 else 0) - 1
    if only < 0:
        return old, labelled
    return [(n, axis if d == only or d not in labelled else None) for d, (n, axis) in enumerate(old)], [only]


def _line(grid: IndexArray, axis: int) -> IndexArray:
    return np.ascontiguousarray(grid[tuple(slice(None) if k == axis else 0 for k in range(grid.ndim))])


def _times(x: torch.Tensor, out: torch.Tensor) -> list[int]:
    """Repetitions per dimension of a repeated tensor."""
    before = [1] * (out.dim() - x.dim()) + list(x.shape)
    return [now // max(old, 1) for now, old in zip(out.shape, before, strict=True)]


@rule("expand", "expand_copy", "broadcast_to")
def expand(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Expand dimensions of length 1: the same content at every index."""
    x, value = args[0], t.value(args[0])
    t.repeated(_times(x, out))
    added = out.dim() - x.dim()
    axes: list[AxisLabel] = [WILD] * added
    for d, axis in enumerate(value.axes):
        axes.append(axis if x.shape[d] == out.shape[added + d] else WILD)
    t.label(out, axes, zero=value.zero)


@rule("repeat", "tile")
def repeat(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Tile axes."""
    x, value = args[0], t.value(args[0])
    t.repeated(_times(x, out))
    added = out.dim() - x.dim()
    axes: list[AxisLabel] = [WILD] * added
    for d, axis in enumerate(value.axes):
        times = out.shape[added + d] // max(x.shape[d], 1)
        if x.shape[d] == 1 and times > 1:
            axes.append(WILD)
        elif isinstance(axis, np.ndarray):
            t.note(times)
            axes.append(np.tile(axis, times))
        else:
            axes.append(axis)
    t.label(out, axes, zero=value.zero)


@rule("as_strided")
def as_strided(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """New strides, followed only where they change the memory format of the same shape in place."""
    x = args[0]
    if str(func._schema.name) == "aten::as_strided_" and tuple(x.shape) == tuple(args[1]) == tuple(out.shape):
        same(t, func, args, kwargs, out)
    else:
        unknown(t, func, args, kwargs, out)


@rule("flip", "roll")
def rearranged(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Flip, whose labels are reversed, or roll, which freezes the axis."""
    x, value = args[0], t.value(args[0])
    axes = list(value.axes)
    if str(func._schema.name) == "aten::flip":
        for d in dimensions(args[1], x.dim()):
            axis = axes[d]
            axes[d] = axis[::-1].copy() if isinstance(axis, np.ndarray) else axis
    else:
        moved = dimensions(argument(func, args, kwargs, "dims"), x.dim())
        t.freeze([axes[d] for d in moved], f"rolled in {t.where(func)}")
    t.label(out, axes, zero=value.zero)
