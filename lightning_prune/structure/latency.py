"""Latency of a network at any widths, from a table measured on its device."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.structure.cost import LatencyTable, LayerTimes
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.latency_fit import MULTIPLES, fit_table
from lightning_prune.structure.time_layers import Torch, grid_of, measure, torch_layer
from lightning_prune.structure.traced_model import TracedModel
from lightning_prune.structure.tracing import Call

__all__ = [
    "LatencyTimes",
    "eval_copy",
    "latency_times",
    "measure_latency",
    "median_seconds",
    "resize",
    "with_latency",
]

# Widths at which the network is timed: shares of the present ones, and how often random ones between the smallest of
# these and all.
_UNIFORM, _RANDOM = (1.0, 0.75, 0.5, 0.25), 4
# Seconds after which the layers, and then the networks, are not timed once more.
_LIMIT = 20.0


def with_latency(structure: Structure, table: LatencyTable) -> Structure:
    """The structure with a latency table; groups that were removed take no time."""
    names = {name for layer in table.layers for axis in layer.axes for name, _ in axis.counts()}
    table = table.without(names - structure.widths.keys())
    return replace(structure, cost=replace(structure.cost, latency_table=table))


@dataclass(frozen=True)
class LatencyTimes:
    """What is timed to know the latency of a network at any widths.

    Attributes:
        kinds: Descriptions of different layers, with the lengths at which they are timed.
        layers: Axes of each call of a layer, and the number of its kind.
        networks: Widths and bytes of activations of the network at several widths, the present ones first; and of some,
            the number of which all widths are odd multiples, else 0.
    """

    kinds: tuple[Mapping[str, Any], ...]
    layers: tuple[tuple[LayerTimes, int], ...]
    networks: tuple[tuple[Mapping[str, int], int, int], ...]


def measure_latency(
    traced: TracedModel,
    structure: Structure,
    dense: Mapping[str, int] | None = None,
    progress: Callable[[float], object] = lambda _: None,
) -> LatencyTable:
    """Time one sample's forward pass in eval mode, layer by layer at several widths, on copies.

    Each convolution and matrix product of a layer is timed at an eighth, a quarter, half, three quarters and all of
    each dimension that can shrink, and between two of these for the step in which its times rise. The network is timed
    at several widths, too; see `fit_table`.

    Args:
        traced: The network and its calls, on the device to measure.
        structure: Structure of the network.
        dense: Largest widths that the table must cover, by group, if the network was cut before.
        progress: Called with the share that is done.
    """
    copy, args, kwargs = eval_copy(traced)
    run = partial(copy.module, *args, **kwargs)
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=_devices(copy.module)):
        inputs = _inputs(copy.module, args, kwargs)
        timed = _times_of(inputs, structure, dense)
        like = inputs[0][2] if inputs else torch.zeros(())
        examples = {_key(_kind(layer, x)): x for _, layer, x in inputs}

        def time_layer(kind: Mapping[str, Any], rows: int, columns: int, seconds: float) -> float:
            return _milliseconds(torch_layer(kind, examples[_key(kind)], rows, columns), seconds)

        def time_network(number: int, seconds: float) -> float:
            with copy.cut(structure.axes({name: range(n) for name, n in timed.networks[number][0].items()})):
                return _milliseconds(run, seconds)

        measured = measure(timed.kinds, len(timed.networks), time_layer, time_network, limit=_LIMIT, progress=progress)
    return fit_table(timed.kinds, timed.layers, timed.networks, measured, _about(like.device))


def latency_times(traced: TracedModel, structure: Structure, dense: Mapping[str, int] | None = None) -> LatencyTimes:
    """What is to be timed; takes the arguments of `measure_latency`."""
    copy, args, kwargs = eval_copy(traced)
    with torch.no_grad(), torch.random.fork_rng(devices=_devices(copy.module)):
        return _times_of(_inputs(copy.module, args, kwargs), structure, dense)


def eval_copy(traced: TracedModel) -> tuple[Any, Any, Any]:
    """A copy of the network in eval mode, and the arguments of a call with one sample."""
    copy, call = traced.copy("real"), traced.calls[0]
    copy.module.eval()
    args, kwargs = (resize(part, call, 1) for part in (call.args, dict(call.kwargs)))
    return copy, args, kwargs


def _about(device: torch.device) -> dict[str, Any]:
    """Device, runtime and versions of what is measured in this process."""
    return Torch(str(device)).about()


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


def _times_of(
    inputs: Sequence[tuple[str, nn.Module, Tensor]], structure: Structure, dense: Mapping[str, int] | None
) -> LatencyTimes:
    """What is to be timed; identical layers are timed once."""
    cost, present = structure.cost, structure.widths
    largest = {**present, **(dense or {})}
    weights = {term.layer: term.axes[:2] for term in cost.parameters if len(term.axes) >= 2}
    kinds: dict[str, dict[str, Any]] = {}
    layers = []
    for name, layer, x in inputs:
        if name not in weights:
            continue  # its weight is computed or tied
        rows, columns = weights[name]
        grid = [grid_of(axis.length(largest), varies=bool(axis.repeat)) for axis in (rows, columns)]
        kind = {**_kind(layer, x), "grid": grid}
        key = json.dumps(kind)
        kinds.setdefault(key, kind)
        layers.append((LayerTimes((rows, columns)), [*kinds].index(key)))
    sampled = [(widths, 0) for widths in _sampled_widths(present)]
    sampled += [({name: _odd(width, multiple) for name, width in present.items()}, multiple) for multiple in MULTIPLES]
    networks = tuple((widths, cost.memory(widths), multiple) for widths, multiple in sampled)
    return LatencyTimes(tuple(kinds.values()), tuple(layers), networks)


def _sampled_widths(widths: Mapping[str, int]) -> list[dict[str, int]]:
    """Widths at which the network is timed: equal shares, and random ones, the same each time."""
    rng = np.random.default_rng(0)
    shares = [dict.fromkeys(widths, share) for share in _UNIFORM]
    shares += [dict(zip(widths, rng.uniform(_UNIFORM[-1], 1, len(widths)), strict=True)) for _ in range(_RANDOM)]
    found = [{name: _near(share[name] * width, width) for name, width in widths.items()} for share in shares]
    return [widths for number, widths in enumerate(found) if widths not in found[:number]]


def _odd(width: int, multiple: int) -> int:
    """An odd multiple near six tenths of a width; the width itself where it is too narrow."""
    return multiple * (2 * int(0.3 * width / multiple) + 1) if width > 2 * multiple else width


def _near(wanted: float, width: int) -> int:
    """A multiple of 8 near to the wanted width, or any width below 16."""
    multiple = 8 if wanted >= 16 else 1
    return min(max(round(wanted / multiple), 1) * multiple, width)


def _kind(layer: Any, x: Tensor) -> dict[str, Any]:
    """Plain description of a layer and its input, without the lengths that can shrink."""
    kind: dict[str, Any] = {"dtype": str(x.dtype).removeprefix("torch."), "bias": layer.bias is not None}
    if isinstance(layer, nn.Linear):
        return {"op": "linear", "lead": list(x.shape[:-1]), **kind}
    dims = len(layer.kernel_size)
    depthwise = min(layer.in_channels, layer.out_channels) == layer.groups > 1
    return {
        "op": "convolution",
        "lead": list(x.shape[: x.dim() - dims - 1]),
        "size": list(x.shape[-dims:]),
        "kernel": list(layer.kernel_size),
        "stride": list(layer.stride),
        "padding": _padding(layer),
        "output_padding": list(layer.output_padding),
        "dilation": list(layer.dilation),
        "transposed": bool(layer.transposed),
        "depthwise": depthwise,
        "groups": 1 if depthwise else layer.groups,
        "per_group": (layer.in_channels if layer.transposed else layer.out_channels) // layer.groups,
        **kind,
    }


def _padding(layer: Any) -> list[int]:
    """Zeros on each side of each spatial axis."""
    if layer.padding == "same":
        return [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [0] * len(layer.kernel_size) if layer.padding == "valid" else list(layer.padding)


def _key(kind: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in kind.items() if name != "grid"})


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
