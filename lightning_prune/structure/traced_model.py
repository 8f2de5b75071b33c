"""A network with the calls that are traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parameter import is_lazy

from lightning_prune.errors import PruningError
from lightning_prune.structure.tracing import (
    Call,
    FakeCopy,
    Kind,
    output_tensors,
)

__all__ = [
    "StructureError",
    "TracedModel",
    "batch_size_of",
    "describe",
    "first_line",
    "require_names",
    "require_network",
    "require_traceable",
    "written",
]


class StructureError(PruningError, ValueError):
    """Raised when the structure of a network cannot be found."""


@dataclass(frozen=True)
class TracedModel:
    """A network and everything needed to run a copy of it.

    Attributes:
        model: The network.
        calls: Calls to trace; the first is a forward pass in eval mode, for which costs are counted.
        optional: Calls that are skipped with a note if they fail, such as a ``training_step`` with side effects.
        memo: Replacements for objects that must not be copied: ``{id(object): replacement}``.
        prepare: Called with a copy before it runs, to replace metrics and loggers.
        with_hooks: Whether forward hooks that affect the output run on a copy.
    """

    model: nn.Module
    calls: tuple[Call, ...]
    optional: tuple[Call, ...] = ()
    memo: Mapping[int, Any] | None = None
    prepare: Callable[[nn.Module], None] | None = None
    with_hooks: bool = True

    @classmethod
    def of(cls, model: nn.Module, *args: Any, **kwargs: Any) -> TracedModel:
        """A plain module, called as ``model(*args, **kwargs)`` in eval and in train mode."""
        calls = tuple(Call(args, kwargs, training=training) for training in (False, True))
        return cls(model, calls)

    def copy(self, kind: Kind, *, blank: bool = False) -> FakeCopy:
        """A copy of the network on tensors of this kind; see `FakeCopy` for ``blank``."""
        return FakeCopy(self.model, self.memo, self.prepare, kind=kind, with_hooks=self.with_hooks, blank=blank)


def require_names(model: nn.Module) -> None:
    """Raise an error if a module has an attribute ``_orig_mod``, the name that `torch.compile` uses."""
    for prefix, module in model.named_modules():
        if "_orig_mod" in module._modules and not isinstance(module, OptimizedModule):
            where = f"{prefix} ({type(module).__name__})" if prefix else type(module).__name__
            raise StructureError(
                f"{where}: expected no attribute `_orig_mod`, which is the name that `torch.compile` gives to the "
                "module that it stands around. Give the attribute another name."
            )


def require_network(model: object) -> None:
    """Check that a network is a module without uninitialized lazy layers.

    Raises:
        TypeError: If it is no module.
        StructureError: If layers are lazy.
    """
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"expected a torch.nn.Module, got {got}")
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise StructureError(
            f"{type(model).__name__}: {', '.join(lazy)} have no shape yet. Run one forward pass first, so that lazy "
            "layers learn their widths."
        )


def written(model: nn.Module) -> nn.Module:
    """The network as it is written, which `torch.compile` wraps.

    Raises:
        StructureError: If a module has an attribute ``_orig_mod``.
    """
    require_names(model)
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def require_traceable(model: nn.Module) -> None:
    """Raise an error for scripted modules and lazy layers."""
    for prefix, module in model.named_modules():
        where = f"{prefix or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise StructureError(
                f"{where}: expected modules in Python, got a ScriptModule, whose operators cannot be followed. Prune "
                "the network that it was made from, and script that."
            )
        lazy = [name for name, parameter in module._parameters.items() if is_lazy(parameter)]
        if lazy:
            raise StructureError(
                f"{where}: expected initialized parameters, got `{lazy[0]}` of a lazy layer. Run the network once on "
                "an example before: `model(example)`."
            )


def batch_size_of(call: Call) -> int:
    """Batch size of an example: the length of a list of images (as detectors take), else of the first tensor."""
    first = next(iter((*call.args, *call.kwargs.values())), None)
    if isinstance(first, list) and all(isinstance(item, torch.Tensor) and item.dim() == 3 for item in first):
        return max(len(first), 1)
    tensors = output_tensors((call.args, dict(call.kwargs)))
    if not tensors or tensors[0].dim() == 0 or (tensors[0].dim() == 1 and tensors[0].is_floating_point()):
        return 1
    return int(tensors[0].shape[0])


def describe(call: Call) -> str:
    """Describe the tensors that a call passes, for messages."""
    tensors = output_tensors((call.args, dict(call.kwargs)))
    return ", ".join(f"a tensor of shape {tuple(t.shape)}, {t.dtype}" for t in tensors) or "without tensors"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or ["no message"])[0]
