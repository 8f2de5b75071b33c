"""Specs of layers in plain data, from which replaced layers are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lightning_prune.surgery import plain
from lightning_prune.surgery.options import KINDS, Option, require_options

__all__ = ["LayerSpec", "spec_of"]

_SEQUENTIAL = "Sequential"


@dataclass(frozen=True)
class LayerSpec:
    """Description of a PyTorch layer, or a sequence of layers, without weights.

    Attributes:
        kind: Name of its class in ``torch.nn``: one of `KINDS`, or ``"Sequential"``.
        options: Arguments of the class by name, in plain data; the class's defaults if missing.
        layers: Layers of a ``"Sequential"``.

    Raises:
        ValueError: For an unknown kind or option, or an invalid value.

    Example:
        >>> LayerSpec("Linear", {"in_features": 4, "out_features": 2}).build()
        Linear(in_features=4, out_features=2, bias=True)
    """

    kind: str
    options: Mapping[str, Option] = field(default_factory=dict)
    layers: tuple[LayerSpec, ...] = ()

    def __post_init__(self) -> None:
        _require_types(self.kind, self.options, self.layers)
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.kind == _SEQUENTIAL:
            if self.options:
                raise ValueError(f"expected no options of a Sequential, got {', '.join(self.options)}")
            return
        if self.kind not in KINDS:
            raise ValueError(f"expected a layer of a known kind ({', '.join(KINDS)}, Sequential), got {self.kind!r}")
        if self.layers:
            raise ValueError(f"expected layers inside of a Sequential only, got some in a {self.kind}")
        given = {name: _as_tuple(value) for name, value in self.options.items()}
        require_options(self.kind, given)
        try:
            module = _make(self.kind, given, "meta")
        except (TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{self} cannot be built ({type(error).__name__}: {error})") from error
        # All options are stored, as defaults may change in later versions of PyTorch.
        object.__setattr__(self, "options", {name: _as_tuple(_read(module, name)) for name in KINDS[self.kind]})

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
        """Build the layer with its default initialization.

        Args:
            device: Device of its tensors.
            dtype: Dtype of its floating-point tensors; PyTorch's default if None.
        """
        module = self._built(device)
        return module if dtype is None else module.to(dtype)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer, by name."""
        module = self._built("meta")
        return {name: tuple(t.shape) for name, t in [*module.named_parameters(), *module.named_buffers()]}

    def to_plain(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        if self.kind == _SEQUENTIAL:
            return {"kind": self.kind, "layers": [layer.to_plain() for layer in self.layers]}
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in self.options.items()}
        return {"kind": self.kind, "options": options}

    @classmethod
    def from_plain(cls, found: object) -> LayerSpec:
        """Read what `to_plain` returned.

        Raises:
            HistoryError: If it is damaged or of an unknown kind.
        """
        top: dict[str, Any] = plain.value(found, dict, "a layer")
        kind = plain.entry(top, "kind", str)
        layers = plain.entry(top, "layers", list) if kind == _SEQUENTIAL else []
        options = {} if kind == _SEQUENTIAL else plain.entry(top, "options", dict)
        for name in options:
            plain.value(name, str, f"an option of a {kind}")
        inside = tuple(cls.from_plain(layer) for layer in layers)
        try:
            return cls(kind, options, inside)
        except ValueError as error:
            raise plain.damaged(str(error)) from error

    def __str__(self) -> str:
        inside = ", ".join(map(str, self.layers)) or ", ".join(f"{n}={v}" for n, v in self.options.items())
        return f"{self.kind}({inside})"

    def _built(self, device: torch.device | str) -> nn.Module:
        if self.kind == _SEQUENTIAL:
            return nn.Sequential(*(layer._built(device) for layer in self.layers))
        return _make(self.kind, self.options, device)


def spec_of(module: nn.Module, **changes: Option) -> LayerSpec:
    """Create the spec of a layer.

    Args:
        module: A layer of a kind in `KINDS`, or a ``nn.Sequential`` of such layers; no subclasses.
        **changes: Options to change: ``spec_of(conv, in_channels=64)``.

    Raises:
        ValueError: If the layer is of another kind, or has no such option.

    Example:
        >>> spec_of(torch.nn.Linear(8, 2), in_features=5).build()
        Linear(in_features=5, out_features=2, bias=True)
    """
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return replace(LayerSpec(_SEQUENTIAL, changes), layers=tuple(spec_of(layer) for layer in module))
    kind = type(module).__name__
    if kind not in KINDS or type(module) is not getattr(nn, kind):
        raise ValueError(
            f"expected a layer of a known kind ({', '.join(KINDS)}, or a Sequential of them), got "
            f"{type(module).__module__}.{type(module).__qualname__}: it cannot be described in plain data"
        )
    options = {name: _read(module, name) for name in KINDS[kind]}
    return LayerSpec(kind, {**options, **changes})


def _make(kind: str, options: Mapping[str, Option], device: torch.device | str) -> nn.Module:
    build: Callable[..., nn.Module] = getattr(nn, kind)
    with torch.device(device):
        return build(**options)


def _read(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    return value is not None if name == "bias" else value


def _require_types(kind: object, options: object, layers: object) -> None:
    if not isinstance(options, Mapping):
        raise ValueError(f"expected the options of a {kind} by name, got {type(options).__name__}")
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(f"expected the layers of a {kind} as a sequence of LayerSpec, got {type(layers).__name__}")
    for layer in layers:
        if not isinstance(layer, LayerSpec):
            raise ValueError(f"expected the layers of a {kind} to be LayerSpec, got a {type(layer).__name__}")


def _as_tuple(value: Any) -> Any:
    """A size as it is kept; lists are what plain data have."""
    return tuple(value) if isinstance(value, list) else value
