"""The table of criteria in the documentation is the generated one."""

from pathlib import Path

from lightning_prune.scoring import criteria, criteria_table


def test_the_page_holds_the_generated_table():
    page = Path(__file__).parents[2] / "docs" / "criteria.md"
    assert criteria_table() in page.read_text(), "paste `criteria_table()` into docs/criteria.md"


def test_every_criterion_has_a_row_of_three_cells():
    rows = criteria_table().splitlines()[2:]
    assert len(rows) == len(criteria.__all__)
    assert all(row.count("|") == 4 for row in rows)
