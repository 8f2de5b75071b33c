"""Recording of a forward pass, operator by operator, in single-assignment form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from lightning_prune.scoring.data import Batch, Forward, forward
from lightning_prune.scoring.walk.station import Station, is_layer
from lightning_prune.structure.layers import canonical, named

__all__ = [
    "Constant",
    "Input",
    "ModuleCall",
    "Recording",
    "Size",
    "Step",
    "Value",
    "Weight",
    "leaves",
    "map_places",
    "record",
    "storage_of",
]


class Value(NamedTuple):
    """A result of a step."""

    number: int


class Weight(NamedTuple):
    """A parameter or buffer, by name."""

    name: str


class Input(NamedTuple):
    """A tensor among the arguments of ``forward``, by leaf index."""

    leaf: int


class Constant(NamedTuple):
    """A tensor that no recorded operator created."""

    tensor: Tensor


class Size(NamedTuple):
    """A number that depends on the batch size: ``per_sample · samples + fixed``."""

    per_sample: int
    fixed: int


PLACES = (Value, Weight, Input, Constant, Size)


@dataclass(eq=False)
class Step:
    """An operator, or a marker of a station that renumbers a value.

    Attributes:
        func: The operator; None for a marker.
        args: Positional arguments, with placeholders for tensors.
        kwargs: Keyword arguments.
        outs: Value number of every leaf of the output; None for leaves that are not tensors.
        writes: Position of the argument that is modified in place, if any; ``outs`` then numbers its new value.
        macs: Multiply-accumulates for the whole batch.
        station: Station of a marker.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outs: tuple[int | None, ...]
    writes: int | None = None
    macs: int = 0
    station: Station | None = None

    def reads(self) -> list[int]:
        """Numbers of the values that the step reads."""
        return [place.number for place in leaves((self.args, dict(self.kwargs))) if isinstance(place, Value)]


class ModuleCall(NamedTuple):
    """A call of a module.

    Attributes:
        name: Name of the module.
        module: The module.
        first: Number of steps before the call.
        last: Number of steps after the call.
        entered: Value of its first argument, if it is one.
        left: Value of its output, if it is one tensor.
    """

    name: str
    module: nn.Module
    first: int
    last: int
    entered: int | None
    left: int | None


@dataclass(eq=False)
class Recording:
    """A recorded forward pass.

    Attributes:
        steps: Steps in the order of execution.
        output: The output, with placeholders for tensors.
        calls: Calls of modules, in the order in which they ended.
        values: The recorded tensor of each value.
        problems: Reasons why the steps cannot be replayed.
        read: Numbers that were read out of tensors which depend on the inputs alone, such as whether an attention mask
            is all ones, with the placeholders of these. The steps are those of batches with the same numbers.
    """

    steps: list[Step] = field(default_factory=list)
    output: Any = None
    calls: list[ModuleCall] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    read: list[tuple[Any, Any]] = field(default_factory=list)


def record(model: nn.Module, batch: Batch, call: Forward = forward) -> Recording:
    """Record a forward pass on a batch; call it within `preserved_state`."""
    recorder = _Recorder(model, (batch.args, dict(batch.kwargs)))
    with torch.no_grad(), _watched(model, recorder), recorder:
        output = call(model, batch)
    recorder.recording.output = recorder.places(output)
    return recorder.recording


def leaves(tree: Any) -> list[Any]:
    """Leaves of a tree with placeholders."""
    return tree_leaves(tree, is_leaf=_is_place)


def map_places(function: Any, *trees: Any) -> Any:
    """Apply a function to every leaf, with placeholders as leaves."""
    return tree_map(function, *trees, is_leaf=_is_place)


def _is_place(thing: Any) -> bool:
    return isinstance(thing, PLACES)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operator below autograd."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self.calls: dict[str, int] = {}
        self._known: dict[int, Any] = {}
        self._by_key: dict[tuple[Any, ...], Any] = {}
        self._kept: list[Tensor] = []  # kept alive, so that ids are not reused
        self._stale: set[int] = set()
        self._by_storage: dict[int, set[int]] = {}  # values by storage
        self._data_dependent: set[int] = set()  # values that depend on the inputs
        self._computed: set[int] = set()  # those that weights enter, too, or that stations are at
        for name, tensor in named(model).items():
            self._register(tensor, Weight(name))
        for index, leaf in enumerate(tree_leaves(inputs)):
            if isinstance(leaf, Tensor):
                self._register(leaf, Input(index))

    # -- placeholders
    # -------------------------------------------------------------------------------------------------------

    def places(self, tree: Any) -> Any:
        """Replace tensors in a tree by placeholders."""
        return tree_map(lambda leaf: self.place(leaf) if isinstance(leaf, Tensor) else leaf, tree)

    def place(self, tensor: Tensor) -> Any:
        """The placeholder of a tensor."""
        known = self._known.get(id(tensor)) or self._by_key.get(_key(tensor))
        if known is None:
            known = Constant(tensor)
            self._register(tensor, known)
        if not isinstance(known, Value) or known.number not in self._stale:
            return known
        if known.number in self._data_dependent:
            self.recording.problems.append("an operator writes into a tensor of which something else reads a view")
            return known
        with _disable_current_modes():  # for instance a mask that is filled in parts, the same for all samples
            return Constant(tensor.detach().clone())

    def new(self, tensor: Tensor) -> int:
        """Assign a number to a new tensor."""
        number = len(self.recording.values)
        self.recording.values.append(tensor)
        self._register(tensor, Value(number))
        return number

    def mark(self, tensor: Tensor, station: Station) -> Any:
        """Add a marker that renumbers a value; returns its previous placeholder."""
        place = self.place(tensor)
        number = self.new(tensor)
        self.recording.steps.append(Step(None, (place,), {}, (number,), station=station))
        if self._is_data(place):
            self._data_dependent.add(number)
            self._computed.add(number)
        return place

    def restore(self, tensor: Tensor, place: Any, mark: int) -> None:
        """Undo the renumbering by a marker."""
        if self.place(tensor) == Value(mark):
            self._register(tensor, place)

    def _register(self, tensor: Tensor, place: Any) -> None:
        self._known[id(tensor)] = place
        self._by_key[_key(tensor)] = place
        self._kept.append(tensor)
        if isinstance(place, Value):
            self._by_storage.setdefault(storage_of(tensor), set()).add(place.number)

    # -- operators ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = self.places(_without_content(func, args)), self.places(kwargs)
        written = _written(func)
        before = args[written] if written is not None and written < len(args) else None
        out = func(*args, **kwargs)
        self._check_replayable(func, before, written)
        is_data = any(self._is_data(place) for place in leaves(places))
        is_computed = is_data and any(self._is_computed(place) for place in leaves(places))
        if is_data and func is torch.ops.aten._local_scalar_dense.default:
            if is_computed:
                self.recording.problems.append("a number is read out of a tensor, and what follows may depend on it")
            else:
                self.recording.read.append((places[0][0], out))
        if isinstance(before, Tensor):
            self._mark_stale(before, is_data)
        outs = tuple(self.new(leaf) if isinstance(leaf, Tensor) else None for leaf in tree_leaves(out))
        self._data_dependent.update(number for number in outs if number is not None and is_data)
        self._computed.update(number for number in outs if number is not None and is_computed)
        macs = _macs(func, args, kwargs, out)
        self.recording.steps.append(Step(func, *places, outs, written if before is not None else None, macs))
        return out

    def _check_replayable(self, func: Any, before: Any, written: int | None) -> None:
        """Add a problem if an operator cannot be replayed."""
        problems = self.recording.problems
        # Attention has the tag because of dropout, which is inactive in eval mode.
        if torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in str(func):
            problems.append(f"`{func}` draws random numbers")
        if written is not None and not isinstance(before, Tensor):
            problems.append(f"`{func}` writes into an argument that is no single tensor")

    def _mark_stale(self, tensor: Tensor, is_data: bool) -> None:
        """Mark the values of a storage that is modified in place as stale."""
        there = self._by_storage.get(storage_of(tensor), set())
        self._stale |= there
        if is_data:
            self._data_dependent |= there

    def _is_computed(self, place: Any) -> bool:
        return isinstance(place, Weight) or (isinstance(place, Value) and place.number in self._computed)

    def _is_data(self, place: Any) -> bool:
        return isinstance(place, Input) or (isinstance(place, Value) and place.number in self._data_dependent)


@contextmanager
def _watched(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Record the calls of modules, and mark their outputs and the inputs of layers."""
    running: list[tuple[int, int | None, tuple[Any, Any, int] | None]] = []

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        place = None if x is None else recorder.place(x)
        marked = None
        call = recorder.calls[name] = recorder.calls.get(name, -1) + 1
        if is_layer(module) and x is not None:
            marked = x, recorder.mark(x, Station(name, "input", call)), len(recorder.recording.values) - 1
        entered = place.number if isinstance(place, Value) else None
        running.append((len(recorder.recording.steps), entered, marked))

    def after(name: str, module: nn.Module, _: Any, output: Any) -> None:
        first, entered, marked = running.pop()
        if marked is not None:
            recorder.restore(*marked)
        last = len(recorder.recording.steps)
        left = recorder.place(output) if isinstance(output, Tensor) else None
        number = left.number if isinstance(left, Value) else None
        if name and isinstance(left, Value):
            recorder.mark(output, Station(name, "output", recorder.calls[name]))
            last, number = last + 1, len(recorder.recording.values) - 1
        recorder.recording.calls.append(ModuleCall(name, module, first, last, entered, number))

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(before, canonical(name)), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(after, canonical(name))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _written(func: Any) -> int | None:
    """Position of the argument that an operator modifies in place."""
    found = [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return found[0] if found else None


def _without_content(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an operator, with an empty tensor for one that only determines dtype and device."""
    if not func._overloadpacket.__name__.startswith("new_") or not isinstance(args[0], Tensor):
        return args
    return (torch.empty(0, dtype=args[0].dtype, device=args[0].device), *args[1:])


def _macs(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    name = func._overloadpacket.__name__
    if name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
        return _attention_macs(name, args)
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        query, key, value = args[:3]
        return query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])  # type: ignore[no-any-return]
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out)) // 2


def _attention_macs(name: str, args: Any) -> int:
    """MACs of the fused operators of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, for self-attention."""
    x, embedding = args[0], args[1] if name == "_transformer_encoder_layer_fwd" else args[3]
    samples, tokens = x.shape[:2]
    macs = samples * (4 * tokens * embedding**2 + 2 * tokens**2 * embedding)
    if name == "_transformer_encoder_layer_fwd":
        hidden = next(
            a.shape[0] for a in reversed(args) if isinstance(a, Tensor) and a.dim() == 2 and len(a) != embedding
        )
        macs += samples * 2 * tokens * embedding * hidden
    return int(macs)


def storage_of(tensor: Tensor) -> int:
    """Address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return (storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
