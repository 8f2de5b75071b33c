"""Tests with ``pytorch_lightning`` in place of ``lightning.pytorch``: ``LIGHTNING_PACKAGE=pytorch_lightning pytest``.

Tests, and the modules of this package that train, then import from there; the callbacks still import
``lightning.pytorch``, so that both packages are in the process, as for their users.
"""

from __future__ import annotations

import builtins
import os

_NAMES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
_MODULES = ("tests.", "lightning_prune.cli", "lightning_prune.data", "lightning_prune.models", "lightning_prune.study")


def use() -> None:
    """Import from the other package if the environment asks for it."""
    asked = os.environ.get("LIGHTNING_PACKAGE", "lightning.pytorch")
    if asked == "lightning.pytorch":
        return
    assert asked == "pytorch_lightning", f"LIGHTNING_PACKAGE={asked}: expected lightning.pytorch or pytorch_lightning"
    real = builtins.__import__

    def other(name, globals=None, locals=None, fromlist=(), level=0):
        if globals and str(globals.get("__name__")).startswith(_MODULES):
            name = "pytorch_lightning" if name == "lightning" else name
            for ours, theirs in _NAMES.items():
                name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        return real(name, globals, locals, fromlist, level)

    builtins.__import__ = other
