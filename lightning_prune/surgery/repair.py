"""Making good for a cut without training: what the removed units gave on average or together with those that stay.

A repair computes new contents of parameters and buffers on a copy of the network, from a few batches of data; the live
network only takes them over. All sums are in float64.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.arguments import Settings
from lightning_prune.scoring import DataPass
from lightning_prune.scoring.contributions import LINEAR_LAYERS
from lightning_prune.structure.graph import Axes, IndexArray
from lightning_prune.surgery.change import Change, CutError
from lightning_prune.surgery.depth import stays
from lightning_prune.surgery.shrink import cut
from lightning_prune.surgery.tensors import canonical, named, take

__all__ = [
    *("FoldMean", "ReestimateBatchNorm", "Repair", "Ridge", "Run", "batch_norms", "double", "input_dim", "install"),
    "patches",
    *("repaired", "require_positive", "spread", "tied_layers", "windows"),
]

#: Runs the first n batches of some data, always the same, through a network.
Run = Callable[[nn.Module, int], None]


# (√5 − 1) / 2: multiples of it spread evenly over [0, 1), whatever the period of what is sampled.
_GOLDEN = 0.6180339887498949


class Repair(Settings, ABC):
    """What is changed in the layers that stay, right after a cut.

    Attributes:
        batches: Batches of training data that are looked at.
        restarts: Whether training starts anew from the new contents, so that the optimizer's state is cleared.
    """

    batches: int
    restarts: ClassVar[bool] = False

    @property
    def info(self) -> Mapping[str, float]:
        """Plain numbers that the history of the cut is to remember."""
        return {}

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:  # noqa: ARG002
        """New contents by name of parameter or buffer, in the shapes before the cut, from the network before it.

        Args:
            model: A copy of the network in eval mode.
            axes: What the cut keeps; of the inputs of a layer that becomes a constant, none.
            run: Runs batches through the network.
        """
        return {}

    def between(
        self,
        dense: nn.Module,  # noqa: ARG002
        narrow: nn.Module,  # noqa: ARG002
        axes: Axes,  # noqa: ARG002
        data: DataPass,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """New contents from the networks before and after the cut side by side.

        Args:
            dense: A copy of the network before the cut.
            narrow: One after it, which may be changed: what it holds then is set from the contents.
            axes: What the cut keeps.
            data: Batches for both.
        """
        return {}

    def after(self, model: nn.Module, run: Run) -> dict[str, Tensor]:  # noqa: ARG002
        """New contents from the network after the cut (a copy, in the mode it trains in)."""
        return {}


def repaired(
    copied: Callable[[], nn.Module],
    axes: Axes,
    repairs: Sequence[Repair],
    data: DataPass | None,
    drops: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """What parameters and buffers hold after a cut and its repairs, by name, where the repairs change them.

    Args:
        copied: Gives a copy of the network before the cut, in the modes it trains in.
        axes: What is kept.
        repairs: In the order in which they happen; where two write the same tensor, the later one counts.
        data: Batches that are run through the copies; None if no repair reads any.
        drops: Layers that the cut takes out whole (``structure.drops(kept)``).

    Raises:
        CutError: If a content is not finite.
        ValueError: If a repair reads batches, and there are none.
    """
    drops, model = drops or {}, copied()
    compares = [type(repair).between is not Repair.between for repair in repairs]
    dense = copied().eval() if any(compares) else model

    def run(model: nn.Module, n: int) -> None:
        _required(data, repairs).run(model, keep_modes=True, limit=n)

    inputs = {f"{name}.weight": {1: np.empty(0, np.int64)} for name, kind in drops.items() if kind == "constant"}
    emptied = {**axes, **{name: {**axes.get(name, {}), **none} for name, none in inputs.items()}}
    modes = [(module, module.training) for module in model.modules()]
    contents: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        model.eval()
        for repair in repairs:
            contents |= repair.before(model, emptied, run)
        for module, training in modes:
            module.training = training
        cut(model, axes, drops=drops)
        contents = {name: take(new, axes.get(name, {})) for name, new in contents.items() if stays(name, drops)}
        _copy_into(model, contents)
        for repair, does_compare in zip(repairs, compares, strict=True):
            if does_compare:
                contents |= repair.between(dense, model, axes, _required(data, repairs))
                _copy_into(model, contents)
            later = repair.after(model, run)
            _copy_into(model, later)
            contents |= later
    broken = [name for name, content in contents.items() if not content.isfinite().all()]
    if broken:
        raise CutError(f"the repair gives NaN or infinity for {', '.join(broken)}")
    return contents


def _required(data: DataPass | None, repairs: Sequence[Repair]) -> DataPass:
    if data is None:
        raise ValueError(f"expected batches of data for {', '.join(map(repr, repairs))}, got none")
    return data


def install(change: Change, model: nn.Module, contents: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers of a network other contents of the same shapes, as part of a ``change``."""
    present = named(model)
    for name, content in contents.items():
        tensor = present[name]
        with torch.no_grad():
            data = torch.empty_like(tensor.detach()).copy_(content)
        change.assign(tensor, data, tensor.grad)


@final
@dataclass(frozen=True)
class FoldMean(Repair):
    r"""Adds to the next layer's bias what the removed units :math:`R` gave on average, :math:`W_R \mu_R`.

    Exact for units that are constant. A layer that loses all its inputs becomes the mean of what it gave. What counts
    is what enters the next layer, after activation and normalisation.
    Under zero padding the mean is taken over all positions, those at the border included, so that even a constant
    channel leaves an error there. A layer without a bias that is followed directly by a batch norm has its mean moved
    there; without either nothing is done, with a warning.

    It covers Linear, Conv and ConvTranspose layers that are called as modules, and also grouped convolutions.

    Args:
        batches: Batches of training data that the means are taken over.
    """

    batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:
        """The shifted biases."""
        observed = [_Mean(consumer) for consumer in _consumers(model, axes)]
        return _contents(model, observed, partial(run, model, self.batches), self)


@final
@dataclass(frozen=True)
class Ridge(Repair):
    r"""Refits the next layer's weights, so that from the inputs that stay it computes what it did from all of them.

    With :math:`\Sigma` the covariance of the inputs, :math:`S` those that stay and :math:`R` those that go,
    :math:`W_S \leftarrow W_S + W_R \Sigma_{RS} (\Sigma_{SS} + \lambda I)^{-1}`, and the bias takes the difference of
    the means: least squares with a penalty :math:`\lambda \lVert W_S' - W_S \rVert^2`. Inputs that say nothing of each
    other leave the weights as they are, which is `FoldMean`. :math:`\lambda` is relative to the mean variance of the
    inputs that stay. The statistics of all layers are those of the network before the cut.

    A convolution is a linear layer on its patches, of channels times kernel elements. Grouped and transposed
    convolutions, layers with more than ``max_inputs`` inputs and those that lose all of them get `FoldMean` instead. A
    layer without a bias that no batch norm follows is fitted without one, on second moments in place of covariances.

    Args:
        batches: Batches of training data that covariances are taken over; more than inputs divided by ``rows`` at
            least.
        strength: λ, above 0.
        rows: Patches (tokens, samples) per batch and layer, spread evenly where there are more.
        max_inputs: Largest number of inputs of a layer; the matrices take its square in memory.
    """

    batches: int = 32
    strength: float = 0.01
    rows: int = 1024
    max_inputs: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def before(self, model: nn.Module, axes: Axes, run: Run) -> dict[str, Tensor]:
        """The refitted weights and shifted biases."""
        observed = [self._observation(consumer) for consumer in _consumers(model, axes)]
        return _contents(model, observed, partial(run, model, self.batches), self)

    def _observation(self, consumer: _Consumer) -> _Mean | _Covariance:
        layer: Any = consumer.layer
        small = consumer.weight[0].numel() <= self.max_inputs and len(consumer.kept) > 0
        plain = isinstance(layer, nn.Linear) or (layer.groups == 1 and not layer.transposed)
        return _Covariance(consumer, self.strength, self.rows) if small and plain else _Mean(consumer)


@final
@dataclass(frozen=True)
class ReestimateBatchNorm(Repair):
    """Takes the running mean and variance of every batch norm anew from the network after the cut.

    The mean over batches of their means and unbiased variances, in the mode the network trains in (dropout is active).
    Batch norms in eval mode (frozen) and those without running statistics stay as they are, and so do all other
    buffers.

    Args:
        batches: Batches of training data.
    """

    batches: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def after(self, model: nn.Module, run: Run) -> dict[str, Tensor]:
        """The running statistics."""
        norms = batch_norms(model)
        if not norms:
            return {}
        sums: dict[str, list[Tensor]] = {name: [] for name in norms}

        def see(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
            values = double(args[0]).transpose(0, 1).flatten(1)
            seen = torch.stack([values.mean(1), values.var(1), torch.ones_like(values[:, 0])])
            sums[name] = [sums[name][0] + seen] if sums[name] else [seen]

        with _kept(model), _removed(m.register_forward_pre_hook(partial(see, name)) for name, m in norms.items()):
            run(model, self.batches)
        contents = {}
        for name, total in ((name, total[0]) for name, total in sums.items() if total):
            prefix = canonical(name) + "." if name else ""
            contents[f"{prefix}running_mean"] = total[0] / total[2]
            contents[f"{prefix}running_var"] = total[1] / total[2]
        return contents


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Batch norms whose running statistics follow the training, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    }


# -- layers that take removed units as input --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Consumer:
    """A Linear, Conv or ConvTranspose and what it keeps of its inputs.

    Attributes:
        name: Canonical name of the layer.
        layer: The layer.
        dim: Dimension of its weight that the inputs lie on.
        kept: Positions kept there.
    """

    name: str
    layer: nn.Module
    dim: int
    kept: IndexArray

    @property
    def weight(self) -> Tensor:
        """In float64, on the CPU."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return double(weight.detach()).cpu()

    def tensor(self, name: str) -> str:
        """Qualified name of one of the layer's tensors."""
        return f"{self.name}.{name}" if self.name else name

    def batched(self, x: Tensor) -> Tensor:
        """Inputs with exactly one batch dimension."""
        if isinstance(self.layer, nn.Linear):
            return x.reshape(-1, x.shape[-1])
        return x if x.ndim == self.layer.weight.ndim else x[None]


def _consumers(model: nn.Module, axes: Axes) -> list[_Consumer]:
    """Layers that lose inputs; those that cannot be told apart from others are named in a warning."""
    shared, found, tied = tied_layers(model), [], []
    for name, layer in model.named_modules():
        dim = input_dim(layer)
        own = canonical(name)
        weight = f"{own}.weight" if own else "weight"
        if dim is None or dim not in axes.get(weight, {}):
            continue
        if own in shared:
            tied.append(own)
        else:
            found.append(_Consumer(own, layer, dim, axes[weight][dim]))
    if tied:
        warnings.warn(f"not repaired, because their weight or bias is another's too: {', '.join(tied)}", stacklevel=2)
    return found


def tied_layers(model: nn.Module) -> set[str]:
    """Canonical names of modules that share a parameter with another one."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {
        canonical(name)
        for name, module in model.named_modules()
        if any(p is not None and owners[id(p)] > 1 for p in module._parameters.values())
    }


def input_dim(layer: Any) -> int | None:
    """Dimension of the weight that inputs lie on; None if calling the layer does not compute a plain linear map."""
    known = isinstance(layer, LINEAR_LAYERS) and not isinstance(layer, NonDynamicallyQuantizableLinear)
    if not known or type(layer).forward not in [kind.forward for kind in LINEAR_LAYERS]:
        return None
    if "weight" not in layer._parameters:
        return None  # computed by a parametrization
    if isinstance(layer, nn.Linear) or not layer.transposed:
        return 1
    return 0 if layer.groups == 1 else None


# -- what is observed -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Mean:
    """What the removed inputs of a layer add to its outputs on average."""

    consumer: _Consumer
    total: Tensor | None = None
    count: int = 0
    _part: nn.Module | None = field(default=None, repr=False)

    def see(self, x: Tensor) -> None:
        """Add one call's inputs."""
        batch = self.consumer.batched(x)
        mean = double(batch).mean(0, keepdim=True).cpu()
        if self._part is None:
            self._part = self._removed_part()
        # A linear map of the mean is the mean of the linear map: one sample is enough.
        out = self._part.forward(mean)
        # Unlike the outputs of a Linear, those of a convolution have positions.
        out = out[0].flatten(1).mean(1) if out.ndim > 2 else out[0]
        self.total = out * len(batch) + (0 if self.total is None else self.total)
        self.count += len(batch)

    def fit(self, constant: bool) -> tuple[dict[str, Tensor], Tensor]:  # noqa: ARG002
        """New contents of the layer's own weight (none) and what its outputs lose on average, shape ``(outputs,)``."""
        assert self.total is not None
        return {}, self.total / self.count

    def _removed_part(self) -> nn.Module:
        """The layer with the inputs that go alone: without the others, bias and hooks."""
        weight = self.consumer.weight.clone()
        weight.index_fill_(self.consumer.dim, torch.from_numpy(self.consumer.kept), 0)
        part = copy.copy(self.consumer.layer)
        vars(part)["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
        return part


@dataclass(eq=False)
class _Covariance:
    """First and second moments of a layer's inputs (of a convolution: its patches)."""

    consumer: _Consumer
    strength: float
    rows: int
    count: int = 0
    total: Tensor | None = None
    square: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """Add one call's inputs."""
        batch = self.consumer.batched(x)
        if isinstance(self.consumer.layer, nn.Linear):
            rows = batch[spread(len(batch), self.rows).to(batch.device)]
        else:
            rows = patches(self.consumer.layer, batch, self.rows)
        rows = double(rows)
        self.total = rows.sum(0) + (0 if self.total is None else self.total)
        self.square = rows.T @ rows + (0 if self.square is None else self.square)
        self.count += len(rows)

    def fit(self, constant: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The refitted weight and what the outputs lose on average, shape ``(outputs,)``.

        Args:
            constant: Whether a constant can be added to the outputs; else the fit goes without one.
        """
        assert self.total is not None
        assert self.square is not None
        whole = self.consumer.weight
        weight = whole.flatten(1)
        mean, moment = (self.total / self.count).cpu(), (self.square / self.count).cpu()
        covariance = moment - mean.outer(mean) if constant else moment
        stay = torch.zeros(whole.shape[1:], dtype=torch.bool)
        stay[torch.from_numpy(self.consumer.kept)] = True
        stay = stay.flatten()
        inner, cross = covariance[stay][:, stay], covariance[~stay][:, stay]
        scale = inner.diagonal().mean()
        added = torch.zeros_like(weight[:, stay])
        if scale > 0:
            inner = inner + self.strength * scale * torch.eye(len(inner), dtype=inner.dtype)
            added = torch.linalg.solve(inner, cross.T @ weight[:, ~stay].T).T
        fitted = weight.clone()
        fitted[:, stay] += added
        lost = weight[:, ~stay] @ mean[~stay] - added @ mean[stay]
        return {self.consumer.tensor("weight"): fitted.reshape(whole.shape)}, lost


def _contents(
    model: nn.Module, observed: Sequence[_Mean | _Covariance], run: Callable[[], None], repair: Repair
) -> dict[str, Tensor]:
    """Observe the run and give what the repair writes."""
    followers = _Followers(model)
    with _removed(chain(followers.watch([o.consumer for o in observed]), map(_hook, observed))):
        run()
    contents: dict[str, Tensor] = {}
    problems = []
    for observation in observed:
        consumer = observation.consumer
        if observation.count == 0:
            problems.append(f"{consumer.name} was never called as a module")
            continue
        bias: Tensor | None = consumer.layer._parameters["bias"]
        norm = followers.of(consumer)
        new, lost = observation.fit(constant=bias is not None or norm is not None)
        contents |= new
        if bias is not None:
            contents[consumer.tensor("bias")] = double(bias.detach()).cpu() + lost
        elif norm is not None:
            # What no longer arrives must no longer be subtracted.
            mean = named(model)[norm]
            contents[norm] = double(mean).cpu() - lost
        elif not new:
            problems.append(f"{consumer.name} has no bias, and no batch norm follows it directly")
    if problems:
        warnings.warn(f"{type(repair).__name__} leaves some layers as they are: {'; '.join(problems)}", stacklevel=5)
    return contents


def _hook(observation: _Mean | _Covariance) -> RemovableHandle:
    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel():
            observation.see(x)

    return observation.consumer.layer.register_forward_pre_hook(see, with_kwargs=True)


class _Followers:
    """Which batch norm takes exactly what a layer gives, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        self.norms = {
            canonical(name): module
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        }
        self._given: Any = WeakTensorKeyDictionary()
        self._taken: dict[str, set[str | None]] = {name: set() for name in self.norms}

    def watch(self, consumers: Sequence[_Consumer]) -> Iterator[RemovableHandle]:
        """Hooks that find out, while the network runs."""
        for consumer in consumers:
            yield consumer.layer.register_forward_hook(partial(self._give, consumer.name))
        for name, norm in self.norms.items():
            yield norm.register_forward_pre_hook(partial(self._take, name))

    def of(self, consumer: _Consumer) -> str | None:
        """Name of the running mean behind a layer."""
        found = [name for name, sources in self._taken.items() if sources == {consumer.name}]
        return None if not found else f"{found[0]}.running_mean" if found[0] else "running_mean"

    def _give(self, name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        self._given[output] = (name, output._version)

    def _take(self, name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        source, version = self._given.get(args[0], (None, -1))
        # The version tells whether an activation has written over it in between.
        self._taken[name].add(source if args[0]._version == version else None)


# -- numbers ----------------------------------------------------------------------------------------------------------


def spread(total: int, wanted: int) -> Tensor:
    """``wanted`` of the numbers below ``total``, evenly spread and without a period; all where there are no more."""
    if total <= wanted:
        return torch.arange(total)
    places = np.arange(wanted) * _GOLDEN % 1
    return torch.from_numpy(np.floor(places * total).astype(np.int64))


def patches(layer: Any, x: Tensor, rows: int) -> Tensor:
    """What a convolution is applied to at some of its positions: shape ``(rows, channels · kernel elements)``."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    spans = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    sizes = [(n - span) // s + 1 for n, span, s in zip(x.shape[2:], spans, layer.stride, strict=True)]
    return windows(layer, x, sizes, layer.stride, spread(len(x) * math.prod(sizes), rows))


def windows(layer: Any, x: Tensor, sizes: Sequence[int], stride: Sequence[int], chosen: Tensor) -> Tensor:
    """What a convolution's kernel covers of padded inputs at some positions: ``(rows, channels · kernel elements)``.

    Args:
        layer: Kernel size and dilation.
        x: The padded inputs.
        sizes: Of the outputs.
        stride: Step from one position to the next.
        chosen: Numbers of the positions, of all samples.
    """
    sample, *places = torch.unravel_index(chosen.to(x.device), (len(x), *sizes))
    dims = len(sizes)
    index: list[Any] = [sample.reshape(-1, *[1] * dims), slice(None)]
    for dim, place in enumerate(places):
        taps = torch.arange(layer.kernel_size[dim], device=x.device) * layer.dilation[dim]
        shape = [-1 if d == dim else 1 for d in range(dims)]
        index.append((place[:, None] * stride[dim] + taps).reshape(len(place), *shape))
    # Indices around a slice put their dimensions first: rows × kernel × channels.
    return x[tuple(index)].movedim(-1, 1).flatten(1)


def double(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)  # MPS has no float64


def _copy_into(model: nn.Module, contents: Mapping[str, Tensor]) -> None:
    present = named(model)
    for name, content in contents.items():
        present[name].copy_(content)


@contextmanager
def _removed(handles: Iterator[RemovableHandle]) -> Iterator[None]:
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Buffers are as before afterwards."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, content in saved:
            buffer.copy_(content)


def require_positive(repair: Any) -> None:
    for name in repair.__dataclass_fields__:
        if getattr(repair, name) <= 0:
            raise ValueError(
                f"{type(repair).__name__}: expected `{name}` above 0, got {getattr(repair, name)}. Leave it out for "
                "the default."
            )
