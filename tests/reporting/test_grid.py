"""One table, four renderings."""

import math

import pytest
from rich.console import Console

from lightning_prune.reporting.grid import Grid, as_text, count, kib, number, plural, share

GRID = Grid("Sizes", ("layer", "units"), (("a|b", "1"), ("[bold]<c>", "20")), note="1 MAC = 2 FLOPs")


def test_markdown_keeps_bars_inside_cells():
    assert GRID.markdown().splitlines() == [
        "**Sizes**",
        "",
        "| layer | units |",
        "| --- | ---: |",
        "| a\\|b | 1 |",
        "| [bold]<c> | 20 |",
        "",
        "1 MAC = 2 FLOPs",
    ]


def test_html_is_escaped():
    html = GRID.html()
    assert "&lt;c&gt;" in html
    assert "<c>" not in html
    assert html.count("<tr>") == 3
    assert '<td style="text-align:right">20</td>' in html


def test_terminal_and_text_show_brackets_as_they_are():
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(GRID.rich())
    assert "[bold]<c>      20" in capture.get()
    text = as_text([GRID, GRID])
    assert text.count("[bold]<c>") == 2
    assert text.startswith("Sizes\n")
    assert "\n\nSizes\n" in text  # an empty line between two tables


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999_999, "999,999"), (1_234_567, "1.23 M"), (4.09e9, "4.09 G"), (2e12, "2 T"), (25_557_032, "25.6 M")],
)
def test_count(value, text):
    assert count(value) == text


def test_figures():
    assert kib(2048) == "2.0"
    assert number(0.97123) == "0.9712"
    assert share(1, 3) == "33.3 %"
    assert plural(1, "cut") == "1 cut"
    assert plural(0, "cut") == "0 cuts"


def test_what_was_not_measured_is_a_dash():
    assert kib(None) == number(None) == number(math.nan) == share(None, 3) == share(1, None) == share(1, 0) == "–"
    assert share(math.nan, 1.0) == "–"
