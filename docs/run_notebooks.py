"""Run the tutorials again and keep what they show: `make notebooks`."""

import io
import sys
import tempfile
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

TUTORIALS = Path(__file__).parent / "tutorials"
LARGEST_PICTURE = 80_000


def main(names: list[str]) -> None:
    """Each in an empty folder, where its runs go."""
    for page in [TUTORIALS / f"{name}.ipynb" for name in names] or sorted(TUTORIALS.glob("*.ipynb")):
        notebook = nbformat.read(page, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(
                notebook,
                timeout=None,
                kernel_name="python3",
                record_timing=False,
                coalesce_streams=True,
                resources={"metadata": {"path": folder}},
            ).execute()
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell["outputs"] = [shown(output) for output in cell["outputs"] if output.get("name") != "stderr"]
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, page)


def shown(output: Any) -> Any:
    """An output for readers: no plain text beside the same as HTML or a picture, and pictures with 64 colours.

    Raises:
        ValueError: If a picture is larger than 80 kB.
    """
    data = output.get("data", {})
    if {"text/html", "text/markdown", "image/png"} & set(data):
        data.pop("text/plain", None)
    if "image/png" in data:
        small = io.BytesIO()
        picture = Image.open(io.BytesIO(b64decode(data["image/png"]))).convert("RGB")
        picture.quantize(64).save(small, "png", optimize=True)
        if len(small.getvalue()) > LARGEST_PICTURE:
            raise ValueError(f"a picture has {len(small.getvalue())} bytes, at most {LARGEST_PICTURE} were expected")
        data["image/png"] = b64encode(small.getvalue()).decode()
    return output


if __name__ == "__main__":
    main(sys.argv[1:])
