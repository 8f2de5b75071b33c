"""Width attributes of layers (``in_features``, ``num_groups``, ...) and names of their tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune.structure.attention import MultiheadAttention, scale_of

__all__ = [
    "ATTENTION",
    "canonical",
    "has_own_projections",
    "is_within",
    "named",
    "options",
    "refresh",
    "relax_unflatten",
    "tensors",
    "updates_widths",
]

#: What ``torch.compile`` puts into the names of everything inside a compiled module.
_COMPILED = "_orig_mod."

#: Classes of PyTorch's attention before and after a cut.
ATTENTION = (nn.MultiheadAttention, MultiheadAttention)

Shape = Sequence[int]
Shapes = Mapping[str, Shape]


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and buffers (persistent or not) by local name."""
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def canonical(name: str) -> str:
    """A qualified name without the prefixes of ``torch.compile``."""
    return f"{name}.".replace(_COMPILED, "").removesuffix(".")


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module, parameter or buffer is one of these modules or inside one, by name."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by canonical name; a tied one appears under each of its names."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in tensors(module).items():
            found[canonical(f"{prefix}.{name}" if prefix else name)] = tensor
    return found


def refresh(module: nn.Module, old_shapes: Shapes) -> None:
    """Set a layer's width attributes (``in_features``, ``groups``, ``normalized_shape`` ...) from its tensors' shapes.

    Args:
        module: A layer whose own parameters or buffers have just changed shape.
        old_shapes: Shapes of its tensors before the change, by local name.

    Modules of unknown types are not changed.
    """
    for types, update in _UPDATES:
        if isinstance(module, types):
            update(module, old_shapes)
            return
    if foreign := _foreign(module):
        foreign[1](module, old_shapes)


def updates_widths(module: nn.Module) -> bool:
    """Whether `refresh` sets the width attributes of this module."""
    return any(isinstance(module, types) for types, _ in _UPDATES) or _foreign(module) is not None


def options(module: nn.Module) -> dict[str, Any]:
    """A layer's configuration attributes by name, those that `refresh` sets among them."""
    # PyTorch's layers list theirs in `__constants__`.
    foreign = _foreign(module)
    names = (*getattr(module, "__constants__", ()), *(foreign[0] if foreign else ()))
    if isinstance(module, nn.MultiheadAttention):
        names = (*names, "embed_dim", "kdim", "vdim", "num_heads", "head_dim", "scale", "_qkv_same_embed_dim")
    return {name: vars(module)[name] for name in names if name in vars(module)}


def _foreign(module: nn.Module) -> tuple[tuple[str, ...], Callable[[Any, Shapes], None]] | None:
    """Width attributes of a layer of another package, and how they are set."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
    return next((_FOREIGN_UPDATES[name] for name in names if name in _FOREIGN_UPDATES), None)


def relax_unflatten(module: nn.Module) -> None:
    """Let ``nn.Unflatten`` infer its first size (-1), so that it stays valid after a cut."""
    if type(module) is nn.Unflatten:
        sizes: Sequence[Any] = module.unflattened_size
        if all(isinstance(size, int) and size > 0 for size in sizes):
            module.unflattened_size = (-1, *sizes[1:])


def _weight_shape(module: nn.Module) -> Shape:
    """Shape of the weight, or of ``weight_v`` under weight_norm."""
    own = tensors(module)
    for name in ("weight", "weight_v"):
        if name in own:
            return tuple(own[name].shape)
    return tuple(module.weight.shape)  # type: ignore[arg-type]  # computed on access


def _old_weight_shape(module: nn.Module, old: Shapes) -> Shape:
    for name in ("weight", "weight_v"):
        if name in old:
            return old[name]
    raise KeyError(f"{type(module).__name__}: its weight is computed from other tensors and cannot be resized")


def _linear(module: Any, _: Shapes) -> None:
    module.out_features, module.in_features = _weight_shape(module)


def _convolution(module: Any, old: Shapes) -> None:
    shape, groups = _weight_shape(module), module.groups
    if groups > 1:
        before = _old_weight_shape(module, old)
        per_group_in, per_group_out = (before[1], before[0] // groups)
        if module.transposed:
            per_group_in, per_group_out = (before[0] // groups, before[1])
        # Whole groups are removed where a group has a single input or output channel (depthwise); elsewhere all groups
        # # become narrower. The flag distinguishes the cases once a single channel is left.
        if per_group_in > 1 and per_group_out > 1:
            module.groups_stay = True
        elif not getattr(module, "groups_stay", False):
            groups = shape[0] // (per_group_in if module.transposed else per_group_out)
    module.groups = groups
    if module.transposed:
        module.in_channels, module.out_channels = shape[0], shape[1] * groups
    else:
        module.in_channels, module.out_channels = shape[1] * groups, shape[0]


def _batch_norm(module: Any, _: Shapes) -> None:
    own = tensors(module)
    per_channel = [own[name] for name in ("weight", "running_mean") if name in own]
    if per_channel:
        module.num_features = per_channel[0].shape[0]


def _group_norm(module: Any, old: Shapes) -> None:
    before, now = _old_weight_shape(module, old)[0], _weight_shape(module)[0]
    if before == module.num_groups:  # one channel per group, as in instance norm
        module.num_groups = now
    module.num_channels = now


def _layer_norm(module: Any, _: Shapes) -> None:
    module.normalized_shape = tuple(_weight_shape(module))


def _embedding(module: Any, _: Shapes) -> None:
    module.num_embeddings, module.embedding_dim = _weight_shape(module)


def _prelu(module: Any, _: Shapes) -> None:
    module.num_parameters = _weight_shape(module)[0]


def _bilinear(module: Any, _: Shapes) -> None:
    module.out_features, module.in1_features, module.in2_features = _weight_shape(module)


def _transposed_linear(module: Any, _: Shapes) -> None:
    module.nx, module.nf = _weight_shape(module)


def has_own_projections(module: nn.MultiheadAttention) -> bool:
    """Whether the weights of queries, keys and values are parameters of the layer."""
    own = tensors(module)
    return "in_proj_weight" in own or all(f"{part}_proj_weight" in own for part in "qkv")


def _attention(module: Any, _: Shapes) -> None:
    own = tensors(module)
    if not has_own_projections(module):  # they are computed
        return
    packed = own.get("in_proj_weight")
    q, k, v = packed.chunk(3) if packed is not None else (own[f"{part}_proj_weight"] for part in "qkv")
    module.num_heads, module.embed_dim = q.shape[0] // module.head_dim, q.shape[1]
    module.kdim, module.vdim = k.shape[1], v.shape[1]
    # PyTorch's fused operators compute the features of a head from both.
    module._qkv_same_embed_dim = packed is not None and q.shape[0] == q.shape[1]
    if type(module) in ATTENTION:
        # `nn.TransformerEncoder` packs samples of unequal lengths, which PyTorch's takes with an even number of heads.
        is_pytorchs = q.shape[0] == q.shape[1] and module.num_heads % 2 == 0
        is_pytorchs = is_pytorchs and math.isclose(scale_of(module), module.head_dim**-0.5)
        module.__class__ = nn.MultiheadAttention if is_pytorchs else MultiheadAttention


def _recurrent(module: Any, _: Shapes) -> None:
    w_ih, w_hh = (getattr(module, f"weight_{name}_l0") for name in ("ih", "hh"))
    module.input_size, gates = w_ih.shape[1], {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    module.hidden_size = w_ih.shape[0] // gates
    module.proj_size = w_hh.shape[1] if module.proj_size else 0
    module.flatten_parameters()


def _recurrent_cell(module: Any, _: Shapes) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


#: First match wins.
_UPDATES: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Any, Shapes], None]], ...] = (
    ((nn.Linear,), _linear),
    ((nn.modules.conv._ConvNd,), _convolution),
    ((nn.modules.batchnorm._NormBase,), _batch_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    ((nn.PReLU,), _prelu),
    ((nn.Bilinear,), _bilinear),
    ((nn.MultiheadAttention,), _attention),
    ((nn.RNNBase,), _recurrent),
    ((nn.RNNCellBase,), _recurrent_cell),
)

#: Layers of other packages, which need not be installed, by name: their width attributes, and how they are set.
_FOREIGN_UPDATES: dict[str, tuple[tuple[str, ...], Callable[[Any, Shapes], None]]] = {
    "transformers.pytorch_utils.Conv1D": (("nx", "nf"), _transposed_linear),  # of GPT-2
}
