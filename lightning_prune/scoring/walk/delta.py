"""Layers behind a station as a difference: what they gave, less the share of the channels that are masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lightning_prune.scoring.walk.chains import CHANNELWISE, operator_name
from lightning_prune.scoring.walk.program import Program
from lightning_prune.scoring.walk.recording import Step, Value

__all__ = ["Delta", "Shares"]


class Shares(NamedTuple):
    """Rows of a run, variant by variant.

    Attributes:
        rows: Number of rows of each variant.
        channels: The masked channels of each.
        samples: Which sample each row is.
    """

    rows: list[int]
    channels: list[Tensor]
    samples: Tensor


@final
class Delta:
    """Convolutions and linear layers that read a station's value, or what channelwise operators make of it.

    Args:
        program: The operators.
        start: Position of the station.
        steps: Positions of those that are run behind it.
        masked: Positions of stations that are masked beside: behind them the channels are others.

    Attributes:
        layers: Position of the operator of each such layer, and the number of the value that it reads.
    """

    def __init__(self, program: Program, start: int, steps: Sequence[int], masked: frozenset[int]) -> None:
        self.program = program
        self.layers: dict[int, int] = {}
        followed = {program.value_at(start)}
        changed = set(followed)
        for index in steps:
            step = program.steps[index]
            reads = changed.intersection(step.reads())
            changed.update(out for out in step.outs if out is not None)
            if index in masked or not reads <= followed:
                continue
            if reads and self._layer_input(step) in reads:
                self.layers[index] = next(iter(reads))
                if self._is_depthwise(step):
                    followed.update(out for out in step.outs if out is not None)
            elif reads and self._is_channelwise(step):
                followed.update(out for out in step.outs if out is not None)

    def _layer_input(self, step: Step) -> int | None:
        """The value that a convolution (of one group, or a channel a group) or a matrix product reads, if it is one."""
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
        entered = self._layer_input(step)
        if operator_name(step) != "convolution" or entered is None or out is None or step.args[8] == 1:
            return False
        return shapes[entered][1] == shapes[out][1]

    def _is_channelwise(self, step: Step) -> bool:
        """Whether every channel (dimension 1) of what a step gives depends on that channel of what it reads alone."""
        if step.func is None:
            return True
        name, out, shapes = operator_name(step), step.outs[0], self.program.shapes
        if name not in CHANNELWISE or out is None:
            return False
        if name == "mean":  # over positions only
            dims = len(shapes[step.args[0].number])
            return len(step.args) > 1 and all(dim % dims > 1 for dim in step.args[1])
        values = [place.number for place in step.args if isinstance(place, Value)]
        return all(shapes[number][:2] == shapes[out][:2] for number in values if self.program.depends[number])

    @property
    def wanted(self) -> set[int]:
        """Values of the unmasked network that differences are taken from."""
        outs = {self.program.steps[index].outs[0] for index in self.layers}
        return {*self.layers.values(), *(out for out in outs if out is not None)}

    def instead(self, dense: Mapping[int, Tensor], shares: Shares) -> dict[int, Callable[..., Tensor]]:
        """By position of a layer's operator, what takes its place: a function of its arguments.

        Args:
            dense: What is ``wanted``.
            shares: The rows of the run.
        """
        found: dict[int, Callable[..., Tensor]] = {}
        for index, number in self.layers.items():
            step = self.program.steps[index]
            out = step.outs[0]
            assert out is not None
            found[index] = _Difference(step, dense[number], dense[out], shares)
        return found

    def macs(self, shares: Shares) -> tuple[int, int]:
        """Multiply-accumulates of the layers for these rows: as differences and whole."""
        spent = whole = 0
        for index, number in self.layers.items():
            step = self.program.steps[index]
            channels = self.program.shapes[number][1]
            for rows, masked in zip(shares.rows, shares.channels, strict=True):
                spent += step.macs * rows * len(masked) // (2 * channels)
                whole += step.macs * rows // 2
        return spent, whole


class _Difference:
    """One layer's operator."""

    def __init__(self, step: Step, entered: Tensor, gave: Tensor, shares: Shares) -> None:
        self.step, self.entered, self.gave, self.shares = step, entered, gave, shares

    def __call__(self, *args: Any) -> Tensor:
        out = self.gave.index_select(0, self.shares.samples)
        position = 1 if operator_name(self.step) == "addmm" else 0
        x, first = args[position], 0
        for rows, channels in zip(self.shares.rows, self.shares.channels, strict=True):
            last = first + rows
            if rows and len(channels):
                here, samples = x[first:last].index_select(1, channels), self.shares.samples[first:last]
                before = self.entered.index_select(0, samples).index_select(1, channels)
                self._add(out[first:last], here, before, channels, args)
            first = last
        return out

    def _add(self, out: Tensor, x: Tensor, before: Tensor, channels: Tensor, args: tuple[Any, ...]) -> None:
        if operator_name(self.step) in ("addmm", "mm"):
            out.add_((x - before) @ args[-1].index_select(0, channels))
            return
        weight, stride, padding, dilation, groups = args[1], args[3], args[4], args[5], args[8]
        settings = stride, padding, dilation, False, [0] * len(stride)
        if groups == 1:
            part = weight.index_select(1, channels)
            out.add_(torch.ops.aten.convolution.default(x - before, part, None, *settings, 1))
            return
        # One channel a group: only the outputs of the masked ones change.
        each = len(weight) // groups
        outs = (channels[:, None] * each + torch.arange(each, device=channels.device)).flatten()
        part = weight.index_select(0, outs)
        change = torch.ops.aten.convolution.default(x - before, part, None, *settings, len(channels))
        out.index_add_(1, outs, change)
