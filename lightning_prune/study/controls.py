"""Controls of a pruning run: what the same training would have given without it, seed by seed.

From random weights, the pruned run is compared with the narrow network that it ends with, trained from new weights at
equal epochs and at equal MACs, and with the dense network. From pretrained weights, with the dense network trained on
at equal MACs, and with `L1` at the same widths, trained on at equal epochs and at equal MACs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch

from lightning_prune.callbacks.network_pruning import NetworkPruning
from lightning_prune.callbacks.scheduled import ScheduledPruning
from lightning_prune.study.configurations import Cell, resumable, starting
from lightning_prune.study.recipe import Config, get
from lightning_prune.study.store import ARCHITECTURE, Result, Store
from lightning_prune.study.stretching import stretched
from lightning_prune.surgery import Drop, History, Keep, Replace

__all__ = [
    "PRUNED",
    "Checked",
    "ControlRun",
    "Controls",
    "cells_of",
    "define",
    "of_length",
    "seed_keys",
    "without_pruning",
]

#: The run that the controls belong to.
PRUNED = "pruned"
_DENSE, _DENSE_MACS = "dense, equal epochs", "dense, equal MACs"
_NARROW, _NARROW_MACS = "narrow from scratch, equal epochs", "narrow from scratch, equal MACs"
_L1, _L1_MACS = "L1 at the same widths, equal epochs", "L1 at the same widths, equal MACs"
_BY_START = {
    "random": (PRUNED, _DENSE, _NARROW, _NARROW_MACS),
    "pretrained": (PRUNED, _DENSE_MACS, _L1, _L1_MACS),
}

Start = Literal["random", "pretrained"]

# Arguments of a network that name weights to begin with.
_WEIGHTS = ("pretrained", "weights")

# Settings of a run that would make lengths unequal.
_LENGTHS = ("max_steps", "min_steps", "min_epochs", "max_time")


@dataclass(frozen=True)
class Controls:
    """A pruning run with its controls.

    Attributes:
        recipe: The complete configuration of ``fit``, see `controls_runner.resolve`.
        seeds: Every run is done once with each.
        start: Whether the network begins with ``"random"`` or ``"pretrained"`` weights.
        stretch: Keys of the recipe with a length in epochs or steps, which is scaled with the length of a control.
        metric: What is compared; by default the main metric of the run.
    """

    recipe: Config
    seeds: tuple[int, ...]
    start: Start
    stretch: tuple[str, ...] = ()
    metric: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the runs of a seed, the pruned one first."""
        return _BY_START[self.start]

    @property
    def epochs(self) -> int:
        """Epochs of the pruned run."""
        return int(self.recipe["trainer"]["max_epochs"])


@dataclass(frozen=True)
class Checked:
    """What is known before any training.

    Attributes:
        metric: What is compared.
        mode: Whether higher (``"max"``) or lower (``"min"``) is better.
        dense_macs: MACs of one training batch of the dense network.
    """

    metric: str
    mode: Literal["max", "min"]
    dense_macs: int


@dataclass(frozen=True)
class ControlRun:
    """A finished run.

    Attributes:
        name: One of `Controls.names`.
        seed: Its seed.
        result: What it gave.
    """

    name: str
    seed: int
    result: Result

    @property
    def macs(self) -> int:
        """MACs of the whole training."""
        return self.result.spent[-1]

    def last(self, metric: str) -> float:
        """The metric after the last epoch."""
        return self.result.curve[-1][metric]

    def best(self, checked: Checked) -> float:
        """The metric after the best epoch at the final size."""
        values = [
            row[checked.metric]
            for row, size in zip(self.result.curve, self.result.sizes, strict=True)
            if checked.metric in row and size == self.result.sizes[-1]
        ]
        return max(values) if checked.mode == "max" else min(values)


def define(
    recipe: Config,
    seeds: Sequence[int],
    start: Start | None = None,
    stretch: Sequence[str] = (),
    metric: str | None = None,
) -> Controls:
    """The pruning run of a configuration with its controls.

    Args:
        recipe: The complete configuration, see `controls_runner.resolve`.
        seeds: At least two.
        start: How the network begins; by default ``"pretrained"`` if the network's argument ``pretrained`` or
            ``weights`` is set.
        stretch: Further keys with lengths, such as ``["model.warmup_epochs"]``.
        metric: What to compare.

    Raises:
        ValueError: If there are too few seeds, or the run cannot have controls; the text says what to change.
    """
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(
            f"controls: expected at least two different seeds of at least 0, got {list(seeds)}: one difference has no "
            "interval. Give three or more."
        )
    callbacks = _callbacks(recipe)
    pruning = [one for one in callbacks if issubclass(_class_of(one), ScheduledPruning)]
    if not pruning:
        raise ValueError(
            "controls: expected a pruning callback in `trainer.callbacks`, got none. Give the recipe of a run that "
            "prunes, or add a method: --config RECIPE --config METHOD."
        )
    masking = [_name(one) for one in pruning if not issubclass(_class_of(one), NetworkPruning)]
    if masking:
        raise ValueError(
            f"controls: expected a method that removes units, got {masking[0]}, which masks weights, so that there is "
            "no narrow network to train. Use StructuredPruning or another that makes layers narrower."
        )
    stopping = [_name(one) for one in callbacks if "EarlyStopping" in _name(one)]
    trainer = recipe["trainer"]
    limited = [key for key in _LENGTHS if trainer.get(key) not in (None, -1)]
    if stopping or limited:
        raise ValueError(
            f"controls: expected runs whose length is `max_epochs` alone, got {', '.join([*stopping, *limited])}, so "
            "that their lengths could not be equal. Leave it out."
        )
    if not isinstance(trainer.get("max_epochs"), int) or trainer["max_epochs"] < 1:
        raise ValueError(
            f"controls: expected `trainer.max_epochs` of at least 1, got {trainer.get('max_epochs')}. Give the length."
        )
    if recipe.get("ckpt_path") is not None:
        raise ValueError(
            "controls: expected a run from its beginning, got `ckpt_path`, which resumes one. Give weights to begin "
            "with to the network, such as --model.pretrained FILE."
        )
    recipe = deepcopy(recipe)
    recipe["trainer"]["check_val_every_n_epoch"] = 1
    return Controls(recipe, tuple(seeds), start or _start(recipe), tuple(stretch), metric)


# -- the runs of a seed -----------------------------------------------------------------------------------------------


def cells_of(controls: Controls, checked: Checked, store: Store) -> Iterator[tuple[str, int, Cell]]:
    """Name, seed and cell of every run that can be made with what is finished."""
    for seed in controls.seeds:
        recipe = controls.recipe
        pruned = _cell(recipe, PRUNED, seed, keep="architecture")
        yield PRUNED, seed, pruned
        result = store.result(pruned)
        if result is None:
            continue  # what it costs and leaves is not known yet
        dense = without_pruning(recipe)
        if controls.start == "random":
            yield _DENSE, seed, _cell(dense, _DENSE, seed)
            names = (_NARROW, _NARROW_MACS)
        else:
            length = _length(controls, result, result.spent[-1] / checked.dense_macs)
            yield _DENSE_MACS, seed, _cell(of_length(dense, controls, *length), _DENSE_MACS, seed)
            names = (_L1, _L1_MACS)
        equal = _small(controls, pruned, store, names[0], seed, None)
        yield names[0], seed, equal
        small = store.result(equal)
        if small is not None:
            # An equal number of epochs says what a batch costs.
            length = _length(controls, result, result.spent[-1] / (small.spent[-1] / small.batches))
            yield names[1], seed, _small(controls, pruned, store, names[1], seed, length)


def _small(
    controls: Controls, pruned: Cell, store: Store, name: str, seed: int, length: tuple[int, int] | None
) -> Cell:
    """A network of the pruned one's widths, of equal epochs or of another length."""
    if controls.start == "random":
        return _narrow(controls, pruned, name, seed, length)
    return _l1(controls, pruned, store, name, seed, length)


def _narrow(controls: Controls, pruned: Cell, name: str, seed: int, length: tuple[int, int] | None) -> Cell:
    """The narrow network from new weights."""
    config = of_length(without_pruning(controls.recipe), controls, *(length or (controls.epochs, None)))
    config = resumable(config, seed, seed_keys(config))
    config = starting(config, seed, architecture=pruned.reference, rule="own")
    return Cell(config, f"{name}, seed {seed}", needs=(pruned,))


def _l1(controls: Controls, pruned: Cell, store: Store, name: str, seed: int, length: tuple[int, int] | None) -> Cell:
    """The network with the weights it began with, cut by `L1` to the same widths at once."""
    stored = torch.load(store.finished(pruned) / ARCHITECTURE, map_location="cpu", weights_only=True)
    ratios = _ratios(History.from_plain(stored))
    arguments: Config = {
        "pruning_ratio": ratios,
        "criterion": {"class_path": "lightning_prune.L1"},
        "schedule": {"class_path": "lightning_prune.OneShot", "init_args": {"at": 0, "unit": "step"}},
    }
    if 1.0 in ratios.values():
        arguments["scope"] = {"class_path": "lightning_prune.Scope", "init_args": {"min_width": 0}}
    config = without_pruning(controls.recipe)
    config["trainer"]["callbacks"].insert(
        0, {"class_path": "lightning_prune.StructuredPruning", "init_args": arguments}
    )
    config = of_length(config, controls, *(length or (controls.epochs, None)))
    return _cell(config, name, seed)


def _ratios(history: History) -> dict[str, float]:
    """Share of units that each group has lost."""
    if any(isinstance(edit, Replace) for edit in history.edits):
        raise ValueError(
            "controls: expected a method that removes units, got one that replaced modules, so that `L1` cannot reach "
            "the same widths. From random weights (--start random) there are controls for it."
        )
    dense = history.size.widths
    widths = dict(dense)
    for edit in history.edits:
        if isinstance(edit, Keep):
            widths |= {name: len(units) for name, units in edit.kept.items()}
        elif isinstance(edit, Drop):
            widths |= dict.fromkeys(edit.groups, 0)
    return {name: 1 - widths[name] / width for name, width in dense.items() if widths[name] < width}


def _length(controls: Controls, pruned: Result, batches: float) -> tuple[int, int]:
    """Epochs, and batches in each, for so many batches in all: whole epochs, shortened alike."""
    whole = pruned.batches // controls.epochs
    epochs = math.ceil(round(batches) / whole)
    return epochs, max(round(batches / epochs), 1)


def of_length(config: Config, controls: Controls, epochs: int, batches: int | None) -> Config:
    """The configuration for another length, with its schedules stretched to that."""
    config = stretched(config, epochs / controls.epochs, controls.stretch)
    config["trainer"]["max_epochs"] = epochs
    if batches is not None:
        config["trainer"]["limit_train_batches"] = batches
    return config


def _cell(config: Config, name: str, seed: int, keep: Literal["architecture"] | None = None) -> Cell:
    return Cell(resumable(config, seed, seed_keys(config)), f"{name}, seed {seed}", keep=keep)


def without_pruning(recipe: Config) -> Config:
    """The recipe without its pruning callbacks."""
    config = deepcopy(recipe)
    callbacks = _callbacks(recipe)
    config["trainer"]["callbacks"] = [one for one in callbacks if not issubclass(_class_of(one), ScheduledPruning)]
    return config


def seed_keys(config: Config) -> tuple[str, ...]:
    """The data's own seed, if it has one."""
    return ("data.seed",) if isinstance(get(config, "data.seed"), int) else ()


def _start(recipe: Config) -> Start:
    given = [get(recipe, f"model.{name}") for name in _WEIGHTS]
    return "pretrained" if any(value not in (None, False) for value in given) else "random"


def _callbacks(recipe: Config) -> list[Config]:
    given = recipe.get("trainer", {}).get("callbacks") or []
    listed = given if isinstance(given, list) else [given]
    return [{"class_path": one} if isinstance(one, str) else one for one in listed]


def _class_of(callback: Mapping[str, Any]) -> type:
    module, _, name = str(callback["class_path"]).rpartition(".")
    found: type = getattr(import_module(module or "lightning_prune"), name)
    return found


def _name(callback: Mapping[str, Any]) -> str:
    return str(callback["class_path"]).rpartition(".")[2]
