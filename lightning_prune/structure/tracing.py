"""Running a network once on fake tensors while following every index of every axis."""

from __future__ import annotations

import copy
import random
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.structure.atoms import Atoms, MismatchError
from lightning_prune.structure.layers import refresh, tensors

__all__ = [
    "WILD",
    "AxisLabel",
    "Call",
    "FakeCopy",
    "IndexArray",
    "Kind",
    "MacsRecord",
    "Tracer",
    "Value",
    "output_tensors",
]

IndexArray = npt.NDArray[np.int64]
#: Atoms along one dimension; None: an axis of fixed size; a string WILD: the same content at every index (expanded).
AxisLabel = IndexArray | None | str
WILD = "wild"
Kind = Literal["meta", "fake", "real"]


@dataclass(frozen=True)
class Call:
    """One way in which the network is run: ``getattr(model, method)(*args, **kwargs)`` in train or eval mode."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    method: str = "forward"
    training: bool = False


@dataclass(frozen=True)
class Value:
    """What is known about a tensor.

    Attributes:
        axes: A label per dimension.
        zero: Whether the slices of removed units are exactly zero in the masked network.
        source: For a parameter seen directly or transposed: its name and its own dimension behind each dimension.
        constant: Whether it is computed from parameters and buffers alone, once for all samples.
    """

    axes: tuple[AxisLabel, ...]
    zero: bool = False
    source: tuple[str, tuple[int, ...]] | None = None
    constant: bool = False


@dataclass(frozen=True)
class MacsRecord:
    """MACs of one operator, or bytes of a tensor: ``factor`` × the product of the lengths of the labelled axes.

    Attributes:
        once: Whether that is for all samples of a batch together, since it does not depend on them.
    """

    factor: float
    axes: tuple[IndexArray, ...]
    layer: str
    once: bool


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that labels every tensor's axes with atoms by the rule of each operator.

    Args:
        atoms: The classes, shared between several traces of one network.
        rules: Operator name (``"convolution"``) → rule.
        fallback: The rule for all others.

    Attributes:
        meta: Whether the network runs on the meta device.
        script: Operators of a run, with the numbers that enter elementwise ones.
        expected: The script of the first trace, which a trial must follow.
        trail: What is known about the inputs of the latest operators: where to look when one fails.
    """

    def __init__(self, atoms: Atoms, rules: Mapping[str, Callable[..., None]], fallback: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.atoms = atoms
        self.rules = rules
        self.fallback = fallback
        self.stack: list[str] = []
        self.roles: dict[tuple[str, int], str] = {}
        self.order: dict[str, int] = {}
        self.seen: set[str] = set()
        self.macs: list[MacsRecord] = []
        self.written: list[MacsRecord] = []
        self.counting = False
        self.samples: int | None = None  # as the first convolution saw them
        self.constant = True  # whether what is being computed does not depend on the network's inputs
        self.meta = False
        self.script: list[tuple[Any, ...]] = []
        self.expected: list[tuple[Any, ...]] | None = None
        self.trail: deque[list[Value]] = deque(maxlen=8)
        self._rule_of: dict[Any, Callable[..., None]] = {}
        self._values: dict[int, tuple[torch.Tensor, Value]] = {}
        self._by_storage: dict[tuple[Any, ...], Value] = {}

    # -- labels ---------------------------------------------------------------------------------------------------

    def value(self, tensor: torch.Tensor) -> Value:
        """What is known about a tensor; one that came from nowhere has axes of fixed size."""
        known = self._values.get(id(tensor))
        if known is not None:
            return known[1]
        return self._by_storage.get(_storage_key(tensor)) or Value((None,) * tensor.dim())

    def label(self, tensor: torch.Tensor, axes: Sequence[AxisLabel], *, zero: bool = False, source: Any = None) -> None:
        """Write down a tensor's labels."""
        value = Value(tuple(axes), zero, source, self.constant)
        self._values[id(tensor)] = (tensor, value)  # the tensor is kept so that its id stays its own
        self._by_storage[_storage_key(tensor)] = value

    def forget(self) -> None:
        """Drop every tensor of a finished run."""
        self._values.clear()
        self._by_storage.clear()
        self.script = []

    def meet(self, a: AxisLabel, b: AxisLabel, where: str) -> AxisLabel:
        """Unite two axes of equal length; the label of what comes out."""
        if isinstance(a, str):
            return b
        if isinstance(b, str):
            return a
        if a is None or b is None:
            self.freeze([a, b], f"meets an axis of fixed size in {where}")
            return None
        self.atoms.unite(a, b)
        return a

    def freeze(self, axes: Sequence[AxisLabel], reason: str) -> None:
        """Freeze every labelled axis among ``axes``."""
        for axis in axes:
            if isinstance(axis, np.ndarray):
                self.atoms.freeze(axis, reason)

    def role(self, value: Value, dim: int, role: str) -> None:
        """Note that a parameter's axis produces or consumes."""
        if value.source is not None:
            name, dims = value.source
            self.roles.setdefault((name, dims[dim]), role)
            self.seen.add(name)
            self.order.setdefault(name, len(self.order))

    def where(self, func: Any) -> str:
        """An operator and its place, for messages."""
        place = f" in `{self.stack[-1]}`" if self.stack and self.stack[-1] else ""
        return f"`{_name(func)}`{place}"

    def count(self, factor: float, axes: Sequence[AxisLabel], lengths: Sequence[int]) -> None:
        """Record the MACs of a contraction; axes without label enter the factor."""
        if not self.counting:
            return
        for axis, length in zip(axes, lengths, strict=True):
            if not isinstance(axis, np.ndarray):
                factor *= length
        labelled = tuple(axis for axis in axes if isinstance(axis, np.ndarray))
        self.macs.append(MacsRecord(factor, labelled, self.stack[-1] if self.stack else "", self.constant))

    # -- dispatch -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.meta and "device" in kwargs:  # constants join the network where it runs
            kwargs = {**kwargs, "device": "meta"}
        values = [self.value(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.constant = all(value.constant for value in values)
        if values:
            self.trail.append(values)
        short = self.meta and _SHORTCUTS.get(_name(func))
        out = short(*args) if short else func(*args, **kwargs)
        if func.namespace == "prim":  # asks for a device or a layout
            return out
        self.seen.update(value.source[0] for value in values if value.source is not None)
        rule = self._rule_of.get(func)
        if rule is None:
            rule = self._rule_of[func] = self._rule(func)
        rule(self, func, args, kwargs, out)
        self._note_numbers(func, args, kwargs, out)
        self._note_memory((args, kwargs), out)
        if func._schema.name.endswith("_") and isinstance(out, torch.Tensor):
            self._written(out)
        return out

    def _note_numbers(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Keep the numbers that enter elementwise operators, or compare them with those of the first trace.

        A number that a network computes from a width (a scale ``width ** -0.5``) reaches no rule, but is another one in
        the trial, and so are the operators where a branch or loop depends on a width.
        """
        line: tuple[Any, ...] = (_name(func),)
        if torch.Tag.pointwise in func.tags:
            line += tuple(n for n in tree_leaves((args, kwargs)) if isinstance(n, (int, float)))
        elif line[0] in ("full", "new_full", "full_like", "fill_", "scalar_tensor"):
            line += (args[-1],)
        elif line[0] == "lift_fresh" and args[0].numel() == 1 and type(args[0]) is torch.Tensor and not args[0].is_meta:
            line += (args[0].item(),)  # torch.tensor(number)
        elif line[0] in ("ones", "new_ones", "arange", "linspace", "eye"):
            line += tuple(out.shape)  # sizes that follow a width are counted with, sooner or later
        if self.expected is not None:
            at = len(self.script)
            if at >= len(self.expected) or not _same_line(self.expected[at], line):
                raise MismatchError(f"a number that depends on a width enters {self.where(func)}")
        self.script.append(line)

    def _note_memory(self, inputs: Any, out: Any) -> None:
        """Write down the bytes of the tensors that an operator makes; a view of an input is no new one."""
        if not self.counting:
            return
        given = {_storage_key(leaf)[0] for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _storage_key(tensor)[0] not in given:
                fixed, labelled = tensor.element_size(), []
                for axis, length in zip(self.value(tensor).axes, tensor.shape, strict=True):
                    if isinstance(axis, np.ndarray):
                        labelled.append(axis)
                    else:
                        fixed *= length
                self.written.append(
                    MacsRecord(fixed, tuple(labelled), self.stack[-1] if self.stack else "", self.constant)
                )

    def _written(self, out: torch.Tensor) -> None:
        """After a write in place, no other view of the same memory is known to be zero where units left."""
        if self.value(out).zero or not any(isinstance(axis, np.ndarray) for axis in self.value(out).axes):
            return
        home = _storage_key(out)[0]
        for number, (tensor, value) in self._values.items():
            if value.zero and _storage_key(tensor)[0] == home:
                self._values[number] = (tensor, replace(value, zero=False))
        for key, value in self._by_storage.items():
            if value.zero and key[0] == home:
                self._by_storage[key] = replace(value, zero=False)

    def _rule(self, func: Any) -> Callable[..., None]:
        """The rule of an operator; of an in-place one that of its twin."""
        name = _name(func)
        for candidate in (name, name.removesuffix("_")):
            if candidate in self.rules:
                return self.rules[candidate]
        return self.rules["pointwise"] if torch.Tag.pointwise in func.tags else self.fallback


def _same_line(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether the same numbers entered the same operator; NaN is itself."""
    return len(first) == len(second) and all(a == b or (a != a and b != b) for a, b in zip(first, second, strict=True))


def _name(func: Any) -> str:
    return str(func._schema.name).removeprefix("aten::")


def _batch_norm(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes of what batch norm gives back; PyTorch's own answer on the meta device takes a millisecond of Python."""
    channels = x.shape[1] if rest[4] else 0  # statistics of the batch, in training
    return torch.empty_like(x), x.new_empty(channels), x.new_empty(channels)


def _layer_norm(x: torch.Tensor, shape: Sequence[int], *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for layer norm."""
    if tuple(x.shape[x.dim() - len(shape) :]) != tuple(shape):
        raise ValueError(f"a layer norm of {list(shape)} met an input of {list(x.shape)}")
    outer = [*x.shape[: x.dim() - len(shape)], *([1] * len(shape))]
    return torch.empty_like(x), x.new_empty(outer), x.new_empty(outer)


#: Operators that the meta device works out slowly.
_SHORTCUTS: dict[str, Callable[..., Any]] = {
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    **dict.fromkeys(("relu", "gelu", "silu", "sigmoid", "tanh", "hardswish"), lambda x, *_: torch.empty_like(x)),
    **dict.fromkeys(("relu_", "silu_", "hardtanh_", "hardswish_"), lambda x, *_: x),
}


def _storage_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


class FakeCopy:
    """A copy of a network that runs without memory or arithmetic, and can be cut and restored cheaply.

    Args:
        model: The network; left untouched, hooks and all.
        memo: Objects of the network that the copy shall not copy: ``{id(object): replacement}``.
        prepare: Called with the copy, to replace what must not run on fake tensors (metrics, loggers).
        kind: ``"meta"`` is fastest; ``"fake"`` tensors also know their device, and constants mix with them;
            ``"real"`` ones are for steps whose operators depend on data.
    """

    def __init__(
        self,
        model: nn.Module,
        memo: Mapping[int, Any] | None = None,
        prepare: Callable[[nn.Module], None] | None = None,
        *,
        kind: Kind = "fake",
    ) -> None:
        self.kind = kind
        self.mode = FakeTensorMode(allow_non_fake_inputs=True) if kind == "fake" else None
        self.named: dict[str, torch.Tensor] = {}
        self.module = copy.deepcopy(model, self._twins(model, memo or {}))
        if prepare is not None:
            prepare(self.module)
        self._slots: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.module.modules():
            for name, tensor in tensors(module).items():
                self._slots.setdefault(id(tensor), []).append((module, name))

    def _twins(self, model: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
        """What stands in the copy for the tensors and hooks of the network: ``{id(object): stand-in}``."""
        twins = dict(memo)
        for prefix, module in model.named_modules():
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                twins[id(getattr(module, hooks))] = _structural(getattr(module, hooks))
            for name, tensor in tensors(module).items():
                if id(tensor) not in twins:
                    twin = self._twin(tensor)
                    twins[id(tensor)] = twin
                    self.named[f"{prefix}.{name}" if prefix else name] = twin
            for plain in vars(module).values():
                if isinstance(plain, torch.Tensor):
                    twins.setdefault(id(plain), self._own(plain))
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
                tensor = whole[name]
                shape = [len(kept[d]) if d in kept else n for d, n in enumerate(tensor.shape)]
                self.named[name] = self._empty(tensor, shape)
                self._put(tensor, self.named[name])
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

    def _empty(self, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        with ExitStack() as stack:
            if self.mode is not None:
                stack.enter_context(self.mode)
            narrow = torch.zeros(shape, dtype=like.dtype, device=like.device)
            return nn.Parameter(narrow, like.requires_grad) if isinstance(like, nn.Parameter) else narrow

    def run(self, tracer: Tracer, call: Call, labels: Mapping[str, Sequence[AxisLabel]]) -> Any:
        """Run the copy under the tracer.

        Args:
            tracer: Follows the indices.
            call: What to run.
            labels: Label of every axis of every parameter and buffer.
        """
        hooks = self._watch_modules(tracer)
        self.module.train(call.training)
        tracer.meta = self.kind == "meta"
        fastpath = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            with ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")  # what the network has to say it says in the user's own run
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.enable_grad())
                stack.enter_context(_forked_rng())
                args, kwargs = self._inputs((call.args, dict(call.kwargs)))
                if self.mode is not None:
                    stack.enter_context(self.mode)
                tracer.constant = True
                for name, tensor in self.named.items():
                    tracer.label(tensor, labels[name], zero=True, source=(name, tuple(range(tensor.dim()))))
                stack.enter_context(tracer)
                return getattr(self.module, call.method)(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            tracer.stack.clear()
            for handle in hooks:
                handle.remove()

    def _inputs(self, tree: Any) -> Any:
        def twin(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            own = self._own(leaf)  # an inference tensor becomes an ordinary one
            return own if self.mode is None else self.mode.from_tensor(own, static_shapes=True)

        return tree_map(twin, tree)

    def _watch_modules(self, tracer: Tracer) -> list[Any]:
        handles = []
        for name, module in self.module.named_modules():

            def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
                tracer.stack.append(name)

            def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
                if tracer.stack:
                    tracer.stack.pop()

            handles += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave, always_call=True),
            ]
        return handles


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes in which a layer may have written down its widths."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, tuple))}


def _structural(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    """The hooks that PyTorch itself builds a layer with (weight_norm); a user's hooks must not see fake tensors."""
    kept = {k: h for k, h in hooks.items() if type(h).__module__.startswith("torch.nn.utils")}
    return OrderedDict((k, copy.copy(h)) for k, h in kept.items())


@contextmanager
def _forked_rng() -> Iterator[None]:
    """Leave every random generator as it was found."""
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


def output_tensors(out: Any) -> list[torch.Tensor]:
    """Every tensor in a nested output, dataclasses and objects with a ``__dict__`` of tensors included."""
    found = []
    for leaf in tree_leaves(out):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__"):
            found += [t for t in tree_leaves(vars(leaf)) if isinstance(t, torch.Tensor)]
    return found
