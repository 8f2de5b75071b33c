"""Loading weights of a narrow network that come without a pruning history, where their shapes tell all."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.api.inspecting import traced_model_for
from lightning_prune.api.portable import require_real, tensors_of
from lightning_prune.errors import listed
from lightning_prune.structure import Structure, trace
from lightning_prune.structure.graph import Axes, Group
from lightning_prune.structure.layers import is_within
from lightning_prune.structure.size_attributes import modules_with_heads
from lightning_prune.structure.traced_model import require_network, written
from lightning_prune.surgery import HistoryError, history_of
from lightning_prune.surgery.compiled import reset_compiled
from lightning_prune.surgery.restore import load_narrow
from lightning_prune.surgery.tensors import canonical, named, non_persistent

__all__ = ["load_by_shapes"]

Module = TypeVar("Module", bound=nn.Module)

#: First bytes of what `torch.save` writes.
_ZIP = b"PK\x03\x04"


def load_by_shapes(model: Module, weights: str | Path | Mapping[str, Tensor], example: Any = None) -> Module:
    """Load a plain ``state_dict`` of a narrow network into a newly built dense one, in place, by the shapes in it.

    For weights that come without the history that `save` stores: from ``torch.save(model.state_dict())``, after
    `strip`, or from another library. Each layer gets the widths of its tensors. That is the pruned network if nothing
    but widths has changed. Groups stay as many as they are, but for depthwise convolutions and instance norms. Numbers
    that modules hold, such as that of attention heads, follow only if an example is given; where shapes allow for fewer
    heads and for fewer features of each (``#head_dim``), heads are taken, with a warning. The loaded network has no
    history: amounts of further pruning refer to its present size.

    Args:
        model: The network as it was built before it was pruned.
        weights: A safetensors file, a file of ``torch.save`` (read with ``weights_only=True``), or the tensors by name.
        example: A batch of inputs, as for `prune`. The dense network is traced with it, to find what follows the
            widths; required if an attention may have lost heads.

    Returns:
        The network, in the mode it was in.

    Raises:
        HistoryError: If the names are not those of the network, a tensor is larger than the network's, or shapes do
            not tell all: layers were removed, an attention may have lost heads and no example is given, or a buffer
            that is not in the ``state_dict`` may have been cut. The network is unchanged.

    Example:
        >>> import torch
        >>> from lightning_prune import load_by_shapes, prune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = prune(net, torch.zeros(2, 4), pruning_ratio=0.5)
        >>> again = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> load_by_shapes(again, net.state_dict())
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    require_network(model)
    network = written(model)
    require_real(network, "load_by_shapes")
    if history_of(network) is not None:
        raise ValueError(
            f"load_by_shapes: expected a newly built dense {type(network).__name__}, got one that was pruned. Build it "
            "again. Weights of its own widths are loaded by `load_state_dict`."
        )
    found = _tensors(weights if isinstance(weights, Mapping) else _read(Path(weights)))
    narrow = {canonical(name): weight for name, weight in found.items()}
    here = {canonical(name): tensor for name, tensor in network.state_dict().items()}
    axes: Axes = {}
    for name in narrow.keys() & here.keys():
        pairs = zip(narrow[name].shape, here[name].shape, strict=False)
        axes[name] = {dim: np.arange(now) for dim, (now, dense) in enumerate(pairs) if now != dense}
    axes = {name: kept for name, kept in axes.items() if kept}
    problems = [*_problems(narrow, here), *_unsaved(network, axes, here)]
    if not problems and example is not None:
        axes |= _sizes(trace(traced_model_for(network, example)), axes)
    elif not problems:
        problems = list(_heads(network, axes))
    if problems:
        raise HistoryError(
            f"expected the weights of this {type(network).__name__}, of which shapes tell how narrow it is: "
            f"{listed(problems, 3)}. Nothing has changed. Use `save` where it was pruned, and `load`."
        )
    reset_compiled(network)
    load_narrow(network, axes, narrow)
    return model


def _heads(network: nn.Module, axes: Axes) -> Iterator[str]:
    """Modules that may have fewer attention heads, a number that no shape tells."""
    cut = [name.rpartition(".")[0] for name, kept in axes.items() if 0 in kept]
    for name in modules_with_heads(network):
        if any(is_within(layer, [name]) for layer in cut):
            yield f"{name} may have lost attention heads, which no shape tells: give an `example`, too"


def _sizes(structure: Structure, axes: Axes) -> Axes:
    """Sizes in attributes that follow the widths of these axes."""
    found: Axes = {}
    assumed: list[str] = []
    for group in (group for group in structure.groups if group.sizes and not group.within):
        units, rest, length = _units(structure, group, axes)
        inner = [one for one in structure.groups if one.within == group.name]
        features = {one.name: _units(structure, one, axes) for one in inner}
        are_features = bool(inner) and not any(rest for _, rest, _ in features.values())
        if rest and not are_features:
            raise HistoryError(
                f"expected weights with whole heads or units of {group.name!r}, got an axis of {length} positions. "
                "Nothing has changed. The weights are of another network, or heads and their features were pruned: use "
                "`save` where it was pruned, and `load`."
            )
        if units < group.width and not rest and are_features:
            assumed.append(f"{group.name} has {units} heads")
        counted = {group.name: units} if not rest else {name: number for name, (number, _, _) in features.items()}
        for one in (one for one in (group, *inner) if counted.get(one.name, one.width) < one.width):
            lengths = {size.tensor: counted[one.name] * size.index.shape[1] for size in one.sizes}
            found.update((name, {0: np.arange(now)}) for name, now in lengths.items())
    if assumed:
        warnings.warn(
            f"load_by_shapes takes whole heads as removed where shapes allow for fewer features of heads, too: "
            f"{listed(assumed)}. If features were pruned (`#head_dim`), use `save` where it was pruned, and `load`.",
            stacklevel=3,
        )
    return found


def _units(structure: Structure, group: Group, axes: Axes) -> tuple[int, int, int]:
    """How many units an axis that these have alone holds after a cut, what remains of it, and its length."""
    shapes = structure.cost.shapes
    whole = next((m for m in group.members if m.index.size == shapes[m.tensor][m.dim]), None)
    if whole is None:
        raise HistoryError(
            f"expected an axis with the units of {group.name!r} alone, from whose length their number follows, but "
            "others share each of them. Nothing has changed. Use `save` where it was pruned, and `load`."
        )
    length = len(axes.get(whole.tensor, {}).get(whole.dim, range(whole.index.size)))
    return *divmod(length, whole.index.shape[1]), length


def _problems(narrow: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> Iterator[str]:
    yield from (f"{name} is missing in the weights" for name in sorted(here.keys() - narrow.keys()))
    yield from (f"{name} is not in the network" for name in sorted(narrow.keys() - here.keys()))
    for name, tensor in here.items():
        now, dense = list(narrow.get(name, tensor).shape), list(tensor.shape)
        if len(now) != len(dense) or any(a > b for a, b in zip(now, dense, strict=True)):
            yield f"{name} is {now}, here it is {dense}"
        elif 0 in now and 0 not in dense:
            yield f"{name} is {now}: layers were removed"


def _unsaved(network: nn.Module, axes: Axes, here: Mapping[str, Tensor]) -> Iterator[str]:
    """Buffers that no file holds, and that may have been cut."""
    lengths = {here[name].shape[dim] for name, kept in axes.items() for dim in kept}
    present = named(network)
    for name in sorted(non_persistent(network)):
        buffer = present.get(name)
        if buffer is not None and buffer.is_floating_point() and lengths & {*buffer.shape} - {1}:
            yield f"{name} {list(buffer.shape)} is in no `state_dict`, and which of it was kept is not known"


def _tensors(found: object) -> Mapping[str, Tensor]:
    """Weights, which must be tensors by name."""
    problem = "" if isinstance(found, Mapping) else f"a {type(found).__name__}"
    if isinstance(found, Mapping):
        others = [f"a {type(part).__name__} for {name!r}" for name, part in found.items() if not _is_dense(part)]
        problem = ", ".join(others[:3])
    if problem:
        raise HistoryError(
            f"expected a `state_dict`, tensors by name, got {problem}. Nothing has changed. Of a checkpoint, give the "
            'part that holds them, such as `torch.load(file, weights_only=True)["state_dict"]`.'
        )
    assert isinstance(found, Mapping)
    return found


def _is_dense(part: object) -> bool:
    return isinstance(part, Tensor) and part.layout is torch.strided and not part.is_meta


def _read(file: Path) -> object:
    with file.open("rb") as opened:
        is_zip = opened.read(len(_ZIP)) == _ZIP
    if not is_zip:
        return tensors_of(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise HistoryError(
            f"expected a file of tensors, got '{file}', which is torn or holds other objects, which are not read since "
            "that would execute them. Nothing has changed. Save its `state_dict()`."
        ) from error
