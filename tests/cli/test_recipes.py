"""The recipes: found wherever the package is, listed, shown, copied, named on the command line."""

from __future__ import annotations

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


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes.recipes())
    assert "Digits (no download)" in next(line for line in lines if line.startswith("digits_mlp"))


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
