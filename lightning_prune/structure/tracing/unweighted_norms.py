"""Norms without weights, whose width is in an attribute alone: of `nn.LayerNorm` and the instance norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_prune.structure.layers import tensors

__all__ = ["UnweightedNorms"]


def _is_unweighted(module: nn.Module) -> bool:
    """Whether a norm has no tensors and runs PyTorch's own code."""
    kinds = (nn.LayerNorm, _InstanceNorm)
    return not tensors(module) and any(isinstance(module, k) and type(module).forward is k.forward for k in kinds)


class UnweightedNorms:
    """Lets these norms of a copy run at any width, and keeps the inputs of the latest run."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self._modules: dict[str, nn.Module] = {}

    def forward_of(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """The norm's forward; another one's is returned as it is."""
        forward = module.forward
        if not _is_unweighted(module):
            return forward
        self._modules[name] = module

        def run(input: Tensor) -> Tensor:
            self.inputs.setdefault(name, []).append(input)
            own = vars(module)
            before: dict[str, Any] = {key: own[key] for key in ("normalized_shape", "num_features") if key in own}
            if isinstance(module, nn.LayerNorm):
                own["normalized_shape"] = tuple(input.shape[input.dim() - len(module.normalized_shape) :])
            else:
                own["num_features"] = input.shape[_channel(module, input)]
            try:
                return forward(input)  # type: ignore[no-any-return]
            finally:
                own.update(before)

        return run

    def axes(self) -> Iterator[tuple[str, list[tuple[Tensor, int]]]]:
        """Each size, ``norm.normalized_shape[0]`` or ``norm.num_features``, and the axes of inputs that it counts."""
        for name, inputs in self.inputs.items():
            module, prefix = self._modules[name], f"{name}." if name else ""
            if not isinstance(module, nn.LayerNorm):
                yield f"{prefix}num_features", [(x, _channel(module, x)) for x in inputs]
                continue
            for place in range(n := len(module.normalized_shape)):
                yield f"{prefix}normalized_shape[{place}]", [(x, x.dim() - n + place) for x in inputs]


def _channel(module: Any, x: Tensor) -> int:
    """The axis of the channels; inputs of an instance norm may have no samples."""
    return 0 if x.dim() == module._get_no_batch_dim() else 1
