"""The convolutional backbone of a classifier, layer by layer, and the head behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_prune.structure.layers import canonical, is_within, tensors

__all__ = ["Backbone", "ConvolutionalLayer", "head_error", "is_convolution", "is_norm"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def is_convolution(module: nn.Module) -> bool:
    """Whether the module is a convolution, transposed or not, of any number of dimensions."""
    return isinstance(module, nn.modules.conv._ConvNd)


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises: over the batch, the instance, groups of channels or the layer."""
    return isinstance(module, _NORMS)


@dataclass(frozen=True, eq=False)
class ConvolutionalLayer:
    """A convolution with its norm and all other modules with parameters up to the next convolution.

    Attributes:
        name: Name of the convolution.
        modules: Modules of the layer that own parameters or buffers, by name.
    """

    name: str
    modules: Mapping[str, nn.Module]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the layer by name."""
        return dict(_parameters(self.modules))

    @property
    def norms(self) -> dict[str, nn.Module]:
        """Normalisation layers by name."""
        return {name: module for name, module in self.modules.items() if is_norm(module)}


@dataclass(frozen=True, eq=False)
class Backbone:
    """The convolutional layers of a network in order, and its head.

    The order is that in which the modules are registered, which is the order of a forward pass in torchvision's and
    timm's networks and in ours. A norm belongs to the convolution before it (also in networks such as DenseNet, whose
    blocks normalise their input), and so does everything else with parameters up to the next convolution. Parameters
    that a block holds itself belong to its first convolution.

    Attributes:
        layers: The convolutional layers, the first one first.
        head: All other modules that own parameters or buffers, by name: the classifier.
    """

    layers: tuple[ConvolutionalLayer, ...]
    head: Mapping[str, nn.Module]

    @classmethod
    def of(cls, model: nn.Module, head: str | Iterable[str] | None = None) -> Backbone:
        """The backbone of a network.

        Args:
            model: The network.
            head: Names or globs of the modules (with their submodules) that form the head. By default everything
                after the last convolution and the norms right behind it.
        """
        patterns = () if head is None else (head,) if isinstance(head, str) else tuple(head)
        layers: list[tuple[str, dict[str, nn.Module]]] = []
        found: dict[str, nn.Module] = {}  # of the head
        waiting: dict[str, nn.Module] = {}  # for the next convolution
        for name, module in _own_tensors(model):
            if not name or _inside(name, patterns):
                found[name] = module
            elif is_convolution(module):
                layers.append((name, {**waiting, name: module}))
                waiting = {}
            elif not layers or any(map(is_convolution, module.modules())):
                waiting[name] = module
            else:
                layers[-1][1][name] = module
        found |= waiting
        if layers and not patterns:
            name, last = layers[-1]
            mine = _up_to_the_norm(name, last)
            found = {**{key: module for key, module in last.items() if key not in mine}, **found}
            layers[-1] = (name, mine)
        return cls(tuple(ConvolutionalLayer(name, modules) for name, modules in layers), found)

    @property
    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the head by name."""
        return dict(_parameters(self.head))


def head_error(model: nn.Module, head: str | Iterable[str] | None) -> str | None:
    """An error message if no module matches one of the names or globs of a head, else None."""
    patterns = () if head is None else (head,) if isinstance(head, str) else tuple(head)
    names = [canonical(name) for name, _ in model.named_modules() if name]
    strange = [pattern for pattern in patterns if not any(_inside(name, (pattern,)) for name in names)]
    if not strange:
        return None
    outermost = ", ".join(name for name, _ in model.named_children())
    return f"expected names of modules as `head`, got {', '.join(map(repr, strange))}. The outermost are {outermost}."


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that own parameters or buffers, by canonical name, in the order of registration."""
    for name, module in model.named_modules():
        if tensors(module):
            yield canonical(name), module


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in modules.items():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{name}.{own}" if name else own, parameter


def _inside(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module or one of its parents matches one of the patterns."""
    parts = name.split(".")
    outer = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    return any(fnmatchcase(one, pattern) for pattern in patterns for one in outer)


def _up_to_the_norm(convolution: str, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules before and inside the convolution, and the norms right after it."""
    mine: dict[str, nn.Module] = {}
    is_behind = False
    for name, module in modules.items():
        inside = is_within(name, (convolution,))
        if is_behind and not inside and not is_norm(module):
            break
        mine[name] = module
        is_behind = is_behind or inside
    return mine
