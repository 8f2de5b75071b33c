"""``torch.compile``: hooks that fire, and code that fits the shapes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo import OptimizedModule

__all__ = ["as_written", "forget_code", "is_compiled"]


def is_compiled(module: nn.Module) -> bool:
    """Whether the module or a part of it runs through ``torch.compile``."""
    return bool(getattr(module, "_compiler_ctx", None)) or any(
        isinstance(part, OptimizedModule) or part._compiled_call_impl is not None for part in module.modules()
    )


@contextmanager
def as_written(module: nn.Module) -> Iterator[None]:
    """Within the context the Python code runs: compiled code does not know of hooks that came later."""
    if not is_compiled(module):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def forget_code(module: nn.Module) -> None:
    """Before shapes change: compiled code may hold a graph of the last step, and counts for a limit."""
    if is_compiled(module):
        torch.compiler.reset()
        gc.collect()  # frames that a compiled step was captured from are in reference cycles
