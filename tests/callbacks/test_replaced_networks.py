"""Networks of torchvision, truncated, with a new head and half of their units: equal to networks written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.replacing import CASES, measure, measure_ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The dirpath has changed")]


def _check(found: dict[str, Any]) -> None:
    dense, replaced, cut = found["params"]
    assert cut < replaced < dense
    assert found["by_hand"] < 1e-12
    assert found["loaded"] == 0
    assert found["resumed"] == dict.fromkeys(found["resumed"], True)
    assert len(found["resumed"]) == 3


@pytest.mark.parametrize("case", CASES)
def test_equal_to_a_network_written_by_hand_and_resumed(case: str, tmp_path: Path) -> None:
    found = measure(case, tmp_path)
    _check(found)
    assert found["steps"] < 1e-9


@pytest.mark.ddp
@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_the_same(case: str, tmp_path: Path) -> None:
    _check(measure_ranks(case, tmp_path))
