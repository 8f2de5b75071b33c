"""Definition of a study, read from ``study.yaml``: a recipe, a grid of hyperparameters, variants and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from lightning_prune.study.axes import Axis, Extent, axis_of
from lightning_prune.study.recipe import Config, get, read, set_value

__all__ = ["Pipeline", "Study", "Variant", "define", "load"]

#: How a network is pruned and trained, see `Variant`.
Pipeline = Literal["scratch", "finetune", "rewind", "initialisation", "training"]

# The thesis' words, and what they are called in a `Scope`.
_SCOPES: dict[str, Any] = {
    "uniform": "local",
    "non-uniform": {"class_path": "lightning_prune.Scope", "init_args": {"kind": "global", "normalize": "none"}},
}


@dataclass(frozen=True)
class Variant:
    """A variant of the network whose hyperparameters are studied.

    Attributes:
        name: How tables and pictures call it.
        remaining: Share of the FLOPs that remains, in (0, 1]; ``None`` for the unpruned network or a method that has
            its own amount.
        scope: ``"uniform"`` (one share of units for every layer), ``"non-uniform"`` (raw scores over all layers), or
            what the method's ``scope`` takes.
        method: The pruning callback, as in a recipe; by default `StructuredPruning` by `L1`.
        pipeline: ``"scratch"``: the architecture is cut once, from the network trained at the prior, and trains from
            new weights. ``"finetune"``: it trains on from the weights that were kept. ``"rewind"``: from the weights
            that were kept, as they were after ``epoch`` epochs. ``"initialisation"``: every run cuts before its first
            step. ``"training"``: every run cuts when the method's own schedule says so.
        epoch: Epochs of the training at the prior to rewind to; 0 for the weights it began with.
    """

    name: str
    remaining: float | None = None
    scope: Any = "uniform"
    method: Config | None = None
    pipeline: Pipeline = "scratch"
    epoch: int = 1

    def __post_init__(self) -> None:
        if self.remaining is not None and not 0 < self.remaining <= 1:
            raise ValueError(
                f"variants: {self.name}: expected `remaining` in (0, 1], the share of the FLOPs that remains, got "
                f"{self.remaining}."
            )
        if self.pipeline not in get_args(Pipeline):
            raise ValueError(
                f"variants: {self.name}: expected a `pipeline` of {', '.join(get_args(Pipeline))}, got "
                f"{self.pipeline!r}."
            )
        if self.epoch < 0:
            raise ValueError(f"variants: {self.name}: expected `epoch` of at least 0, got {self.epoch}.")

    @property
    def callback(self) -> Config | None:
        """The pruning callback with its amount and scope, as in a recipe; ``None`` for the unpruned network."""
        if self.method is None:
            return None
        arguments = dict(self.method.get("init_args", {}))
        if self.remaining is not None:
            arguments["budget"] = {"macs": self.remaining}
        if "scope" not in arguments:
            arguments["scope"] = _SCOPES.get(self.scope, self.scope) if isinstance(self.scope, str) else self.scope
        if self.pipeline != "training" and "schedule" not in arguments:
            arguments["schedule"] = {"class_path": "lightning_prune.OneShot", "init_args": {"at": 0}}
        return {"class_path": self.method["class_path"], "init_args": arguments}


@dataclass(frozen=True)
class Study:
    """A study: every variant at every point of the grid with every seed.

    Attributes:
        recipe: What all runs have in common, as ``lightning-prune fit`` takes it.
        axes: Two hyperparameters; a weight decay comes first, as in the thesis' figures.
        variants: Forms of the network; the first one is the unpruned.
        seeds: Every run is done once with each.
        metric: Logged share of right answers (top-1), in [0, 1], higher is better.
        top5: The same of the best five, if it is logged.
        most: Values that an axis may have after the grid was extended; the grid's own size = never extended.
        seed_keys: Keys of the recipe that take the seed, besides ``seed_everything``.
    """

    recipe: Config
    axes: tuple[Axis, Axis]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0,)
    metric: str = "val_acc"
    top5: str = "val_acc_top5"
    most: int = 0
    seed_keys: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"variants: expected different names, got {', '.join(twice)} more than once.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: expected different whole numbers of at least 0, got {list(self.seeds)}.")

    @property
    def extent(self) -> Extent:
        """The first grid."""
        return tuple(axis.reach for axis in self.axes)

    @property
    def unpruned(self) -> Variant:
        """The network that the others are compared with."""
        return self.variants[0]


def load(file: Path, find: Callable[[str], Path] = Path) -> Study:
    """Read a definition.

    Args:
        file: A ``study.yaml``.
        find: Gives the file of a recipe by its name.

    Raises:
        ValueError: If anything in it is unknown, missing or out of range; the text names the entry.
        FileNotFoundError: If there is no such file or recipe.
    """
    loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(loaded, dict):
        raise ValueError(f"expected a mapping of recipe, grid, variants, ... in {file}, got {loaded!r}")
    return define(loaded, lambda name: _file(name, file.parent, find))


def define(given: Mapping[str, Any], find: Callable[[str], Path]) -> Study:
    """The study that a definition describes, see :func:`load`."""
    entries = ("recipe", "grid", "variants", "seeds", "metric", "top5", "most", "seed_keys", "set")
    unknown = sorted(given.keys() - set(entries))
    if unknown:
        raise ValueError(f"expected the entries {', '.join(entries)}, got {', '.join(unknown)}.")
    recipe = _recipe(given, find)
    axes = _axes(given.get("grid"), recipe)
    largest = max(axis.points for axis in axes)
    most = int(given.get("most", largest))
    if most < largest:
        raise ValueError(f"most: expected at least the {largest} points of the first grid, got {most}.")
    return Study(
        recipe,
        axes,
        (Variant("unpruned"), *_variants(given.get("variants", []))),
        tuple(int(seed) for seed in given.get("seeds", [0])),
        str(given.get("metric", Study.metric)),
        str(given.get("top5", Study.top5)),
        most,
        tuple(given.get("seed_keys", ())),
    )


def _recipe(given: Mapping[str, Any], find: Callable[[str], Path]) -> Config:
    names = given.get("recipe")
    if not names:
        raise ValueError("recipe: expected a recipe's name or file, or a list of them, got nothing.")
    if isinstance(names, Mapping):
        recipe: Config = deepcopy(dict(names))
    else:
        recipe = read([find(str(name)) for name in ([names] if isinstance(names, str) else names)])
    for key, value in (given.get("set") or {}).items():
        set_value(recipe, key, value)
    return recipe


def _axes(grid: Mapping[str, Any] | None, recipe: Config) -> tuple[Axis, Axis]:
    if not grid:
        where = "optimizer" if "optimizer" in recipe else "model"
        grid = {f"{where}.weight_decay": {}, f"{where}.lr": {}}
    axes = [axis_of(key, settings or {}, get(recipe, key)) for key, settings in grid.items()]
    if len(axes) != 2:
        raise ValueError(f"grid: expected two hyperparameters, got {', '.join(grid)}. Fix the others by `set`.")
    first, second = sorted(axes, key=lambda axis: axis.name != "weight_decay")
    return first, second


def _variants(given: Sequence[Mapping[str, Any]]) -> list[Variant]:
    """Every combination of the entries that are lists."""
    known = {each.name for each in fields(Variant)}
    found = []
    for entry in given:
        unknown = sorted(entry.keys() - known)
        if unknown:
            raise ValueError(f"variants: expected {', '.join(sorted(known))}, got {', '.join(unknown)}.")
        lists = {key: value if isinstance(value, list) else [value] for key, value in entry.items()}
        found += [_variant(dict(zip(lists, values, strict=True))) for values in product(*lists.values())]
    return found


def _variant(entry: dict[str, Any]) -> Variant:
    method = entry.pop("method", "lightning_prune.StructuredPruning")
    method = {"class_path": method} if isinstance(method, str) else dict(method)
    if not isinstance(method.get("class_path"), str):
        raise ValueError(f"variants: expected `method` to be a callback (class_path, init_args), got {method}.")
    name = entry.pop("name", None) or _name(entry, method)
    return Variant(name, method=method, **entry)


def _name(entry: Mapping[str, Any], method: Config) -> str:
    """As in the thesis' tables: ``60% uniform``; whatever is not the default follows."""
    words = [f"{100 * entry['remaining']:g}%"] if entry.get("remaining") is not None else []
    scope = entry.get("scope", "uniform")
    words.append(scope if isinstance(scope, str) else str(scope.get("init_args", scope).get("kind", "scope")))
    kind, criterion = method["class_path"].rpartition(".")[2], get(method, "criterion")
    words += [kind] if kind != "StructuredPruning" else []
    if criterion is not None:
        path = criterion if isinstance(criterion, str) else str(criterion["class_path"])
        words += [] if path.rpartition(".")[2] == "L1" else [path.rpartition(".")[2]]
    pipeline = entry.get("pipeline", "scratch")
    words += (
        [f"{pipeline} {entry.get('epoch', 1)}" if pipeline == "rewind" else pipeline] if pipeline != "scratch" else []
    )
    return " ".join(words)


def _file(name: str, home: Path, find: Callable[[str], Path]) -> Path:
    """Find a file next to the definition, in the working folder, or among the recipes of the package."""
    beside = home / name
    if beside.is_file():
        return beside
    return Path(name) if Path(name).is_file() else find(name)
