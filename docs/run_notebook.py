"""Run ``notebook.ipynb`` and keep what it shows: ``make notebook``."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

PAGE = Path(__file__).with_name("notebook.ipynb")


def main() -> None:
    """Outputs for readers: no messages of this machine, and no text beside HTML."""
    page = nbformat.read(PAGE, as_version=4)
    NotebookClient(page, timeout=600, kernel_name="python3", record_timing=False).execute()
    for cell in page.cells:
        shown = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        for output in shown:
            if {"text/html", "image/png"} & set(output.get("data", {})):
                output["data"].pop("text/plain", None)
        if cell.cell_type == "code":
            cell["outputs"] = shown
    page.metadata.pop("language_info", None)
    nbformat.write(page, PAGE)


if __name__ == "__main__":
    main()
