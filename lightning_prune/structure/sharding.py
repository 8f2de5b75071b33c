"""Networks that are sharded by FSDP2 (``fully_shard``): whole tensors, plain copies, and parameters of other shapes.

A sharded parameter is a ``DTensor`` of the whole shape, of which each process holds some rows. Only this file uses
private names of PyTorch's FSDP2. In PyTorch without distributed training, nothing is sharded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

__all__ = [
    "WholeTensors",
    "assign_sharded",
    "fit_groups",
    "has_shards",
    "is_mesh",
    "is_sharded",
    "plain_classes",
    "require_reduced",
    "require_supported",
    "sharded_like",
    "whole",
]

# Registers of a module with hooks that FSDP2 adds for its parameters, besides those of the forward pass.
_STATE_DICT_HOOKS = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is distributed over processes."""
    return torch.distributed.is_available() and isinstance(tensor, DTensor)


def is_mesh(thing: object) -> bool:
    """Whether an object is a mesh of devices, which cannot be copied."""
    return torch.distributed.is_available() and isinstance(thing, DeviceMesh)


def has_shards(model: nn.Module) -> bool:
    """Whether a network has sharded parameters."""
    return any(map(is_sharded, model.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, detached; any other tensor is returned unchanged.

    All processes that hold a part must call it.
    """
    return cast(DTensor, tensor.detach()).full_tensor() if is_sharded(tensor) else tensor


def sharded_like(content: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a whole tensor, distributed like ``tensor``; ``content`` if that is not sharded.

    Args:
        content: The same in all processes, with as many dimensions as ``tensor``.
        tensor: A tensor with the device mesh and placements to use.
    """
    if not is_sharded(tensor):
        return content
    content = content.contiguous()
    mesh, placements = tensor.device_mesh, tensor.placements
    part = distribute_tensor(content, mesh, placements, src_data_rank=None).to_local()
    # Copied, as the part is a view that would keep the whole in memory.
    return DTensor.from_local(
        part.clone(), mesh, placements, run_check=False, shape=content.shape, stride=content.stride()
    )


def assign_sharded(tensor: Tensor, content: Tensor, grad: Tensor | None) -> None:
    """Give a sharded tensor other content and gradient, possibly of another shape; the object stays the same.

    FSDP2 must be told with `fit_groups` before the network runs.

    Raises:
        RuntimeError: If an autograd graph refers to the tensor itself rather than to the network's weight.
    """
    is_parameter, requires_grad = isinstance(tensor, nn.Parameter), tensor.requires_grad
    new = nn.Parameter(content, requires_grad) if is_parameter else content.detach().requires_grad_(requires_grad)
    vars(new).update(vars(tensor))  # what users store with a parameter
    new.grad = grad
    torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]


class WholeTensors(Mapping[str, Tensor]):
    """Tensors by name, detached and whole, of which sharded ones are gathered one by one whenever they are read.

    All processes must read the same ones in the same order.

    Args:
        tensors: Parameters and buffers of a network.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return whole(self._tensors[name].detach())

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


# -- copies ------------------------------------------------------------------------------------------------------------


@contextmanager
def plain_classes(model: nn.Module) -> Iterator[None]:
    """Give modules the classes and attributes they had before ``fully_shard`` within the context, to be copied."""
    is_any = any(True for _ in _sharded_modules(model))
    before = [(module, type(module), dict(vars(module))) for module in model.modules()] if is_any else []
    try:
        for module, kind, state in before:
            if isinstance(module, FSDPModule):
                module.__class__ = kind.__mro__[2]
            plain = {name: value for name, value in state.items() if name not in (STATE_KEY, REGISTRY_KEY)}
            for register in _STATE_DICT_HOOKS:
                plain[register] = OrderedDict((k, hook) for k, hook in state[register].items() if not _is_of_fsdp(hook))
            _set(vars(module), plain)
        yield
    finally:
        for module, kind, state in before:
            module.__class__ = kind
            _set(vars(module), state)


def _set(entries: dict[str, Any], new: Mapping[str, Any]) -> None:
    entries.clear()
    entries.update(new)


def _is_of_fsdp(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # of PyTorch's `_WrappedHook`
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.fsdp.")


# -- parameters of other shapes ----------------------------------------------------------------------------------------


def require_supported(model: nn.Module) -> None:
    """Check that a sharded network can be cut.

    Raises:
        ValueError: If parameters are sharded along another dimension than their first, by tensor parallelism too, or
            kept on the CPU, or PyTorch is older than 2.13.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ValueError(
            f"expected PyTorch 2.13 or later, whose FSDP2 recovers from a failed pass, got {torch.__version__}. "
            "Upgrade it."
        )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) and parameter.placements not in ((Shard(0),), (Replicate(), Shard(0))):
            raise ValueError(
                f"expected parameters sharded along their first dimension by `fully_shard` alone, got {name} with the "
                f"placements {list(parameter.placements)}. Leave `shard_placement_fn` out, and use "
                "`ModelParallelStrategy(tensor_parallel_size=1)`."
            )
    if any(isinstance(group.offload_policy, CPUOffloadPolicy) for group in _groups(model)):
        raise ValueError(
            "expected parameters on the device that trains, got a `CPUOffloadPolicy`. Leave `offload_policy` out of "
            "`fully_shard`."
        )


def require_reduced(model: nn.Module) -> None:
    """Check that the sharded parameters hold all gradients.

    Raises:
        RuntimeError: If gradients were accumulated without synchronization, which belong to whole parameters.
    """
    if any(_has_whole_gradient(known) for group in _groups(model) for known in group.fsdp_params):
        raise RuntimeError(
            "expected gradients that are reduced after every backward pass, got accumulated ones of whole parameters. "
            "Do not use `set_requires_gradient_sync(False)` in the step before a cut."
        )


def fit_groups(model: nn.Module) -> None:
    """Let FSDP2 free whole parameters, and tell it the present shapes and contents of the sharded ones.

    It gathers and reduces them with the meshes and policies it had; the settings of its modules and groups stay. What a
    failed pass has left is removed.
    """
    for module in _sharded_modules(model):
        if module._get_fsdp_state()._is_root:  # known after the first forward pass
            module.reset_iter_state()
    for group in _groups(model):
        group._to_sharded()  # type: ignore[no-untyped-call]
        for place, known in enumerate(group.fsdp_params):
            if _has_whole_gradient(known):
                known.unsharded_accumulated_grad = known._unsharded_param.grad = None
            if known.sharded_param.shape != known._orig_size:
                group.fsdp_params[place] = _renewed(known, group)
            group.fsdp_params[place].reset_sharded_param()  # type: ignore[no-untyped-call]
        group._init_mp_dtypes()


def _renewed(known: FSDPParam, group: FSDPParamGroup) -> FSDPParam:
    """What FSDP2 knows of a parameter, for its present shape."""
    parameter = known.sharded_param
    # Without memory, as for networks that are sharded before their weights are loaded.
    blank = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), parameter.requires_grad)
    settings = (known.mesh_info, known.post_forward_mesh_info, known.device)
    policies = (known.mp_policy, group.offload_policy)
    new = FSDPParam(blank, known._module_info, *settings, None, *policies)
    new._setattr_on_modules(parameter)  # in place of the one that it has made
    new._param_fqn, new._orig_param_uid = known._param_fqn, known._orig_param_uid
    known._post_load_hook_handle.remove()
    return new


def _has_whole_gradient(known: FSDPParam) -> bool:
    whole = getattr(known, "_unsharded_param", None)  # there is none before the first forward pass
    return known.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None)


def _sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    if torch.distributed.is_available():
        yield from (module for module in model.modules() if isinstance(module, FSDPModule))


def _groups(model: nn.Module) -> Iterator[FSDPParamGroup]:
    seen: set[int] = set()
    for module in _sharded_modules(model):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            if id(group) not in seen:  # several modules may share one
                seen.add(id(group))
                yield group
