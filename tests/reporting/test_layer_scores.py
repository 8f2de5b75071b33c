"""Scores of layers as tables and pictures."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest

from lightning_prune.reporting import (
    LayerScores,
    Report,
    ScoredDepth,
    ScoredLayer,
    SizeAtThreshold,
    importance_figure,
    over_depth_figure,
    over_depth_grid,
    score_figure,
    threshold_figure,
)
from lightning_prune.scoring import Station
from lightning_prune.scoring.xgb import LayerScore
from lightning_prune.structure import Size


def found(layer: str, score: float, importance: list[float], call: int = 0) -> LayerScore:
    numbers = np.array(importance)
    return LayerScore(Station(layer, "activation", call), score, numbers, numbers, 0.25)


LAYERS = [
    found("first", 0.5, [0.0, 0.6, 0.4, 0.0]),
    found("second", 0.8, [0.005, 0.995]),
    found("none", 0.2, [0.0, 0.0]),
]
DEPTHS = [ScoredDepth("block1", 1, 4, 0.5), ScoredDepth("block2", 2, 2, 0.8, chosen=True)]


def test_rows() -> None:
    table = LayerScores(LAYERS, {"first": [1], "second": [0, 1]}, "accuracy", DEPTHS)
    assert table.rows == [
        ScoredLayer("first", 4, 0.5, unused=2, holding=2, kept=1, seconds=0.25),
        ScoredLayer("second", 2, 0.8, unused=0, holding=1, kept=2, seconds=0.25),
        ScoredLayer("none", 2, 0.2, unused=2, holding=0, kept=None, seconds=0.25),
    ]
    text = str(table)
    assert "0.625" in text, "μ* of the first layer"
    assert "50.0 %" in text
    assert "chosen" in text
    assert len(table.grids()) == 2
    assert len(LayerScores(LAYERS, {}, "accuracy").grids()) == 1


def test_a_layer_that_is_called_twice() -> None:
    assert ScoredLayer.of(found("shared", 0.5, [1.0], call=1)).layer == "shared, call 2"


def test_they_are_part_of_a_report() -> None:
    report = Report(scored=LayerScores(LAYERS, {}, "accuracy").rows, depths=list(DEPTHS), config={"metric": "r2"})
    again = Report.from_plain(report.to_plain())
    assert (again.scored, again.depths) == (report.scored, report.depths)
    assert [grid.title for grid in again.grids()] == ["Layers", "Depths"]
    assert "r2 on held-out samples" in str(again)


def test_histograms() -> None:
    """A panel per layer, kept and gone apart, the threshold marked, those never used told in words."""
    figure = importance_figure(LAYERS, {"first": [1], "second": [0, 1], "none": []}, threshold=0.5)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["first (4)", "second (2)", "none (2)"]
    assert [axes.lines[0].get_xdata()[0] for axes in panels] == pytest.approx([np.log(0.5)] * 3)
    assert "2 never used" in panels[0].texts[0].get_text()
    drawn = [sum(bar.get_height() for bar in axes.patches) for axes in panels]
    assert drawn == [2, 2, 0], "channels that are used"
    figure.savefig(BytesIO())


def test_many_layers() -> None:
    figure = importance_figure([found(str(i), 0.5, [0.5, 0.5]) for i in range(70)], {})
    assert sum(axes.get_visible() for axes in figure.axes) == 24
    assert "one in 3 layers" in figure.get_suptitle()


def test_scores_over_depth() -> None:
    figure = score_figure({"trees": [("a", 0.4), ("b", 0.8)], "probe": [("a", 0.5), ("b", 0.5)]})
    trees, probe = figure.axes[0].lines
    assert list(trees.get_ydata()) == [0.5, 1]
    assert list(probe.get_ydata()) == [1, 1]
    figure.savefig(BytesIO())


def test_thresholds_layer_by_layer() -> None:
    figure = importance_figure(LAYERS, {}, {"second": 0.5})
    assert [len(axes.lines) for axes in figure.axes if axes.get_visible()] == [0, 1, 0]
    assert "dashed: ln ρ" in figure.get_suptitle()
    assert "dashed" not in importance_figure(LAYERS, {}, {}).get_suptitle()


def test_numbers_behind_the_histograms() -> None:
    rows = LayerScores(LAYERS, {"first": [1]}, "accuracy").channels()
    assert [row[:3] for row in rows[:3]] == [("first", 0, 0.0), ("first", 1, 0.6), ("first", 2, 0.4)]
    assert [row[3] for row in rows[:2]] == pytest.approx([np.log(1e-16), np.log(0.6)])
    assert [row[4] for row in rows] == ["gone", "kept", "gone", "gone", "", "", "", ""]


SIZES = [SizeAtThreshold(0.0, 10, 900, 10, 1000), SizeAtThreshold(0.01, 6, 500, 10, 1000)]


def test_sizes_by_threshold() -> None:
    grid = LayerScores(LAYERS, {}, "accuracy", sizes=SIZES, whole="the backbone").grids()[-1]
    assert grid.rows[1] == ("0.01", "6", "60.0 %", "500", "50.0 %")
    assert "Parameters of the backbone." in grid.note
    figure = threshold_figure(SIZES, "the backbone", threshold=0.02)
    params, units, marked = figure.axes[0].lines
    assert (list(params.get_xdata()), list(params.get_ydata()), list(units.get_ydata())) == ([0.01], [50], [60])
    assert list(marked.get_xdata()) == [0.02, 0.02]
    figure.savefig(BytesIO())


def test_parameters_over_depth() -> None:
    dense, pruned = {"a": 10, "b": 30, "c": 60}, {"a": 10, "b": 15}
    rows = over_depth_grid(dense, pruned).rows
    assert rows[1] == ("b", "30", "15", "40", "40.0 %", "25", "25.0 %")
    assert rows[2] == ("c", "60", "0", "100", "100.0 %", "25", "25.0 %")
    figure = over_depth_figure(dense, pruned)
    before, after, _ = figure.axes[0].lines
    assert (list(before.get_ydata()), list(after.get_ydata())) == ([10, 40, 100], [10, 25])
    figure.savefig(BytesIO())


def test_parameters_over_depth_are_part_of_a_report() -> None:
    """Of runs that score layers; they survive storing."""
    sizes = {"dense": Size(120, 0, layers={"a": 10, "b": 30}), "final": Size(60, 0, layers={"a": 5})}
    report = Report(**sizes, scored=LayerScores(LAYERS, {}, "accuracy").rows)
    again = Report.from_plain(report.to_plain())
    assert again.dense == report.dense
    assert again.grids()[-1].title == "Parameters over depth"
    assert "![parameters over depth](depth.png)" in again.pages()[0].markdown()
    assert not Report(**sizes).shows_depth
