"""Context managers for running a network under a tracer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_prune.structure.tracing.tracer import Tracer

__all__ = [
    "SAME_UNITS_IN_BOTH_MODES",
    "buffers_restored",
    "data_assignments_traced",
    "fake_tensor_log_disabled",
    "push_name",
    "record_mode_readers",
]


def _has_plain_training_flag(kind: type[nn.Module]) -> bool:
    """Whether modules of this type use PyTorch's own `training` flag and attribute lookup."""
    return (
        (kind.train, kind.eval, kind.__getattr__) == (nn.Module.train, nn.Module.eval, nn.Module.__getattr__)
        and kind.__getattribute__ is object.__getattribute__
        and not issubclass(kind, torch.jit.ScriptModule)
    )


#: Layers that have the same structure in train and eval mode.
SAME_UNITS_IN_BOTH_MODES = frozenset(
    [
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.LSTM, nn.GRU, nn.RNN),
    ]
)


@contextmanager
def record_mode_readers(root: nn.Module, running: Sequence[str]) -> Iterator[set[type] | None]:
    """Collect the types of modules whose `training` flag is read; yields None if that cannot be observed.

    The flag is removed from the modules, so that Python calls `nn.Module.__getattr__` for it. A read while another
    module is `running`, or by a replaced `forward`, is recorded as `object`.
    """
    modules = {id(module): (module, name) for name, module in root.named_modules()}
    original = nn.Module.__getattr__
    if not all(map(_has_plain_training_flag, {type(module) for module, _ in modules.values()})):
        yield None
        return
    modes = {number: vars(module).pop("training") for number, (module, _) in modules.items()}
    asked: set[type] = set()

    def answer(self: nn.Module, name: str) -> Any:
        if name == "training" and id(self) in modes:
            own = getattr(vars(self)["forward"].__wrapped__, "__func__", None) is type(self).forward
            asked.add(type(self) if own and running and running[-1] == modules[id(self)][1] else object)
            return modes[id(self)]
        return original(self, name)

    nn.Module.__getattr__ = answer  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        nn.Module.__getattr__ = original  # type: ignore[method-assign]
        for number, (module, _) in modules.items():
            vars(module).setdefault("training", modes[number])


@contextmanager
def buffers_restored(buffers: Iterable[torch.Tensor]) -> Iterator[None]:
    """Restore the contents of buffers on exit, such as the batch counter of batch norm."""
    before = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for buffer, content in before:
            buffer.copy_(content)


@contextmanager
def fake_tensor_log_disabled() -> Iterator[None]:
    """Silence PyTorch's log of operators that fail on fake tensors: the error is handled."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def data_assignments_traced(tracer: Tracer) -> Iterator[None]:
    """Report assignments to `Tensor.data`, which reach no operator, to the tracer, and undo them on exit.

    Assignments in other threads are not affected.
    """
    data: Any = torch._C.TensorBase.data
    thread = threading.get_ident()
    before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def assign(tensor: torch.Tensor, given: torch.Tensor) -> None:
        if threading.get_ident() == thread:
            before.append((tensor, data.__get__(tensor)))
            tracer.assigned(tensor, given)
        data.__set__(tensor, given)

    torch.Tensor.data = property(data.__get__, assign)  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.data
        for tensor, old in reversed(before):
            data.__set__(tensor, old)


def push_name(forward: Callable[..., Any], name: str, stack: list[str]) -> Callable[..., Any]:
    """Wrap a method to keep its module's name on a stack while it runs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        stack.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            stack.pop()

    run.__wrapped__ = forward  # type: ignore[attr-defined]  # its signature is what `inspect` reports
    return run
