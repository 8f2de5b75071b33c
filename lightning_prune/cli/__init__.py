"""The command ``lightning-prune``: LightningCLI with our names imported, a folder per run, and the recipes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_prune.cli import recipes

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Words after ``lightning-prune``; the process's own if left out.

    Raises:
        SystemExit: On ``--help`` and on wrong usage, as every command line does.
    """
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] == ["recipes"]:
        recipes.main(words[1:])
        return
    # Here and not above: Lightning takes seconds to import, and `recipes` answers without it.
    from lightning_prune.cli.verbs import run

    run(recipes.resolve(words))
