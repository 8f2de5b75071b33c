"""A parser that reads whole numbers as such, whatever was imported before it."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any, get_args

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

__all__ = ["Parser"]


class Parser(LightningArgumentParser):
    """LightningCLI's parser that tries ``int`` before ``float`` wherever an argument takes both.

    The members of a union are tried in their order, and a ``float`` takes ``5`` as well. Where the default is None,
    jsonargparse asks for ``Optional[int | float]``, and `typing` answers with an equal union that any package asked
    for before, in that one's order.
    """

    @override
    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        added: list[str] = super().add_class_arguments(*args, **kwargs)
        for action in self._actions:
            members = list(get_args(getattr(action, "_typehint", None)))
            if int in members and float in members:
                members.remove(int)
                members.insert(members.index(float), int)
                action._typehint = reduce(or_, members)  # type: ignore[attr-defined]
        return added
