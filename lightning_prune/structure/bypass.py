"""Layers of a chain that can be removed by connecting their input to the layers after them.

A layer that loses all its units blocks its path. In a residual network there is another path (`with_flow`); in a chain
the layers after it must be re-created for the layer's input. That suits only networks that are re-initialized: this
file finds where it is possible, and what must be removed with the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure.flow import layer_kinds
from lightning_prune.structure.graph import Group, Structure
from lightning_prune.structure.layers import canonical, is_within
from lightning_prune.structure.stages import stages_of
from lightning_prune.structure.traced_model import TracedModel
from lightning_prune.structure.tracing import output_tensors

__all__ = ["Bypass", "Bypasses", "find_bypasses"]

_POOLS: tuple[type[nn.Module], ...] = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.LPPool1d, nn.LPPool2d),
)
_DROPOUTS: tuple[type[nn.Module], ...] = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    getattr(nn.modules.activation, name)
    for name in nn.modules.activation.__all__
    if name not in ("MultiheadAttention", "Softmax", "Softmax2d", "LogSoftmax", "Softmin", "GLU")
)


@dataclass(frozen=True)
class Bypass:
    """How a group can be removed from a chain.

    Attributes:
        before: The group that its layer reads, and that the layers after it read instead.
        inputs: Inputs of the layer per unit of that group: more than one where a feature map was flattened.
        modules: Modules that become identities: the layer, its norm and its activation; for a stage, the blocks.
        consumers: The layers after it, and their inputs per unit.
        along: Groups inside the blocks of a stage, which are removed with it.
    """

    before: str
    inputs: int
    modules: tuple[str, ...]
    consumers: Mapping[str, int]
    along: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bypasses:
    """Groups that can be removed although the network has no other path around them.

    Attributes:
        groups: By name, in the order of execution.
        pools: Pooling layers, each with the groups of the layers between the previous one and itself: it is removed
            when all of these are.
    """

    groups: Mapping[str, Bypass]
    pools: Mapping[str, frozenset[str]]

    def modules(self, gone: Collection[str]) -> tuple[str, ...]:
        """Modules that become identities when these groups are removed."""
        names = [name for group in gone for name in self.groups[group].modules]
        return tuple(dict.fromkeys([*names, *(pool for pool, groups in self.pools.items() if groups <= set(gone))]))

    def reads(self, group: str, gone: Collection[str]) -> tuple[str, int]:
        """The group that is read in place of a removed one, and the inputs per unit.

        Args:
            group: The group; returned with 1 if it stays.
            gone: Removed groups.
        """
        inputs = 1
        while group in gone:
            bypass = self.groups[group]
            group, inputs = bypass.before, inputs * bypass.inputs
        return group, inputs

    def widths(self, widths: Mapping[str, int], gone: Collection[str]) -> dict[str, int]:
        """Widths, with that of each removed group replaced by the width of what is read in its place."""
        found = {name: self.reads(name, gone) for name in widths}
        return {name: widths[group] * inputs for name, (group, inputs) in found.items()}

    def consumers(self, gone: Collection[str]) -> dict[str, tuple[str, int]]:
        """Layers that must be re-created when groups are removed: the group they read then, and inputs per unit."""
        replaced = self.modules(gone)
        found: dict[str, tuple[str, int]] = {}
        for name in gone:
            group, inputs = self.reads(name, gone)
            for layer, size in self.groups[name].consumers.items():
                if not is_within(layer, replaced):
                    found[layer] = group, inputs * size
        return found


def find_bypasses(structure: Structure, traced: TracedModel) -> Bypasses:
    """Find the groups that can be removed where no other path leads around them, and the pooling layers with them.

    A group qualifies if a single plain Linear or Conv produces it from one other group, and if plain layers consume it
    alone. A copy without the layer, with the inputs of the layers after it adjusted, must return outputs of the same
    shape. So a layer that changes the spatial size is removed only where any size is accepted afterwards (global
    pooling), and pooling likewise. Layers that read no group, such as the first layer, always stay.

    A stage of a residual network (its stream and the groups inside its branches) qualifies if its layers fill whole
    modules (blocks) that all read one group from outside.

    Args:
        structure: Structure of the network, with its flow if stages are to be found.
        traced: The network and its calls.
    """
    trial, kinds = _Trial(traced), layer_kinds(traced.model)
    widths, groups = structure.widths, dict[str, Bypass]()
    stages = stages_of(structure) if structure.flow is not None else {}
    for group in structure.groups:
        if group.name in stages:
            bypass = _stage(structure, group, stages[group.name], kinds, trial)
        else:
            bypass = _candidate(structure, group, kinds, trial)
        if bypass is not None:
            width = widths[bypass.before] * bypass.inputs
            read = {layer: size * width for layer, size in bypass.consumers.items()}
            if trial.works(bypass.modules, read):
                groups[group.name] = bypass
    owners = {name: group for group, bypass in groups.items() for name in bypass.modules}
    pools = {pool: stage for pool, stage in _stages(trial, owners) if trial.works((pool,), {})}
    return Bypasses(groups, pools)


def _candidate(structure: Structure, group: Group, kinds: Mapping[str, str], trial: _Trial) -> Bypass | None:
    """The bypass of a group, if its members are of the right kinds."""
    if len(group.producers) != 1:
        return None
    layer = group.producers[0]
    norms = {member.layer for member in group.members if member.role == "along"} - {layer}
    consumers = {m.layer: m.index.shape[1] for m in group.members if m.role == "in"}
    whole = all(structure.cost.shapes[m.tensor][m.dim] == m.index.size for m in group.members)
    plain = all(kinds.get(name) == "linear" for name in (layer, *consumers)) and all(
        kinds.get(name) == "norm" for name in norms
    )
    before = _read_by(structure, f"{layer}.weight")
    if not (whole and plain and consumers and before):
        return None
    return Bypass(*before, (layer, *trial.follows(layer, norms)), consumers)


def _stage(
    structure: Structure, stream: Group, inner: tuple[str, ...], kinds: Mapping[str, str], trial: _Trial
) -> Bypass | None:
    """The bypass of a stage, if its layers fill blocks that read one group from outside."""
    groups = [stream, *map(structure.group, inner)]
    own = {member.layer for group in groups for member in group.members if member.role != "in"}
    blocks = trial.filled_by(own)
    names = {group.name for group in groups}
    reads = {_read_by(structure, f"{layer}.weight") for group in groups for layer in group.producers}
    before = {read for read in reads if read is None or read[0] not in names}
    consumers = {m.layer: m.index.shape[1] for m in stream.members if m.role == "in" and not is_within(m.layer, blocks)}
    whole = all(structure.cost.shapes[m.tensor][m.dim] == m.index.size for g in groups for m in g.members)
    plain = all(kinds.get(name) == "linear" for name in consumers)
    if not blocks or not consumers or not whole or not plain or len(before) != 1:
        return None
    read = before.pop()
    return None if read is None else Bypass(*read, blocks, consumers, inner)


def _read_by(structure: Structure, weight: str) -> tuple[str, int] | None:
    """The one group that a layer reads, and its inputs per unit; None if it reads anything else."""
    for group in structure.groups:
        for member in group.members:
            if member.tensor == weight and member.dim == 1 and member.role == "in":
                whole = member.index.size == structure.cost.shapes[weight][1]
                return (group.name, member.index.shape[1]) if whole else None
    return None


def _stages(trial: _Trial, owners: Mapping[str, str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Pooling layers with the groups between the previous one and themselves, where all of these can be removed."""
    found: set[str] = set()
    all_can = True
    for name in trial.order:
        if isinstance(trial.modules[name], _POOLS):
            if found and all_can and trial.order.count(name) == 1:
                yield name, frozenset(found)
            found, all_can = set(), True
        elif name in owners:
            found.add(owners[name])
        elif any(True for _ in trial.modules[name].parameters()):
            all_can = False


class _Trial:
    """A copy of the network that can be run with some modules replaced by identities.

    Attributes:
        modules: Its modules by name.
        order: Leaf modules, in the order in which they are called.
    """

    def __init__(self, traced: TracedModel) -> None:
        call = traced.calls[0]
        self.copy = traced.copy("real").module.eval()
        self.args, self.kwargs = call.args, call.kwargs
        self.modules = {canonical(name): module for name, module in self.copy.named_modules()}
        self.order: list[str] = []
        names = {id(module): name for name, module in self.modules.items()}
        handles = [
            module.register_forward_pre_hook(lambda m, _: self.order.append(names[id(m)]))
            for module in self.modules.values()
            if not any(True for _ in module.children())
        ]
        try:
            self.shapes = self._run()
        finally:
            for handle in handles:
                handle.remove()

    def follows(self, layer: str, norms: Collection[str]) -> list[str]:
        """The layer's norms, and the activations and dropouts between it and the next layer or pooling."""
        found: list[str] = []
        for name in self.order[self.order.index(layer) + 1 :] if layer in self.order else ():
            single = self.order.count(name) == 1
            if name in norms or (single and isinstance(self.modules[name], (*_ACTIVATIONS, *_DROPOUTS))):
                found.append(name)
            else:
                break
        return [*found, *(norm for norm in norms if norm not in found)]

    def filled_by(self, layers: Collection[str]) -> tuple[str, ...]:
        """The largest modules whose layers are all among these; none if a layer itself is the largest."""
        full = [
            name
            for name, module in self.modules.items()
            if name
            and (owners := [n for n, m in module.named_modules(prefix=name) if m._parameters])
            and all(owner in layers for owner in owners)
        ]
        largest = [name for name in full if not any(is_within(name, [other]) for other in full if other != name)]
        return () if any(name in layers for name in largest) else tuple(largest)

    def works(self, gone: Iterable[str], reads: Mapping[str, int]) -> bool:
        """Whether the network returns outputs of the same shape without some modules.

        Args:
            gone: Modules that become identities.
            reads: New input widths of layers; all others keep theirs.
        """
        others: dict[str, nn.Module] = {name: nn.Identity() for name in gone}
        others |= {name: _WithInputs(self.modules[name], inputs) for name, inputs in reads.items()}
        with self._with(others):
            try:
                return self._run() == self.shapes
            except Exception:  # shapes that do not fit, or code that looks at a layer that is not there
                return False

    @contextmanager
    def _with(self, others: Mapping[str, nn.Module]) -> Iterator[None]:
        """Replace modules within the context."""
        places = [
            (self.modules[name.rpartition(".")[0]], name.rpartition(".")[2], other) for name, other in others.items()
        ]
        before = [parent._modules[key] for parent, key, _ in places]
        try:
            for parent, key, other in places:
                parent._modules[key] = other
            yield
        finally:
            for (parent, key, _), module in zip(places, before, strict=True):
                parent._modules[key] = module

    def _run(self) -> list[tuple[int, ...]]:
        with torch.no_grad():
            output = self.copy(*self.args, **self.kwargs)
        return [tuple(tensor.shape) for tensor in output_tensors(output)]


class _WithInputs(nn.Module):
    """A linear layer or convolution with another number of inputs and zero weights."""

    def __init__(self, layer: nn.Module, inputs: int) -> None:
        super().__init__()
        weight = layer.get_parameter("weight")
        self.layer = copy.copy(layer)
        shape = (weight.shape[0], inputs, *weight.shape[2:])
        self.layer._parameters = {**layer._parameters, "weight": nn.Parameter(weight.new_zeros(shape))}

    def forward(self, x: Tensor) -> Any:
        """Zeros of the layer's shape."""
        return self.layer(x)
