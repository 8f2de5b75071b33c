"""PyTorch's recurrent layers and cells in operators that a tracer can follow, with all time steps at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_prune.structure.tracing.operators import memory_of
from lightning_prune.structure.tracing.tracer import Tracer

__all__ = ["RecurrentFunctions", "is_recurrent"]

#: Hidden state, and the cell of an LSTM.
State = tuple[Tensor, ...]
#: From the products of the input and of the hidden state with the weights, and the state, to the next state.
Step = Callable[[Tensor, Tensor, Sequence[Tensor | None]], State]


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's recurrent layers or cells."""
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase))


class RecurrentFunctions(TorchFunctionMode):
    """Runs `torch.lstm`, `torch.gru`, their cells and the like as one step, from the initial state to all time steps.

    Time steps share their weights, so the step has the units and the MACs of all. Its values differ from those of the
    layer, but depend on the units alike.

    Args:
        tracer: Follows the indices. The hidden state is united with what the recurrent weights take as input.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _LAYERS:
            return self._layer(_LAYERS[func], func is torch.lstm, *args, **(kwargs or {}))
        if func in _CELLS:
            return self._cell(_CELLS[func], *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _cell(
        self,
        step: Step,
        x: Tensor,
        state: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        given = (state,) if isinstance(state, Tensor) else tuple(state)
        if any(part.shape[-1] != w_hh.shape[1] for part in given):
            raise RuntimeError(f"expected a state of {w_hh.shape[1]} units, got {given[0].shape[-1]}")
        after = self._step(step, x, given, w_ih, w_hh, b_ih, b_hh)
        return after[0] if isinstance(state, Tensor) else after

    def _layer(self, step: Step, has_cell: bool, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        packed = isinstance(rest[0 if has_cell else 1], Tensor)
        if packed:
            _, given, weights, has_biases, layers, dropout, training, bidirectional = rest
        else:
            given, weights, has_biases, layers, dropout, training, bidirectional, batch_first = rest
            x = x.transpose(0, 1) if batch_first else x
            if self.tracer.samples is None:
                self.tracer.samples = x.shape[1]
                self.tracer.time_first = not batch_first and x.shape[0] == self.tracer.batch
        directions = 1 + bidirectional
        size = len(weights) // (layers * directions)
        finals: list[State] = []
        states = [part.unbind() for part in (given if has_cell else (given,))]
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                number = layer * directions + direction
                w_ih, w_hh, *others = weights[number * size : (number + 1) * size]
                b_ih, b_hh = others[:2] if has_biases else (None, None)
                w_hr = others[-1] if size % 2 else None
                initial = tuple(part[number] for part in states)
                samples = len(initial[0])
                if not packed:
                    after = self._step(step, x, initial, w_ih, w_hh, b_ih, b_hh, w_hr)
                    finals.append(tuple(part[0 if direction else -1] for part in after))
                else:  # rows of all time steps and samples
                    initial = tuple(part[:1] for part in initial)
                    after = self._step(step, x, initial, w_ih, w_hh, b_ih, b_hh, w_hr)
                    finals.append(tuple(part[:samples] for part in after))
                outputs.append(after[0])
            x = torch.cat(outputs, -1)
            if layer < layers - 1 and dropout:
                x = F.dropout(x, dropout, training)
        output = x if packed or not batch_first else x.transpose(0, 1)
        return output, *(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _step(
        self,
        step: Step,
        x: Tensor,
        state: State,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None = None,
    ) -> State:
        """The state after inputs of shape ``(..., features)``, each from the same initial state."""
        at_all = [part.expand(*x.shape[:-1], part.shape[-1]) for part in state]
        before = [None if memory_of(part) in self.tracer.zeros else part for part in at_all]
        hidden, *cell = step(F.linear(x, w_ih, b_ih), F.linear(at_all[0], w_hh, b_hh), before)
        if w_hr is not None:
            hidden = F.linear(hidden, w_hr)
        where = f"the recurrence of `{self.tracer.stack[-1] if self.tracer.stack else ''}`"
        self.tracer.meet(self.tracer.value(hidden).axes[-1], self.tracer.value(w_hh).axes[1], where)
        return hidden, *cell


def _lstm(of_input: Tensor, of_hidden: Tensor, state: Sequence[Tensor | None]) -> State:
    i, f, g, o = (of_input + of_hidden).chunk(4, -1)
    new = i.sigmoid() * g.tanh()
    cell = new if state[1] is None else f.sigmoid() * state[1] + new
    return o.sigmoid() * cell.tanh(), cell


def _gru(of_input: Tensor, of_hidden: Tensor, state: Sequence[Tensor | None]) -> State:
    (r_i, z_i, n_i), (r_h, z_h, n_h) = of_input.chunk(3, -1), of_hidden.chunk(3, -1)
    z, new = (z_i + z_h).sigmoid(), (n_i + (r_i + r_h).sigmoid() * n_h).tanh()
    return (new - z * new if state[0] is None else new + z * (state[0] - new),)


def _rnn(activation: Callable[[Tensor], Tensor]) -> Step:
    return lambda of_input, of_hidden, _: (activation(of_input + of_hidden),)


def _by_function(suffix: str, functions: Iterable[tuple[str, Step]]) -> dict[Callable[..., Any], Step]:
    return {getattr(torch, f"{name}{suffix}"): step for name, step in functions}


_STEPS = (("lstm", _lstm), ("gru", _gru), ("rnn_tanh", _rnn(torch.tanh)), ("rnn_relu", _rnn(torch.relu)))
_LAYERS, _CELLS = _by_function("", _STEPS), _by_function("_cell", _STEPS)
