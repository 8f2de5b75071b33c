"""Slicing of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_prune.structure.graph import IndexArray
from lightning_prune.structure.layers import canonical, named
from lightning_prune.structure.sharding import is_sharded, sharded_like, whole

__all__ = ["blank", "canonical", "named", "non_persistent", "rescaled", "take", "zero"]

#: Bytes per block.
_BLOCK = 1 << 18


def non_persistent(model: nn.Module) -> set[str]:
    """Canonical names of non-persistent buffers."""
    return {
        canonical(f"{prefix}.{name}" if prefix else name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def take(tensor: Tensor, kept: Mapping[int, IndexArray | Sequence[int]]) -> Tensor:
    """Copy ``tensor`` with only the positions ``kept`` along each given dimension.

    Dtype, device and memory format (channels-last, transposed) are preserved. A sharded tensor is gathered, and what is
    kept is sharded likewise.

    Args:
        tensor: A dense tensor, possibly fake, meta or sharded.
        kept: Positions to keep, strictly ascending, by dimension; other dimensions are kept whole.

    Raises:
        ValueError: If the tensor is sparse, or a dimension or position is out of range or out of order.
    """
    _require_dense(tensor)
    for dim, positions in kept.items():
        _require_positions(tensor, dim, positions)
    if is_sharded(tensor):
        return sharded_like(take(whole(tensor), kept), tensor)
    # index_select returns a contiguous tensor, so dimensions are permuted to memory order first.
    order = _memory_order(tensor)
    out = tensor.permute(order)
    selection = {order.index(dim): _index(positions, tensor) for dim, positions in kept.items()}
    return (_select(out, selection) if kept else out.clone()).permute(_inverse(order))


def _select(tensor: Tensor, selection: Mapping[int, Tensor]) -> Tensor:
    """``index_select`` along several dimensions; for large tensors in blocks that fit into the CPU cache."""
    if 0 in selection and len(selection) > 1 and tensor.is_cpu and tensor.nbytes > 64 * _BLOCK:
        rows, inner = selection[0], {dim: index for dim, index in selection.items() if dim}
        shape = [len(selection[dim]) if dim in selection else n for dim, n in enumerate(tensor.shape)]
        out = tensor.new_empty(shape)
        at_once = max(1, _BLOCK * len(tensor) // tensor.nbytes)
        for start in range(0, len(rows), at_once):
            block = slice(start, start + at_once)
            out[block] = _select(tensor.index_select(0, rows[block]), inner)
        return out
    for dim, index in selection.items():
        tensor = tensor.index_select(dim, index)
    return tensor


def rescaled(tensor: Tensor, factors: tuple[IndexArray, float] | None, power: int = 1) -> Tensor:
    """Multiply rows of a tensor, in place if it is not sharded.

    Args:
        tensor: A tensor that nothing else refers to.
        factors: The rows and the factor; None to change nothing.
        power: Power of the factor.
    """
    if factors is None:
        return tensor
    if is_sharded(tensor):
        return sharded_like(rescaled(whole(tensor), factors, power), tensor)
    rows, factor = factors
    with torch.no_grad():
        tensor[_index(rows, tensor)] *= factor**power
    return tensor


def zero(tensor: Tensor, kept: Mapping[int, IndexArray | Sequence[int]]) -> Tensor:
    """Copy ``tensor`` with zeros where :func:`take` would remove it; same arguments and errors."""
    _require_dense(tensor)
    out = tensor.clone()
    for dim, positions in kept.items():
        _require_positions(tensor, dim, positions)
        lost = np.setdiff1d(np.arange(tensor.shape[dim]), np.asarray(positions, dtype=np.int64))
        out.index_fill_(dim, _index(lost, tensor), 0)
    return out


def blank(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros of another ``shape`` with the dtype, device, memory order and sharding of ``tensor``."""
    if is_sharded(tensor):
        return sharded_like(torch.zeros(tuple(shape), dtype=tensor.dtype, device=tensor.device), tensor)
    order = _memory_order(tensor)
    return tensor.new_zeros([shape[dim] for dim in order]).permute(_inverse(order))


def _memory_order(tensor: Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest in memory."""
    # Dimensions of length 1 have arbitrary strides and are sorted after longer ones of equal stride.
    return sorted(range(tensor.ndim), key=lambda dim: (tensor.stride()[dim], tensor.shape[dim]), reverse=True)


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]


def _index(positions: IndexArray | Sequence[int], like: Tensor) -> Tensor:
    if isinstance(like, FakeTensor):
        # Only the number of positions matters, and fake tensors cannot be indexed with real ones.
        return like.new_zeros(len(positions), dtype=torch.int64)
    return torch.as_tensor(np.asarray(positions, dtype=np.int64), device=like.device)


def _require_dense(tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"Only dense tensors can be sliced, got layout {tensor.layout}. If it is a sparse gradient (an embedding "
            "with `sparse=True`), clear it before the cut: `optimizer.zero_grad(set_to_none=True)`."
        )


def _require_positions(tensor: Tensor, dim: int, positions: IndexArray | Sequence[int]) -> None:
    # Checked here, as an index out of range on a GPU aborts the process.
    if not 0 <= dim < tensor.ndim:
        raise ValueError(f"Expected a dimension of a tensor of shape {tuple(tensor.shape)}, got {dim}.")
    array = np.asarray(positions, dtype=np.int64)
    length = tensor.shape[dim]
    if array.ndim != 1 or np.any(np.diff(array) <= 0) or (array.size and (array[0] < 0 or array[-1] >= length)):
        raise ValueError(
            f"Expected strictly ascending positions in [0, {length}) along dimension {dim} of a tensor of shape "
            f"{tuple(tensor.shape)}, got {array.tolist()}."
        )
