"""Recording the data flow of a network, to determine which groups can be removed entirely."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_prune.structure.analysis import KINDS, Analysis
from lightning_prune.structure.atoms import IndexArray
from lightning_prune.structure.graph import Structure
from lightning_prune.structure.layers import tensors
from lightning_prune.structure.rules import RULES, unknown
from lightning_prune.structure.stubs import CONVOLUTIONS, NORMS
from lightning_prune.structure.traced_model import TracedModel
from lightning_prune.structure.tracing import Call, Tracer, output_tensors
from lightning_prune.structure.vanishing import Flow, Op, Operand, Pass, Removal

__all__ = ["layer_kinds", "with_flow"]

#: Operators that read only the shapes of their inputs.
_BLIND = frozenset(
    f"{name}{like}" for name in ("zeros", "ones", "empty", "full", "rand", "randn") for like in ("_like",)
) | frozenset(f"new_{name}" for name in ("zeros", "ones", "empty", "full", "empty_strided"))
#: Operators whose index arguments carry no data.
_PLACED = frozenset({"max_unpool2d", "max_unpool3d"})

Raw = tuple[int, bool, tuple[Any, ...]]


class _Recorder(Tracer):  # type: ignore[no-untyped-call]
    """Tracer that also records the operators."""

    def __init__(self, analysis: Analysis) -> None:
        super().__init__(analysis.atoms, RULES, unknown)
        self.ops: list[tuple[list[Raw], list[Raw], bool]] = []

    def raw(self, tensor: torch.Tensor) -> Raw:
        """A tensor's storage, whether it is empty, and the labels of its axes."""
        storage = tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
        return storage, tensor.numel() == 0, self.value(tensor).axes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        before = [self.raw(tensor) for tensor in inputs]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace != "prim":
            outputs = [self.raw(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            name = str(func._schema.name).removeprefix("aten::")
            self.ops.append((before[:1] if name in _PLACED else before, outputs, name not in _BLIND))
        return out


def with_flow(structure: Structure, traced: TracedModel, gone: Collection[str] = ()) -> Structure:
    """The structure with its data flow, which determines the groups that can be removed entirely.

    Args:
        structure: Structure of the network.
        traced: The network and its calls.
        gone: Groups that were removed before.
    """
    with torch.inference_mode(False):
        try:
            analysis, runs = _recorded(traced, structure)
        except Exception:
            if not traced.with_hooks:
                raise
            analysis, runs = _recorded(replace(traced, with_hooks=False), structure)  # like `trace`, which adds a note
    cover = _Covers(analysis, structure)
    passes = tuple(_pass(cover, *run) for run in runs)
    flow = _flow(cover, passes, analysis, structure, traced.model)
    return replace(structure, flow=flow.take(Removal(frozenset(gone))))


Run = tuple[list[tuple[list[Raw], list[Raw], bool]], set[int], list[Raw], dict[int, tuple[str, ...]], bool]


def _recorded(traced: TracedModel, structure: Structure) -> tuple[Analysis, list[Run]]:
    analysis = Analysis(traced)
    analysis.label_units(structure)
    recorder = _Recorder(analysis)
    runs = [_run(recorder, analysis, call) for call in traced.calls]
    for call in traced.optional:
        with suppress(Exception):  # noted by `trace`
            runs.append(_run(recorder, analysis, call))
    return analysis, runs


def _run(recorder: _Recorder, analysis: Analysis, call: Call) -> Run:
    """Record a call on the cheapest kind of tensors that it runs on."""
    for kind in KINDS:
        copy = analysis.copy(kind)
        recorder.ops = []
        try:
            out = copy.run(recorder, call, analysis.labels)
        except Exception:
            recorder.forget()
            if kind == KINDS[-1]:
                raise
            continue
        outputs = [recorder.raw(tensor) for tensor in output_tensors(out)]
        names: dict[int, tuple[str, ...]] = {}
        for name, tensor in copy.named.items():
            if isinstance(tensor, nn.Parameter):
                storage = recorder.raw(tensor)[0]
                names[storage] = (*names.get(storage, ()), name)
        known = {recorder.raw(tensor)[0] for tensor in copy.named.values()}
        made = {raw[0] for _, outs, _ in recorder.ops for raw in outs}
        # Tensors that are neither created by an operator nor part of the network are inputs.
        inputs = {raw[0] for ins, _, _ in recorder.ops for raw in ins} - known - made
        inputs |= _first_seen(recorder.ops) - known
        ops = recorder.ops
        recorder.forget()
        return ops, inputs, outputs, names, call.method == "forward"
    raise AssertionError


def _first_seen(ops: Sequence[tuple[list[Raw], list[Raw], bool]]) -> set[int]:
    """Storages that are read before they are written: those of inputs."""
    written: set[int] = set()
    found: set[int] = set()
    for inputs, outputs, _ in ops:
        found |= {raw[0] for raw in inputs} - written
        written |= {raw[0] for raw in outputs} | {raw[0] for raw in inputs}
    return found


class _Covers:
    """Looks up the groups that make up an axis."""

    def __init__(self, analysis: Analysis, structure: Structure) -> None:
        self.atoms = analysis.atoms
        groups = [group for group in structure.groups if not group.within]
        self.names = [group.name for group in groups]
        self.owner = np.full(len(self.atoms.parent), -1)
        for number, group in enumerate(groups):
            for member in group.members:
                axis = analysis.labels[member.tensor][member.dim]
                self.owner[self.atoms.find(axis[member.index.flatten()])] = number

    def of(self, axis: IndexArray) -> frozenset[str] | None:
        """The groups of an axis; None if it has other indices too."""
        owners = self.owner[self.atoms.find(axis)]
        return None if (owners < 0).any() else frozenset(self.names[i] for i in np.unique(owners).tolist())

    def piece(self, raw: Raw) -> Operand:
        """The operand for a tensor."""
        storage, empty, axes = raw
        if empty:
            return Operand(storage, (frozenset(),))
        found = [self.of(axis) for axis in axes if isinstance(axis, np.ndarray) and len(axis)]
        return Operand(storage, tuple(dict.fromkeys(cover for cover in found if cover is not None)))


def _pass(
    cover: _Covers,
    ops: list[tuple[list[Raw], list[Raw], bool]],
    inputs: set[int],
    outputs: list[Raw],
    names: dict[int, tuple[str, ...]],
    guarded: bool,
) -> Pass:
    kept = tuple(
        Op(tuple(cover.piece(raw) for raw in ins), tuple(cover.piece(raw) for raw in outs), reads)
        for ins, outs, reads in ops
    )
    return Pass(kept, frozenset(inputs), tuple(cover.piece(raw) for raw in outputs), names, guarded)


def _flow(cover: _Covers, passes: tuple[Pass, ...], analysis: Analysis, structure: Structure, model: nn.Module) -> Flow:
    covers: dict[str, dict[int, frozenset[str]]] = {}
    for name, axes in analysis.labels.items():
        for dim, axis in enumerate(axes):
            groups = cover.of(axis) if len(axis) else None
            if groups is not None:
                covers.setdefault(name, {})[dim] = groups
    parameters = [name for name, tensor in analysis.first.named.items() if isinstance(tensor, nn.Parameter)]
    owners = {name: name.rpartition(".")[0] for name in parameters}
    producers = {
        group.name: tuple(m.tensor for m in group.members if m.role == "out" and m.tensor in owners)
        for group in structure.groups
        if not group.within
    }
    # An instance norm runs at any width.
    counted = {
        group.name: size.tensor
        for group in structure.groups
        for size in reversed(group.sizes)
        if not group.within and not size.tensor.endswith("num_features")
    }
    return Flow(passes, covers, owners, layer_kinds(model), producers, counted)


def layer_kinds(model: nn.Module) -> Mapping[str, str]:
    """Kind of each module: ``"linear"``, ``"norm"``, or the reason why it cannot be removed."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    users: dict[int, set[int]] = {}
    for module in model.modules():
        for tensor in tensors(module).values():
            users.setdefault(id(tensor), set()).add(id(module))
    shared = {id(m) for m in model.modules() if any(len(users[id(tensor)]) > 1 for tensor in tensors(m).values())}
    kinds = {}
    for name, module in model.named_modules():
        kinds[name] = _kind(module)
        if len(places[id(module)]) > 1:
            kinds[name] = "it is used in several places"
        elif id(module) in shared:
            kinds[name] = "its weights are tied"
    return kinds


def _kind(module: nn.Module) -> str:
    if hasattr(module, "parametrizations"):
        return "its weight is computed"
    if type(module) is nn.Linear or type(module) in CONVOLUTIONS:
        return "linear"
    return "norm" if type(module) in NORMS else f"layers of type {type(module).__name__} cannot be removed"
