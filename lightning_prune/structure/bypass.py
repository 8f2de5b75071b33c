"""Layers of a chain that a network can do without: what they read is handed on to the layers behind.

A layer that loses all its units leaves no path through itself. In a residual network another one leads around it
(`with_flow`); in a chain the layers behind have to be built anew, for what the layer read. That is only for networks
whose weights are drawn anew: this file finds where it can be done, and what goes along.
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
from lightning_prune.structure.subject import Subject
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
    """How a group can vanish from a chain.

    Attributes:
        before: The group whose units its layer reads, and the layers behind read instead.
        inputs: How many inputs of the layer a unit of that group is: more than one where a map was flattened.
        modules: What becomes an identity: the layer, its norm and its activation; of a stage, the blocks.
        consumers: The layers behind, and how many of their inputs a unit is.
        along: Groups inside the blocks of a stage, which go with it.
    """

    before: str
    inputs: int
    modules: tuple[str, ...]
    consumers: Mapping[str, int]
    along: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bypasses:
    """What can vanish although no path of the network leads around it.

    Attributes:
        groups: By name, in the order of execution.
        pools: Poolings, and the groups of the layers since the one before: when all of these vanish, it goes along.
    """

    groups: Mapping[str, Bypass]
    pools: Mapping[str, frozenset[str]]

    def modules(self, gone: Collection[str]) -> tuple[str, ...]:
        """What becomes an identity when these groups vanish."""
        names = [name for group in gone for name in self.groups[group].modules]
        return tuple(dict.fromkeys([*names, *(pool for pool, groups in self.pools.items() if groups <= set(gone))]))

    def reads(self, group: str, gone: Collection[str]) -> tuple[str, int]:
        """What is read where the units of a group were: a group, and how many inputs each of its units is.

        Args:
            group: The group; itself, and one input each, if it stays.
            gone: Groups that vanish.
        """
        inputs = 1
        while group in gone:
            bypass = self.groups[group]
            group, inputs = bypass.before, inputs * bypass.inputs
        return group, inputs

    def widths(self, widths: Mapping[str, int], gone: Collection[str]) -> dict[str, int]:
        """Widths with those of vanished groups replaced by what is read in their place."""
        found = {name: self.reads(name, gone) for name in widths}
        return {name: widths[group] * inputs for name, (group, inputs) in found.items()}

    def consumers(self, gone: Collection[str]) -> dict[str, tuple[str, int]]:
        """Layers that have to be built anew when groups vanish: what they read, and inputs of a unit of it."""
        replaced = self.modules(gone)
        found: dict[str, tuple[str, int]] = {}
        for name in gone:
            group, inputs = self.reads(name, gone)
            for layer, size in self.groups[name].consumers.items():
                if not is_within(layer, replaced):
                    found[layer] = group, inputs * size
        return found


def find_bypasses(structure: Structure, subject: Subject) -> Bypasses:
    """Which groups of a network can vanish where no other path leads around them, and which poolings with them.

    A group qualifies if one plain Linear or Conv produces it, which reads the units of one other group and nothing
    else, and plain layers that read nothing else take it. A trial decides: a copy without the layer, in which the
    layers behind are as wide as what reaches them, has to give outputs of the same shape. So a layer that changes the
    size of the map goes only where what follows takes any size (global pooling), and a pooling likewise. The layers
    that read what no group produces, the network's input above all, always stay.

    A stage of a residual network qualifies likewise: its stream, with the groups inside its branches, if its layers
    fill modules (blocks) that all read one group from outside.

    Args:
        structure: Of the network as it is; with its flow, if stages are to be found.
        subject: The network and how it is run.
    """
    trial, kinds = _Trial(subject), layer_kinds(subject.model)
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
    """What would go with a group, if its members are of the right kinds."""
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
    """What would go with a stage, if its layers fill blocks that read one group from outside."""
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
    """The group whose units are all that a layer reads, and how many of its inputs each of them is."""
    for group in structure.groups:
        for member in group.members:
            if member.tensor == weight and member.dim == 1 and member.role == "in":
                whole = member.index.size == structure.cost.shapes[weight][1]
                return (group.name, member.index.shape[1]) if whole else None
    return None


def _stages(trial: _Trial, owners: Mapping[str, str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Poolings, each with the groups of the layers since the last one, where all of these can vanish."""
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
    """A copy of the network that is run with some modules as identities.

    Attributes:
        modules: Its modules by name.
        order: Modules without modules inside, in the order in which they are called.
    """

    def __init__(self, subject: Subject) -> None:
        call = subject.calls[0]
        self.copy = subject.copy("real").module.eval()
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
        """The layer's norms, and activations and dropouts called between it and the next layer or pooling."""
        found: list[str] = []
        for name in self.order[self.order.index(layer) + 1 :] if layer in self.order else ():
            single = self.order.count(name) == 1
            if name in norms or (single and isinstance(self.modules[name], (*_ACTIVATIONS, *_DROPOUTS))):
                found.append(name)
            else:
                break
        return [*found, *(norm for norm in norms if norm not in found)]

    def filled_by(self, layers: Collection[str]) -> tuple[str, ...]:
        """The largest modules all of whose layers are among these; none if one of these would stand alone."""
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
        """Whether the network gives outputs of the same shape without some modules.

        Args:
            gone: Modules that become identities.
            reads: What layers read then, in inputs; all others read as much as before.
        """
        others: dict[str, nn.Module] = {name: nn.Identity() for name in gone}
        others |= {name: _Reading(self.modules[name], inputs) for name, inputs in reads.items()}
        with self._with(others):
            try:
                return self._run() == self.shapes
            except Exception:  # shapes that do not fit, or code that looks at a layer that is not there
                return False

    @contextmanager
    def _with(self, others: Mapping[str, nn.Module]) -> Iterator[None]:
        """Other modules in the place of some, within the context."""
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


class _Reading(nn.Module):
    """A linear layer or convolution as it would be if it read another number of inputs."""

    def __init__(self, layer: nn.Module, inputs: int) -> None:
        super().__init__()
        weight = layer.get_parameter("weight")
        self.layer = copy.copy(layer)
        shape = (weight.shape[0], inputs, *weight.shape[2:])
        self.layer._parameters = {**layer._parameters, "weight": nn.Parameter(weight.new_zeros(shape))}

    def forward(self, x: Tensor) -> Any:
        """Zeros of the layer's shape."""
        return self.layer(x)
