"""The command ``lightning-prune``: LightningCLI with our names imported, a folder per run, and the recipes."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from traceback import walk_tb

from lightning_prune.cli import recipes

__all__ = ["main"]

# Environment variable that asks for tracebacks.
_TRACEBACK = "LIGHTNING_PRUNE_TRACEBACK"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Words after ``lightning-prune``; the process's own if left out.

    Raises:
        SystemExit: On ``--help``, and with 2 on wrong usage and on errors that this package raises, after their text.
    """
    words = list(sys.argv[1:] if args is None else args)
    if words[:1] == ["recipes"]:
        recipes.main(words[1:])
        return
    # Here and not above: Lightning takes seconds to import, and `recipes` answers without it.
    try:
        if words[:1] == ["study"]:
            from lightning_prune.cli import study

            study.main(words[1:])
            return
        if words[:1] == ["compare"]:
            from lightning_prune.cli import compare

            compare.main(words[1:])
            return
        from lightning_prune.cli.options import placed
        from lightning_prune.cli.verbs import run

        run(placed(recipes.resolve(words)))
    except Exception as error:
        own = _own(error)
        if own is None or os.environ.get(_TRACEBACK):
            raise
        sys.stderr.write(f"lightning-prune: {own}\n({_TRACEBACK}=1 shows where it comes from.)\n")
        raise SystemExit(2) from None


def _own(error: BaseException) -> BaseException | None:
    """The error, or what caused it, that this package raised itself: its text says all, a traceback would hide it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:  # a cause may be the error itself
        chain.append(link)
        link = link.__cause__
    return next((link for link in chain if _is_raised_here(link)), None)


def _is_raised_here(error: BaseException) -> bool:
    """Whether a ``raise`` of this package raised it. A cause need not have been raised at all."""
    frames = list(walk_tb(error.__traceback__))
    if not frames:
        return False
    frame, line = frames[-1]
    file = Path(frame.f_code.co_filename)
    ours = Path(recipes.__file__).parents[1] in file.parents
    return ours and linecache.getline(str(file), line).lstrip().startswith("raise ")
