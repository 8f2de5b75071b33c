"""The command ``lightning-prune``: LightningCLI with our names imported, a folder per run, and the recipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_prune.cli import recipes
from lightning_prune.cli.messages import COMMANDS, in_one_line, near

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Words after ``lightning-prune``; the process's own if left out. With ``--debug`` errors keep their
            traceback.

    Raises:
        SystemExit: On ``--help``, and with 2 on mistakes of the user, after one line that says what to do.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: a module of one's own is found where one works
    try:
        _dispatch([word for word in words if word != "--debug"])
    except Exception as error:
        line = in_one_line(error)
        if debug or line is None:
            raise
        sys.stderr.write(f"lightning-prune: {line}\n")
        raise SystemExit(2) from None


def _dispatch(words: list[str]) -> None:
    # Imported here and not above: Lightning takes seconds to import, and these answer without it.
    command = words[0] if words else ""
    if command == "recipes":
        recipes.main(words[1:])
    elif not words:
        raise ValueError(f"expected a command, got none. They are {', '.join(COMMANDS)}; --help says more.")
    elif command not in COMMANDS and not command.startswith("-"):
        guess = near(command, COMMANDS)
        raise ValueError(f"expected a command, got {command!r}.{guess} They are {', '.join(COMMANDS)}.")
    elif command in ("study", "compare"):
        import_module(f"lightning_prune.cli.{command}").main(words[1:])
    else:
        found = recipes.resolve(words)
        from lightning_prune.cli.options import placed
        from lightning_prune.cli.verbs import run

        run(placed(found))
