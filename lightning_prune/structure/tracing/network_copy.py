"""A copy of a network without memory for its weights, to run it under a tracer, also with narrower tensors."""

from __future__ import annotations

import copy
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import is_not
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from lightning_prune.structure.atoms import IndexArray
from lightning_prune.structure.hooks import REGISTERS, held_by, is_container, put_on, reachable, remembered, taking_part
from lightning_prune.structure.layers import canonical, loosen, refresh, tensors
from lightning_prune.structure.tracing.calls import Call, forked_rng, output_tensors
from lightning_prune.structure.tracing.contexts import (
    ALIKE_IN_BOTH_MODES,
    assignments_followed,
    contents_restored,
    fastpath_off,
    log_held,
    named_while_running,
    who_asks_for_the_mode,
)
from lightning_prune.structure.tracing.labels import AxisLabel, Kind
from lightning_prune.structure.tracing.operators import CONSTANT
from lightning_prune.structure.tracing.tracer import Tracer

__all__ = ["FakeCopy"]

#: A run under the tracer changes two classes of PyTorch for its time, so that threads run theirs one after the other.
_TRACING = threading.RLock()


class FakeCopy:
    """A copy of a network that runs without memory or arithmetic, and can be cut and restored cheaply.

    Args:
        model: The network; left untouched. Its forward hooks that take part in what it computes run on the copy, and
            store what they store there; the others do not.
        memo: Objects of the network that the copy shall not copy: ``{id(object): replacement}``.
        prepare: Called with the copy, to replace what must not run on fake tensors (metrics, loggers).
        kind: ``"meta"`` is fastest; ``"fake"`` tensors also know their device, and constants mix with them;
            ``"real"`` ones are for steps whose operators depend on data.
        with_hooks: Whether hooks run on the copy.

    Attributes:
        hooks: Those that do.
        notes: Remarks about hooks that were left out.
    """

    def __init__(
        self,
        model: nn.Module,
        memo: Mapping[int, Any] | None = None,
        prepare: Callable[[nn.Module], None] | None = None,
        *,
        kind: Kind = "fake",
        with_hooks: bool = True,
    ) -> None:
        self.kind = kind
        self.mode = FakeTensorMode(allow_non_fake_inputs=True) if kind == "fake" else None
        self.stack: list[str] = []
        self.asked: set[type] | None = None
        self.watched = False
        self.named: dict[str, torch.Tensor] = {}
        hooks, held = taking_part(model) if with_hooks else {}, held_by(model)
        twins = self._twins(model, memo or {}, held)
        self.module = _copied(model, twins)
        self.hooks, self.notes = put_on(hooks, model, twins)
        self._held = [twins[id(thing)] for thing in held if id(thing) in twins]
        if prepare is not None:
            prepare(self.module)
        self._slots: dict[int, list[tuple[nn.Module, str]]] = {}
        self._homes: list[dict[Any, Any]] = []
        for module in self.module.modules():
            self._homes += vars(module), module._buffers, *(getattr(module, register) for register in REGISTERS)
            loosen(module)
            for name, tensor in tensors(module).items():
                self._slots.setdefault(id(tensor), []).append((module, name))

    def _twins(self, model: nn.Module, memo: Mapping[int, Any], held: Iterable[Any]) -> dict[int, Any]:
        """What stands in the copy for the tensors and hooks of the network: ``{id(object): stand-in}``."""
        twins = dict(memo)
        for prefix, module in model.named_modules():
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                twins[id(getattr(module, hooks))] = _structural(getattr(module, hooks))
            for name, tensor in tensors(module).items():
                if id(tensor) not in twins:
                    twin = self._twin(tensor)
                    twins[id(tensor)] = twin
                    self.named[canonical(f"{prefix}.{name}" if prefix else name)] = twin
        for thing in held:
            if isinstance(thing, torch.Tensor):
                twins.setdefault(id(thing), self._own(thing))
        return twins

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.mode is not None:
            return self.mode.from_tensor(tensor, static_shapes=True)
        twin = self._own(tensor)
        return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("meta") if self.kind == "meta" else tensor.detach().clone()

    @contextmanager
    def cut(self, axes: Mapping[str, Mapping[int, IndexArray]]) -> Iterator[None]:
        """Within the context the copy is narrower: ``{tensor: {dim: kept positions}}``."""
        whole = dict(self.named)
        owners = {id(module): module for name in axes for module, _ in self._slots[id(whole[name])]}
        before = [(m, _plain(m), {n: tuple(t.shape) for n, t in tensors(m).items()}) for m in owners.values()]
        try:
            for name, kept in axes.items():
                self.named[name] = self._narrow(whole[name], kept)
                self._put(whole[name], self.named[name])
            for module, _, shapes in before:
                refresh(module, shapes)
            yield
        finally:
            for name in axes:
                self._put(whole[name], whole[name])
            for module, plain, _ in before:
                for name in _plain(module).keys() - plain.keys():
                    delattr(module, name)
                vars(module).update(plain)
            self.named = whole

    def _put(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """Put a tensor into every place that `place` had at first."""
        for module, slot in self._slots[id(place)]:
            home = module._parameters if slot in module._parameters else module._buffers
            home[slot] = tensor  # type: ignore[assignment]  # without the checks of `__setattr__`

    def _narrow(self, tensor: torch.Tensor, kept: Mapping[int, IndexArray]) -> torch.Tensor:
        with ExitStack() as stack:
            if self.mode is not None:
                stack.enter_context(self.mode)
            shape = [len(kept[d]) if d in kept else n for d, n in enumerate(tensor.shape)]
            make = torch.zeros if self.kind == "fake" else torch.empty
            narrow = make(shape, dtype=tensor.dtype, device=tensor.device)
            if self.kind == "real":
                narrow = tensor.detach()
                for dim, positions in kept.items():
                    narrow = narrow.index_select(dim, torch.from_numpy(positions).to(narrow.device))
            return nn.Parameter(narrow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else narrow

    @contextmanager
    def masked(self, axes: Mapping[str, Mapping[int, IndexArray]]) -> Iterator[None]:
        """Within the context the slices that a cut removes are zero."""
        whole = {name: self.named[name].detach().clone() for name in axes}
        try:
            for name, kept in axes.items():
                tensor = self.named[name].detach()
                for dim, positions in kept.items():
                    gone = np.setdiff1d(np.arange(tensor.shape[dim]), positions)
                    tensor.index_fill_(dim, torch.from_numpy(gone).to(tensor.device), 0)
            yield
        finally:
            for name, content in whole.items():
                self.named[name].detach().copy_(content)

    @property
    def mode_matters(self) -> bool:
        """Whether the latest run could have gone otherwise in the other mode, as far as its structure is concerned."""
        return self.asked is None or not self.asked <= ALIKE_IN_BOTH_MODES

    def run(self, tracer: Tracer, call: Call, labels: Mapping[str, Sequence[AxisLabel]]) -> Any:
        """Run the copy under the tracer.

        Args:
            tracer: Follows the indices.
            call: What to run.
            labels: Label of every axis of every parameter and buffer.
        """
        self._watch()
        self.module.train(call.training)
        tracer.stack = self.stack
        tracer.meta = self.kind == "meta"
        with ExitStack() as stack:
            stack.enter_context(_TRACING)
            stack.enter_context(fastpath_off())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # what the network has to say it says in the user's own run
            stack.enter_context(log_held())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(forked_rng())
            if self.kind == "real":
                stack.enter_context(contents_restored(self.module.buffers()))
            args, kwargs = self._inputs((call.args, dict(call.kwargs)))
            if self.mode is not None:
                stack.enter_context(self.mode)
            tracer.constant = True
            for name, tensor in self.named.items():
                tracer.label(tensor, labels[name], zero=True, source=(name, tuple(range(tensor.dim()))))
            self.asked = stack.enter_context(who_asks_for_the_mode(self.module, self.stack))
            stack.enter_context(assignments_followed(tracer))
            left = stack.enter_context(self._state_restored())
            stack.enter_context(remembered(self._stores()))
            stack.enter_context(tracer)
            run = self.module if call.method == "forward" else getattr(self.module, call.method)
            out = run(*args, **kwargs)
            if call.method == "forward" and left():  # a second call may go on from there
                counting, tracer.counting = tracer.counting, False
                stack.callback(setattr, tracer, "counting", counting)
                out = out, run(*args, **kwargs)
            return out

    def _stores(self) -> list[Any]:
        """What a run may store something in besides the attributes of modules."""
        if not self.hooks:
            return [thing for thing in self._held if is_container(thing)]
        own = {id(tensor) for tensor in self.named.values()}
        found = reachable([*self.hooks, *self._held], into_modules=False)
        return [thing for thing in found if not isinstance(thing, nn.Module) and id(thing) not in own]

    @contextmanager
    def _state_restored(self) -> Iterator[Callable[[], bool]]:
        """Put back what a run assigns to the modules; tells whether it has left tensors there."""
        before = [(home, home.copy()) for home in self._homes]

        def changed() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
            return (
                pair for pair in before if len(pair[0]) != len(pair[1]) or any(map(is_not, *map(dict.values, pair)))
            )

        def left() -> bool:
            new = (value for home, old in changed() for name, value in home.items() if value is not old.get(name))
            return any(map(output_tensors, new))

        try:
            yield left
        finally:
            for home, old in changed():
                home.clear()
                home.update(old)

    def _inputs(self, tree: Any) -> Any:
        def twin(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            own = self._own(leaf)  # an inference tensor becomes an ordinary one
            return own if self.mode is None else self.mode.from_tensor(own, static_shapes=True)

        return tree_map(twin, tree)

    def _watch(self) -> None:
        """From now on the name of the module that runs lies on top of the stack."""
        if self.watched:
            return
        self.watched = True
        for name, module in self.module.named_modules():
            vars(module)["forward"] = named_while_running(module.forward, name, self.stack)


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What `copy.deepcopy(model, memo)` makes, without its detours for modules that are plain objects.

    What `torch.compile` put around a module is left out: the copy runs as written.
    """
    twins = []
    for module in model.modules():
        kind = type(module)
        if id(module) not in memo and _is_plain(kind):
            memo[id(module)] = twin = kind.__new__(kind)
            twins.append((module, twin))
    for module in model.modules():
        if isinstance(module, OptimizedModule):
            memo[id(module)] = _twin_of(module._orig_mod, memo)
    for module, twin in twins:
        state = {name: value for name, value in vars(module).items() if name != "_compiled_call_impl"}
        for value in state.values():
            if type(value) in (dict, OrderedDict, set, list) and not value:
                memo.setdefault(id(value), type(value)())
        copied = {k: v if type(v) in CONSTANT else _twin_of(v, memo) for k, v in state.items()}
        twin.__setstate__(copied)  # type: ignore[no-untyped-call]
    whole: nn.Module = _twin_of(model, memo)
    return whole


def _twin_of(thing: Any, memo: dict[int, Any]) -> Any:
    return memo[id(thing)] if id(thing) in memo else copy.deepcopy(thing, memo)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether a copy of a module of this type is a new object with a copy of its state."""
    hooks = ("__reduce_ex__", "__reduce__", "__deepcopy__", "__new__")
    same = all(getattr(kind, hook, None) is getattr(object, hook, None) for hook in hooks)
    return same and getattr(kind, "__getstate__", None) is getattr(nn.Module, "__getstate__", None)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes in which a layer may have written down its widths."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, tuple))}


def _structural(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """The hooks that PyTorch itself builds a layer with (weight_norm); a user's hooks must not see fake tensors."""
    kept = {k: h for k, h in hooks.items() if type(h).__module__.startswith("torch.nn.utils")}
    return OrderedDict((k, copy.copy(h)) for k, h in kept.items())
