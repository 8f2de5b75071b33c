"""Tables, pictures and advice of studies whose answers are known."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lightning_prune.reporting.pages import Bullets, Page, Picture
from lightning_prune.study.analysis import Analysis, analyse
from lightning_prune.study.axes import points
from lightning_prune.study.numeric import numeric_tables
from lightning_prune.study.plots import spaces_figure
from lightning_prune.study.report import page, recommendations, tables
from lightning_prune.study.statistics import ellipse
from lightning_prune.study.table import Row
from tests.study.surfaces import study

viridis = colormaps["viridis"]

STUDY = study(
    points=7,
    variants=[{"remaining": 0.5}, {"remaining": 0.2}],
    seeds=[0, 1],
    grid={"model.lr": {"step": 0.5, "points": 7}, "model.weight_decay": {"step": 0.5, "points": 7}},
)


def flat(lr: float, decay: float, pruned: bool, seed: int) -> float:
    """A ridge along lr · wd = 1e-4, tilted so that the prior is best; pruned a tenth lower everywhere."""
    across, along = lr + decay + 4, lr - decay - 2
    return 0.9 - 0.02 * across**2 - 0.001 * abs(along) - 0.1 * pruned + 1e-4 * seed


def moved(lr: float, decay: float, pruned: bool, seed: int) -> float:
    """The same, but pruned networks want ten times the learning rate at the same weight decay."""
    return flat(lr - pruned, decay, pruned, seed)


def made(surface: Callable[[float, float, bool, int], float]) -> list[Row]:
    rows = []
    for variant in STUDY.variants:
        for point in points(STUDY.extent):
            for seed in STUDY.seeds:
                decay, lr = values = tuple(axis.value(n) for axis, n in zip(STUDY.axes, point, strict=True))
                top1 = surface(float(np.log10(lr)), float(np.log10(decay)), variant.method is not None, seed)
                rows.append(Row(variant.name, "", variant.remaining, values, seed, top1, None, 9, 20, 1.0, False, "k"))
    return rows


def analysed(surface: Callable[[float, float, bool, int], float]) -> Analysis:
    return analyse(made(surface), STUDY.axes)


@pytest.fixture(scope="module")
def still() -> Analysis:
    return analysed(flat)


def test_spaces_are_arranged_by_seed_and_configuration(still: Analysis) -> None:
    assert [space.name for space in still.spaces] == ["unpruned", "50% uniform", "20% uniform"]
    assert still.unpruned.accuracy.shape == (2, 49)
    assert still.values[still.prior].tolist() == [1e-3, 0.1]
    assert still.unpruned.accuracy[:, still.prior] == pytest.approx([90.0, 90.01])
    assert still.unpruned.best == pytest.approx(90.005)
    assert still.initial.all()


def test_a_pruned_network_of_the_same_shape_has_the_same_figures(still: Analysis) -> None:
    unpruned, pruned = still.spaces[:2]
    for threshold in (0.5, 1.0):
        assert still.ellipse(unpruned, threshold) == still.ellipse(pruned, threshold)
    base, risk = still.risk(unpruned), still.risk(pruned)
    assert risk.mean == pytest.approx(base.mean)
    assert risk.relative_mean == pytest.approx(base.mean / 80.005)
    assert (risk.within, risk.crossed) == (1.0, pytest.approx(base.crossed))
    for line in recommendations(still, 0.5):
        assert "keep the unpruned network's hyperparameters. Keeping them costs 0.17 points" in line
        assert line.endswith("on average (cross-fitted); accepted: 0.5.")


def test_the_ellipse_lies_along_the_ridge(still: Analysis) -> None:
    (_, found), _ = still.ellipses(still.unpruned, 1.0)
    assert found.angle == pytest.approx(-np.pi / 4, abs=1e-6)
    region = still.positions[still.unpruned.accuracy[0] >= 89.0 - 1e-9]
    again = ellipse(region)
    assert again is not None
    assert (found.length, found.width) == (again.length, again.width)


def test_a_moved_optimum_is_named() -> None:
    found = analysed(moved)
    (first, _) = recommendations(found, 0.5)
    assert first.startswith("50% uniform: tune again: try ")
    assert "larger learning rate first. Keeping them costs 2.19 points" in first
    assert found.risk(found.spaces[1]).within < 0.5
    assert recommendations(found, 100.0)[0].startswith("50% uniform: keep")


def test_edges_that_the_region_touches_are_named(still: Analysis) -> None:
    assert "unpruned" in still.edges()["highest weight_decay"]


def test_tables_have_the_thesis_form(still: Analysis) -> None:
    overview, ellipses, intervals, risks = tables(still)
    assert ellipses.columns[1:4] == ("1.0-ROI length", "1.0-ROI width", "1.0-ROI centre")
    assert ellipses.rows[0][3] == "(-3.0, -1.0)"
    assert re.fullmatch(r"\d\.\d\d", ellipses.rows[0][1])
    assert len(intervals.rows) == 3 * 2 * 2
    assert risks.rows[1][7] == "100 %"
    assert [row[0] for row in overview.rows] == [row[0] for row in risks.rows]


def test_the_page_holds_everything(still: Analysis, tmp_path: Path) -> None:
    found = page(STUDY, still, "A study <of> mine")
    markdown, html = found.write(tmp_path, "report")
    text = html.read_text()
    assert text.count("<img ") == text.count("data:image/png;base64,") == len(found.pictures) == 3
    assert "A study &lt;of&gt; mine" in text
    assert not re.search(r'(src|href)="(?!data:)', text), "nothing is loaded from elsewhere"
    assert {f"{picture.name}.png" for picture in found.pictures} <= {file.name for file in tmp_path.iterdir()}
    assert markdown.read_text().count("](") == 3
    for table in tables(still):
        assert table.markdown() in markdown.read_text()
    assert all(picture.png.startswith(b"\x89PNG") for picture in found.pictures)


def test_a_page_refuses_what_it_cannot_show() -> None:
    assert Page("t", (Bullets(("one", "two")),)).markdown() == "# t\n\n- one\n- two\n"
    assert "<li>one</li>" in Page("t", (Bullets(("one",)),)).html()
    assert Picture("name", "words", b"").png == b""
    for render in (Page.markdown, Page.html):
        with pytest.raises(TypeError, match="expected a part of a page"):
            render(Page("t", (3,)))  # type: ignore[arg-type]


def test_an_empty_table_is_refused() -> None:
    with pytest.raises(ValueError, match="got an empty one"):
        analyse([], STUDY.axes)


def narrow(lr: float, decay: float, pruned: bool, seed: int) -> float:
    """Good learning rates within half a power of ten of the prior, and none else."""
    return 0.9 if abs(lr + 1) < 0.6 else 0.3


def test_contours_are_dark_wherever_runs_were_bad() -> None:
    analysis = analysed(narrow)
    figure = spaces_figure(analysis)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    above = figure.axes[0]

    def colour(decay: float, lr: float) -> list[int]:
        x, y = above.transData.transform((decay, lr))
        return pixels[pixels.shape[0] - 1 - int(y), int(x), :3].tolist()

    darkest, brightest = ([round(255 * c) for c in viridis(v)[:3]] for v in (0.0, 1.0))
    for decay, lr in analysis.positions:
        inside = 0.98 * (decay + 3) - 3, 0.98 * (lr + 1) - 1 - 0.01  # off the frame and the white lines
        if abs(lr + 1) > 0.6:
            assert colour(*inside) == pytest.approx(darkest, abs=2)
    assert colour(-3.2, -1.0) == pytest.approx(brightest, abs=40)


def test_tables_of_numbers(still: Analysis) -> None:
    """Each figure as the printed tables have it, and nothing but numbers beside the names."""
    found = numeric_tables(made(flat), still)
    assert {name: len(table.rows) for name, table in found.items()} == {
        "runs": 49 * 2 * 3,
        "networks": 3,
        "ellipses": 6,
        "risk": 3,
    }
    first = dict(zip(found["runs"].columns, found["runs"].rows[0], strict=True))
    row = made(flat)[0]
    assert (first["model.lr"], first["model.weight_decay"]) == row.values[::-1]
    assert (first["variant"], first["top1"], first["remaining"], first["seed"]) == ("unpruned", row.top1, None, 0)
    overview, ellipses, _, risks = tables(still)
    for name, grid, columns in (
        ("networks", overview, ["best_top1", "prior_top1"]),
        ("ellipses", ellipses, ["length", "width"]),
        ("risk", risks, ["mean", "std"]),
    ):
        table = found[name]
        assert all(isinstance(cell, (int, float, type(None))) for cells in table.rows for cell in cells[1:]), name
        printed = {cell for cells in grid.rows for cell in cells}
        for cells in table.rows:
            named = dict(zip(table.columns, cells, strict=True))
            assert {f"{named[column]:.{3 if name == 'risk' else 2}f}" for column in columns} <= printed, name
