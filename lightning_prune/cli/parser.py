"""A parser that reads integers as such, whatever was imported before."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any, get_args

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

__all__ = ["Parser"]


class Parser(LightningArgumentParser):
    """LightningCLI's parser, which tries ``int`` before ``float`` if an argument accepts both.

    Members of a union are tried in order, and a ``float`` accepts ``5`` as well. If the default is None, jsonargparse
    creates ``Optional[int | float]``, for which `typing` may return a cached equal union with another order.
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
