"""Concatenation, splitting and indexing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_prune.structure.atoms import IndexArray
from lightning_prune.structure.rules.elementwise import broadcast, zero_along
from lightning_prune.structure.rules.registry import argument, labelled, rigid, rule
from lightning_prune.structure.tracing import WILD, AxisLabel, Tracer, Value, memory_of

__all__ = ["index", "reads_sizes", "split"]


@rule("cat", "concat", "stack")
def cat(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Concatenate the atoms."""
    stacked = str(func._schema.name) == "aten::stack"
    parts = [p for p in args[0] if stacked or p.dim() > 1 or p.numel()]  # `cat` skips empty vectors
    dim = argument(func, args, kwargs, "dim", 0) % out.dim()
    values = [t.value(p) for p in parts]
    where = t.where(func)
    if stacked:
        rest = broadcast(t, func, list(zip(parts, values, strict=True)), parts[0].dim())
        zero = all(zero_along(x, v, rest) for x, v in zip(parts, values, strict=True))
        t.label(out, [*rest[:dim], None, *rest[dim:]], zero=zero)
        return
    axes: list[AxisLabel] = []
    for d in range(out.dim()):
        if d != dim:
            label: AxisLabel = WILD
            for v in values:
                label = t.meet(label, v.axes[d], where)
            axes.append(label)
            continue
        pieces = [v.axes[d] for v in values]
        if not any(isinstance(p, np.ndarray) for p in pieces):
            axes.append(None)
            continue
        axes.append(
            np.concatenate(
                [
                    p if isinstance(p, np.ndarray) else t.atoms.fresh(x.shape[d], f"a part of fixed size in {where}")
                    for x, p in zip(parts, pieces, strict=True)
                ]
            )
        )
    others = [axis for d, axis in enumerate(axes) if d != dim]
    alike = all(labelled(others) == labelled([a for d, a in enumerate(v.axes) if d != dim]) for v in values)
    t.label(out, axes, zero=alike and all(v.zero for v in values))


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "split_copy", "split_with_sizes_copy")
def split(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Split: equal parts lose the same indices; unequal ones of given sizes lose any, which a trial decides."""
    x, value = args[0], t.value(args[0])
    dim = argument(func, args, kwargs, "dim", 0) % x.dim()
    parts = list(out)
    axis = value.axes[dim]
    sizes = [p.shape[dim] for p in parts]
    if isinstance(axis, np.ndarray) and len(parts) > 1:
        are_equal = t.decide(len(set(sizes)) == 1)
        if are_equal and t.of_features and len(parts) == 2:
            t.halves.append(axis)
        elif are_equal:
            by_part = axis.reshape(len(parts), -1)
            t.atoms.unite(by_part[1:].ravel(), np.tile(by_part[0], len(parts) - 1))
        elif "split_with_sizes" not in str(func._schema.name):
            t.freeze([axis], f"split into unequal parts in {t.where(func)}")
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        piece = axis[start : start + size] if isinstance(axis, np.ndarray) else axis
        start += size
        t.label(part, [*value.axes[:dim], piece, *value.axes[dim + 1 :]], zero=value.zero)


@rule("slice", "slice_copy", "narrow")
def slice_(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Slice: the indices before each bound are frozen, since the bound is a number.

    For a bound counted from the end, those after it are. One of equal parts may lose the same indices as the others
    instead, and where every second index is picked, say, two neighbours leave together. The trial checks bounds that
    are computed from a width. Features of heads leave on both sides of a bound, which must follow in a trial, as that
    between those which rotary embeddings turn and the others.
    """
    x, value = args[0], t.value(args[0])
    dim = argument(func, args, kwargs, "dim", 0) % x.dim()
    start = argument(func, args, kwargs, "start") or 0
    end = argument(func, args, kwargs, "end")
    step = argument(func, args, kwargs, "step") or 1
    axis = value.axes[dim]
    if isinstance(axis, np.ndarray):
        part = axis[start:end:step]
        is_part = step == 1 and t.takes_equal_part(axis, len(axis[:start]), len(part))
        if is_part and t.of_features:
            t.halves.append(axis)
        elif is_part:
            by_part = axis.reshape(-1, len(part))
            t.atoms.unite(by_part[1:].ravel(), np.tile(by_part[0], len(by_part) - 1))
        elif 0 <= start < step > 1 and len(axis) % step == 0 and (end is None or end >= len(axis)):
            blocks = axis.reshape(-1, step)
            t.atoms.unite(blocks[:, 1:].ravel(), np.repeat(blocks[:, 0], step - 1))
        elif value.constant or step != 1 or not (t.of_features or t.bounds_follow):
            _freeze_far_side(t, func, axis, (start, end, step))
            if value.constant and len(part) < len(axis):  # such as positions beyond the example's length
                t.freeze([axis], f"a part of a parameter, taken by {t.where(func)}")
        t.picked(axis, part)
        axis = part
    elif axis is None:
        t.note(None if t.crossed else start)
    t.label(out, [*value.axes[:dim], axis, *value.axes[dim + 1 :]], zero=value.zero)


def _freeze_far_side(t: Tracer, func: Any, axis: IndexArray, bounds: tuple[int, int | None, int]) -> None:
    start, end, step = bounds
    for bound in (start, end):
        if bound is not None and -len(axis) < bound < len(axis) and bound:
            held = slice(bound) if bound > 0 else slice(bound, None)
            t.freeze([axis[held]], f"lies on the far side of a bound of {t.where(func)}")
            t.bounds.setdefault(t.module, []).append(axis[held])
    if step != 1:
        t.freeze([axis], f"picked at regular intervals in {t.where(func)}")


@rule("select", "select_copy")
def select(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Select one index of an axis, which is frozen."""
    x, value = args[0], t.value(args[0])
    dim = args[1] % x.dim()
    t.freeze([value.axes[dim]], f"picked from by number in {t.where(func)}")
    t.label(out, [*value.axes[:dim], *value.axes[dim + 1 :]], zero=value.zero)


@rule("unbind", "unbind_copy")
def unbind(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Split an axis into its indices, which freezes it."""
    x, value = args[0], t.value(args[0])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.dim()
    t.freeze([value.axes[dim]], f"taken apart in {t.where(func)}")
    for part in out:
        t.label(part, [*value.axes[:dim], *value.axes[dim + 1 :]], zero=value.zero)


@rule("index_select")
def index_select(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Pick along one axis, which is frozen."""
    x, value = args[0], t.value(args[0])
    dim = args[1] % x.dim()
    t.freeze([value.axes[dim]], f"picked from by number in {t.where(func)}")
    t.label(out, [*value.axes[:dim], None, *value.axes[dim + 1 :]], zero=value.zero)


@rule("index", "_unsafe_index")
def index(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Index with tensors of places or masks: the indexed axes are frozen, the others are followed."""
    value = t.value(args[0])
    before, dims = _followed(t, func, value, args[1])
    rest = [value.axes[d] for d in dims]
    picked: list[AxisLabel] = [None] * (out.dim() - len(rest))
    t.label(out, [*rest[:before], *picked, *rest[before:]], zero=value.zero)


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Write to what tensors of places or masks pick: the indexed axes are frozen, the others meet the values'.

    Axes with the same content at every index, as of zeros that results are collected in, take the values' labels.
    """
    value, given, where = t.value(args[0]), t.value(args[2]), t.where(func)
    before, dims = _followed(t, func, value, args[1])
    behind = min(len(dims) - before, len(given.axes))  # aligned from the right, as in broadcasting
    others = [value.axes[d] for d in dims[:before]]
    t.freeze([*others, *given.axes[: len(given.axes) - behind]], f"the places of {where}")
    axes: list[AxisLabel] = [
        None if isinstance(axis, str) and d not in dims else axis for d, axis in enumerate(value.axes)
    ]
    for back in range(1, behind + 1):
        if args[2].shape[-back] > 1:
            axes[dims[-back]] = t.meet(axes[dims[-back]], given.axes[-back], where)
    starts_at_zero = value.zero or memory_of(args[0]) in t.zeros
    t.label(out, axes, zero=given.zero and starts_at_zero)


def _followed(t: Tracer, func: Any, value: Value, indices: Sequence[Any]) -> tuple[int, list[int]]:
    """Freeze the axes that are indexed; the other dimensions, and how many of them stand before what is picked."""
    dims: list[int] = []
    at = 0
    for places in indices:
        if places is None:
            at += 1
            continue
        covered = places.dim() if places.dtype in (torch.bool, torch.uint8) else 1
        dims += range(at, at + covered)
        at += covered
        t.freeze(t.value(places).axes, f"used as an index in {t.where(func)}")
    t.freeze([value.axes[d] for d in dims], f"picked from by number in {t.where(func)}")
    # PyTorch puts what is picked first where the indexed axes are apart from each other.
    before = dims[0] if dims and dims[-1] - dims[0] < len(dims) else 0
    return before, [d for d in range(len(value.axes)) if d not in dims]


@rule("index_add", "index_reduce", "scatter_add", "scatter_reduce")
def gathered(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Rows added up at given places, as graph networks pass messages: the other axes are followed.

    Places that are the same for all features are expanded over them.
    """
    x = args[0]
    places, rows = argument(func, args, kwargs, "index"), argument(func, args, kwargs, "source")
    rows = argument(func, args, kwargs, "src") if rows is None else rows
    dim, where = argument(func, args, kwargs, "dim") % max(x.dim(), 1), t.where(func)
    value, given, index = t.value(x), t.value(rows), t.value(places)
    is_for_each = places.dim() == rows.dim() and str(func._schema.name).removeprefix("aten::").startswith("scatter")
    axes: list[AxisLabel] = []
    for d in range(x.dim()):
        labels = [value.axes[d], given.axes[d], *([index.axes[d]] if is_for_each else [])]
        if d == dim:
            t.freeze(labels, f"the places of {where}")
            axes.append(None)
            continue
        label = labels[0]
        for other in labels[1:]:
            label = t.meet(label, other, where)
        axes.append(label)
    if not is_for_each:
        t.freeze(index.axes, f"the places of {where}")
    starts_at_zero = value.zero or memory_of(x) in t.zeros
    reduces_zeros = argument(func, args, kwargs, "reduce", "sum") != "prod"
    t.label(out, axes, zero=given.zero and starts_at_zero and reduces_zeros)


@rule("_pack_padded_sequence")
def pack(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Rows of all samples and time steps that are not padding; the features are followed."""
    value = t.value(args[0])
    t.freeze(value.axes[:2], f"the samples and time steps of {t.where(func)}")
    t.label(out[0], [None, *value.axes[2:]], zero=value.zero)
    rigid(t, out[1])


@rule("glu")
def glu(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Gated linear unit: both halves lose the same indices."""
    x, value = args[0], t.value(args[0])
    dim = argument(func, args, kwargs, "dim", -1) % x.dim()
    axis = value.axes[dim]
    if isinstance(axis, np.ndarray):
        first, second = axis.reshape(2, -1)
        t.atoms.unite(first, second)
        axis = first
    t.label(out, [*value.axes[:dim], axis, *value.axes[dim + 1 :]], zero=value.zero)


@rule(
    "sym_size",
    "sym_numel",
    "sym_stride",
    "is_same_size",
    "_assert_async",
    "_assert_tensor_metadata",
    "_is_all_true",
)
def reads_sizes(t: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Operators that only read sizes."""
    rigid(t, out)
