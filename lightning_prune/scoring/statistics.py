"""Statistics of units observed during training by forward and backward hooks."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn, final

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric
from torchmetrics.functional.regression import spearman_corrcoef

from lightning_prune.scoring.contributions import LINEAR_LAYERS, Ratio, contributions_of
from lightning_prune.scoring.data import Batch, DataPass, forward
from lightning_prune.structure.attention_calls import out_proj_called
from lightning_prune.structure.graph import Group, Member, Structure
from lightning_prune.structure.layers import named

__all__ = [
    "ActivationStatistic",
    "ConsumerStatistic",
    "ContributionStatistic",
    "EndOfBatch",
    "Statistic",
    "Target",
    "is_linear_layer",
    "per_unit",
    "unit_inputs",
]

Reduction = Literal["sum", "max"]
#: Index of one of the two halves that observed batches alternate between; None for both together.
Half = Literal[0, 1] | None


class Statistic(Metric):
    """Values per unit of every group, accumulated over observed training batches.

    Each quantity is a persistent state per group of shape ``(2, sources, …)``: even and odd observed batches are kept
    apart, so that the agreement of the two halves measures convergence, with one row for every layer ("source") that a
    group is observed at. Quantities are sums, or maxima of values of at least 0. They start at 0, so that ranks, halves
    and the parts of an interrupted run merge by the declared reduction. They are float64 where the device supports it.

    A subclass declares its quantities and implements ``observe`` (registers hooks) or ``collect`` (extra passes over
    data), which call ``record``, and ``estimate`` (the value per unit).

    Args:
        structure: The network's groups.
        sources: Names of the layers that each group is observed at; groups without any are ``unobservable``.

    Attributes:
        evidence: What the values are computed from, for the table of criteria.
        uses_loss: Whether it uses gradients of the loss.
        uses_data: Whether ``collect`` uses the contents of the data rather than only shapes.
        loss_scale: Loss scale (mixed precision) of the batch being observed, by which gradients are multiplied.
    """

    full_state_update = False
    batches: Tensor
    evidence: ClassVar[str] = "activations"
    uses_loss: ClassVar[bool] = False
    uses_data: ClassVar[bool] = True
    # Parts of messages: "NaN or infinite ... 'place'" and "place ... in none of the observed batches".
    _faulty: ClassVar[str] = "activations or weights at layer"
    _unseen: ClassVar[str] = "was called as a module"

    def __init__(self, structure: Structure, sources: Mapping[str, Sequence[str]]) -> None:
        # No cache: `update` would clear it, but is not called.
        super().__init__(compute_with_cache=False)
        self.structure = structure
        self.sources = {name: tuple(places) for name, places in sources.items() if places}
        self._states: dict[str, Reduction] = {}
        self._half = 0
        self.loss_scale = 1.0
        self._is_collecting = False  # count passes in eval mode too
        self._warned: set[str] = set()
        self._below_zero: dict[str, Tensor] = {}  # whether a recorded maximum was, by quantity
        self._set("batches", torch.zeros((), dtype=torch.int64), "sum")
        self.declare("passes", "sum", per_unit=False)
        self.declare("skipped", "sum", per_unit=False)

    # -- for subclasses ---------------------------------------------------------------------------------------------

    def observe(self, model: nn.Module) -> Iterable[RemovableHandle]:  # noqa: ARG002
        """Register hooks that ``record``, and return their handles; none if ``collect`` is implemented."""
        return []

    def unhookable(self, model: nn.Module) -> dict[str, str]:  # noqa: ARG002
        """Groups without a layer to hook in this network: ``{group: reason}``."""
        return {name: "there is nowhere to observe it" for name in self.structure.widths if name not in self.sources}

    def collect(self, model: nn.Module, data: DataPass) -> None:
        """Run the network on data right before scores are computed, and ``record``.

        By default the batches are observed like training batches, in eval mode.

        Args:
            model: The network, or a copy if there is a loss.
            data: The samples, with a loss if needed.

        Raises:
            ValueError: If a loss or labels are needed and the data has none.
        """

        def call(model: nn.Module, batch: Batch) -> Any:
            handles = self.attach(model)
            try:
                if not self.uses_loss:
                    return forward(model, batch)
                loss = data.loss_of(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss
            finally:
                for handle in handles:
                    handle.remove()

        self._is_collecting = True
        try:
            data.run(model, call=call, grad=self.uses_loss)
        finally:
            self._is_collecting = False

    @property
    def collects(self) -> bool:
        """Whether it runs extra passes instead of observing the training."""
        return type(self).collect is not Statistic.collect

    @abstractmethod
    def estimate(self, name: str, half: Half = None) -> Tensor:
        """Value per unit of an observed group: shape ``(width,)``."""

    @final
    def declare(self, quantity: str, reduction: Reduction, *, per_unit: bool = True) -> None:
        """Add a state for every observed group, per unit and source or per source."""
        for name, places in self.sources.items():
            unit_axis = (self.structure.group(name).width,) if per_unit else ()
            self._set(f"{quantity}/{name}", torch.zeros(2, len(places), *unit_axis), reduction)

    @final
    def record(self, name: str, source: int, passes: int, **quantities: Tensor) -> None:
        """Add the quantities of one call to the current half.

        Calls with NaN or infinity in any quantity are skipped and counted. The warning follows at the next batch or
        score, to avoid a GPU synchronization during the forward pass, and so does the error for a negative maximum.

        Args:
            name: Name of the group.
            source: Index of the observed layer among the group's sources.
            passes: Number of samples of this call, by which `per_pass` divides.
            quantities: Values of all declared quantities: shape ``(width,)``, or ``()`` if declared with
                ``per_unit=False``.

        Raises:
            ValueError: If a quantity was not declared or has another shape.
        """
        unknown = [quantity for quantity in quantities if f"{quantity}/{name}" not in self._states]
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: expected declared quantities, got {unknown[0]!r} for group '{name}'. Call "
                f'`self.declare("{unknown[0]}", "sum")` in `__init__`.'
            )
        quantities = {quantity: value.detach() for quantity, value in quantities.items()}
        finite = torch.stack([value.sum() for value in quantities.values()]).isfinite().all()
        counted = {quantity: torch.where(finite, value, 0) for quantity, value in quantities.items()}
        counted |= {"passes": finite * passes, "skipped": ~finite * passes}
        for quantity, value in counted.items():
            key = f"{quantity}/{name}"
            row = getattr(self, key)[self._half, source]
            if value.shape != row.shape:
                raise ValueError(
                    f"{type(self).__name__}: expected {quantity!r} of shape {tuple(row.shape)} for group '{name}', got "
                    f"{tuple(value.shape)}. Reduce it over samples and positions, to one value per unit; "
                    "`declare(..., per_unit=False)` is for one value per call."
                )
            if self._states[key] == "sum":
                row += value
            else:
                self._below_zero[quantity] = self._below_zero.get(quantity, False) | (value < 0).any()
                torch.maximum(row, value.to(row.dtype), out=row)

    @final
    def read(self, quantity: str, name: str, half: Half = None) -> Tensor:
        """Quantity of a group, of one half or both: shape ``(sources, …)``."""
        state: Tensor = getattr(self, f"{quantity}/{name}")
        if half is not None:
            return state[half]
        return state.sum(0) if self._states[f"{quantity}/{name}"] == "sum" else state.amax(0)

    @final
    def per_pass(self, quantity: str, name: str, half: Half = None) -> Tensor:
        """Quantity of a group divided by the number of passes: shape ``(observed sources, width)``."""
        passes = self.read("passes", name, half)
        return (self.read(quantity, name, half) / passes[:, None])[passes > 0]

    @final
    def follow(self, model: nn.Module) -> None:
        """Move to the device of the network."""
        parameter = next(model.parameters(), None)
        self._move(parameter.device if parameter is not None else self.device)

    # -- for callbacks ----------------------------------------------------------------------------------------------

    @final
    def attach(self, model: nn.Module, loss_scale: float = 1.0) -> list[RemovableHandle]:
        """Register the hooks to observe one training batch, before its forward pass.

        Remove the returned handles after the backward pass.

        Args:
            model: The network.
            loss_scale: Loss scale of this batch in mixed precision.
        """
        self._check_maxima()
        self._warn_of_skipped(self.sources)
        self.follow(model)
        self._half = int(self.batches) % 2
        self.batches += 1
        self.loss_scale = loss_scale
        handles: list[RemovableHandle] = []
        try:
            handles.extend(self.observe(model))
            return handles
        except BaseException:  # also on KeyboardInterrupt
            for handle in handles:
                handle.remove()
            raise

    @final
    def unobservable(self, model: nn.Module) -> dict[str, str]:
        """Groups that cannot be scored, ``{group: reason}``: without a layer to hook, or never called so far.

        Layers that are used without being called (``F.linear(x, layer.weight)``) are found only after batches have been
        observed: check before the first batch and again before every cut.
        """
        unobserved = {
            name: f"{', '.join(places)} {self._unseen} in none of the {self.update_count} observed batches"
            for name, places in self.sources.items()
            if self.update_count and not (self.read("passes", name) + self.read("skipped", name)).any()
        }
        return unobserved | self.unhookable(model)

    @final
    def value(self, name: str) -> Tensor:
        """Value per unit over all observed batches: shape ``(width,)``.

        Raises:
            FloatingPointError: If every observed pass had NaN or infinity.
            RuntimeError: If no pass was observed.
            ValueError: If a negative value was recorded for a maximum.
        """
        self._check_maxima()
        if self.passes(name) == 0:
            self._refuse(name)
        self._warn_of_skipped([name])
        return self.estimate(name)

    @final
    def passes(self, name: str) -> int:
        """Samples observed since the start or the last ``reset``: the maximum over sources."""
        return int(self.read("passes", name).amax()) if name in self.sources else 0

    @final
    def split_half(self, name: str) -> float:
        """Spearman's rank correlation between even and odd observed batches, in [-1, 1].

        Near 1, more batches would not change the order of the units. NaN if a half is empty or there is one unit.
        """
        if name not in self.sources or self.structure.group(name).width < 2:
            return math.nan
        if not self.read("passes", name, 0).any() or not self.read("passes", name, 1).any():
            return math.nan
        return float(spearman_corrcoef(self.estimate(name, 0), self.estimate(name, 1)))

    # -- torchmetrics -----------------------------------------------------------------------------------------------

    @property
    def update_count(self) -> int:
        """Observed batches since the start or the last ``reset``."""
        return int(self.batches)

    @property
    def update_called(self) -> bool:
        """Whether any batch was observed."""
        return self.update_count > 0

    def update(self, *_: Any, **__: Any) -> None:
        """Not supported: hooks call ``record``.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"{type(self).__name__} observes by hooks; use `attach(model)`")

    @final
    def compute(self) -> dict[str, Tensor]:
        """``value`` of every group that was observed."""
        return {name: self.value(name) for name in self.sources if self.passes(name)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the states.

        Raises:
            ValueError: If the states do not match this structure.
        """
        expected = {key: _form(getattr(self, key)) for key in self._states}
        found = {key: _form(value) if isinstance(value, Tensor) else None for key, value in state_dict.items()}
        if expected != found:
            wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            raise ValueError(
                f"{type(self).__name__}: expected states of the present network, got others for {', '.join(wrong[:5])} "
                f"({len(wrong)} in all; first: expected {expected.get(wrong[0])}, got {found.get(wrong[0])}). Cut the "
                "network to the widths it was saved at before loading."
            )
        # Copied, since torchmetrics would keep the caller's tensors, which are modified in place.
        copies = {key: value.to(getattr(self, key), copy=True) for key, value in state_dict.items()}
        return super().load_state_dict(copies, strict=strict, assign=assign)

    # -- internals -----------------------------------------------------------------------------------------------------

    def _set(self, key: str, state: Tensor, reduction: Reduction) -> None:
        """Declare a state with this value, and a default of the same shape, dtype and device."""
        if state.is_floating_point():
            state = state.to(torch.float32 if state.device.type == "mps" else torch.float64)  # MPS has no float64
        self._states[key] = reduction
        self.add_state(key, torch.zeros_like(state), dist_reduce_fx=reduction, persistent=True)
        setattr(self, key, state)

    def _move(self, device: torch.device) -> None:
        if self.batches.device == device:
            return
        for key, reduction in list(self._states.items()):
            state: Tensor = getattr(self, key)
            if device.type == "mps" and state.is_floating_point():
                state = state.float()
            self._set(key, state.to(device), reduction)

    def _skipped_places(self, names: Iterable[str]) -> list[str]:
        """Sources with skipped passes, by a single transfer from the device."""
        places = [place for name in names for place in self.sources.get(name, ())]
        if not places:
            return []
        skipped = torch.cat([self.read("skipped", name) for name in names if name in self.sources]).tolist()
        return list(dict.fromkeys(place for place, passes in zip(places, skipped, strict=True) if passes))

    def _warn_of_skipped(self, names: Iterable[str]) -> None:
        for place in self._skipped_places(names):
            if place not in self._warned:
                self._warned.add(place)
                warnings.warn(
                    f"NaN or infinite {self._faulty} '{place}': such batches are left out of the "
                    "scores. A lower learning rate, gradient clipping or bf16 in place of fp16 may help.",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _check_maxima(self) -> None:
        for quantity, below_zero in self._below_zero.items():
            if below_zero:
                raise ValueError(
                    f"{type(self).__name__}: expected values of at least 0 for the maximum {quantity!r}, which starts "
                    f"at 0, got a negative one. Record `value.abs()` or `value.clamp(min=0)`, or declare a sum."
                )

    def _refuse(self, name: str) -> NoReturn:
        bad = self._skipped_places([name])
        if bad:
            raise FloatingPointError(
                f"group '{name}' cannot be scored: every observed pass had NaN or infinite {self._faulty} "
                f"{', '.join(map(repr, bad))}. Lower the learning rate or clip gradients."
            )
        raise RuntimeError(
            f"group '{name}' cannot be scored: expected at least one training pass to have been observed, got none at "
            f"{', '.join(map(repr, self.sources.get(name, ()))) or 'any layer'}. Observe more batches "
            "(`every_n_batches`), cut later, or exclude the layer if it is never called as a module."
        )


class Target(NamedTuple):
    """Group and source observed at a layer, and the layer's inputs that are each unit, shape ``(width, k)``."""

    group: str
    source: int
    inputs: Tensor


class ConsumerStatistic(Statistic):
    """Base class of statistics observed at the layers (Linear, Conv, ConvTranspose) that consume a group's units."""

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure, {group.name: [m.layer for m in _consuming(group)] for group in structure.groups})

    def unhookable(self, model: nn.Module) -> dict[str, str]:
        """Groups whose units enter no plain Linear, Conv or ConvTranspose, with reasons."""
        seen = {target.group for targets in self.targets(model).values() for target in targets}
        places = {name: ", ".join(dict.fromkeys(own)) for name, own in self.sources.items()}
        return {
            name: f"its units enter {places[name]}, which is no plain Linear, Conv or ConvTranspose"
            if name in places
            else "no layer takes its units as input"
            for name in self.structure.widths
            if name not in seen
        }

    @final
    def targets(self, model: nn.Module) -> dict[nn.Module, list[Target]]:
        """Layers to hook, with their targets."""
        layers: dict[Tensor, list[nn.Module]] = {}  # tied layers share a weight
        for module in filter(is_linear_layer, model.modules()):
            weight = module._parameters.get("weight")  # None under a parametrization
            if weight is not None:
                layers.setdefault(weight, []).append(module)
        tensors = named(model)
        targets: dict[nn.Module, list[Target]] = {}
        for group in self.structure.groups:
            for source, member in enumerate(_consuming(group)):
                taken = tensors.get(member.tensor)
                for module in layers.get(taken, ()) if taken is not None else ():
                    inputs = unit_inputs(module, member)
                    if inputs is not None:
                        targets.setdefault(module, []).append(Target(group.name, source, inputs.to(self.device)))
        return targets


class ActivationStatistic(ConsumerStatistic):
    """Base class of statistics of the inputs of layers that consume a group's units.

    Subclasses implement ``see``, which is called for every call of such a layer, including recomputation under gradient
    checkpointing.
    """

    @abstractmethod
    def see(self, layer: nn.Module, activation: Tensor, output: Tensor, targets: Sequence[Target]) -> None:
        """Record one call of a layer.

        Args:
            layer: A Linear, Conv or ConvTranspose.
            activation: Its input, not empty.
            output: Its output, before other hooks.
            targets: Inputs of the layer by unit.
        """

    def observe(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register forward hooks on every Linear, Conv and ConvTranspose that consumes units."""
        targets = self.targets(model)
        if any(isinstance(module, NonDynamicallyQuantizableLinear) for module in targets):
            calls = ExitStack()
            yield EndOfBatch(calls.close)
            calls.enter_context(out_proj_called(model))

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            # A copy of the model made in this batch (for weight averaging) has the hook but is not a target.
            activation = args[0] if args else kwargs["input"]
            if (model.training or self._is_collecting) and module in targets and activation.numel():
                self.see(module, activation, output, targets[module])

        # Prepended: other hooks may replace or overwrite the output.
        for module in targets:
            yield module.register_forward_hook(hook, prepend=True, with_kwargs=True)


@final
class ContributionStatistic(ActivationStatistic):
    """Contribution of every unit to the outputs of the layers that consume it (contribution pruning).

    For a unit that is several inputs of a layer (a channel flattened over its pixels), shares are summed and maxima
    maximised. Several consumers are averaged, and every call of a layer counts. A pass recomputed under gradient
    checkpointing counts twice in both the sum and the count.

    Args:
        structure: The network's groups.
        lambda_avg: Weight of C_avg, which is divided by its mean over the group; not computed if 0.
        lambda_max: Weight of C_max, which is divided by its mean over the group; not computed if 0.
        ratio: ``"absolute"`` or ``"signed"`` shares.
        epsilon: Stabilises signed denominators.
        positions: Number of positions of a convolution sampled for C_max, others in every batch; all if None. The
            sample depends on the number of observed batches alone, so it is the same after a resume and on every rank.
    """

    def __init__(
        self,
        structure: Structure,
        lambda_avg: float = 1.0,
        lambda_max: float = 0.0,
        ratio: Ratio = "absolute",
        epsilon: float = 1e-6,
        positions: int | None = None,
    ) -> None:
        super().__init__(structure)
        self.lambda_avg, self.lambda_max = lambda_avg, lambda_max
        self.ratio, self.epsilon, self.positions = ratio, epsilon, positions
        self.declare("outputs", "sum", per_unit=False)
        if lambda_avg:
            self.declare("mass", "sum")
        if lambda_max:
            self.declare("maximum", "max")

    def see(self, layer: nn.Module, activation: Tensor, output: Tensor, targets: Sequence[Target]) -> None:
        """Record the contributions of one call."""
        seen = contributions_of(
            layer,
            activation,
            output,
            ratio=self.ratio,
            epsilon=self.epsilon,
            average=self.lambda_avg != 0,
            maximum=self.lambda_max != 0,
            positions=self.positions,
            seed=self.update_count if self.positions else 0,  # the count synchronizes with the GPU
        )
        for name, source, inputs in targets:
            quantities = {"outputs": seen.outputs}
            if self.lambda_avg:
                quantities["mass"] = seen.mass[inputs].sum(1)
            if self.lambda_max:
                quantities["maximum"] = seen.maximum[inputs].amax(1)
            self.record(name, source, seen.passes, **quantities)

    def estimate(self, name: str, half: Half = None) -> Tensor:
        """λ_avg · C_avg + λ_max · C_max, each divided by its mean (absolute) value over the group."""
        score = torch.zeros(self.structure.group(name).width, dtype=torch.float64)
        for weight, term in ((self.lambda_avg, self.average), (self.lambda_max, self.maximum)):
            if weight:
                value = term(name, half).to(score)
                score += weight * value / value.abs().mean().clamp_min(torch.finfo(value.dtype).tiny)
        return score

    def average(self, name: str, half: Half = None) -> Tensor:
        """C_avg of a group: shape ``(width,)``; sums to 1 if nothing else enters its consumers."""
        outputs = self.read("outputs", name, half).clamp_min(1)
        return self._over_consumers(self.read("mass", name, half) / outputs[:, None], name, half)

    def maximum(self, name: str, half: Half = None) -> Tensor:
        """C_max of a group: shape ``(width,)``, at least 0."""
        return self._over_consumers(self.read("maximum", name, half), name, half)

    def _over_consumers(self, value: Tensor, name: str, half: Half) -> Tensor:
        return value[self.read("passes", name, half) > 0].mean(0)


class EndOfBatch(RemovableHandle):
    """Handle that calls ``on_remove`` when it is removed with the other hooks of a batch."""

    def __init__(self, on_remove: Callable[[], None]) -> None:
        super().__init__(OrderedDict())
        self.on_remove = on_remove

    def remove(self) -> None:
        """Call ``on_remove``."""
        self.on_remove()


def _consuming(group: Group) -> list[Member]:
    return [member for member in group.members if member.role == "in"]


def is_linear_layer(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer or convolution.

    That of PyTorch's attention is one that is used by calling it in `out_proj_called` alone.
    """
    return isinstance(module, LINEAR_LAYERS) and type(module).forward in [layer.forward for layer in LINEAR_LAYERS]


def unit_inputs(layer: Any, member: Member) -> Tensor | None:
    """Inputs (features, channels) of each unit, shape ``(width, k)``; None if the layer does not sum over them.

    Args:
        layer: A Linear, Conv or ConvTranspose.
        member: The axis of its weight with the units.
    """
    index = torch.as_tensor(member.index)
    if isinstance(layer, nn.Linear):
        return index if member.dim == 1 else None
    if layer.transposed:  # weight: inputs × outputs of one group
        # In a depthwise convolution nothing is summed over units.
        depthwise = layer.groups > 1 and layer.groups in (layer.in_channels, layer.out_channels)
        return index if member.dim == 0 and not depthwise else None
    # weight: outputs × inputs of one group, for the same position in every group
    offsets = torch.arange(layer.groups) * (layer.in_channels // layer.groups)
    return (index[:, :, None] + offsets).flatten(1) if member.dim == 1 else None


@torch.no_grad()
def per_unit(layer: nn.Module, activation: Tensor, inputs: Tensor) -> Tensor:
    """Input of a layer by unit: shape ``(passes, width, k, *positions)``, at least float32.

    Args:
        layer: A Linear, Conv or ConvTranspose.
        activation: Input of the layer, batched or not.
        inputs: Features or channels of each unit, shape ``(width, k)``.
    """
    dense = isinstance(layer, nn.Linear)
    x = activation.detach().to(torch.promote_types(activation.dtype, torch.float32))
    if x.dim() == (1 if dense else layer.get_parameter("weight").dim() - 1):
        x = x[None]
    return (x.movedim(-1, 1) if dense else x)[:, inputs]


def _form(state: Tensor) -> tuple[int | str, ...]:
    """Shape and kind of a state, which must be equal for loading."""
    kind = "real" if state.is_floating_point() else "complex" if state.is_complex() else "whole"
    readable = state.layout is torch.strided and not state.is_meta
    negative = kind == "whole" and readable and bool((state < 0).any())  # these are counts
    return (*state.shape, f"{'' if readable else 'un'}readable {'negative' if negative else kind} numbers")
