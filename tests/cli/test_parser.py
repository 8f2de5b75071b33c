"""Whole numbers of the command line, where a share of the run may stand as well."""

from __future__ import annotations

from typing import Optional, Union

import pytest

from lightning_prune.cli.parser import Parser


class Inner:
    # As `typing` answers to `int | float | None` where another package asked first, the other way round.
    def __init__(self, every: Optional[Union[float, int]] = None, start: float | int = 0.5) -> None:  # noqa: UP007, UP045
        self.every, self.start = every, start


class Outer:
    def __init__(self, inner: Inner, at: float | int | None = None) -> None:
        self.inner, self.at = inner, at


@pytest.mark.parametrize("value", [5, 1, 5.0, 0.25, None])
def test_a_whole_number_stays_one(value: float | None) -> None:
    parser = Parser(exit_on_error=False)
    parser.add_class_arguments(Outer, "outer")
    word = "null" if value is None else value
    words = [f"--outer.inner={__name__}.Inner", *(f"--outer.{name}={word}" for name in ("inner.every", "at"))]
    words += [] if value is None else [f"--outer.inner.start={word}"]
    outer = parser.instantiate_classes(parser.parse_args(words)).outer
    found = [outer.inner.every, outer.at, *([] if value is None else [outer.inner.start])]
    assert [(type(one), one) for one in found] == [(type(value), value)] * len(found)
