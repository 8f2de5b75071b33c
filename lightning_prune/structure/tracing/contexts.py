"""What holds while a network runs under a tracer, and is restored afterwards."""

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
    "ALIKE_IN_BOTH_MODES",
    "assignments_followed",
    "contents_restored",
    "fastpath_off",
    "log_held",
    "named_while_running",
    "who_asks_for_the_mode",
]


def _hides_nothing(kind: type[nn.Module]) -> bool:
    """Whether modules of this type keep their mode in the attribute `training` and look attributes up as all do."""
    return (
        (kind.train, kind.eval, kind.__getattr__) == (nn.Module.train, nn.Module.eval, nn.Module.__getattr__)
        and kind.__getattribute__ is object.__getattribute__
        and not issubclass(kind, torch.jit.ScriptModule)
    )


#: Layers that work on the same units in train as in eval mode.
ALIKE_IN_BOTH_MODES = frozenset(
    [
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    ]
)


@contextmanager
def who_asks_for_the_mode(root: nn.Module, running: Sequence[str]) -> Iterator[set[type] | None]:
    """Collect the types of the modules that read their attribute `training`; None if that cannot be seen.

    The attribute is hidden, so that Python asks `nn.Module.__getattr__` for it. A module that is asked while another
    one is `running`, or whose `forward` is not that of its type, counts as of unknown type.
    """
    modules = {id(module): (module, name) for name, module in root.named_modules()}
    original = nn.Module.__getattr__
    if not all(map(_hides_nothing, {type(module) for module, _ in modules.values()})):
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
def contents_restored(buffers: Iterable[torch.Tensor]) -> Iterator[None]:
    """Put back what a run writes into buffers: a count of batches may enter what the next run computes with."""
    before = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for buffer, content in before:
            buffer.copy_(content)


@contextmanager
def fastpath_off() -> Iterator[None]:
    """Attention by its parts: the fused kernel of whole encoder layers hides them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def log_held() -> Iterator[None]:
    """Nothing in PyTorch's log of an operator that fails on tensors without content: the error says it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def assignments_followed(tracer: Tracer) -> Iterator[None]:
    """Tell the tracer of assignments to `data`, which reach no operator; at the end they are taken back.

    Those of other threads are none of its business.
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


def named_while_running(forward: Callable[..., Any], name: str, stack: list[str]) -> Callable[..., Any]:
    """A method that puts its module's name on a stack for as long as it runs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        stack.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            stack.pop()

    run.__wrapped__ = forward  # type: ignore[attr-defined]  # its signature is what `inspect` reports
    return run
