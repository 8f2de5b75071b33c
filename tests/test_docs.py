"""Every Python block of the README and the pages runs, commands are understood, and links lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

import lightning_prune
import lightning_prune.data
import lightning_prune.models
from lightning_prune.callbacks.display import report_writer
from lightning_prune.cli import main, recipes, study
from lightning_prune.reporting import Timing
from tests.study.surfaces import Inline, Surface

ROOT = Path(__file__).parent.parent
EVERY_PAGE = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text()
]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
LARGEST_PICTURE = 80_000
# Bases of the data modules and models, for those who write their own in this package.
INTERNAL = {"lightning_prune.data.ImageData", "lightning_prune.data.ImageTensors", "lightning_prune.models.Classifier"}
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)
#: Blocks of pages and these runs of tutorials have a few images only, and a layer that is large for a matrix of inputs.
FEW_IMAGES = "ignore:Ridge f(its weights to fewer rows|olds only the mean)"


@pytest.fixture
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are about other things than latency, and timing two networks takes five seconds of every run."""
    monkeypatch.setattr(report_writer, "latencies", lambda _, networks: [{1: Timing(1.0)}] * len(networks))


@pytest.mark.usefixtures("_no_timing")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")  # a reader's Trainer has no logger yet
@pytest.mark.filterwarnings(FEW_IMAGES)
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
    text = re.sub(r"^```.*?^```", "", prose(page), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


def prose(page: Path) -> str:
    """The text of a page in Markdown, or that between the cells of a notebook."""
    if page.suffix == ".md":
        return page.read_text()
    return "\n\n".join("".join(cell["source"]) for cell in notebook_cells(page, "markdown"))


@pytest.mark.parametrize("page", [*EVERY_PAGE, *TUTORIALS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for name, anchor in LINK.findall(prose(page)):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


def test_pages_have_no_directives() -> None:
    """GitHub would show them as code."""
    assert not [page.name for page in EVERY_PAGE if re.search(r"^```{|^:::", page.read_text(), re.MULTILINE)]


def test_the_reference_is_complete() -> None:
    """Every public name has one place on one of its pages."""
    listed = []
    for page in sorted((ROOT / "docs" / "api").glob("*.rst")):
        for module, names in re.findall(
            r"currentmodule:: (\S+)\n.*?:nosignatures:\n\n((?:   [^\n]+\n)+)", page.read_text(), re.DOTALL
        ):
            listed += [f"{module}.{name}" for name in names.split()]
    assert len(set(listed)) == len(listed)
    public = {f"lightning_prune.{name}" for name in lightning_prune.__all__ if name != "__version__"}
    for room in (lightning_prune.data, lightning_prune.models):
        public |= {f"{room.__name__}.{name}" for name in room.__all__} - INTERNAL
    assert public <= set(listed), f"not in docs/api: {sorted(public - set(listed))}"


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
            recipes.copy("digits_mlp_contribution", Path("mine.yaml"))
            recipes.copy("digits_mlp_contribution", Path("runs/mine/001/config.yaml"))
            Path("my_data.yaml").write_text("class_path: Digits\n")
            Path("my_package.py").write_text("from lightning_prune.models import MLPClassifier as MyModule\n")
            monkeypatch.syspath_prepend(in_tmp)
            with pytest.raises(SystemExit) as end:
                main([*options, "--print_config"])
            assert not end.value.code
        case _:
            assert words[:2] == ("git", "clone")


def notebook_cells(page: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == kind]


# What stands in for the cell tagged "parameters" where no data can be downloaded and seconds count.
QUICK = {
    "parameter_budget": """
from lightning_prune.data import Digits
data, image, channels, hidden = Digits(batch_size=64), (1, 8, 8), (8, 16), (32, 16)
epochs, more_epochs, samples_per_class = 1, 1, 5
""",
    "prune_while_training": """
from lightning_prune.data import Digits
data, image, epochs = Digits(batch_size=64), (1, 8, 8), 2
""",
    "masks": """
from lightning_prune import OneShot
from lightning_prune.data import Digits
data, sizes, epochs, schedule = Digits(batch_size=64), [64, 48, 24, 10], 2, OneShot(1, unit="epoch")
""",
    "prune_a_pretrained_network": """
from pathlib import Path
import torch
from lightning_prune.data import ImageFolder
from lightning_prune.models import ResNetCIFAR
from tests.support.data_files import write_flowers
write_flowers(Path("images"))
weights, url = Path("resnet20.th"), None
torch.save(ResNetCIFAR(depth=20).state_dict(), weights)
data, epochs, few = ImageFolder("images", size=16, batch_size=2, val_share=0.2), 1, 8
""",
    "study": """
from tests.study.definitions import DEFINITION as definition
""",
    "transfer_by_xgb": """
from tests.support.data_files import write_flowers
url, root, size, samples, epochs, e_u = None, Path("flowers"), 32, 40, 2, 0.02
write_flowers(root, ["roses", "tulips"])
def pretrained():
    return timm.create_model("tf_efficientnet_lite0", num_classes=2)
""",
}


@pytest.mark.usefixtures("_no_timing")
@pytest.mark.filterwarnings(FEW_IMAGES)
@pytest.mark.parametrize("page", TUTORIALS, ids=[page.stem for page in TUTORIALS])
def test_tutorials_run(page: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of a tutorial, without a kernel; the runs of a study are numbers by a formula."""
    monkeypatch.setattr(study, "launcher_of", lambda *_: Inline())
    monkeypatch.setattr(study, "check", lambda *_: None)
    monkeypatch.setattr(study, "train", Surface(lambda lr, decay, pruned, seed: 0.9 - (lr + 1 - pruned) ** 2 / 20))
    names: dict[str, object] = {"__name__": page.stem}
    for number, cell in enumerate(notebook_cells(page, "code")):
        is_replaced = "parameters" in cell["metadata"].get("tags", ())
        source = QUICK[page.stem] if is_replaced else "".join(cell["source"])
        exec(compile(source, f"{page.stem}, code cell {number}", "exec", dont_inherit=True), names)
    plt.close("all")


@pytest.mark.parametrize("page", TUTORIALS, ids=[page.stem for page in TUTORIALS])
def test_tutorials_show_a_run(page: Path) -> None:
    """What `make notebooks` kept: a table or a picture, no error, no folder of that machine, nothing large."""
    cells = notebook_cells(page, "code")
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in cells) == 1
    assert 8 <= len(cells) + len(notebook_cells(page, "markdown")) <= 24
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "not run from top to bottom"
    shown = [output for cell in cells for output in cell["outputs"]]
    assert any({"image/png", "text/html"} & set(output.get("data", {})) for output in shown)
    for output in shown:
        text = json.dumps(output)
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        assert not re.search(r"/(home|tmp|root|work|Users)\b|Warning|Traceback", text), text[:500]
        assert len(text) < 4 * LARGEST_PICTURE / 3 + 1000
