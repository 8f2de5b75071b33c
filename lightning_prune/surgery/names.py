"""Names of the tensors that a checkpoint must have according to its history."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from torch import Tensor, nn

from lightning_prune.structure.layers import is_within
from lightning_prune.surgery.depth import stays
from lightning_prune.surgery.edits import Drop, Edit, Replace
from lightning_prune.surgery.tensors import canonical

__all__ = ["missing_or_unexpected"]


def missing_or_unexpected(
    model: nn.Module, gone: Mapping[str, nn.Module], steps: Iterable[Edit], state_dict: Mapping[str, Any]
) -> Iterator[str]:
    """Messages about missing and unexpected tensors in a checkpoint.

    Modules with their own loading rules (a hook, a ``_load_from_state_dict``) are skipped.

    Args:
        model: The network.
        gone: Modules that were removed or replaced, in their dense form.
        steps: The checkpoint's edits.
        state_dict: The checkpoint's weights.
    """
    if type(model).load_state_dict is not nn.Module.load_state_dict:
        return
    own_rules = {canonical(name) for name, module in model.named_modules() if _has_own_rules(module)}
    expected = _after(_dense(model, gone), steps)
    found = _tensors(state_dict)
    missing, unexpected = expected - found, found - expected
    for text, names in (("is missing in the checkpoint", missing), ("is not in the network", unexpected)):
        yield from (
            f"{name} {text}" for name in sorted(names) if "" not in own_rules and not is_within(name, own_rules)
        )


def _tensors(state_dict: Mapping[str, Any]) -> set[str]:
    return {canonical(name) for name, content in state_dict.items() if isinstance(content, Tensor)}


def _dense(model: nn.Module, gone: Mapping[str, nn.Module]) -> set[str]:
    names = {name for name in _tensors(model.state_dict()) if not is_within(name, gone)}
    return names | {f"{prefix}.{name}" for prefix, module in gone.items() for name in _tensors(module.state_dict())}


def _after(names: Set[str], steps: Iterable[Edit]) -> Set[str]:
    for step in steps:
        if isinstance(step, Replace):
            names = {name for name in names if not is_within(name, step.modules)}
            names |= {f"{prefix}.{name}" for prefix, spec in step.modules.items() for name in spec.shapes}
        elif isinstance(step, Drop):
            constants = [name for name, kind in step.modules.items() if kind == "constant"]
            names = {n for n in names if stays(n, step.modules)} | {f"{name}.weight" for name in constants}
    return names


def _has_own_rules(module: nn.Module) -> bool:
    loads = type(module)._load_from_state_dict
    return bool(module._load_state_dict_pre_hooks) or not loads.__module__.startswith("torch.nn.modules.")
