"""Latency of a network at any widths, from a table measured on its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.structure.cost import Axis, CostModel, LatencyTable, LayerTimes
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.traced_model import TracedModel
from lightning_prune.structure.tracing import Call

__all__ = ["measure_latency", "median_seconds", "resize", "with_latency"]

#: Fractions of the dense lengths at which a layer is timed.
_SHARES = (0.125, 0.25, 0.5, 1.0)
# Seconds to measure one point of a table, and the whole network.
_POINT, _WHOLE = 0.01, 0.2


def with_latency(structure: Structure, table: LatencyTable) -> Structure:
    """The structure with a latency table; groups that were removed take no time."""
    names = {name for layer in table.layers for axis in layer.axes for name, _ in axis.repeat}
    table = table.without(names - structure.widths.keys())
    return replace(structure, cost=replace(structure.cost, latency_table=table))


def measure_latency(traced: TracedModel, structure: Structure, dense: Mapping[str, int] | None = None) -> LatencyTable:
    """Time one sample's forward pass in eval mode, layer by layer at several widths, on copies.

    Each convolution and matrix product of a layer is timed at an eighth, a quarter, half and all of each dimension that
    can shrink. The time of the whole network beyond their sum is split into a fixed part and one proportional to the
    bytes of its activations, by timing the network also with half of its units.

    Args:
        traced: The network and its calls, on the device to measure.
        structure: Structure of the network.
        dense: Largest widths that the table must cover, by group, if the network was cut before.
    """
    copy, call = traced.copy("real"), traced.calls[0]
    copy.module.eval()
    args, kwargs = (resize(part, call, 1) for part in (call.args, dict(call.kwargs)))
    widths = structure.widths
    half = {name: range(-(-width // 2)) for name, width in widths.items()}
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=_devices(copy.module)):
        inputs = _inputs(copy.module, args, kwargs)
        layers = _layers(inputs, structure.cost, {**widths, **(dense or {})})
        run = partial(copy.module, *args, **kwargs)
        whole = _milliseconds(run, _WHOLE)
        with copy.cut(structure.axes(half)):
            halved = _milliseconds(run, _WHOLE)
    narrow = {name: len(kept) for name, kept in half.items()}
    return _fit(structure.cost, layers, (widths, whole), (narrow, halved))


def _fit(
    cost: CostModel,
    layers: Sequence[LayerTimes],
    whole: tuple[Mapping[str, int], float],
    halved: tuple[Mapping[str, int], float],
) -> LatencyTable:
    """Fit the table to the measured times of the whole and, as far as possible, the halved network."""
    known = sum(layer.value(whole[0]) for layer in layers)
    if known > whole[1]:  # a layer may be slower alone than among others
        scale = whole[1] / known
        layers = [replace(layer, ms=tuple(tuple(scale * ms for ms in row) for row in layer.ms)) for layer in layers]
        return LatencyTable(0.0, 0.0, tuple(layers))
    rest = whole[1] - known
    rest_halved = halved[1] - sum(layer.value(halved[0]) for layer in layers)
    memory, memory_halved = cost.memory(whole[0]), cost.memory(halved[0])
    per_byte = (rest - rest_halved) / (memory - memory_halved) if memory > memory_halved else 0.0
    per_byte = min(max(per_byte, 0.0), rest / max(memory, 1))
    return LatencyTable(rest - per_byte * memory, per_byte, tuple(layers))


def _inputs(module: nn.Module, args: Any, kwargs: Any) -> list[tuple[str, nn.Module, Tensor]]:
    """Calls of linear layers in a forward pass: name, layer and input."""
    seen: list[tuple[str, nn.Module, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda layer, given, name=name: seen.append((name, layer, given[0])))
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
    ]
    try:
        module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _layers(
    inputs: Sequence[tuple[str, nn.Module, Tensor]], cost: CostModel, dense: Mapping[str, int]
) -> list[LayerTimes]:
    """One table per call of a layer; identical layers are measured once."""
    weights = {term.layer: term.axes[:2] for term in cost.parameters if len(term.axes) >= 2}
    measured: dict[tuple[Any, ...], tuple[tuple[float, ...], ...]] = {}
    found = []
    for name, layer, x in inputs:
        if name not in weights:
            continue  # its weight is computed or tied
        rows, columns = weights[name]
        grid = (_points(rows, dense), _points(columns, dense))
        key = (_kind(layer), grid, tuple(x.shape), x.dtype, x.device)
        if key not in measured:
            measured[key] = _measure(layer, x, grid)
        found.append(LayerTimes((rows, columns), grid, measured[key]))
    return found


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    names = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups")
    return (type(layer), layer.bias is None, *(getattr(layer, name, None) for name in names))


def _points(axis: Axis, dense: Mapping[str, int]) -> tuple[int, ...]:
    length = axis.length(dense)
    shares = _SHARES if axis.repeat else (1.0,)
    return tuple(sorted({max(round(share * length), 1) for share in shares}))


def _measure(layer: nn.Module, x: Tensor, grid: tuple[Sequence[int], Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    times = np.array([[_milliseconds(_runner(layer, x, a, b), _POINT) for b in grid[1]] for a in grid[0]])
    # Times must be monotone, so that a budget has one solution.
    times = np.maximum.accumulate(np.maximum.accumulate(times, axis=0), axis=1)
    return tuple(tuple(row) for row in times.tolist())


def _runner(layer: Any, x: Tensor, rows: int, columns: int) -> Callable[[], Tensor]:
    """The layer's operator with a weight whose first two dimensions are ``rows`` × ``columns``."""
    if isinstance(layer, nn.Linear):
        weight, x = x.new_zeros(rows, columns), x.new_zeros(*x.shape[:-1], columns)
        return partial(F.linear, x, weight, None if layer.bias is None else x.new_zeros(rows))
    per_group = (layer.in_channels if layer.transposed else layer.out_channels) // layer.groups
    thin = min(layer.in_channels, layer.out_channels) == layer.groups > 1
    groups = max(rows // per_group, 1) if thin else layer.groups
    rows = max(rows // groups, 1) * groups
    weight = x.new_zeros(rows, columns, *layer.kernel_size)
    channels, outputs = (rows, columns * groups) if layer.transposed else (columns * groups, rows)
    dims = len(layer.kernel_size)
    x = x.new_zeros(*x.shape[: x.dim() - dims - 1], channels, *x.shape[-dims:])
    bias = None if layer.bias is None else x.new_zeros(outputs)
    if layer.transposed:
        operator = getattr(F, f"conv_transpose{dims}d")
        return partial(
            operator, x, weight, bias, layer.stride, layer.padding, layer.output_padding, groups, layer.dilation
        )
    return partial(getattr(F, f"conv{dims}d"), x, weight, bias, layer.stride, layer.padding, layer.dilation, groups)


def _milliseconds(run: Callable[[], Any], seconds: float) -> float:
    return 1e3 * median_seconds(run, seconds)


def _devices(module: nn.Module) -> list[torch.device]:
    return list({p.device for p in module.parameters() if p.device.type == "cuda"})


def median_seconds(run: Callable[[], Any], seconds: float) -> float:
    """Median time of ``run()``, synchronized with the device, measured for about ``seconds``."""
    from torch.utils.benchmark import Timer, timer  # the import logs its search for a CUDA compiler

    with _disable_current_modes():  # a counter of operations would be timed, too, and count all repetitions
        run()  # the first pass allocates memory and chooses algorithms
        start = timer()  # waits for the device
        run()
        once = float(timer() - start)
        if once > seconds:
            return once
        threads = torch.get_num_threads()
        measured = Timer("run()", globals={"run": run}, num_threads=threads).blocked_autorange(min_run_time=seconds)
    return float(measured.median)


def resize(tree: Any, call: Call, batch_size: int) -> Any:
    """Change the batch size of all tensors in a tree by repeating the first sample."""
    tensors = [leaf for leaf in tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Tensor) and leaf.dim()]
    samples = len(tensors[0]) if tensors else 0

    def resized(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == samples:
            return leaf[:1].expand(batch_size, *leaf.shape[1:]).contiguous()
        return leaf

    return tree_map(resized, tree)
