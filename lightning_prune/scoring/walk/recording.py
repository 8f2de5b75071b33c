"""What a forward pass does, operator by operator, as values that are each computed once."""

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
    "Given",
    "ModuleCall",
    "Recording",
    "Size",
    "Step",
    "Value",
    "Weight",
    "leaves",
    "map_places",
    "record",
]


class Value(NamedTuple):
    """What a step computed."""

    number: int


class Weight(NamedTuple):
    """A parameter or buffer, by name."""

    name: str


class Given(NamedTuple):
    """A tensor among the arguments of ``forward``, by its number among the leaves."""

    leaf: int


class Constant(NamedTuple):
    """A tensor that came from nowhere."""

    tensor: Tensor


class Size(NamedTuple):
    """A number that grows with the batch: ``per_sample · samples + fixed``."""

    per_sample: int
    fixed: int


PLACES = (Value, Weight, Given, Constant, Size)


@dataclass(eq=False)
class Step:
    """One operator, or a mark that hands a value on under a new number.

    Attributes:
        func: The operator; None for a mark.
        args: Its arguments, with places in place of tensors.
        kwargs: And by keyword.
        outs: A number for every leaf of what it gives, None where that is no tensor.
        writes: Position among ``args`` of the tensor that is written into, if one is; ``outs`` then numbers what it
            becomes.
        macs: Multiply-accumulates of the whole batch.
        station: What a mark stands for.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outs: tuple[int | None, ...]
    writes: int | None = None
    macs: int = 0
    station: Station | None = None

    def reads(self) -> list[int]:
        """Numbers of the values that enter."""
        return [place.number for place in leaves((self.args, dict(self.kwargs))) if isinstance(place, Value)]


class ModuleCall(NamedTuple):
    """One call of a module.

    Attributes:
        name: Its name.
        module: The module.
        first: Number of steps before it.
        last: Number of steps when it was over.
        entered: The value that its first argument is, if it is one.
        left: The value that it gave, if that is one tensor.
    """

    name: str
    module: nn.Module
    first: int
    last: int
    entered: int | None
    left: int | None


@dataclass(eq=False)
class Recording:
    """A forward pass.

    Attributes:
        steps: In the order of execution.
        output: What came out, with places in place of tensors.
        calls: Of modules, in the order in which they were over.
        values: What each value was.
        problems: Why the steps cannot stand for the network, one sentence each.
    """

    steps: list[Step] = field(default_factory=list)
    output: Any = None
    calls: list[ModuleCall] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def record(model: nn.Module, batch: Batch, call: Forward = forward) -> Recording:
    """Run a network once on a batch and write down what it does. Call it within `undisturbed`."""
    recorder = _Recorder(model, (batch.args, dict(batch.kwargs)))
    with torch.no_grad(), _watched(model, recorder), recorder:
        output = call(model, batch)
    recorder.recording.output = recorder.places(output)
    return recorder.recording


def leaves(tree: Any) -> list[Any]:
    """Leaves of a tree in which places stand for tensors."""
    return tree_leaves(tree, is_leaf=_is_place)


def map_places(function: Any, *trees: Any) -> Any:
    """Apply a function to every leaf, a place being one."""
    return tree_map(function, *trees, is_leaf=_is_place)


def _is_place(thing: Any) -> bool:
    return isinstance(thing, PLACES)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operator below autograd."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self.calls: dict[str, int] = {}
        self._known: dict[int, Any] = {}
        self._by_key: dict[tuple[Any, ...], Any] = {}
        self._kept: list[Tensor] = []  # so that an id stays its own
        self._stale: set[int] = set()
        self._at_home: dict[int, set[int]] = {}  # values by the memory they lie in
        self._of_data: set[int] = set()  # values that depend on the inputs
        for name, tensor in named(model).items():
            self._know(tensor, Weight(name))
        for index, leaf in enumerate(tree_leaves(inputs)):
            if isinstance(leaf, Tensor):
                self._know(leaf, Given(index))

    # -- places -------------------------------------------------------------------------------------------------------

    def places(self, tree: Any) -> Any:
        """The tree with places in place of tensors."""
        return tree_map(lambda leaf: self.place(leaf) if isinstance(leaf, Tensor) else leaf, tree)

    def place(self, tensor: Tensor) -> Any:
        """Where a tensor comes from."""
        known = self._known.get(id(tensor)) or self._by_key.get(_key(tensor))
        if known is None:
            known = Constant(tensor)
            self._know(tensor, known)
        if not isinstance(known, Value) or known.number not in self._stale:
            return known
        if known.number in self._of_data:
            self.recording.problems.append("an operator writes into a tensor of which something else reads a view")
            return known
        with _disable_current_modes():  # a mask, say, that is filled part by part and the same for all samples
            return Constant(tensor.detach().clone())

    def new(self, tensor: Tensor) -> int:
        """A number for a tensor that has just been computed."""
        number = len(self.recording.values)
        self.recording.values.append(tensor)
        self._know(tensor, Value(number))
        return number

    def mark(self, tensor: Tensor, station: Station) -> Any:
        """Hand a value on under a new number; what it was."""
        place = self.place(tensor)
        number = self.new(tensor)
        self.recording.steps.append(Step(None, (place,), {}, (number,), station=station))
        if self._is_data(place):
            self._of_data.add(number)
        return place

    def restore(self, tensor: Tensor, place: Any, mark: int) -> None:
        """Let the number of a mark no longer stand for the tensor."""
        if self.place(tensor) == Value(mark):
            self._know(tensor, place)

    def _know(self, tensor: Tensor, place: Any) -> None:
        self._known[id(tensor)] = place
        self._by_key[_key(tensor)] = place
        self._kept.append(tensor)
        if isinstance(place, Value):
            self._at_home.setdefault(_home(tensor), set()).add(place.number)

    # -- operators ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = self.places(_without_content(func, args)), self.places(kwargs)
        written = _written(func)
        before = args[written] if written is not None and written < len(args) else None
        out = func(*args, **kwargs)
        self._object(func, before, written)
        is_data = any(self._is_data(place) for place in leaves(places))
        if is_data and func is torch.ops.aten._local_scalar_dense.default:
            self.recording.problems.append("a number is read out of a tensor, and what follows may depend on it")
        if isinstance(before, Tensor):
            self._spoil(before, is_data)
        outs = tuple(self.new(leaf) if isinstance(leaf, Tensor) else None for leaf in tree_leaves(out))
        self._of_data.update(number for number in outs if number is not None and is_data)
        macs = _macs(func, args, kwargs, out)
        self.recording.steps.append(Step(func, *places, outs, written if before is not None else None, macs))
        return out

    def _object(self, func: Any, before: Any, written: int | None) -> None:
        """Note why an operator cannot be run again by itself."""
        problems = self.recording.problems
        # Attention has the tag for its dropout, which does nothing in eval mode.
        if torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in str(func):
            problems.append(f"`{func}` draws random numbers")
        if written is not None and not isinstance(before, Tensor):
            problems.append(f"`{func}` writes into an argument that is no single tensor")

    def _spoil(self, tensor: Tensor, is_data: bool) -> None:
        """What lies in the memory that is written into is no longer what it was."""
        there = self._at_home.get(_home(tensor), set())
        self._stale |= there
        if is_data:
            self._of_data |= there

    def _is_data(self, place: Any) -> bool:
        return isinstance(place, Given) or (isinstance(place, Value) and place.number in self._of_data)


@contextmanager
def _watched(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Let the recorder know of calls of modules, and mark what leaves them and what enters layers."""
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
    """Position of the argument that an operator writes into."""
    found = [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return found[0] if found else None


def _without_content(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an operator, without what it takes nothing but type and device of."""
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
    """Of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` where they are one operator: queries as keys."""
    x, embedding = args[0], args[1] if name == "_transformer_encoder_layer_fwd" else args[3]
    samples, tokens = x.shape[:2]
    macs = samples * (4 * tokens * embedding**2 + 2 * tokens**2 * embedding)
    if name == "_transformer_encoder_layer_fwd":
        hidden = next(
            a.shape[0] for a in reversed(args) if isinstance(a, Tensor) and a.dim() == 2 and len(a) != embedding
        )
        macs += samples * 2 * tokens * embedding * hidden
    return int(macs)


def _home(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return (_home(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
