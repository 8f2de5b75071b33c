"""Boundaries of layers or blocks at which a convolutional network can be truncated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_map

from lightning_prune.structure.backbone import Backbone, head_error, is_convolution
from lightning_prune.structure.layers import canonical
from lightning_prune.structure.traced_model import StructureError, TracedModel
from lightning_prune.structure.tracing import output_tensors

__all__ = ["Boundary", "find_boundaries"]

# Where PyTorch defines what belongs to the layer before it.
_ELEMENTWISE = ("torch.nn.modules.activation", "torch.nn.modules.dropout")


@dataclass(frozen=True)
class Boundary:
    """A point after which the rest of the backbone can be removed.

    Attributes:
        name: The module whose output becomes that of the backbone: a module in a sequential network, a block
            or stage in a residual one.
        layers: The remaining convolutions, in the order of execution.
        width: Channels of that output.
        tail: Modules that become identities; empty for the last boundary.
        readers: First layers of the head that need another number of inputs, with that number.
        is_layer: Whether the head then reads the output of the last convolution alone, rather than a sum (residual
            networks) or a concatenation (DenseNet).
    """

    name: str
    layers: tuple[str, ...]
    width: int
    tail: tuple[str, ...]
    readers: Mapping[str, int]
    is_layer: bool = field(default=False, compare=False)


def find_boundaries(traced: TracedModel, head: str | Iterable[str] | None = None) -> tuple[Boundary, ...]:
    """Find every point at which a network can be truncated, the shallowest first; the last is the backbone's end.

    A module is a boundary if every path from the input to the output goes through its output, in the graph of a
    backward pass. That holds for the layers of a chain and for the blocks of a residual network, of Inception or of
    DenseNet, but not for layers inside such blocks. Norm, activation and dropout after a convolution belong to it,
    pooling does not. The modules after the boundary, up to the last activation of the backbone, become identities;
    pooling and head stay. The truncated copy must run forward and backward and return an output of the same shape.

    Args:
        traced: The network and its calls.
        head: Names or globs of the modules that form the head, see `Backbone.of`.

    Raises:
        StructureError: If the network is not a chain, so that there is no boundary or no head after it, or if no module
            matches ``head``.
    """
    objection = head_error(traced.model, head)
    if objection:
        raise StructureError(f"{type(traced.model).__name__}: {objection}")
    trial = _Trial(traced, head)
    found: dict[tuple[str, ...], Boundary] = {}
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for name in trial.separators:
        layers, shape = trial.before(name), trial.shapes[name]
        if not 0 < len(layers) < trial.convolutions or shapes.setdefault(layers, shape) != shape:
            continue
        tail = trial.behind(name)
        readers = trial.readers(tail) if tail else None
        if readers is not None:
            found[layers] = Boundary(name, layers, shape[1], tail, readers, layers[-1] in trial.every)
    if not found:
        raise StructureError(
            f"{type(traced.model).__name__}: expected a backbone that is a chain of layers or blocks, behind any of "
            "which it can end, found no such place. Leave `depth` out for this network, or name its classifier by "
            "`head`."
        )
    return (*found.values(), trial.end)


@dataclass
class _Visit:
    """One call of a module: when it began and ended, and its output."""

    start: int
    end: int = -1
    node: Node | None = None
    shape: tuple[int, ...] = ()


class _Trial:
    """A copy of the network with the calls of its modules recorded, which can be run without its tail."""

    def __init__(self, traced: TracedModel, head: str | Iterable[str] | None) -> None:
        call = traced.calls[0]
        self.model = traced.copy("real").module.eval().requires_grad_(False)
        self.call = call
        self.modules = {canonical(name): module for name, module in self.model.named_modules() if name}
        self.visits: dict[str, list[_Visit]] = {}
        with torch.inference_mode(False), torch.enable_grad(), self._watched():
            output = self._run()
        if len(output) != 1 or output[0].grad_fn is None:
            raise StructureError(
                f"{type(traced.model).__name__}: expected one output that depends on the input to truncate, got "
                f"{len(output)} output(s)."
            )
        self.shape = tuple(output[0].shape)
        self.visits = {name: seen for name, seen in self.visits.items() if len(seen) == 1}
        backbone = Backbone.of(self.model, head)
        own = {name for layer in backbone.layers for name in layer.modules}
        self.own = sorted((name for name in own if name in self.visits), key=lambda name: self._of(name).end)
        self.head = [name for name in backbone.head if name in self.visits]
        self.convolutions = sum(is_convolution(self.modules[name]) for name in self.own)
        nodes = _on_every_path(output[0].grad_fn)
        in_order = sorted(self._once(), key=lambda pair: pair[1].end)
        self.every = [name for name, visit in in_order if visit.node in nodes]
        self.last = self._last()
        self.separators = [n for n in self.every if len(self._of(n).shape) > 2 and self._of(n).end < self.last]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Output shapes of the modules that were called once."""
        return {name: visit.shape for name, visit in self._once()}

    @property
    def end(self) -> Boundary:
        """The end of the whole backbone."""
        whole = [n for n in self.every if len(self.before(n)) == self.convolutions and self._of(n).start < self.last]
        name = [n for n in whole if self._of(n).shape == self._of(whole[0]).shape][-1]
        layers = self.before(name)
        return Boundary(name, layers, self._of(name).shape[1], (), {}, layers[-1] in self.every)

    def before(self, name: str) -> tuple[str, ...]:
        """The convolutions that have run when a module returns."""
        end = self._of(name).end
        return tuple(n for n in self.own if is_convolution(self.modules[n]) and self._of(n).end <= end)

    def behind(self, name: str) -> tuple[str, ...]:
        """The outermost modules of the backbone that run after a module; none if they do not form a chain."""
        later = [(n, v) for n, v in self._once() if self._of(name).end < v.start < self.last]
        outermost = [n for n, v in later if not any(o.start < v.start and v.end < o.end for _, o in later)]
        if not set(outermost) <= set(self.every):
            return ()
        return tuple(sorted(outermost, key=lambda n: self._of(n).start))

    def readers(self, tail: tuple[str, ...]) -> dict[str, int] | None:
        """Input widths of the head without the tail, where they change; ``None`` if the network fails without it."""
        if not self.head:
            return None
        first = min(self.head, key=lambda name: self._of(name).start)
        stub = _Stub(self.modules[first], self._of(first).shape)
        with self._replaced({**{name: nn.Identity() for name in tail}, first: stub}):
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    output = self._run()
                    output[0].sum().backward()  # type: ignore[no-untyped-call]  # fails where two operators in place meet
            except (RuntimeError, ValueError, TypeError, IndexError):  # shapes that do not fit
                return None
        shapes = [tuple(tensor.shape) for tensor in output]
        if shapes != [self.shape] or stub.reads is None:
            return None
        return {} if stub.reads == stub.read_before else {first: stub.reads}

    def _last(self) -> int:
        """Time at which the backbone ends: after its last convolution or norm and their activation and dropout."""
        if not self.own:
            return -1
        last, shape = self._of(self.own[-1]).end, self._of(self.own[-1]).shape
        for name in self.every:
            visit = self._of(name)
            if visit.start > last:
                kind = type(self.modules[name]).__module__
                if visit.shape != shape or kind not in _ELEMENTWISE:
                    break
                last = visit.end
        return last

    def _of(self, name: str) -> _Visit:
        return self.visits[name][0]

    def _once(self) -> list[tuple[str, _Visit]]:
        return [(name, seen[0]) for name, seen in self.visits.items()]

    def _run(self) -> list[Tensor]:
        args, kwargs = tree_map(_leaf, (self.call.args, dict(self.call.kwargs)))
        return output_tensors(self.model(*args, **kwargs))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Record every call of a module within the context."""
        clock = iter(range(10**9))
        names = {id(module): name for name, module in self.modules.items()}

        def begin(module: nn.Module, _: Any) -> None:
            self.visits.setdefault(names[id(module)], []).append(_Visit(next(clock)))

        def finish(module: nn.Module, _: Any, output: Any) -> None:
            visit = next(v for v in reversed(self.visits[names[id(module)]]) if v.end < 0)
            visit.end = next(clock)
            if isinstance(output, Tensor):
                visit.node, visit.shape = output.grad_fn, tuple(output.shape)

        handles = [module.register_forward_pre_hook(begin) for module in self.modules.values()]
        handles += [module.register_forward_hook(finish) for module in self.modules.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _replaced(self, others: Mapping[str, nn.Module]) -> Iterator[None]:
        places = [
            (self.modules.get(name.rpartition(".")[0], self.model), name.rpartition(".")[2], other)
            for name, other in others.items()
        ]
        before = [parent._modules[own] for parent, own, _ in places]
        for parent, own, other in places:
            parent._modules[own] = other
        try:
            yield
        finally:
            for (parent, own, _), module in zip(places, before, strict=True):
                parent._modules[own] = module


class _Stub(nn.Module):
    """Placeholder for the head's first layer that records its number of inputs and returns zeros."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.dim = shape, 1 if is_convolution(layer) else -1
        self.read_before = getattr(layer, "in_channels", getattr(layer, "in_features", None))
        self.reads: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the layer's shape."""
        self.reads = x.shape[self.dim] if self.read_before is not None else None
        return x.new_zeros(self.shape) + 0 * x.sum()


def _leaf(value: Any) -> Any:
    """A copy of an input that requires a gradient where it can."""
    return value.detach().clone().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value


def _on_every_path(output: Node) -> set[Node]:
    """Nodes of an autograd graph that every path from the output to the inputs goes through."""
    order = _topological(output)
    down = dict.fromkeys(order, 0)  # paths from the output
    down[output] = 1
    for node in order:
        for following, _ in node.next_functions:
            if following is not None:
                down[following] += down[node]
    up: dict[Node, int] = {}  # paths to the input
    for node in reversed(order):
        further = [following for following, _ in node.next_functions if following is not None]
        up[node] = sum(up[following] for following in further) if further else 1
    return {node for node in order if down[node] * up[node] == up[output]}


def _topological(output: Node) -> list[Node]:
    """Nodes in topological order, without recursion, which would exceed Python's limit for deep networks."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(output, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((following, False) for following, _ in node.next_functions if following is not None)
    return order[::-1]
