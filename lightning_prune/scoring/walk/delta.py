"""Incremental computation of layers with few changed input channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lightning_prune.scoring.walk.chains import CHANNELWISE, operator_name
from lightning_prune.scoring.walk.program import Program
from lightning_prune.scoring.walk.recording import Step, Value

__all__ = ["Delta", "Partial", "Shares"]


class Shares(NamedTuple):
    """Rows of a batch of variants.

    Attributes:
        rows: Number of rows of each variant.
        channels: Masked channels of each variant.
        samples: Sample index of each row.
    """

    rows: list[int]
    channels: list[Tensor]
    samples: Tensor


@final
class Delta:
    """Convolutions and linear layers that read a station's value, directly or after channelwise operators.

    Args:
        program: The operators.
        start: Position of the station.
        steps: Positions of the operators that run after it.
        masked: Positions of other masked stations, after which the changed channels differ.

    Attributes:
        layers: Number of the value that each such layer reads, by the position of its operator.
    """

    def __init__(self, program: Program, start: int, steps: Sequence[int], masked: frozenset[int]) -> None:
        self.program = program
        self.layers: dict[int, int] = {}
        followed = {program.value_at(start)}
        changed = set(followed)
        for index in steps:
            step = program.steps[index]
            reads = changed.intersection(step.reads())
            changed.update(out for out in step.outs if out is not None and program.depends[out])
            if index in masked or not reads <= followed:
                continue
            if reads and self._layer_input(step) in reads:
                self.layers[index] = next(iter(reads))
                if self._is_depthwise(step):
                    followed.update(out for out in step.outs if out is not None)
            elif reads and self._is_channelwise(step):
                followed.update(out for out in step.outs if out is not None)

    def _layer_input(self, step: Step) -> int | None:
        """Input value of a step that is an ungrouped or depthwise convolution or a matrix product, else None."""
        name, args = operator_name(step), step.args
        if name in ("addmm", "mm"):
            x, weight = args[-2:]
            fixed = isinstance(weight, Value) and not self.program.depends[weight.number]
            return x.number if isinstance(x, Value) and fixed and not step.kwargs else None
        if name != "convolution" or args[6] or not isinstance(args[0], Value):
            return None
        return args[0].number if args[8] in (1, self.program.shapes[args[0].number][1]) else None

    def _is_depthwise(self, step: Step) -> bool:
        shapes, out = self.program.shapes, step.outs[0]
        unmasked_input = self._layer_input(step)
        if operator_name(step) != "convolution" or unmasked_input is None or out is None or step.args[8] == 1:
            return False
        return shapes[unmasked_input][1] == shapes[out][1]

    def _is_channelwise(self, step: Step) -> bool:
        """Whether every channel (dimension 1) of a step's output depends only on the same channel of its input."""
        if step.func is None:
            return True
        name, out, shapes = operator_name(step), step.outs[0], self.program.shapes
        if name not in CHANNELWISE or out is None:
            return False
        if name == "mean":  # spatial dimensions only
            dims = len(shapes[step.args[0].number])
            return len(step.args) > 1 and all(dim % dims > 1 for dim in step.args[1])
        values = [place.number for place in step.args if isinstance(place, Value)]
        return all(shapes[number][:2] == shapes[out][:2] for number in values if self.program.depends[number])

    @property
    def wanted(self) -> set[int]:
        """Values of the unmasked network that are needed for differences."""
        outs = {self.program.steps[index].outs[0] for index in self.layers}
        return {*self.layers.values(), *(out for out in outs if out is not None)}

    def instead(self, dense: Mapping[int, Tensor], shares: Shares) -> dict[int, Partial]:
        """Replacements of operators, by position.

        Args:
            dense: The ``wanted`` values.
            shares: Rows of the run.
        """
        found: dict[int, Partial] = {}
        for index, number in self.layers.items():
            step = self.program.steps[index]
            out = step.outs[0]
            assert out is not None
            found[index] = Partial(step, dense[number], dense[out], shares)
        return found


@final
class Partial:
    """An operator of a layer that computes each variant over a part of its input channels.

    If at most half of the channels are masked, their contribution is subtracted from the unmasked output. If more are
    masked, and they are 0, the output is computed from the other channels.

    Args:
        step: The operator.
        unmasked_input: Input of the layer in the unmasked network.
        unmasked_output: Output of the layer in the unmasked network.
        shares: Rows of the run.

    Attributes:
        macs_saved: Multiply-accumulates saved so far.
    """

    def __init__(self, step: Step, unmasked_input: Tensor, unmasked_output: Tensor, shares: Shares) -> None:
        self.step, self.unmasked_input, self.unmasked_output, self.shares = (
            step,
            unmasked_input,
            unmasked_output,
            shares,
        )
        self.macs_saved = 0

    def __call__(self, *args: Any) -> Tensor:
        """Output of the operator for these arguments."""
        x, first = args[self._position], 0
        channels_all = x.shape[1]
        parts = []
        for rows, channels in zip(self.shares.rows, self.shares.channels, strict=True):
            last = first + rows
            if rows:
                here, samples = x[first:last], self.shares.samples[first:last]
                by_others = 2 * len(channels) > channels_all and not self._by_channel
                by_others = by_others and not here.index_select(1, channels).any()
                part = self._of_others(here, channels, args) if by_others else self._less(here, samples, channels, args)
                parts.append(part)
                used = channels_all - len(channels) if by_others else len(channels)
                self.macs_saved += self.step.macs * rows * (channels_all - used) // (2 * channels_all)
            first = last
        return torch.cat(parts)

    @property
    def _is_product(self) -> bool:
        return operator_name(self.step) in ("addmm", "mm")

    @property
    def _position(self) -> int:
        return 1 if operator_name(self.step) == "addmm" else 0

    @property
    def _by_channel(self) -> bool:
        """Whether the layer is a depthwise convolution."""
        return not self._is_product and self.step.args[8] != 1

    def _of_others(self, x: Tensor, channels: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Output from the unmasked channels."""
        kept = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        kept[channels] = False
        (others,) = kept.nonzero(as_tuple=True)
        if self._is_product:
            out: Tensor = x.index_select(1, others) @ args[-1].index_select(0, others)
            return torch.add(out, args[0]) if len(args) > 2 else out
        weight, bias = args[1], args[2]
        if not len(others):
            out = x.new_zeros(len(x), *self.unmasked_output.shape[1:])
            return out if bias is None else out + bias.reshape(-1, *[1] * (out.dim() - 2))
        return self._convolved(x.index_select(1, others), weight.index_select(1, others), bias, args, 1)

    def _less(self, x: Tensor, samples: Tensor, channels: Tensor, args: tuple[Any, ...]) -> Tensor:
        """The unmasked output plus the contribution of the changed channels."""
        out = self.unmasked_output.index_select(0, samples)
        if not len(channels):
            return out
        change = x.index_select(1, channels) - self.unmasked_input.index_select(0, samples).index_select(1, channels)
        if self._is_product:
            return out.add_(change @ args[-1].index_select(0, channels))
        weight, groups = args[1], args[8]
        if groups == 1:
            return out.add_(self._convolved(change, weight.index_select(1, channels), None, args, 1))
        # Depthwise: only the outputs of masked channels change.
        each = len(weight) // groups
        outs = (channels[:, None] * each + torch.arange(each, device=channels.device)).flatten()
        part = self._convolved(change, weight.index_select(0, outs), None, args, len(channels))
        return out.index_add_(1, outs, part)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, args: tuple[Any, ...], groups: int) -> Tensor:
        stride, padding, dilation = args[3:6]
        settings = stride, padding, dilation, False, [0] * len(stride)
        found: Tensor = torch.ops.aten.convolution.default(x, weight, bias, *settings, groups)
        return found
