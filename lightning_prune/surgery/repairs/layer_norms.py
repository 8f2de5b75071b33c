"""Refitting layer norms after a cut of the width that they normalize over."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.linear_maps import double
from lightning_prune.structure.graph import Axes, IndexArray
from lightning_prune.structure.own_norms import own_norms
from lightning_prune.surgery.repairs.repair import Repair, Run, require_positive
from lightning_prune.surgery.shrink import cut
from lightning_prune.surgery.tensors import canonical

__all__ = ["RefitLayerNorm"]


@final
@dataclass(frozen=True)
class RefitLayerNorm(Repair):
    r"""Refits the weights and biases of layer norms that lose width, so that what stays is normalized as before.

    A layer norm divides by the deviation over all of its units (a root-mean-square norm by their root mean square), so
    removing units changes it for the others. With :math:`y` the outputs of the norm before the cut and :math:`z` what
    the narrow norm makes of the same inputs, before its weight, every unit that stays gets

    .. math:: \gamma, \beta = \arg\min_{\gamma, \beta} \; \mathbb{E} \, (\gamma z + \beta - y)^2

    and a norm without a bias gets the best :math:`\gamma` alone. Norms are those of `torch.nn.LayerNorm`,
    `torch.nn.RMSNorm` and their subclasses, and root-mean-square norms that networks write themselves (Llama, Gemma).

    Inputs are those of the network before the cut, as of `Ridge`, which takes the inputs of layers to be what they were
    for the units that stay. So give both, where the embedding width of a transformer is cut.

    Args:
        batches: Batches of training data.
    """

    batches: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:
        """The refitted weights and biases."""
        norms = _norms(model, axes)
        with ExitStack() as hooks:
            for norm in norms:
                hooks.callback(norm.module.register_forward_hook(norm.see).remove)
            if norms:
                run(model, self.batches)
        return {name: content for norm in norms if norm.count for name, content in norm.fit().items()}


def _norms(model: nn.Module, axes: Axes) -> list[_Norm]:
    """The norms that lose width."""
    written = own_norms(model)
    found = []
    for name, module in model.named_modules():
        own = canonical(name)
        weight = getattr(module, "weight", None)
        kept = axes.get(f"{own}.weight" if own else "weight", {}).get(0)
        is_own = own in written and [one for one, _ in module.named_parameters()] == ["weight"]
        is_norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or is_own
        if is_norm and kept is not None and isinstance(weight, Tensor) and weight.dim() == 1 and len(kept):
            found.append(_Norm(own, module, kept))
    return found


@dataclass(eq=False)
class _Norm:
    """Sums over the outputs of a norm, and over those of a narrow copy on the same inputs."""

    name: str
    module: nn.Module
    kept: IndexArray
    count: int = field(default=0, init=False)
    sums: Tensor = field(init=False)
    offset: float = field(default=0.0, init=False)  # a unit is multiplied by (1 - offset) · weight + offset

    def __post_init__(self) -> None:
        self.narrow: Any = copy.deepcopy(self.module)
        for hooks in (self.narrow._forward_hooks, self.narrow._forward_pre_hooks):
            hooks.clear()
        self.has_bias = getattr(self.module, "bias", None) is not None
        cut(self.narrow, {name: {0: self.kept} for name, _ in self.narrow.named_parameters()})
        self.sums = torch.zeros(4, len(self.kept), dtype=torch.float64)

    def see(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        """Add a batch."""
        dim, kept = self._units(args[0]), torch.from_numpy(self.kept).to(out.device)
        x, wanted = (one.detach().index_select(dim, kept) for one in (args[0], out))
        if not self.count:
            self.offset = self._offset(x)
        y, z = (double(one.movedim(dim, -1).flatten(0, -2)) for one in (wanted, self.narrow(x)))
        if self.has_bias:
            z = z - double(self.narrow.bias)
        self.sums += torch.stack([z.sum(0), y.sum(0), (z * z).sum(0), (z * y).sum(0)]).cpu()
        self.count += len(y)

    def _units(self, x: Tensor) -> int:
        """The axis that is normalized over: the last one, or that of channels."""
        (width,) = self.module.get_parameter("weight").shape
        is_pytorchs = type(self.module) in (nn.LayerNorm, nn.RMSNorm)
        return x.dim() - 1 if is_pytorchs or x.shape[1] != width else 1

    def _offset(self, x: Tensor) -> float:
        """0, or 1/2 if units are multiplied by 1 + weight, as in Gemma."""
        probe = copy.deepcopy(self.narrow)
        if self.has_bias:
            probe.bias.zero_()
        at_zero, at_one = (double(probe(x)) for _ in map(probe.weight.fill_, (0.0, 1.0)))
        return float((at_zero * at_one).sum() / (at_one * at_one).sum())

    def fit(self) -> dict[str, Tensor]:
        """The new weight and bias, in the shapes before the cut."""
        z, y, zz, zy = self.sums / self.count
        if self.has_bias:
            zz, zy = zz - z * z, zy - z * y
        slope = torch.where(zz > 0, zy / zz.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
        factor = double(self.narrow.weight).cpu() * (1 - self.offset) + self.offset
        contents = {"weight": (slope * factor - self.offset) / (1 - self.offset)}
        if self.has_bias:
            contents["bias"] = y - slope * z
        return {f"{self.name}.{own}" if self.name else own: self._widened(own, new) for own, new in contents.items()}

    def _widened(self, own: str, new: Tensor) -> Tensor:
        whole = double(getattr(self.module, own)).cpu().clone()
        whole[torch.from_numpy(self.kept)] = new
        return whole
