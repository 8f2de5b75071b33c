"""A cut and a mask made by hand, independent of `lightning_prune.surgery`, to hold the structure against."""

import copy

import numpy as np
import torch
from torch import nn

from lightning_prune.structure import refresh, relax_unflatten


def named(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def draw(structure, seed):
    """Units to keep: for each group a share of its own between one unit and all."""
    random = np.random.default_rng(seed)
    return {
        group.name: tuple(np.sort(random.permutation(group.width)[: random.integers(1, group.width + 1)]).tolist())
        for group in structure.groups
    }


def half(structure, seed=0):
    """Keep half of every group, drawn."""
    random = np.random.default_rng(seed)
    return {
        group.name: tuple(np.sort(random.permutation(group.width)[: (group.width + 1) // 2]).tolist())
        for group in structure.groups
    }


def masked(model, axes):
    """A copy with the removed slices set to zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in named(model).items():
            for dim, kept in axes.get(name, {}).items():
                lost = np.setdiff1d(np.arange(tensor.shape[dim]), kept)
                tensor.index_fill_(dim, torch.from_numpy(lost), 0)
    return model


def shrunk(model, axes, factors=None):
    """A copy without the removed slices, and with rows of queries multiplied."""
    narrow = cut(copy.deepcopy(model), axes)
    with torch.no_grad():
        for name, (rows, factor) in (factors or {}).items():
            named(narrow)[name][rows] *= factor
    return narrow


def cut(model, axes):
    """Replace every tensor by one without the removed slices."""
    narrow = {id(tensor): _narrow(tensor, axes[name]) for name, tensor in named(model).items() if name in axes}
    changed = []
    for module in model.modules():
        relax_unflatten(module)
        slots = [(home, name) for home in (module._parameters, module._buffers) for name in home]
        own = {name: home[name] for home, name in slots if home[name] is not None}
        if any(id(tensor) in narrow for tensor in own.values()):
            changed.append((module, {name: tuple(tensor.shape) for name, tensor in own.items()}))
        for home, name in slots:
            home[name] = narrow.get(id(home[name]), home[name])
    for name, kept in axes.items():
        if name not in named(model):
            _set_size(model, name, len(kept[0]))
    for module, shapes in changed:
        refresh(module, shapes)
    return model


def _set_size(model, name, value):
    """Set an integer attribute, ``block.heads``, or an entry of a list, ``block.parts[1]``."""
    owner, _, own = name.rpartition(".")
    module, (own, _, position) = model.get_submodule(owner), own.partition("[")
    if position:
        content = list(getattr(module, own))
        content[int(position[:-1])] = value
        value = content
    assert hasattr(module, own)
    if isinstance(getattr(module, own), float):  # a scale by the width of heads
        value = 1 / value**0.5
    if isinstance(module, nn.MultiheadAttention):  # the temperature of its softmax stays
        module.scale = getattr(module, "scale", module.head_dim**-0.5)
    setattr(module, own, value)


def _narrow(tensor, kept_by_dim):
    data = tensor.detach()
    for dim, kept in kept_by_dim.items():
        data = data.index_select(dim, torch.from_numpy(np.asarray(kept)))
    return nn.Parameter(data) if isinstance(tensor, nn.Parameter) else data


def settle(model):
    """Double precision, and running statistics and affine parameters that matter."""
    model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
        norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
        if isinstance(module, norms) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model
