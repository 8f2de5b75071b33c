"""A network without anything of this package, to be pickled for programs that do not have it."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from torch import nn

from lightning_prune.structure.attention import MultiheadAttention
from lightning_prune.structure.module_configs import module_configs
from lightning_prune.structure.stubs import Constant, Empty
from lightning_prune.structure.traced_model import require_network, written
from lightning_prune.surgery import attach, attach_masks

__all__ = ["strip"]

Module = TypeVar("Module", bound=nn.Module)


def strip(model: Module) -> Module:
    """Remove what this package has attached to a network, in place, so that it can be unpickled without the package.

    Removed are the pruning history, the masks (masked weights stay zero, until they are trained) and the hooks by which
    a LightningModule saves both. The network computes the same. If it is pruned again, amounts refer to its present
    size, and its checkpoints no longer load into the dense network.

    Args:
        model: A pruned or a dense network.

    Returns:
        The network.

    Raises:
        ValueError: If whole layers were removed, or an `nn.MultiheadAttention` was cut, and modules of this package
            stand there, or if layers compute with numbers of their own in place of those of a configuration that they
            share; nothing has changed.

    Example:
        >>> import pickle, torch
        >>> from lightning_prune import prune, strip
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = prune(net, torch.zeros(2, 4), pruning_ratio=0.5)
        >>> b"lightning_prune" in pickle.dumps(net), b"lightning_prune" in pickle.dumps(strip(net))
        (True, False)
    """
    require_network(model)
    network = written(model)
    attentions = [name for name, module in network.named_modules() if type(module) is MultiheadAttention]
    if attentions:
        raise ValueError(
            f"strip: expected a network of its own modules and PyTorch's, got attention of lightning_prune in "
            f"{', '.join(attentions)}, whose heads have another width in all than their inputs, which PyTorch's cannot "
            "have. Nothing has changed. Use `save` and `rebuild` instead: that file has this attention, too."
        )
    stubs = [name for name, module in network.named_modules() if isinstance(module, (Constant, Empty))]
    if stubs:
        raise ValueError(
            f"strip: expected a network of its own modules and PyTorch's, got modules of lightning_prune in place of "
            f"{', '.join(stubs)}, which were removed. Nothing has changed. Use `save` and `rebuild` instead: that file "
            "has such modules, too."
        )
    configs = module_configs(network)
    if configs:
        raise ValueError(
            f"strip: expected a network of its own modules and PyTorch's, got numbers of lightning_prune in "
            f"{', '.join(configs)}: layers that share a configuration have other numbers of heads or features now. "
            "Nothing has changed. Use `save` and `rebuild` instead: that file has such numbers, too."
        )
    attach(network, None)
    attach_masks(network, {})
    for name in ("on_save_checkpoint", "on_load_checkpoint"):
        hook = vars(network).get(name)
        if isinstance(hook, partial) and hook.func.__module__.startswith("lightning_prune."):
            del vars(network)[name]
    return model
