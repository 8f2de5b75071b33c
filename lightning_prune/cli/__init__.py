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
        args: Arguments after ``lightning-prune``; by default those of the process. With ``--debug``, errors show
            their traceback.

    Raises:
        SystemExit: On ``--help``, and with code 2 on a user's mistake, after one line that says what to do.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, so that the user's own modules are found
    try:
        _dispatch([word for word in words if word != "--debug"])
    except Exception as error:
        line = in_one_line(error)
        if debug or line is None:
            raise
        sys.stderr.write(f"lightning-prune: {line}\n")
        raise SystemExit(2) from None


def _dispatch(words: list[str]) -> None:
    # Imported here, not above: Lightning takes seconds to import, and these commands do not need it.
    command = words[0] if words else ""
    if command == "recipes":
        recipes.main(words[1:])
    elif not words:
        raise ValueError(f"expected a command, got none. Commands: {', '.join(COMMANDS)}. See --help.")
    elif command not in COMMANDS and not command.startswith("-"):
        guess = near(command, COMMANDS)
        raise ValueError(f"expected a command, got {command!r}.{guess} Commands: {', '.join(COMMANDS)}.")
    elif command in ("study", "compare", "controls"):
        import_module(f"lightning_prune.cli.{command}").main(words[1:])
    else:
        found = recipes.resolve(words)
        from lightning_prune.cli.options import placed
        from lightning_prune.cli.verbs import run

        run(placed(found))
