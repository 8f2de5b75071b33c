"""Comparisons: the Pareto front against its definition, pairs by seed against arithmetic, tables and picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.reporting import ComparedNetwork, Comparison, comparison_figure
from lightning_prune.reporting.pages import Picture

DENSE = ComparedNetwork("a/001", "dense", 0.90, 1000, 5000, 0, {1: 0.5, 64: 4.0})
PRUNED = ComparedNetwork("b/001", "pruned", 0.88, 400, 2000, 0, {1: 0.6, 64: 2.0})
WORSE = ComparedNetwork("c/001", "worse", 0.80, 500, 2000, 1, {1: 0.7})


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=8),
    st.sampled_from(["max", "min"]),
)
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]], mode: Literal["max", "min"]) -> None:
    networks = [ComparedNetwork(str(i), str(i), float(y), x, 10 * x) for i, (y, x) in enumerate(points)]
    found = Comparison(tuple(networks), "acc", mode).front("params")
    sign = 1 if mode == "max" else -1
    undominated = {
        str(i)
        for i, (y, x) in enumerate(points)
        if not any(sign * v >= sign * y and w <= x and (v, w) != (y, x) for v, w in points)
    }
    assert {network.run for network in found} == undominated
    assert [network.params for network in found] == sorted(network.params for network in found)


def test_a_network_without_a_latency_is_on_no_front_of_it() -> None:
    comparison = Comparison((DENSE, PRUNED, WORSE), "val_acc")
    assert comparison.costs == ["params", "macs", "1", "64"]
    assert [network.run for network in comparison.front("64")] == ["b/001", "a/001"]
    assert [network.run for network in comparison.front("1")] == ["a/001"]
    assert Comparison((DENSE, replace(PRUNED, latency={})), "val_acc").costs == ["params", "macs"]


def test_settings_are_paired_where_seeds_agree() -> None:
    values = {("dense", 0): 0.90, ("dense", 1): 0.92, ("dense", 2): 0.94, ("pruned", 1): 0.91, ("pruned", 2): 0.90}
    networks = [ComparedNetwork(f"{name}/{seed}", name, value, 10, 10, seed) for (name, seed), value in values.items()]
    saved = replace(networks[-1], metric=0.1, is_final=False)
    _, pairs = Comparison((*networks, saved, WORSE), "val_acc").grids()
    differences = np.array([-0.01, -0.04])
    row, lonely = pairs.rows
    assert row[:2] == ("pruned", "seeds 1, 2")
    expected = [0.93, 0.905, differences.mean(), differences.std(ddof=1), differences.min(), differences.max()]
    assert [float(cell) for cell in row[2:]] == pytest.approx(expected, rel=1e-3)
    assert lonely[1] == "seed 1", "its only seed"
    none = Comparison((DENSE, WORSE), "val_acc").grids()[1].rows[0]
    assert none[1:] == ("no seed in common", *["–"] * 6)


def test_runs_with_one_seed_count_once() -> None:
    networks = (DENSE, replace(PRUNED, metric=0.7), replace(PRUNED, metric=0.9))
    row = Comparison(networks, "val_acc").grids()[1].rows[0]
    assert row[1] == "seed 0"
    assert float(row[3]) == pytest.approx(0.8)
    assert row[5] == "–", "one seed has no spread"


def test_the_table_marks_the_fronts() -> None:
    table = Comparison((DENSE, PRUNED, WORSE), "val_acc").grids()[0]
    marked = [[cell.endswith("*") for cell in row[4:8]] for row in table.rows]
    assert marked == [[True] * 4, [True, True, False, True], [False] * 4]
    assert [row[-1] for row in table.rows] == ["100.0 %", "40.0 %", "40.0 %"]


@pytest.mark.parametrize("latency", [True, False])
def test_the_picture(latency: bool) -> None:
    networks = [DENSE, PRUNED, replace(PRUNED, run="b/002", params=30, is_final=False)]
    networks += [replace(WORSE, setting=f"s{i}", run=f"s{i}") for i in range(10)]
    networks = networks if latency else [replace(network, latency={}) for network in networks]
    figure = comparison_figure(Comparison(tuple(networks), "val_acc"))
    assert [axes.get_xlabel() for axes in figure.axes][:2] == ["parameters", "MACs of one sample"]
    assert len(figure.axes) == (4 if latency else 2)
    assert [axes.get_xscale() for axes in figure.axes][:2] == ["log", "linear"]
    assert len(figure.legends[0].get_texts()) == 13, "twelve settings and the front"
    assert Picture.of("pareto", "", figure).png.startswith(b"\x89PNG")
