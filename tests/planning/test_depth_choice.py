"""How deep a network is to be, by its scores."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_prune.planning import best_depth, require_depth


@pytest.mark.parametrize(
    ("scores", "depth", "place"),
    [
        ([0.1, 0.5, 0.9, 0.7], "argmax", 2),
        ([0.1, 0.9, 0.9, 0.7], "argmax", 1),
        ([0.1, 0.5, 0.9, 0.7], 0.0, 2),
        ([0.1, 0.5, 0.9, 0.7], 0.41, 1),
        ([0.1, 0.5, 0.9, 0.7], 0.39, 2),
        ([0.1, 0.5, 0.9, 0.7], 1, 0),
        ([0.3], "argmax", 0),
    ],
)
def test_by_hand(scores: list[float], depth: Any, place: int) -> None:
    assert best_depth(scores, depth) == place


@pytest.mark.parametrize("depth", ["deep", -0.1, True, float("nan"), [0.1]])
def test_what_is_no_depth(depth: Any) -> None:
    with pytest.raises(ValueError, match="expected `depth` to be None"):
        require_depth(depth)
