"""Definitions: what they become, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_prune.cli import recipes
from lightning_prune.study.configurations import cut_of, preparations, prior, run
from lightning_prune.study.definition import define, load
from lightning_prune.study.recipe import get, merge, set_value
from tests.study.surfaces import RECIPE, study

STUDIES = sorted((recipes.folder() / "studies").glob("*.yaml"))


def test_values_are_set_as_on_the_command_line() -> None:
    config: dict[str, Any] = {
        "model": "MLPClassifier",
        "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}},
        "trainer": {"callbacks": [{"class_path": "ModelCheckpoint"}, {"class_path": "StructuredPruning"}]},
    }
    for key, value in (
        ("model.lr", 1.0),
        ("optimizer.lr", 0.2),
        ("trainer.callbacks.ignore", "head"),
        ("data.seed", 3),
    ):
        set_value(config, key, value)
        assert get(config, key) == value
    assert config["model"] == {"class_path": "MLPClassifier", "init_args": {"lr": 1.0}}
    assert config["optimizer"]["init_args"] == {"lr": 0.2}
    assert config["trainer"]["callbacks"][1] == {"class_path": "StructuredPruning", "init_args": {"ignore": "head"}}
    assert get(config, "model.nothing") is get(config, "nothing.at.all") is None


def test_later_recipes_win() -> None:
    first = {"trainer": {"max_epochs": 3, "callbacks": [1, 2]}, "data": "Digits"}
    assert merge(first, {"trainer": {"callbacks": [3]}}) == {
        "trainer": {"max_epochs": 3, "callbacks": [3]},
        "data": "Digits",
    }
    assert first["trainer"] == {"max_epochs": 3, "callbacks": [1, 2]}


def test_variants_are_every_combination() -> None:
    found = study(
        variants=[
            {"remaining": [0.6, 0.2], "scope": ["uniform", "non-uniform"]},
            {"remaining": 0.5, "pipeline": "finetune"},
        ]
    )
    names = ["unpruned", "60% uniform", "60% non-uniform", "20% uniform", "20% non-uniform", "50% uniform finetune"]
    assert [variant.name for variant in found.variants] == names
    callback = found.variants[4].callback
    assert callback is not None
    assert callback["init_args"] == {
        "budget": {"macs": 0.2},
        "scope": {"class_path": "lightning_prune.Scope", "init_args": {"kind": "global", "normalize": "none"}},
        "schedule": {"class_path": "lightning_prune.OneShot", "init_args": {"at": 0}},
    }
    assert found.unpruned.callback is None


def test_learning_rate_and_weight_decay_by_default() -> None:
    found = define({"recipe": RECIPE}, Path)
    assert [(axis.key, axis.prior, axis.points, axis.step) for axis in found.axes] == [
        ("model.weight_decay", 1e-3, 9, 0.2),
        ("model.lr", 0.1, 9, 0.2),
    ]
    with_optimizer = RECIPE | {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.2, "weight_decay": 1e-4}}}
    assert [axis.key for axis in define({"recipe": with_optimizer}, Path).axes] == [
        "optimizer.weight_decay",
        "optimizer.lr",
    ]


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"variant": []}, "entries recipe, grid, .* got variant"),
        ({"recipe": None}, "a recipe's name or file"),
        ({"grid": {"model.lr": {"points": 1}, "model.weight_decay": {}}}, "odd number of `points` of at least 3"),
        ({"grid": {"model.lr": {}}}, "two hyperparameters, got model.lr"),
        (
            {"grid": {"model.lr": {"size": 3}, "model.weight_decay": {}}},
            "expected prior, step, points and scale, got size",
        ),
        ({"grid": {"model.lr": {}, "model.momentum": {}}}, "model.momentum: expected a `prior`"),
        ({"grid": {"model.lr": {"step": "wide"}, "model.weight_decay": {}}}, "expected numbers"),
        ({"variants": [{"remaining": 1.5}]}, r"`remaining` in \(0, 1\]"),
        ({"variants": [{"remaining": 0.5, "pipeline": "never"}]}, "expected a `pipeline` of scratch, finetune"),
        ({"variants": [{"remaining": 0.5, "pipeline": "rewind", "epoch": -1}]}, "`epoch` of at least 0"),
        ({"variants": [{"ratio": 0.5}]}, "variants: expected .* got ratio"),
        ({"variants": [{"remaining": 0.5}, {"remaining": 0.5}]}, "different names, got 50% uniform"),
        ({"variants": [{"remaining": 0.5, "method": {"init_args": {}}}]}, "`method` to be a callback"),
        ({"seeds": []}, "different whole numbers"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"most": 2}, "at least the 3 points"),
    ],
)
def test_what_is_wrong_is_named(entries: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        study(**entries)


def test_what_is_no_mapping_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("- recipe")
    with pytest.raises(ValueError, match="expected a mapping"):
        load(file)
    file.write_text(yaml.safe_dump({"recipe": "list.yaml"}))
    (tmp_path / "list.yaml").write_text("[]")
    with pytest.raises(ValueError, match="expected a recipe"):
        load(file)
    file.write_text(yaml.safe_dump({"recipe": "absent"}))
    with pytest.raises(FileNotFoundError, match="absent"):
        load(file, recipes.path)


@pytest.mark.parametrize("file", STUDIES, ids=[file.stem for file in STUDIES])
def test_the_studies_that_are_shipped(file: Path) -> None:
    found = load(file, recipes.path)
    assert file.read_text().startswith("# ")
    assert len(found.variants) > 1
    assert recipes.study(file.stem) == file
    with pytest.raises(FileNotFoundError, match=f"There are: .*{file.stem}"):
        recipes.study("nonsense")


def test_a_name_is_the_whole_configuration() -> None:
    found = study(variants=[{"remaining": 0.5}], seeds=[0, 1])
    pruned = found.variants[1]
    keys = {
        run(found, variant, point, seed).key
        for variant in found.variants
        for point in ((0, 0), (0, 1))
        for seed in (0, 1)
    }
    assert len(keys) == 8
    other = study(variants=[{"remaining": 0.5}], set={"trainer.max_epochs": 3})
    assert run(other, pruned, (0, 1), 1).key not in keys, "what a run starts from is a part of its name"


def test_what_is_prepared_for_each_pipeline() -> None:
    pipelines = ["scratch", "finetune", "initialisation", "training"]
    found = study(variants=[{"remaining": 0.5, "pipeline": [*pipelines, "rewind"], "epoch": 1}])
    scratch, finetune, initialisation, training, rewind = found.variants[1:]
    trained, cut = prior(found), cut_of(found, scratch)
    weights, cuts = preparations(found)
    assert {cell.key for cell in weights} == {trained.key, prior(found, 1).key}
    assert {cell.key for cell in cuts} == {cut.key}, "one architecture for all that start from it"
    assert trained.key == run(found, found.unpruned, (0, 0), 0).key, "the run at the prior is a point of the grid"

    def start(variant: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = run(found, variant, (1, 0), 0).config["trainer"]["callbacks"][0]["init_args"]
        return arguments

    assert start(scratch) == {"seed": 0, "architecture": f"@{cut.key}"}
    assert start(finetune) == {"seed": 0, "architecture": f"@{cut.key}", "weights": f"@{trained.key}"}
    assert start(rewind) == {"seed": 0, "architecture": f"@{cut.key}", "weights": f"@{prior(found, 1).key}"}
    (first,) = study(variants=[{"remaining": 0.5, "pipeline": "rewind", "epoch": 0}], seeds=[3, 4]).variants[1:]
    again = run(study(seeds=[3, 4]), first, (1, 0), 4)
    assert again.config["trainer"]["callbacks"][0]["init_args"]["seed"] == 3, (
        "what the training at the prior began with"
    )
    assert again.config["trainer"]["callbacks"][0]["init_args"]["dense"] is True
    assert first.name == "50% uniform rewind 0"
    for variant in (initialisation, training):
        assert start(variant) == {"seed": 0}
        assert (
            run(found, variant, (1, 0), 0)
            .config["trainer"]["callbacks"][-1]["class_path"]
            .endswith("StructuredPruning")
        )


def test_a_runs_own_checkpoints_and_name_make_way() -> None:
    callbacks = ["LearningRateMonitor", {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val_acc"}}]
    found = study(recipe=RECIPE | {"name": "mine", "trainer": {"max_epochs": 1, "callbacks": callbacks}})
    config = run(found, found.unpruned, (0, 0), 0).config
    assert "name" not in config
    assert config["trainer"]["callbacks"][1:] == [
        {"class_path": "ModelCheckpoint", "init_args": {"filename": "last"}},
        "LearningRateMonitor",
    ]
