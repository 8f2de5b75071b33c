"""Masks of weights, stored with a network and in its checkpoints.

A mask is True where a weight is masked. Masked weights are zeros in ordinary parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_prune.planning import Granularity, Weight
from lightning_prune.planning.scope import as_patterns, matches
from lightning_prune.structure.graph import Axes
from lightning_prune.surgery import plain
from lightning_prune.surgery.optimizers import unwrap
from lightning_prune.surgery.plain import HistoryError
from lightning_prune.surgery.tensors import canonical, named, take

__all__ = [
    "MASKS_KEY",
    "Masks",
    "apply_masks",
    "attach_masks",
    "attach_read",
    "maskable",
    "masks_of",
    "narrowed",
    "read_masks",
    "revived",
    "save_masks_into",
    "without_masks",
    "zero_gradients",
    "zero_moments",
]

#: Masks by qualified name of the parameter, True where a weight is masked.
Masks = Mapping[str, Tensor]

#: Key of the masks in a checkpoint.
MASKS_KEY = "lightning_prune_masks"

_ATTRIBUTE = "_lightning_prune_masks"
_VERSION = 1


# -- with the network --------------------------------------------------------------------------------------------------


def masks_of(model: nn.Module) -> Masks:
    """The masks of a network; may be empty."""
    masks: Masks = getattr(model, _ATTRIBUTE, {})
    return masks


def attach_masks(model: nn.Module, masks: Masks) -> None:
    """Store ``masks`` with ``model``; empty masks remove the attribute."""
    if masks:
        setattr(model, _ATTRIBUTE, dict(masks))
    elif masks_of(model):
        delattr(model, _ATTRIBUTE)


def narrowed(model: nn.Module, axes: Axes) -> dict[str, Any]:
    """Attributes of a network after a cut along ``axes``: its masks."""
    masks = masks_of(model)
    if not masks:
        return {}
    kept, present = {canonical(name): rows for name, rows in axes.items()}, named(model)
    narrow = {name: take(mask, kept.get(name, {})) for name, mask in masks.items() if name in present}
    return {_ATTRIBUTE: narrow}


def without_masks(model: nn.Module, modules: Collection[str]) -> None:
    """Remove the masks of these modules, by name, from a network."""
    masks = masks_of(model)
    left = {n: m for n, m in masks.items() if not any(n.startswith(f"{module}.") for module in modules)}
    if len(left) < len(masks):
        attach_masks(model, left)


def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set masked weights to zero, in place."""
    present = named(model)
    with torch.inference_mode(False), torch.no_grad():
        for name, mask in masks.items():
            present[name].masked_fill_(mask.to(present[name].device), 0)


def revived(model: nn.Module) -> dict[str, int]:
    """Number of masked weights that are not zero, by name of the parameter."""
    present = named(model)
    counts = {n: int((present[n].detach()[m.to(present[n].device)] != 0).sum()) for n, m in masks_of(model).items()}
    return {name: count for name, count in counts.items() if count}


# -- with the optimizers -----------------------------------------------------------------------------------------------


def zero_gradients(parameters: Iterable[Tensor], masks: Mapping[Tensor, Tensor]) -> None:
    """Set the gradients of masked weights to zero, so that clipping and factored moments do not count them."""
    for parameter in parameters:
        if parameter in masks and parameter.grad is not None:
            parameter.grad.masked_fill_(masks[parameter], 0)


def zero_moments(optimizer: Optimizer, masks: Mapping[Tensor, Tensor]) -> None:
    """Set masked weights of an optimizer's parameters, and their state, to zero."""
    optimizer = unwrap(optimizer)
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in masks:
                    continue
                mask = masks[parameter]
                parameter.masked_fill_(mask, 0)
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        value.masked_fill_(mask, 0)


# -- in checkpoints ----------------------------------------------------------------------------------------------------


def save_masks_into(checkpoint: MutableMapping[str, Any], model: nn.Module) -> None:
    """Add the masks of ``model``, if any, to a checkpoint, with one bit per weight."""
    masks = masks_of(model)
    if masks:
        packed = {
            name: {"shape": list(mask.shape), "bits": torch.from_numpy(np.packbits(mask.cpu().numpy()))}
            for name, mask in masks.items()
        }
        checkpoint[MASKS_KEY] = {"version": _VERSION, "masks": packed}


def read_masks(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the masks of a checkpoint, by name, on the CPU.

    Raises:
        HistoryError: If they are damaged or of a newer version.
    """
    if MASKS_KEY not in checkpoint:
        return {}
    top = plain.value(checkpoint[MASKS_KEY], dict, "the masks")
    version = plain.count(top, "version", least=1)
    if version > _VERSION:
        raise HistoryError(
            f"The masks have version {version}, {_VERSION} is the last known. They were written by a newer "
            "lightning_prune: `pip install --upgrade lightning-prune`."
        )
    masks = {}
    for name, packed in plain.items(top, "masks", dict):
        shape = plain.shape(plain.entry(packed, "shape", list), name)
        bits = plain.array(plain.entry(packed, "bits", Tensor), f"the mask of {name!r}")
        count = math.prod(shape)
        if bits.dtype != torch.uint8 or bits.shape != (-(-count // 8),):
            raise plain.damaged(f"expected {-(-count // 8)} bytes of mask for {name!r}")
        flat = np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)
        masks[name] = torch.from_numpy(flat).view(shape)
    return masks


def attach_read(model: nn.Module, masks: Masks) -> None:
    """Attach the masks of a checkpoint to ``model``, which must have the widths of the checkpoint.

    Raises:
        HistoryError: If they are of another architecture; the network is unchanged.
    """
    present = named(model)
    for name, mask in masks.items():
        here = present.get(name)
        if here is None or here.shape != mask.shape:
            raise HistoryError(
                f"The checkpoint has a mask of shape {list(mask.shape)} for {name!r}, which is "
                f"{'missing' if here is None else list(here.shape)} here. Nothing has changed. Build the network with "
                "the arguments it had when the checkpoint was written."
            )
    attach_masks(model, {name: mask.to(present[name].device) for name, mask in masks.items()})


# -- which weights -----------------------------------------------------------------------------------------------------


def maskable(
    model: nn.Module,
    granularity: Granularity,
    layers: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
) -> tuple[Weight, ...]:
    """The weights to mask: by default those of all linear and convolutional layers.

    Patterns are names of layers, globs, or names of modules, for all layers inside. Other layers with a weight of at
    least two dimensions (an embedding) are included if their own name is among ``layers``.

    Raises:
        ValueError: If a pattern matches nothing, no weights are left, or a weight is tied, frozen, computed from others
            or of a shape that the granularity cannot mask.
    """
    wanted, unwanted = as_patterns(layers), as_patterns(ignore)
    modules = {canonical(name): module for name, module in model.named_modules()}
    candidates = {
        name: module
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, _ConvNd)) or (name in wanted and name)
    }
    for argument, patterns in (("layers", wanted), ("ignore", unwanted)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in candidates) and not (
                argument == "ignore" and pattern in modules
            ):
                near = get_close_matches(pattern, [*modules], n=3, cutoff=0.5)
                guess = f" Did you mean {', '.join(near)}?" if near else ""
                raise ValueError(
                    f"{argument}={pattern!r} fits no linear or convolutional layer.{guess} There are: "
                    f"{', '.join(candidates) or 'none'}"
                )
    selected = {
        name: module
        for name, module in candidates.items()
        if (layers is None or any(matches(pattern, name) for pattern in wanted))
        and not any(matches(pattern, name) for pattern in unwanted)
    }
    owners = _owners(model)
    _refuse(granularity, {name: _problem(module, owners) for name, module in selected.items()})
    weights = [_weight(name, module) for name, module in selected.items()]
    if layers is None:
        weights = [weight for weight in weights if granularity.is_for(weight.filters(weight.tensor).shape)]
    if not weights:
        raise ValueError(
            f"layers={layers!r} and ignore={ignore!r} leave no weight for {granularity!r}. Linear and convolutional "
            f"layers: {', '.join(candidates) or 'none'}"
        )
    _refuse(
        granularity,
        {w.name.rpartition(".")[0]: granularity.problem_with(w.filters(w.tensor).shape) for w in weights},
    )
    return tuple(weights)


def _refuse(granularity: Granularity, problems: Mapping[str, str | None]) -> None:
    """Raise an error that lists all layers with problems."""
    found = {name: why for name, why in problems.items() if why}
    if found:
        reasons = "; ".join(f"{name}: {why}" for name, why in found.items())
        ignored = ", ".join(f'"{name}"' for name in found)
        raise ValueError(
            f"{granularity!r} cannot mask {reasons}. Leave out what cannot be masked, ignore=[{ignored}], or name the "
            "`layers` to mask."
        )


def _problem(module: nn.Module, owners: Mapping[int, set[str]]) -> str | None:
    """Reason why the weight of a layer cannot be masked, or None."""
    tensor = module._parameters.get("weight")
    if tensor is None:
        return "it has no weight of its own, or one that is computed from others (a parametrization)"
    if is_lazy(tensor):
        return "its shape is not known yet: run one forward pass before the training"
    if tensor.ndim < 2:
        return "its weight has no filters and inputs"
    if len(owners[id(tensor)]) > 1:
        return f"its weight is tied: it belongs to {', '.join(sorted(owners[id(tensor)]))}"
    if getattr(module, "sparse", False):
        return "its gradients are sparse: build it with `sparse=False`"
    if not tensor.requires_grad:
        return "its weight is frozen (`requires_grad` is False)"
    return None


def _weight(name: str, module: nn.Module) -> Weight:
    transposed = module.groups if isinstance(module, _ConvTransposeNd) else 0
    return Weight(f"{name}.weight" if name else "weight", module.get_parameter("weight"), transposed)


def _owners(model: nn.Module) -> dict[int, set[str]]:
    """Names of the modules that own each parameter, by `id`; each module counts once."""
    owners: dict[int, set[str]] = {}
    for prefix, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(canonical(prefix) or type(model).__name__)
    return owners
