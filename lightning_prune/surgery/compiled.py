"""Support of ``torch.compile``."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo import OptimizedModule

__all__ = ["eager", "is_compiled", "reset_compiled"]


def is_compiled(module: nn.Module) -> bool:
    """Whether the module or a part of it is compiled."""
    return bool(getattr(module, "_compiler_ctx", None)) or any(
        isinstance(part, OptimizedModule) or part._compiled_call_impl is not None for part in module.modules()
    )


@contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Run eagerly within the context, as compiled code ignores hooks registered later."""
    if not is_compiled(module):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def reset_compiled(module: nn.Module) -> None:
    """Discard compiled code before shapes change: it may hold a graph, and counts towards the recompile limit."""
    if is_compiled(module):
        torch.compiler.reset()
        gc.collect()  # frames that a compiled step was captured from are in reference cycles
