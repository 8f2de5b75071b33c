"""The recipes: found wherever the package is, listed, shown, copied, named on the command line."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from lightning_prune.cli import main, recipes

SHIPPED = {f"{name}_contribution" for name in ("cifar10_cnn", "digits_mlp", "fashionmnist_mlp", "mnist_mlp")}


def test_they_are_shipped() -> None:
    assert set(recipes.recipes()) >= SHIPPED


@pytest.mark.parametrize("name", recipes.recipes())
def test_names_and_first_lines(name: str) -> None:
    """``<dataset>_<model>_<method>``, or its two parts; and a first line that says what it does."""
    assert len(name.split("_")) <= 3
    assert len(recipes.summary(recipes.path(name))) > 20
    assert set(yaml.safe_load(recipes.path(name).read_text())) <= {
        "model",
        "data",
        "trainer",
        "checkpoint",
        "optimizer",
        "lr_scheduler",
    }


def test_inside_an_installed_package_they_lie_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lightning_prune"
    (package / "recipes").mkdir(parents=True)
    (package / "recipes" / "a_b_c.yaml").write_text("# One.\n")
    monkeypatch.setattr(recipes, "files", lambda _: package)
    assert recipes.recipes() == {"a_b_c": package / "recipes" / "a_b_c.yaml"}


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "list"]])
def test_list(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each, with its data, its time and what it shows."""
    main(words)
    _, head, _, *lines = (line.strip() for line in capsys.readouterr().out.rstrip().splitlines())
    assert re.split("  +", head) == ["recipe", "data", "time, two cores", "content"]
    assert [line.split()[0] for line in lines] == list(recipes.recipes())
    row = re.split("  +", next(line for line in lines if line.startswith("digits_mlp")))
    assert row[1:] == [
        *("Digits (no download)", "half a minute", "an MLP loses half of its hidden neurons during training.")
    ]


@pytest.mark.parametrize("name", recipes.recipes())
def test_what_a_recipe_says_of_itself(name: str) -> None:
    data, time, what = recipes.described(recipes.path(name))
    assert re.match(r"[A-Z][\w-]+", data)
    method = data.startswith("Method")
    assert method == (time == "the network's")
    assert method or re.fullmatch(r"a GPU|(a|a few|half an?|four|five|ten) (minutes?|hours?)", time), time
    assert what.endswith(".")
    assert "download" not in time


AT_HAND = [name for name in recipes.recipes() if name.startswith(("digits_", "shapes_"))]
REAL = [
    *("mnist_mlp_contribution", "fashionmnist_mlp_contribution", "fashionmnist_mlp_magnitude", "fashionmnist_cnn_spvr"),
    *(
        "fashionmnist_vae_contribution",
        "cifar10_cnn_contribution",
        "cifar10_fourconv",
        "cifar10_resnet",
        "cifar10_vgg16",
    ),
    *("cifar10_mobilenetv2", "cifar10_vgg16_spvr", "cifar10_resnet56_spvr", "cifar10_resnet34_spvr"),
]
ROOT = os.environ.get("LIGHTNING_PRUNE_DATA")


@pytest.mark.parametrize(
    "name",
    [
        *AT_HAND,
        *(
            pytest.param(name, marks=(pytest.mark.slow, pytest.mark.skipif(not ROOT, reason="no LIGHTNING_PRUNE_DATA")))
            for name in REAL
        ),
    ],
)
def test_two_steps(name: str, in_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two steps, and two of the validation, on the data themselves; nothing is written."""
    words = [f"--data.root={ROOT}"] if name in REAL else []
    main(["fit", f"--config={name}", *words, "--trainer.fast_dev_run=2", "--trainer.enable_progress_bar=false"])
    assert "`max_steps=2` reached" in caplog.text
    assert not Path("runs").exists()


def test_every_recipe_with_data_of_its_own_is_among_them() -> None:
    """Other data, or weights, are in no test."""
    sets = ("digits_", "shapes_", "mnist_", "fashionmnist_", "cifar10_")
    theirs = {name for name in recipes.recipes() if name.startswith(sets) and "resnet20" not in name}
    assert theirs == {*AT_HAND, *REAL}


@pytest.mark.parametrize("name", ["digits_mlp_contribution", "digits_mlp_contribution.yaml"])
def test_show(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "show", name])
    assert capsys.readouterr().out == recipes.path("digits_mlp_contribution").read_text()


def test_copy(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = recipes.path("digits_mlp_contribution").read_text()
    main(["recipes", "copy", "digits_mlp_contribution"])
    main(["recipes", "copy", "digits_mlp_contribution", "mine/new.yaml"])
    assert capsys.readouterr().out.split() == ["digits_mlp_contribution.yaml", "mine/new.yaml"]
    assert Path("digits_mlp_contribution.yaml").read_text() == Path("mine/new.yaml").read_text() == source


def test_copy_leaves_an_edited_file_alone(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("digits_mlp_contribution.yaml").write_text("edited")
    with pytest.raises(SystemExit):
        main(["recipes", "copy", "digits_mlp_contribution"])
    assert "expected a new file, got digits_mlp_contribution.yaml" in capsys.readouterr().err
    assert Path("digits_mlp_contribution.yaml").read_text() == "edited"


@pytest.mark.parametrize("verb", ["show", "copy"])
def test_unknown_recipe(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipes", verb, "nonsense"])
    error = capsys.readouterr().err
    assert "got 'nonsense'. There are: " in error
    assert "digits_mlp_contribution" in error


def test_resolve_after_config_only(in_tmp: Path) -> None:
    file = str(recipes.path("digits_mlp_contribution"))
    name = "digits_mlp_contribution"
    assert recipes.resolve(["fit", "--config", name, "--name", name]) == ["fit", "--config", file, "--name", name]
    assert recipes.resolve([f"--config={name}.yaml", "-c", name]) == [f"--config={file}", "-c", file]


def test_a_file_wins_over_a_recipe(in_tmp: Path) -> None:
    Path("digits_mlp_contribution.yaml").write_text("model: MLPClassifier\n")
    words = ["fit", "--config", "digits_mlp_contribution.yaml"]
    assert recipes.resolve(words) == words


def test_neither_file_nor_recipe() -> None:
    with pytest.raises(FileNotFoundError, match="expected a file or the name of a recipe, got 'nonsense'"):
        recipes.resolve(["fit", "--config", "nonsense"])
