"""The bundled experiments, one YAML file each: run, show or copy them."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import takewhile
from pathlib import Path

import yaml

from lightning_prune.cli.messages import OneLineParser, near

__all__ = ["copy", "described", "experiment", "folder", "main", "path", "recipes", "resolve", "study", "summary"]

# Columns if the output is a file or a pipe.
_FILE_WIDTH = 250


def folder() -> Path:
    """The folder of the recipes: inside the package in a wheel, next to it in a checkout."""
    package = Path(str(files("lightning_prune")))
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipes() -> dict[str, Path]:
    """Every recipe by its name, sorted."""
    return {file.stem: file for file in sorted(folder().glob("*.yaml"))}


def path(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: The recipe's name, with or without ``.yaml``.

    Raises:
        FileNotFoundError: If there is no such recipe; the message lists those that exist.
    """
    return _named(name, "recipe", recipes())


def study(name: str) -> Path:
    """The file of a bundled study.

    Args:
        name: The study's name, with or without ``.yaml``.

    Raises:
        FileNotFoundError: If there is no such study; the message lists those that exist.
    """
    return _named(name, "study", {file.stem: file for file in sorted((folder() / "studies").glob("*.yaml"))})


def experiment(name: str) -> Path:
    """A file to show or copy: a recipe, a study or a sweep, such as ``sweeps/digits``."""
    several = {f"{file.parent.name}/{file.stem}": file for file in sorted(folder().glob("*/*.yaml"))}
    return _named(name, "recipe", {**recipes(), **several})


def _named(name: str, kind: str, known: Mapping[str, Path]) -> Path:
    found = known.get(name.removesuffix(".yaml"))
    if found is None:
        hint = near(name.removesuffix(".yaml"), known) or f" There are: {', '.join(known)}."
        raise FileNotFoundError(f"expected a file or the name of a {kind}, got {name!r}.{hint}")
    return found


def summary(recipe: Path) -> str:
    """The first line of a recipe, without the comment sign."""
    return recipe.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def copy(name: str, destination: Path) -> Path:
    """Copy a recipe to edit it.

    Args:
        name: The recipe's name.
        destination: An existing folder, or the new file.

    Returns:
        The new file.

    Raises:
        FileNotFoundError: If there is no such recipe.
        FileExistsError: If the new file exists; it is left unchanged.
    """
    source = experiment(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise FileExistsError(f"expected a new file, got {target}, which exists. Choose another name or remove it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def resolve(words: Sequence[str]) -> list[str]:
    """The arguments of a command line, with names of recipes after ``--config`` replaced by their files.

    A file of that name in the working folder takes precedence.

    Raises:
        FileNotFoundError: If an argument after ``--config`` is neither a file nor a recipe.
        ValueError: If a file is not valid YAML, or not a mapping.
    """
    resolved: list[str] = []
    for position, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if equals and flag in ("--config", "-c"):
            resolved.append(f"{flag}={_file(value)}")
        elif position and words[position - 1] in ("--config", "-c"):
            resolved.append(_file(word))
        else:
            resolved.append(word)
    return resolved


def main(words: Sequence[str]) -> None:
    """``lightning-prune recipes [list] | show NAME | copy NAME [DEST]``."""
    parser = OneLineParser("lightning-prune recipes", description="List, show and copy the bundled experiments.")
    verbs = parser.add_subparsers(dest="verb")
    verbs.add_parser("list", help="list their names, data, duration and content (the default)")
    show = verbs.add_parser("show", help="print a recipe")
    take = verbs.add_parser("copy", help="copy a recipe to edit it")
    for verb in (show, take):
        verb.add_argument("name", help="name of the recipe, or studies/NAME or sweeps/NAME")
    take.add_argument("destination", nargs="?", default=".", type=Path, help="folder or new file (default: here)")
    given = parser.parse_args(words)
    if given.verb in (None, "list"):
        _print_list()
    elif given.verb == "show":
        sys.stdout.write(experiment(given.name).read_text(encoding="utf-8"))
    else:
        sys.stdout.write(f"{copy(given.name, given.destination)}\n")


def described(recipe: Path) -> tuple[str, str, str]:
    """The data (or what a method is combined with), the duration and the content of a recipe, from its comments."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    head = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    data, _, rest = head.partition(": ")
    what = re.split(r"(?<=\.) ", rest)[0]
    if data.startswith("Method"):
        return data, "the network's", what
    time = re.search(r"(?:^|[.,] )((?:half |a )?[\w½]+(?: of)? (?:seconds|minutes?|hours?))\b|for a (GPU)", rest, re.I)
    return data, (time[1] or f"a {time[2]}").lower().replace("gpu", "GPU") if time else "–", what


def _print_list() -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "data", "time, two cores", "content", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, file in recipes().items():
        table.add_row(name, *described(file))
    console = Console()
    # In a file or a pipe, each recipe gets one line.
    (console if console.is_terminal else Console(width=_FILE_WIDTH)).print(table)


def _file(value: str) -> str:
    file = Path(value) if Path(value).is_file() else path(value)
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        quotes = ' Put names with * in quotes: "*.fc1".' if "alias" in (error.context or "") else ""
        raise ValueError(f"{file}, line {line}: expected valid YAML: {error.problem}.{quotes}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: expected valid YAML: {error}") from error
    if not isinstance(found, Mapping):
        got = "nothing" if found is None else repr(found)[:40]
        raise ValueError(f"{file}: expected entries such as `model:` and `trainer:`, got {got}.")
    return str(file)
