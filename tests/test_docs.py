"""Every Python block of the README and the pages runs, in order, in a folder of its own."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text()
]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


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


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


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
