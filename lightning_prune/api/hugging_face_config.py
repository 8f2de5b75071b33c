"""The configuration that builds a transformers model as wide as a pruned one, where there is one."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import PruningError
from lightning_prune.extras import require
from lightning_prune.structure.traced_model import first_line
from lightning_prune.surgery.tensors import named

__all__ = ["ConfigError", "FittedConfig", "built", "fit_config", "quiet_transformers"]

#: Names of sub-configurations, of an integer, and its position where it is in a list.
Place = tuple[str | int, ...]
Changes = dict[Place, int]
#: What a change of a tensor that was not cut counts, in numbers that it sets right.
_WRONG = 1000


class ConfigError(PruningError, ValueError):
    """Raised where no configuration builds a network of these widths; the message says why."""


@dataclass(frozen=True, eq=False)
class FittedConfig:
    """A configuration that builds networks as wide as a pruned one.

    Attributes:
        config: The configuration.
        changes: Its integers that differ from the dense network's, by name such as ``"vision_config.hidden_size"``.
        network: The network that it builds, on the meta device.
    """

    config: Any
    changes: Mapping[str, int]
    network: Any


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the log messages and progress bars of transformers."""
    logging = require("transformers.utils.logging", extra="transformers")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def built(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """The network of a configuration, on the meta device and in eval mode.

    Raises:
        ConfigError: If it cannot be built.
    """
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config)).eval()
    except Exception as error:  # a constructor may raise anything
        raise ConfigError(f"it cannot be built ({type(error).__name__}: {first_line(error)})") from error


def fit_config(model: Any) -> FittedConfig:
    """Find the configuration that builds a network as wide as ``model``.

    Integers of the configuration, of its sub-configurations and of lists in it are set to values that follow from the
    lengths of axes that were cut. Of these changes, those are kept with which the network that is built comes closest,
    until all its shapes are those of ``model``. Whether it also computes the same is left to the caller.

    Args:
        model: A pruned transformers model, with the configuration of the dense one.

    Raises:
        ConfigError: If there is none.
    """
    search = _Search(model)
    search.require_one_width()
    changes = search.fit()
    config = search.config(changes)
    try:
        config.validate()
    except Exception as error:
        reason = " ".join(str(error).split())  # the first of several lines names the check only
        raise ConfigError(f"{type(config).__name__} does not accept {_shown(changes)}: {reason}") from error
    return FittedConfig(config, {_name(place): value for place, value in changes.items()}, built(type(model), config))


@dataclass(frozen=True)
class _Sizes:
    """Shapes of a network's tensors, and numbers in attributes of its modules, by name."""

    shapes: Mapping[str, tuple[int, ...]]
    numbers: Mapping[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> _Sizes:
        shapes = {name: tuple(tensor.shape) for name, tensor in named(model).items()}
        numbers = {
            f"{prefix}.{own}": value
            for prefix, module in model.named_modules()
            for own, value in vars(module).items()
            if type(value) in (int, float) or (isinstance(value, (tuple, list)) and value and type(value[0]) is int)
        }
        return cls(shapes, numbers)

    def differing(self, other: _Sizes) -> list[str]:
        """Names of the tensors with other shapes, of the same tensors."""
        return [name for name, shape in sorted(self.shapes.items()) if shape != other.shapes[name]]

    def distance(self, other: _Sizes) -> int:
        """Number of lengths and numbers that differ."""
        lengths = sum(
            a != b for name in self.differing(other) for a, b in zip(self.shapes[name], other.shapes[name], strict=True)
        )
        return lengths + sum(bool(value != other.numbers.get(name)) for name, value in self.numbers.items())


class _Search:
    """The search for a configuration by building networks on the meta device."""

    def __init__(self, model: Any) -> None:
        self._kind, self._dense = type(model), model.config
        self._wanted, self._start = _Sizes.of(model), _Sizes.of(built(type(model), model.config))
        self._known: dict[frozenset[tuple[Place, int]], _Sizes | None] = {}
        if others := self._wanted.shapes.keys() ^ self._start.shapes.keys():
            raise ConfigError(f"layers were removed or replaced, with which {min(others)} came or went")

    def require_one_width(self) -> None:
        """Check that layers that repeat each other have one width, since the configuration has one number for them."""
        first: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = {}
        for name, shape in self._wanted.shapes.items():
            layer = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
            known, other = first.setdefault((layer, self._start.shapes[name]), (name, shape))
            if other != shape:
                raise ConfigError(
                    f"{known} is {list(other)} and {name} {list(shape)}, but the configuration has one number for both"
                )

    def fit(self) -> Changes:
        """The changes with which all shapes are those of the pruned network."""
        pinned = {place: width for place, width in _head_widths(self._dense) if self._accepts({place: width})}
        changes, moves = dict(pinned), list(self._moves())
        best = self._distance(changes)
        while best:
            distance, closest = min(
                ((self._distance(step), step) for step in ({**changes, place: value} for place, value in moves)),
                key=lambda pair: pair[0],
                default=(best, changes),
            )
            if distance >= best:
                break
            best, changes = distance, closest
        if names := self._differing(changes):
            shape = list(self._wanted.shapes[names[0]])
            raise ConfigError(f"no numbers of {type(self._dense).__name__} give {names[0]} the shape {shape}")
        for place in pinned:
            less = {other: value for other, value in changes.items() if other != place}
            changes = less if self._distance(less) == best else changes
        return changes

    def config(self, changes: Changes) -> Any:
        """The configuration with these changes."""
        config = copy.deepcopy(self._dense)
        for place, value in changes.items():
            names = [part for part in place if isinstance(part, str)]
            owner = config
            for name in names[:-1]:
                owner = getattr(owner, name)
            setattr(owner, names[-1], _with(getattr(owner, names[-1], None), place[len(names) :], value))
        return config

    def _distance(self, changes: Changes) -> float:
        """How far the network that is built is from the pruned one; infinite if it cannot be built."""
        sizes = self._sizes(changes)
        return float("inf") if sizes is None else self._wanted.distance(sizes) + _WRONG * self._wrong(sizes)

    def _wrong(self, sizes: _Sizes) -> int:
        """Number of tensors that were not cut, and have another shape."""
        return sum(
            shape == self._start.shapes[name] != sizes.shapes[name] for name, shape in self._wanted.shapes.items()
        )

    def _accepts(self, changes: Changes) -> bool:
        return self._sizes(changes) is not None

    def _differing(self, changes: Changes) -> list[str]:
        sizes = self._sizes(changes)
        return sorted(self._wanted.shapes) if sizes is None else self._wanted.differing(sizes)

    def _sizes(self, changes: Changes) -> _Sizes | None:
        """Sizes of the network with these changes, if it can be built and has the same tensors."""
        key = frozenset(changes.items())
        if key not in self._known:
            self._known[key] = self._built_sizes(changes)
        return self._known[key]

    def _built_sizes(self, changes: Changes) -> _Sizes | None:
        try:
            found = _Sizes.of(built(self._kind, self.config(changes)))
        except Exception:  # the configuration or the network does not accept a number
            return None
        return found if found.shapes.keys() == self._wanted.shapes.keys() else None

    def _moves(self) -> Iterator[tuple[Place, int]]:
        """Integers that may have changed, each with the values that follow from an axis that was cut."""
        lengths = {
            (dense, now)
            for name, shape in self._wanted.shapes.items()
            for dense, now in zip(self._start.shapes[name], shape, strict=True)
            if dense != now
        }
        for place, value in _integers(self._dense):
            if value is None:
                found = {now for _, now in lengths}
            else:
                found = {value * now // dense for dense, now in lengths if value * now % dense == 0} - {0, value}
            yield from ((place, number) for number in sorted(found))


def _configs(config: Any, around: Place = ()) -> Iterator[tuple[Place, Any]]:
    """A configuration and its sub-configurations, by place."""
    kind = require("transformers", extra="transformers").PreTrainedConfig
    yield around, config
    for name, value in vars(config).items():
        if isinstance(value, kind) and not name.startswith("_"):
            yield from _configs(value, (*around, name))


def _head_widths(config: Any) -> Iterator[tuple[Place, int]]:
    """Widths of attention heads that are not written but follow from the number of heads, by place."""
    for around, owner in _configs(config):
        width, heads = getattr(owner, "hidden_size", None), getattr(owner, "num_attention_heads", None)
        if type(width) is int and type(heads) is int and heads and getattr(owner, "head_dim", None) is None:
            yield (*around, "head_dim"), width // heads


def _integers(config: Any) -> Iterator[tuple[Place, int | None]]:
    """Integers of a configuration, those in lists and those that are not set, by place."""
    for around, owner in _configs(config):
        fields = getattr(type(owner), "__dataclass_fields__", {})
        for name, value in vars(owner).items():
            may_be_set = value is None and name in fields and "int" in str(fields[name].type)
            if name.startswith("_"):
                continue
            if type(value) is int or may_be_set:
                yield (*around, name), value
            elif isinstance(value, (list, tuple)) and all(type(number) is int for number in value):
                yield from (((*around, name, at), number) for at, number in enumerate(value))


def _with(found: Any, at: Iterable[str | int], value: int) -> Any:
    """The value of an attribute, or the list that stands there with the value at a position."""
    for position in at:
        return type(found)(value if here == position else number for here, number in enumerate(found))
    return value


def _name(place: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _shown(changes: Changes) -> str:
    return ", ".join(f"{_name(place)}={value}" for place, value in changes.items())
