"""Copy of a network on meta, fake or real tensors, to be traced at its own or at smaller widths."""

from __future__ import annotations

import copy
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from operator import is_not
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from lightning_prune.structure.atoms import IndexArray
from lightning_prune.structure.attention import scale_of
from lightning_prune.structure.attention_calls import fastpath_disabled
from lightning_prune.structure.hooks import (
    REGISTERS,
    computing_hooks,
    contents_restored,
    copy_hooks,
    is_container,
    reachable_objects,
    stored_objects,
)
from lightning_prune.structure.layers import (
    ATTENTION,
    canonical,
    has_own_projections,
    refresh,
    relax_unflatten,
    tensors,
)
from lightning_prune.structure.sharding import is_mesh, is_sharded, plain_classes
from lightning_prune.structure.size_attributes import SizeAttribute, size_attributes
from lightning_prune.structure.tracing.attention import AttentionWeights
from lightning_prune.structure.tracing.calls import Call, forked_rng, output_tensors
from lightning_prune.structure.tracing.contexts import (
    SAME_UNITS_IN_BOTH_MODES,
    buffers_restored,
    data_assignments_traced,
    fake_tensor_log_disabled,
    push_name,
    record_mode_readers,
)
from lightning_prune.structure.tracing.empty_batches import EmptyBatches
from lightning_prune.structure.tracing.labels import AxisLabel, Kind
from lightning_prune.structure.tracing.operators import CONSTANT
from lightning_prune.structure.tracing.recurrent import RecurrentFunctions, is_recurrent
from lightning_prune.structure.tracing.scales import OwnScales
from lightning_prune.structure.tracing.tracer import Tracer
from lightning_prune.structure.tracing.unweighted_norms import UnweightedNorms

__all__ = ["FakeCopy"]

#: Tracing patches two classes of PyTorch, so only one thread may trace at a time.
_TRACING = threading.RLock()


class FakeCopy:
    """A copy of a network that can be traced, cut and restored cheaply.

    Args:
        model: The network, which is not changed. Copies of the forward hooks that affect its output run on the copy.
        memo: Replacements for objects that must not be copied: ``{id(object): replacement}``.
        prepare: Called with the copy to replace what cannot run on fake tensors (metrics, loggers).
        kind: ``"meta"`` is fastest; ``"fake"`` tensors also have a device and mix with constants; ``"real"`` ones are
            for operators that depend on data.
        with_hooks: Whether hooks run on the copy.
        blank: Whether a real copy has zeros in place of sharded weights, rather than raising a `ValueError`.

    Attributes:
        hooks: Hooks of the copy.
        notes: Notes on hooks that could not be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        memo: Mapping[int, Any] | None = None,
        prepare: Callable[[nn.Module], None] | None = None,
        *,
        kind: Kind = "fake",
        with_hooks: bool = True,
        blank: bool = False,
    ) -> None:
        self.kind, self.blank = kind, blank
        self.mode = FakeTensorMode(allow_non_fake_inputs=True) if kind == "fake" else None
        self.stack: list[str] = []
        self.asked: set[type] | None = None
        self.tracked = False
        self.unweighted_norms = UnweightedNorms()
        self.named: dict[str, torch.Tensor] = {}
        hooks, held = computing_hooks(model) if with_hooks else {}, stored_objects(model)
        replacements = self._replacements(model, memo or {}, held)
        with plain_classes(model):
            self.module = _copied(model, replacements)
        self.hooks, self.notes = copy_hooks(hooks, model, replacements)
        self._held = [replacements[id(thing)] for thing in held if id(thing) in replacements]
        if prepare is not None:
            prepare(self.module)
        _turn_caches_off(self.module)
        self.attention_weights = AttentionWeights()
        self._uses_attention_weights: set[int] = set()
        self._slots: dict[int, list[tuple[nn.Module, str]]] = {}
        self._registers: list[dict[Any, Any]] = []
        for module in self.module.modules():
            self._registers += vars(module), module._buffers, *(getattr(module, register) for register in REGISTERS)
            relax_unflatten(module)
            for name, tensor in tensors(module).items():
                self._slots.setdefault(id(tensor), []).append((module, name))

    def _replacements(self, model: nn.Module, memo: Mapping[int, Any], held: Iterable[Any]) -> dict[int, Any]:
        """Replacements for the tensors and hooks of the network in the copy: ``{id(object): replacement}``."""
        replacements = dict(memo)
        for prefix, module in model.named_modules():
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                replacements[id(getattr(module, hooks))] = _structural(getattr(module, hooks))
            for name, tensor in tensors(module).items():
                if id(tensor) not in replacements:
                    replacement = self._replacement(tensor)
                    replacements[id(tensor)] = replacement
                    self.named[canonical(f"{prefix}.{name}" if prefix else name)] = replacement
        for thing in held:
            if isinstance(thing, torch.Tensor):
                replacements.setdefault(id(thing), self._own(thing))
            elif is_mesh(thing):
                replacements.setdefault(id(thing), thing)
        return replacements

    def _replacement(self, tensor: torch.Tensor) -> torch.Tensor:
        if is_sharded(tensor):
            return self._blank(tensor)
        if self.mode is not None:
            return self.mode.from_tensor(tensor, static_shapes=True)
        replacement = self._own(tensor)
        return nn.Parameter(replacement, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else replacement

    def _blank(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor without content in place of a sharded one."""
        if self.kind == "real" and not self.blank:
            raise ValueError(
                "expected a network whose weights are all in this process, to copy them, got one that is sharded by "
                "`fully_shard`"
            )
        with self.mode or nullcontext():
            device = "meta" if self.kind == "meta" else tensor.device
            blank = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).zero_()
        return nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("meta") if self.kind == "meta" else tensor.detach().clone()

    @contextmanager
    def cut(self, axes: Mapping[str, Mapping[int, IndexArray]]) -> Iterator[None]:
        """Narrow the copy within the context, given ``{tensor: {dim: kept positions}}``.

        Sizes in attributes (`size_attributes`) are set, too.
        """
        whole = dict(self.named)
        sizes = {place: len(axes[name][0]) for name, place in self._sizes(axes).items()}
        contents = [(place.module, place.attributes) for place in sizes]
        axes = {name: kept for name, kept in axes.items() if name in whole}
        owners = {id(module): module for name in axes for module, _ in self._slots[id(whole[name])]}
        before = [(m, _plain(m), {n: tuple(t.shape) for n, t in tensors(m).items()}) for m in owners.values()]
        try:
            for name, kept in axes.items():
                self.named[name] = self._narrow(whole[name], kept)
                self._put(whole[name], self.named[name])
            for place, value in sizes.items():
                vars(place.module).update(place.with_value(value))
            for module, _, shapes in before:
                refresh(module, shapes)
            yield
        finally:
            for module, attributes in contents:
                vars(module).update(attributes)
            for name in axes:
                self._put(whole[name], whole[name])
            for module, plain, _ in before:
                for name in _plain(module).keys() - plain.keys():
                    delattr(module, name)
                vars(module).update(plain)
            self.named = whole

    def _sizes(self, names: Iterable[str]) -> dict[str, SizeAttribute]:
        others = [name for name in names if name not in self.named]
        found = size_attributes(self.module, others)
        assert len(found) == len(others), "neither a tensor nor a size of the network"
        return found

    def _put(self, place: torch.Tensor, tensor: torch.Tensor) -> None:
        """Put a tensor into every slot that `place` had originally."""
        for module, slot in self._slots[id(place)]:
            register = module._parameters if slot in module._parameters else module._buffers
            register[slot] = tensor  # type: ignore[assignment]  # without the checks of `__setattr__`

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
        """Set the slices that a cut removes to zero within the context."""
        whole = {name: self.named[name].detach().clone() for name in axes if name in self.named}
        try:
            for name in whole:
                tensor = self.named[name].detach()
                for dim, positions in axes[name].items():
                    gone = np.setdiff1d(np.arange(tensor.shape[dim]), positions)
                    tensor.index_fill_(dim, torch.from_numpy(gone).to(tensor.device), 0)
            yield
        finally:
            for name, content in whole.items():
                self.named[name].detach().copy_(content)

    @property
    def depends_on_mode(self) -> bool:
        """Whether the structure found by the latest run may differ between train and eval mode."""
        return self.asked is None or not self.asked <= SAME_UNITS_IN_BOTH_MODES

    def run(self, tracer: Tracer, call: Call, labels: Mapping[str, Sequence[AxisLabel]]) -> Any:
        """Run the copy under the tracer.

        Args:
            tracer: Follows the indices.
            call: What to run.
            labels: Label of every axis of every parameter and buffer.
        """
        tracer.stack = self.stack
        self.unweighted_norms.inputs.clear()
        tracer.meta = self.kind == "meta"
        with ExitStack() as stack:
            stack.enter_context(self._alone(call))
            args, kwargs = self._inputs((call.args, dict(call.kwargs)))
            if self.mode is not None:
                stack.enter_context(self.mode)
            tracer.constant = True
            for name, tensor in self.named.items():
                tracer.label(tensor, labels[name], zero=True, source=(name, tuple(range(tensor.dim()))))
            self.asked = stack.enter_context(record_mode_readers(self.module, self.stack))
            stack.enter_context(data_assignments_traced(tracer))
            recurrent = self._recurrent()
            left = stack.enter_context(self._state_restored())
            stack.enter_context(contents_restored(self._stores()))
            if recurrent:
                stack.enter_context(RecurrentFunctions(tracer))
            stack.enter_context(OwnScales(tracer))
            stack.enter_context(EmptyBatches())
            stack.enter_context(tracer)
            run = self.module if call.method == "forward" else getattr(self.module, call.method)
            out = run(*args, **kwargs)
            if call.method == "forward" and left():  # a second call may read what the first stored
                counting, tracer.counting = tracer.counting, False
                stack.callback(setattr, tracer, "counting", counting)
                out = out, run(*args, **kwargs)
            return out

    def compute(self, call: Call) -> Any:
        """Run a copy on real tensors without a tracer; inputs get noise, always the same, and at least float32."""
        with self._alone(call), self._state_restored(), contents_restored(self._stores()):
            self._recurrent()
            torch.manual_seed(0)
            args, kwargs = tree_map(_with_noise, self._inputs((call.args, dict(call.kwargs))))
            return self.module(*args, **kwargs)

    @contextmanager
    def _alone(self, call: Call) -> Iterator[None]:
        """What every run needs: modules in the mode of the call, and nothing outside of the copy that changes."""
        self._track_modules()
        self.attention_weights.start(id(call) in self._uses_attention_weights)
        self.module.train(call.training)
        with ExitStack() as stack:
            stack.enter_context(_TRACING)
            stack.enter_context(fastpath_disabled())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # the user's own run shows them
            stack.enter_context(fake_tensor_log_disabled())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(forked_rng())
            if self.kind == "real":
                stack.enter_context(buffers_restored(self.module.buffers()))
            yield

    def _recurrent(self) -> list[nn.Module]:
        """Recurrent layers, with the weights that they have now."""
        layers = [module for module in self.module.modules() if is_recurrent(module)]
        for layer in layers:
            if isinstance(layer, nn.RNNBase):
                layer._update_flat_weights()
        return layers

    def uses_attention_weights(self, call: Call, failed: bool) -> bool:
        """Whether a run without attention weights shows that the call uses them; later runs of it compute them.

        Args:
            call: The call of the latest run, whose output the caller still holds.
            failed: Whether it raised an exception.
        """
        weights = self.attention_weights
        if not (weights.kept or (failed and weights.left_out)):
            return False
        self._uses_attention_weights.add(id(call))
        return True

    def _stores(self) -> list[Any]:
        """Mutable objects besides the modules that a run may write to."""
        if not self.hooks:
            return [thing for thing in self._held if is_container(thing)]
        own = {id(tensor) for tensor in self.named.values()}
        found = reachable_objects([*self.hooks, *self._held], into_modules=False)
        return [thing for thing in found if not isinstance(thing, nn.Module) and id(thing) not in own]

    @contextmanager
    def _state_restored(self) -> Iterator[Callable[[], bool]]:
        """Restore attributes of modules on exit; yields a function that returns whether tensors were stored in them."""
        before = [(register, register.copy()) for register in self._registers]

        def changed() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
            return (
                pair for pair in before if len(pair[0]) != len(pair[1]) or any(map(is_not, *map(dict.values, pair)))
            )

        def left() -> bool:
            new = (value for own, old in changed() for name, value in own.items() if value is not old.get(name))
            return any(map(output_tensors, new))

        try:
            yield left
        finally:
            for register, old in changed():
                register.clear()
                register.update(old)

    def _inputs(self, tree: Any) -> Any:
        def replacement(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            own = self._own(leaf)  # an inference tensor becomes an ordinary one
            return own if self.mode is None else self.mode.from_tensor(own, static_shapes=True)

        return tree_map(replacement, tree)

    def _track_modules(self) -> None:
        """Wrap every module's `forward` so that the name of the running module is on top of the stack."""
        if self.tracked:
            return
        self.tracked = True
        for name, module in self.module.named_modules():
            if isinstance(module, nn.RNNBase):  # reads the memory of its weights
                vars(module)["flatten_parameters"] = _do_nothing
            forward = self.unweighted_norms.forward_of(canonical(name), module)
            if isinstance(module, nn.MultiheadAttention) and type(module) in ATTENTION and has_own_projections(module):
                vars(module)["scale"] = scale_of(module)  # stays where the features of heads are cut
                forward = self.attention_weights.forward_of(module)
            vars(module)["forward"] = push_name(forward, name, self.stack)


def _do_nothing() -> None: ...


def _with_noise(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf.to(torch.promote_types(leaf.dtype, torch.float32)) + torch.randn_like(leaf)


def _turn_caches_off(model: nn.Module) -> None:
    """Let transformers models return no keys and values, which only the network itself reads, in its next call."""
    for module in model.modules():
        config = vars(module).get("config")
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False  # type: ignore[union-attr]


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A faster `copy.deepcopy(model, memo)` that also unwraps modules compiled by `torch.compile`."""
    replacements = []
    for module in model.modules():
        kind = type(module)
        if id(module) not in memo and _is_plain(kind):
            memo[id(module)] = replacement = kind.__new__(kind)
            replacements.append((module, replacement))
    for module in model.modules():
        if isinstance(module, OptimizedModule):
            memo[id(module)] = _deepcopied(module._orig_mod, memo)
    for module, replacement in replacements:
        state = {name: value for name, value in vars(module).items() if name != "_compiled_call_impl"}
        for value in state.values():
            if type(value) in (dict, OrderedDict, set, list) and not value:
                memo.setdefault(id(value), type(value)())
        copied = {k: v if type(v) in CONSTANT else _deepcopied(v, memo) for k, v in state.items()}
        replacement.__setstate__(copied)  # type: ignore[no-untyped-call]
    whole: nn.Module = _deepcopied(model, memo)
    return whole


def _deepcopied(thing: Any, memo: dict[int, Any]) -> Any:
    return memo[id(thing)] if id(thing) in memo else copy.deepcopy(thing, memo)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether modules of this type are copied by copying their ``__dict__``."""
    hooks = ("__reduce_ex__", "__reduce__", "__deepcopy__", "__new__")
    same = all(getattr(kind, hook, None) is getattr(object, hook, None) for hook in hooks)
    return same and getattr(kind, "__getstate__", None) is getattr(nn.Module, "__getstate__", None)


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes of a layer that may depend on its widths."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, tuple))}


def _structural(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """The hooks by which PyTorch itself computes a weight (weight_norm)."""
    kept = {k: h for k, h in hooks.items() if type(h).__module__.startswith("torch.nn.utils")}
    return OrderedDict((k, copy.copy(h)) for k, h in kept.items())
