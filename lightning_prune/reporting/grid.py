"""A table that can be rendered for a terminal and as text, Markdown and HTML."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.console import Group as RichGroup
    from rich.table import Table

__all__ = [
    "Grid",
    "Shown",
    "as_rich",
    "as_text",
    "console_for",
    "count",
    "kib",
    "number",
    "plural",
    "share",
    "short_count",
    "timed",
]

#: Shown for values that were not measured.
MISSING = "–"

_TEXT_WIDTH = 120


@dataclass(frozen=True)
class Grid:
    """A table of words and numbers.

    Attributes:
        title: Heading of the table.
        columns: Heading of every column.
        rows: Cells as text, one per column.
        words: Number of leading columns with words, which are left-aligned; the others have numbers, right-aligned.
        note: Note below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    note: str = ""

    def rich(self) -> Table:
        """The table for a terminal, without its note, which `as_rich` adds in full width."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD)
        for i, column in enumerate(self.columns):
            table.add_column(Text(column), justify="left" if i < self.words else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    def markdown(self) -> str:
        """The table in GitHub's Markdown, with its title."""
        rule = ("---" if i < self.words else "---:" for i in range(len(self.columns)))
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self._lines(tuple(rule))]
        return "\n".join([f"**{self.title}**", "", *lines, *(["", self.note] if self.note else [])])

    def html(self) -> str:
        """The table for a notebook."""

        def line(cells: Sequence[str], tag: str) -> str:
            align = ("left" if i < self.words else "right" for i in range(len(cells)))
            parts = (f'<{tag} style="text-align:{a}">{escape(c)}</{tag}>' for c, a in zip(cells, align, strict=True))
            return f"<tr>{''.join(parts)}</tr>"

        body = "".join(line(row, "td") for row in self.rows)
        note = f"<p><small>{escape(self.note)}</small></p>" if self.note else ""
        head = f"<caption><b>{escape(self.title)}</b></caption><thead>{line(self.columns, 'th')}</thead>"
        return f"<table>{head}<tbody>{body}</tbody></table>{note}"

    def _lines(self, rule: tuple[str, ...]) -> list[tuple[str, ...]]:
        return [self.columns, rule, *self.rows]


class Shown(ABC):
    """Base class of objects that are displayed as tables: with `print`, in a terminal and in a notebook."""

    @abstractmethod
    def grids(self) -> tuple[Grid, ...]:
        """The tables."""

    def __str__(self) -> str:
        return as_text(self.grids())

    def __rich__(self) -> RichGroup:
        return as_rich(self.grids())

    def _repr_html_(self) -> str:
        return "".join(grid.html() for grid in self.grids())


def as_rich(grids: Sequence[Grid]) -> RichGroup:
    """Tables with their notes for a terminal, separated by empty lines."""
    from rich.console import Group
    from rich.text import Text

    return Group(*(part for grid in grids for part in (grid.rich(), Text(grid.note, style="dim"), "")))


def console_for(width: int = _TEXT_WIDTH) -> Console:
    """A console for tables: the terminal's width, or this many columns for a file or a pipe."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=width)


def as_text(grids: Sequence[Grid]) -> str:
    """Tables as plain text, for `print` and log files."""
    from rich.console import Console

    console = Console(file=StringIO(), width=_TEXT_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(as_rich(grids))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip()


def count(value: float) -> str:
    """A count: an integer up to six digits, then 1.23 M, 4.56 G."""
    if abs(value) < 1e6:
        return f"{value:,.0f}"
    scale, prefix = (1e6, "M") if abs(value) < 1e9 else (1e9, "G") if abs(value) < 1e12 else (1e12, "T")
    return f"{value / scale:.3g} {prefix}"


def short_count(value: float) -> str:
    """A count for file names, with two or three digits: 950, 1.2k, 12k, 123k, 1.2M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit * 0.9995:
            scaled = value / limit
            return f"{scaled:.1f}{suffix}" if scaled < 9.95 else f"{scaled:.0f}{suffix}"
    return f"{value:.0f}"


def plural(n: int, noun: str) -> str:
    """``1 cut``, ``2 cuts``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def kib(size: int | None) -> str:
    """Bytes as KiB (1024 bytes)."""
    return MISSING if size is None else f"{size / 1024:,.1f}"


def number(value: float | None, digits: int = 4) -> str:
    """A measured number with this many significant digits."""
    if value is None or math.isnan(value):
        return MISSING
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if 10**digits <= abs(rounded) < 1e6 else f"{rounded:.{digits}g}"


def timed(value: float, spread: float | None) -> str:
    """A measured time with its spread, such as ``0.047 ± 0.002``: as precise as the spread, with at most three digits.

    Without a spread, two digits.
    """
    if math.isnan(value) or not value or not spread:
        return number(value, 2)
    places = max(min(-math.floor(math.log10(spread)), 2 - math.floor(math.log10(value))), 0)
    rounded = max(round(spread, places), 10.0**-places)
    return f"{value:,.{places}f} ± {rounded:,.{places}f}"


def share(part: float | None, whole: float | None) -> str:
    """A part as a percentage of the whole."""
    if part is None or not whole or math.isnan(part) or math.isnan(whole):
        return MISSING
    return f"{100 * part / whole:.1f} %"
