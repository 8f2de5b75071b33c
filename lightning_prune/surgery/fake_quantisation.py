"""Rounding in forward passes, as by a file of integers: what quantisation-aware training trains with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.surgery.compiled import is_compiled

__all__ = ["FakeQuantisation"]

# Layers whose weight has its output channels on axis 0.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Inputs are stored in signed 8-bit integers.
_LOW, _HIGH = -128, 127
# Weight of a new batch in the moving averages of ranges.
_MOMENTUM = 0.01
# Smallest step between two values, so that layers of zeros do not divide by zero.
_SMALLEST = 1e-12
_FORMAT = 1


class FakeQuantisation:
    """Rounds inputs and weights of linear and convolutional layers in forward passes, as a file of integers does.

    `QuantisationAware` does this in a Lightning run. In a training loop of your own: ``attach``, train the network as
    before, ``detach``, and give this object to `quantise`.

    A weight is rounded per output channel to multiples of ``max |w| / 127`` (``max |w| / 7`` with 4 bits), the inputs
    of a layer to 256 values between the moving averages of their minimum and maximum over training batches, extended to
    zero. Gradients pass through the rounding, except those of inputs outside the range (Jacob et al., "Quantization and
    Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018). BatchNorm is not folded in
    training: with a step per channel, folding its scale later multiplies the step and changes no integer.

    Parameters, buffers and ``state_dict`` stay as they are, so layers can be cut while it is attached. What is not
    computed by calling such a layer stays in float32: additions, norms, transposed convolutions, attention products.

    Args:
        weight_bits: Bits of a weight: 8 or 4.

    Raises:
        ValueError: If ``weight_bits`` is another number.

    Example:
        >>> import torch
        >>> from lightning_prune import FakeQuantisation
        >>> net, rounding = torch.nn.Sequential(torch.nn.Linear(4, 2)), FakeQuantisation()
        >>> rounding.attach(net)
        >>> loss = net(torch.randn(8, 4)).sum()  # train with it
        >>> rounding.detach()
        >>> list(rounding.ranges)
        ['0']
    """

    def __init__(self, weight_bits: int = 8) -> None:
        if weight_bits not in (4, 8):
            raise ValueError(f"FakeQuantisation: expected `weight_bits` of 4 or 8, got {weight_bits!r}.")
        self.weight_bits = weight_bits
        self._ranges: dict[str, Tensor] = {}  # (smallest, largest) input of layers that were trained
        self._attached: list[str] = []
        self._handles: list[RemovableHandle] = []

    @property
    def is_attached(self) -> bool:
        """Whether a network computes with rounding now."""
        return bool(self._handles)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest input of each layer that was trained, by its name."""
        return {name: (float(low), float(high)) for name, (low, high) in self._ranges.items()}

    def attach(self, model: nn.Module) -> None:
        """Let a network compute with rounding. In train mode its batches move the ranges, in eval mode they do not.

        Raises:
            ValueError: If it has no such layer, computes a weight from others (weight norm), or is compiled.
        """
        layers = self.require_layers(model)
        self.detach()
        self._attached = list(layers)
        for name, layer in layers.items():
            if name in self._ranges:
                self._ranges[name] = self._ranges[name].to(next(layer.parameters()).device)
            self._handles += [
                layer.register_forward_pre_hook(partial(self._before, name), with_kwargs=True),
                layer.register_forward_hook(_after, always_call=True),
            ]

    def detach(self) -> None:
        """Let the network compute in floats again; the ranges are kept."""
        while self._handles:
            self._handles.pop().remove()

    @staticmethod
    def require_layers(model: nn.Module) -> dict[str, nn.Module]:
        """The layers of a network that can be rounded, by name.

        Raises:
            ValueError: As `attach`.
        """
        if is_compiled(model):
            raise ValueError(
                "FakeQuantisation: expected a network that is not compiled, as compiled code does not see when "
                "rounding begins. Train it without `torch.compile`."
            )
        layers: dict[str, nn.Module] = {
            name: layer for name, layer in model.named_modules() if isinstance(layer, _LAYERS)
        }
        computed = [name for name, layer in layers.items() if not isinstance(layer._parameters.get("weight"), Tensor)]
        if computed:
            raise ValueError(
                f"FakeQuantisation: expected weights that are parameters, but that of {computed[0]!r} is computed (by "
                "weight norm or another parametrization). Remove it first, as by "
                "`torch.nn.utils.parametrize.remove_parametrizations`."
            )
        if not layers:
            raise ValueError(
                f"FakeQuantisation: expected linear or convolutional layers in {type(model).__name__}, found none."
            )
        return layers

    def average(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Average the ranges of all processes, by a function that averages a tensor over them."""
        device = next(iter(self._ranges.values())).device if self._ranges else None
        none = torch.full((2,), torch.nan, device=device)
        own = torch.stack([self._ranges.get(name, none) for name in self._attached])
        seen = ~own.isnan()
        averages = mean(torch.where(seen, own, 0.0)) / mean(seen.float())
        self._ranges = {
            name: one for name, one in zip(self._attached, averages, strict=True) if not bool(one.isnan().any())
        }

    def require_trained(self, model: nn.Module) -> None:
        """Check that a network was trained with this, and computes in floats now.

        Raises:
            ValueError: If it is attached, layers with ranges are missing, or there are no ranges.
        """
        if self.is_attached:
            raise ValueError("FakeQuantisation: expected one that is not attached. Call its `detach` first.")
        layers, ranges = dict(model.named_modules()), self.ranges
        missing = [name for name in ranges if not isinstance(layers.get(name), _LAYERS)]
        if missing or not ranges:
            got = f"without {missing[0]!r}" if missing else "that was not trained with it"
            raise ValueError(
                f"FakeQuantisation: expected the network that was trained with it, got {type(model).__name__} {got}."
            )

    def fix(self, model: nn.Module) -> None:
        """Round the weights of a copy for good, and its inputs with the ranges of training, so that it can be exported.

        Raises:
            ValueError: As `require_trained`.
        """
        self.require_trained(model)
        layers = dict(model.named_modules())
        for name in self.ranges:
            layer: Any = layers[name]
            with torch.no_grad():
                layer.weight.copy_(self._rounded_weight(layer.weight))
            step, zero = (value.cpu() for value in _step_and_zero(self._ranges[name]))
            layer.register_forward_pre_hook(partial(_fixed, step, zero), with_kwargs=True)

    def to_plain(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        ranges = {name: list(values) for name, values in self.ranges.items()}
        return {"format": _FORMAT, "weight_bits": self.weight_bits, "ranges": ranges}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> FakeQuantisation:
        """The object of which these are the plain values.

        Raises:
            ValueError: If they are of another form.
        """
        try:
            if plain["format"] != _FORMAT:
                raise ValueError(f"format {plain['format']!r}")
            made = cls(plain["weight_bits"])
            for name, (low, high) in plain["ranges"].items():
                made._ranges[str(name)] = torch.tensor([float(low), float(high)])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"FakeQuantisation: expected ranges of format {_FORMAT}, got others ({type(error).__name__}: {error}). "
                "The checkpoint is damaged or of another version of lightning-prune."
            ) from error
        return made

    # -- the hooks ----------------------------------------------------------------------------------------------------

    def _before(self, name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs: Tensor = args[0] if args else kwargs["input"]
        if layer.training:
            self._observe(name, inputs.detach())
        # Shadows the parameter until `_after`; the optimizer and `state_dict` do not see it.
        vars(layer)["weight"] = self._rounded_weight(layer.weight)
        if name not in self._ranges:  # it was not called in training
            return None
        step, zero = _step_and_zero(self._ranges[name])
        rounded = torch.fake_quantize_per_tensor_affine(inputs.float(), step, zero, _LOW, _HIGH).to(inputs.dtype)
        return _replaced(args, kwargs, rounded)

    def _observe(self, name: str, inputs: Tensor) -> None:
        low, high = inputs.float().aminmax()
        found = torch.stack([low, high])
        self._ranges[name] = torch.lerp(self._ranges.get(name, found), found, _MOMENTUM)

    def _rounded_weight(self, weight: Tensor) -> Tensor:
        top = 2 ** (self.weight_bits - 1) - 1
        steps = (weight.detach().float().abs().flatten(1).amax(1) / top).clamp(min=_SMALLEST)
        zeros = torch.zeros_like(steps, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight.float(), steps, zeros, 0, -top, top).to(weight.dtype)


def _after(layer: nn.Module, *_: Any) -> None:
    vars(layer).pop("weight", None)


def _step_and_zero(values: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of two values of a range, and the integer that stands for zero."""
    low, high = values[0].clamp(max=0), values[1].clamp(min=0)
    step = ((high - low) / (_HIGH - _LOW)).clamp(min=_SMALLEST)
    return step, (_LOW - low / step).round().clamp(_LOW, _HIGH).int()


def _fixed(step: Tensor, zero: Tensor, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Round inputs; exported, this is a pair of QuantizeLinear and DequantizeLinear, which PyTorch cannot trace."""
    inputs: Tensor = args[0] if args else kwargs["input"]
    if not torch.compiler.is_exporting():
        rounded = torch.fake_quantize_per_tensor_affine(inputs.float(), step, zero, _LOW, _HIGH).to(inputs.dtype)
    else:
        shape, whole = inputs.shape, zero.to(torch.int8)
        symbolic: Any = torch.onnx.ops.symbolic
        integers = symbolic("QuantizeLinear", (inputs, step, whole), {}, dtype=torch.int8, shape=shape)
        rounded = symbolic("DequantizeLinear", (integers, step, whole), {}, dtype=inputs.dtype, shape=shape)
    return _replaced(args, kwargs, rounded)


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((inputs, *args[1:]), kwargs) if args else ((), {**kwargs, "input": inputs})
