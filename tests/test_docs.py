"""Every Python block of the README and the pages runs, commands are understood, and links lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lightning_prune.cli import main, recipes

ROOT = Path(__file__).parent.parent
EVERY_PAGE = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text()
]
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")  # a reader's Trainer has no logger yet
@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_blocks_run(page: Path, in_tmp: Path) -> None:
    names: dict[str, object] = {"__name__": page.stem}
    text = page.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        # Blank lines put a traceback's line number where the block stands in the page.
        exec(compile("\n" * line + block[1], page, "exec", dont_inherit=True), names)
    assert blocks


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for name, anchor in LINK.findall(page.read_text()):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


def commands() -> list[Any]:
    """Every command of the console blocks once, in its words."""
    found: dict[tuple[str, ...], Any] = {}
    for page in EVERY_PAGE:
        for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                words = tuple(shlex.split(line, comments=True))
                words = words[1:] if "=" in words[0] else words  # an environment variable
                found.setdefault(words, pytest.param(page, words, id=" ".join(words)))
    return list(found.values())


class ParsedError(Exception):
    pass


def parsed(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command up to where its options were understood."""
    parse, parsers = ArgumentParser.parse_known_args, list[ArgumentParser]()

    def stop(self: ArgumentParser, *args: Any, **options: Any) -> Any:
        parsers.append(self)
        found = parse(self, *args, **options)
        parsers.remove(self)
        if parsers:  # this one is of a verb
            return found
        assert not found[1], f"not understood: {found[1]}"
        raise ParsedError

    with monkeypatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_known_args", stop)
        with pytest.raises(ParsedError):
            run()


@pytest.mark.parametrize(("page", "words"), commands())
def test_commands_are_understood(
    page: Path, words: tuple[str, ...], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipes, studies, targets and extras that are named exist, and parsers take the options."""
    match words:
        case ("make", target):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()
        case ("pip", "install", what):
            package, _, extras = what.rstrip("]").partition("[")
            project = (ROOT / "pyproject.toml").read_text()
            assert package == ".", "the package is on no index"
            assert all(f"\n{extra} = [" in project for extra in extras.split(","))
        case ("python", "-m", module, *options) if module.startswith("benchmarks."):
            monkeypatch.setattr(sys, "argv", [module, *options])
            parsed(partial(runpy.run_module, module, run_name="__main__"), monkeypatch)
        case ("lightning-prune", "study" | "compare" | "recipes" as verb, *options):
            if verb == "study":
                assert (page.parent / options[1]).is_file() or recipes.study(options[1])
            elif options[1:]:
                assert verb == "compare" or recipes.experiment(options[1])
            parsed(partial(main, [verb, *options]), monkeypatch)
        case ("lightning-prune", *options):
            Path("mine.yaml").write_text(recipes.path("digits_mlp_contribution").read_text())
            Path("my_data.yaml").write_text("class_path: Digits\n")
            Path("my_package.py").write_text("from lightning_prune.models import MLPClassifier as MyModule\n")
            monkeypatch.syspath_prepend(in_tmp)
            with pytest.raises(SystemExit) as end:
                main([*options, "--print_config"])
            assert not end.value.code
        case _:
            assert words[:2] == ("git", "clone")


def test_the_notebook_runs(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, without a kernel; what it shows was kept by `make notebook`, and names no folder of that machine."""
    page = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(in_tmp))
    names: dict[str, object] = {"__name__": "notebook"}
    cells = [cell for cell in page["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        exec(compile("".join(cell["source"]), "notebook.ipynb", "exec", dont_inherit=True), names)
    assert (in_tmp / "report" / "report.json").is_file()
    shown = [json.dumps(cell["outputs"]) for cell in cells]
    assert sum("text/html" in output for output in shown) >= 2
    assert "image/png" in shown[-1]
    assert not any(word in output for output in shown for word in ("/home", "/tmp", "/root", "Traceback"))
