"""Refitting layer norms after a cut of the width that they normalize over."""

from __future__ import annotations

import copy
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_prune.scoring.linear_maps import double
from lightning_prune.structure.graph import Axes, IndexArray
from lightning_prune.structure.own_norms import own_layer_norms
from lightning_prune.surgery.repairs.repair import Repair, Run, require_positive
from lightning_prune.surgery.shrink import cut
from lightning_prune.surgery.tensors import canonical

__all__ = ["RefitLayerNorm"]

#: Variance of a unit, relative to its mean square, below which it is rounding.
_SMALLEST_VARIANCE = 1e-9


@final
@dataclass(frozen=True)
class RefitLayerNorm(Repair):
    r"""Refits the weights and biases of layer norms that lose width, so that what stays is normalized as before.

    A layer norm divides by the deviation over all of its units (a root-mean-square norm by their root mean square), so
    removing units changes it for the others. With :math:`y` the outputs of the norm before the cut and :math:`z` what
    the narrow norm makes of the same inputs, before its weight, every unit that stays gets

    .. math:: \gamma, \beta = \arg\min_{\gamma, \beta} \; \mathbb{E} \, (\gamma z + \beta - y)^2

    and a norm without a bias gets the best :math:`\gamma` alone. Norms are those of `torch.nn.LayerNorm`,
    `torch.nn.RMSNorm` and their subclasses, and those that networks write themselves (Llama, Gemma, Cohere).

    A warning names norms that are left unchanged: those over several axes, and those that are called with anything but
    one tensor or return anything else.

    Inputs are those of the network before the cut, as of `Ridge`, which takes the inputs of layers to be what they were
    for the units that stay. On a small vision transformer that lost a fifth of its embedding width it gained nothing,
    alone or with `Ridge`; `SequentialRidge` is best there (``docs/evidence/reconstruction_networks``).

    Args:
        batches: Batches of training data.
    """

    batches: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:
        """The refitted weights and biases."""
        norms, problems = _norms(model, axes)
        with ExitStack() as hooks:
            for norm in norms:
                hooks.callback(norm.module.register_forward_hook(norm.see, with_kwargs=True).remove)
            if norms:
                run(model, self.batches)
        problems += [f"{norm.name} {norm.problem}" for norm in norms if not norm.count]
        if problems:
            warnings.warn(f"RefitLayerNorm leaves some norms unchanged: {'; '.join(problems)}", stacklevel=4)
        return {name: content for norm in norms if norm.count for name, content in norm.fit().items()}


def _norms(model: nn.Module, axes: Axes) -> tuple[list[_Norm], list[str]]:
    """The norms that lose width, and those that cannot be refitted, with reasons."""
    written = own_layer_norms(model)
    found, problems = [], []
    for name, module in model.named_modules():
        own = canonical(name)
        weight = getattr(module, "weight", None)
        dims = axes.get(f"{own}.weight" if own else "weight", {})
        kept = dims.get(0)
        is_own = own in written and {one for one, _ in module.named_parameters()} <= {"weight", "bias"}
        is_norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or is_own
        if not is_norm or not dims or not isinstance(weight, Tensor):
            continue
        if weight.dim() > 1:
            problems.append(f"{own} normalizes over {weight.dim()} axes")
        elif kept is not None and len(kept):
            found.append(_Norm(own, module, kept))
    return found, problems


@dataclass(eq=False)
class _Norm:
    """Sums over the outputs of a norm, and over those of a narrow copy on the same inputs."""

    name: str
    module: nn.Module
    kept: IndexArray
    count: int = field(default=0, init=False)
    problem: str = field(default="was never called as a module", init=False)
    is_refused: bool = field(default=False, init=False)
    sums: Tensor = field(init=False)
    offset: float = field(default=0.0, init=False)  # a unit is multiplied by (1 - offset) · weight + offset

    def __post_init__(self) -> None:
        self.narrow: Any = copy.deepcopy(self.module)
        for hooks in (self.narrow._forward_hooks, self.narrow._forward_pre_hooks):
            hooks.clear()
        self.has_bias = getattr(self.module, "bias", None) is not None
        cut(self.narrow, {name: {0: self.kept} for name, _ in self.narrow.named_parameters()})
        self.sums = torch.zeros(4, len(self.kept), dtype=torch.float64)

    def see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        """Add a batch."""
        inputs = [given for given in (*args, *kwargs.values()) if given is not None]
        out = self.module.forward(*args, **kwargs)  # hooks on the outputs follow the narrow norm, too
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(out, Tensor):
            self.problem, self.is_refused, self.count = "is called with more than one tensor, or returns more", True, 0
        if self.is_refused or not out.numel():
            return
        dim, kept = self._units(inputs[0]), torch.from_numpy(self.kept).to(out.device)
        x, wanted = (one.detach().index_select(dim, kept) for one in (inputs[0], out))
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
        if x.dim() < 3 or x.shape[1] != width:
            return x.dim() - 1
        if x.shape[-1] != width:
            return 1
        # Both are as long. The weight of the first unit changes nothing of the others.
        other: Any = copy.deepcopy(self.module)
        other.weight[0] += 1
        changed = other.forward(x) != self.module.forward(x)
        return 1 if changed[..., 1:].any() else x.dim() - 1

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
        varies = zz > _SMALLEST_VARIANCE * self.sums[2] / self.count
        slope = torch.where(varies, zy / torch.where(varies, zz, 1.0), 1.0)
        factor = double(self.narrow.weight).cpu() * (1 - self.offset) + self.offset
        contents = {"weight": (slope * factor - self.offset) / (1 - self.offset)}
        if self.has_bias:
            contents["bias"] = y - slope * z
        return {f"{self.name}.{own}" if self.name else own: self._widened(own, new) for own, new in contents.items()}

    def _widened(self, own: str, new: Tensor) -> Tensor:
        whole = double(getattr(self.module, own)).cpu().clone()
        whole[torch.from_numpy(self.kept)] = new
        return whole
