"""What a network returns for the samples of an example, and how far other outputs are from that."""

from __future__ import annotations

import inspect as signatures
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune.scoring.contexts import preserved_state
from lightning_prune.structure import StructureError
from lightning_prune.structure.latency import median_seconds, resize
from lightning_prune.structure.traced_model import batch_size_of, describe, first_line, written
from lightning_prune.structure.tracing import Call

__all__ = ["Samples", "largest_difference", "milliseconds", "tensors_in"]

#: Seconds to time one of several, in rounds, because a machine may be busy for a while.
_SECONDS, _ROUNDS = 0.2, 5


class Samples:
    """An example, cut into its samples, and what the network returns for them in eval mode.

    Args:
        model: The network, which runs where it is and is not modified.
        call: Its call on the example.
        repeat: Take a single sample twice, if the network accepts that, so that the number is not taken for a constant.

    Attributes:
        number: Number of samples.
        at_once: Number of samples that the network must be given: one, or all if it takes no single one.

    Raises:
        StructureError: If the network fails on the example.
    """

    def __init__(self, model: nn.Module, call: Call, *, repeat: bool = True) -> None:
        self._model, self._call, self.number = written(model), _in_order(written(model), call), batch_size_of(call)
        self._outputs: dict[tuple[int, int], list[Tensor]] = {}
        try:
            self.outputs(0, self.number)
        except Exception as error:
            raise StructureError(
                f"{type(self._model).__name__} fails on the example, {describe(call)} "
                f"({type(error).__name__}: {first_line(error)}). Give an example of the shape and type that `forward` "
                "takes."
            ) from error
        if self.number == 1 and repeat:
            self._repeat()
        self.at_once = 1 if self._takes_one() else self.number

    def has_samples(self, leaf: Tensor) -> bool:
        """Whether the first dimension of an argument is that of the samples."""
        return leaf.dim() > 0 and len(leaf) == self.number

    def arguments(self, begin: int, end: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keywords with some of the samples, as copies on the CPU."""

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            own = leaf[begin:end] if self.has_samples(leaf) else leaf
            return own.detach().cpu().clone(memory_format=torch.contiguous_format)

        args, kwargs = tree_map(cut, (self._call.args, dict(self._call.kwargs)))
        return args, kwargs

    def outputs(self, begin: int, end: int) -> list[Tensor]:
        """The tensors that the network returns for some of the samples, on the CPU."""
        if (begin, end) not in self._outputs:
            self._outputs[begin, end] = self.outputs_again(begin, end)
        return self._outputs[begin, end]

    def outputs_again(self, begin: int, end: int, seed: int = 0) -> list[Tensor]:
        """Run the network on some of the samples, on its own device, with random generators of this seed."""
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        args, kwargs = tree_map(
            lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, self.arguments(begin, end)
        )
        with preserved_state(self._model, seed=seed), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return [out.detach().cpu() for out in tensors_in(self._model(*args, **kwargs))]

    def _repeat(self) -> None:
        once = self._call, self.number, self._outputs
        args, kwargs = resize((once[0].args, dict(once[0].kwargs)), once[0], 2)
        self._call, self.number, self._outputs = Call(args, kwargs), 2, {}
        try:
            self.outputs(0, 2)
        except Exception:  # it takes one sample only
            self._call, self.number, self._outputs = once

    def _takes_one(self) -> bool:
        if not any(map(self.has_samples, tensors_in((self._call.args, dict(self._call.kwargs))))):
            return self.number == 1
        try:
            self.outputs(0, 1)
        except Exception:  # it takes the whole batch only
            return False
        return True


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of an output, as a share of its own largest magnitude; infinite if shapes differ."""
    if [out.shape for out in found] != [out.shape for out in expected]:
        return float("inf")
    return max(map(_difference, found, expected), default=0.0)


def milliseconds(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Median times of functions, called in turn, so that other load on the machine affects all of them equally."""
    rounds = [[median_seconds(run, _SECONDS / _ROUNDS) for run in runs] for _ in range(_ROUNDS)]
    return [1e3 * median(times) for times in zip(*rounds, strict=True)]


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in arguments or outputs, in the order of a file's."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _difference(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    kind = torch.complex128 if expected.is_complex() else torch.float64
    a, b = found.to(kind), expected.to(kind)
    difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    largest = float(b.abs().nan_to_num(nan=0.0, posinf=0.0).max())
    return float(difference.nan_to_num(nan=float("inf")).max()) / (largest or 1.0)


def _in_order(model: nn.Module, call: Call) -> Call:
    """The call with keywords in the order of the signature, which is that of a file's inputs."""
    order = list(signatures.signature(model.forward).parameters)
    names = sorted(call.kwargs, key=lambda name: order.index(name) if name in order else len(order))
    return Call(call.args, {name: call.kwargs[name] for name in names})
