"""The configuration of every run of a study: plain ``lightning-prune fit``, hashed to the name of its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_prune.study.axes import Extent, Point, points
from lightning_prune.study.definition import Study, Variant
from lightning_prune.study.recipe import Config, set_value

__all__ = ["FORMAT", "Cell", "cells", "cut_of", "preparations", "prior", "resumable", "run", "starting"]

#: Version of what a cell's folder and the table hold. A cell of another version has another name, so it is run again.
FORMAT = 1

_START = "lightning_prune.study.InitialNetwork"
_CHECKPOINT = "ModelCheckpoint"


@dataclass(frozen=True, eq=False)
class Cell:
    """One run.

    Attributes:
        config: Input of ``lightning-prune fit --config``. ``@<key>`` is a placeholder of the file that another cell
            writes.
        label: How it is called where it is talked about.
        keep: What it leaves for other cells: the trained ``"weights"``, or the ``"architecture"`` of a cut.
        needs: Cells whose files it starts from.
    """

    config: Config
    label: str
    keep: Literal["weights", "architecture"] | None = None
    needs: tuple[Cell, ...] = ()

    @property
    def key(self) -> str:
        """Name of its folder: the hash of its whole configuration, that of the cells it starts from included."""
        text = json.dumps({"format": FORMAT, "config": self.config}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def reference(self) -> str:
        """Placeholder of the file it writes, for configurations of other cells."""
        return f"@{self.key}"

    def with_files(self, files: dict[str, str]) -> Config:
        """The configuration with the files of other cells, by their keys, in place of their names."""
        replaced: Config = _replaced(self.config, {f"@{key}": file for key, file in files.items()})
        return replaced


def run(study: Study, variant: Variant, point: Point, seed: int) -> Cell:
    """One variant at one point of the grid with one seed."""
    config = _at(study, point, seed)
    values = ", ".join(f"{axis.name} {axis.value(steps):g}" for axis, steps in zip(study.axes, point, strict=True))
    label = f"{variant.name}, {values}, seed {seed}"
    callback = variant.callback
    if callback is None:
        return Cell(starting(config, seed), label)
    if variant.pipeline in ("initialisation", "training"):
        config["trainer"]["callbacks"].append(callback)
        return Cell(starting(config, seed), label)
    cut = cut_of(study, variant)
    if variant.pipeline == "rewind" and variant.epoch == 0:
        # All seeds go back to the weights that the training at the prior began with, as they do for a later epoch.
        return Cell(starting(config, study.seeds[0], architecture=cut.reference, dense=True), label, needs=(cut,))
    weights = _weights(study, variant)
    config = starting(config, seed, architecture=cut.reference, weights=weights.reference if weights else None)
    return Cell(config, label, needs=(cut, *((weights,) if weights else ())))


def prior(study: Study, epochs: int | None = None) -> Cell:
    """The unpruned network trained at the prior with the first seed, or its first epochs; its weights are kept."""
    cell = run(study, study.unpruned, (0,) * len(study.axes), study.seeds[0])
    config, label = deepcopy(cell.config), cell.label
    if epochs is not None:
        set_value(config, "trainer.max_epochs", epochs)
        label += f", {epochs} epochs"
    return Cell(config, label, keep="weights")


def cut_of(study: Study, variant: Variant) -> Cell:
    """The cut that gives a variant its architecture, from the network trained at the prior."""
    trained = prior(study)
    config = _at(study, (0,) * len(study.axes), study.seeds[0])
    config["trainer"]["callbacks"].append(variant.callback)
    config["trainer"] |= {"max_epochs": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    if _cuts_at_once(variant):
        config["trainer"]["limit_train_batches"] = 1
    config = starting(config, study.seeds[0], weights=trained.reference)
    return Cell(config, f"{variant.name}, its cut", keep="architecture", needs=(trained,))


def preparations(study: Study) -> tuple[list[Cell], list[Cell]]:
    """Cells trained and pruned before the grid, each once."""
    cuts = {cell.key: cell for variant in study.variants for cell in _needed(study, variant) if cell.needs}
    weights = {cell.key: cell for variant in study.variants for cell in _needed(study, variant) if not cell.needs}
    weights |= {cell.key: cell for cut in cuts.values() for cell in cut.needs}
    return list(weights.values()), list(cuts.values())


def cells(study: Study, extent: Extent) -> Iterator[tuple[Variant, Point, int, Cell]]:
    """Every run of a grid, point by point, so that partial results are useful."""
    # Variants may be added later, which then start from this run: its weights are kept in any case.
    kept = {cell.key: cell for group in (*preparations(study), [prior(study)]) for cell in group}
    for point in _outwards(points(extent)):
        for seed in study.seeds:
            for variant in study.variants:
                cell = run(study, variant, point, seed)
                # The run at the prior is also the one that others start from.
                yield variant, point, seed, replace(cell, keep=kept[cell.key].keep) if cell.key in kept else cell


def _needed(study: Study, variant: Variant) -> tuple[Cell, ...]:
    return run(study, variant, (0,) * len(study.axes), study.seeds[0]).needs


def _weights(study: Study, variant: Variant) -> Cell | None:
    if variant.pipeline == "scratch":
        return None
    return prior(study, variant.epoch if variant.pipeline == "rewind" else None)


def _cuts_at_once(variant: Variant) -> bool:
    schedule = (variant.callback or {}).get("init_args", {}).get("schedule")
    return isinstance(schedule, dict) and schedule.get("init_args", {}).get("at") == 0


def resumable(recipe: Config, seed: int, seed_keys: Iterable[str]) -> Config:
    """The recipe with a seed, and with one checkpoint after each epoch to resume from and no other."""
    config = deepcopy(recipe)
    config.pop("name", None)
    config["seed_everything"] = seed
    for key in seed_keys:
        set_value(config, key, seed)
    trainer = config.setdefault("trainer", {})
    given = trainer.get("callbacks") or []
    others = [each for each in (given if isinstance(given, list) else [given]) if _class(each) != _CHECKPOINT]
    trainer["callbacks"] = [{"class_path": _CHECKPOINT, "init_args": {"filename": "last"}}, *others]
    return config


def starting(config: Config, seed: int, **arguments: str | bool | None) -> Config:
    """The configuration with an `InitialNetwork` in front of its callbacks; it is changed in place."""
    given = {name: value for name, value in arguments.items() if value}
    start = {"class_path": _START, "init_args": {"seed": seed, **given}}
    config["trainer"]["callbacks"].insert(0, start)
    return config


def _at(study: Study, point: Point, seed: int) -> Config:
    """The recipe at a point of the grid."""
    config = resumable(study.recipe, seed, study.seed_keys)
    for axis, steps in zip(study.axes, point, strict=True):
        set_value(config, axis.key, axis.value(steps))
    return config


def _class(callback: Any) -> str:
    path = callback.get("class_path", "") if isinstance(callback, dict) else str(callback)
    return str(path).rpartition(".")[2]


def _outwards(grid: Iterable[Point]) -> list[Point]:
    """Sort points by their distance from the prior."""
    return sorted(grid, key=lambda point: (max(map(abs, point)), point))


def _replaced(node: Any, files: dict[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _replaced(value, files) for key, value in node.items()}
    if isinstance(node, list):
        return [_replaced(value, files) for value in node]
    return files.get(node, node) if isinstance(node, str) else node
