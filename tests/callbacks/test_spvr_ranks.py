"""A ranking over several processes, and rankings that are killed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks import spvr_runs
from tests.support import ranks

RACES = [None, "exact", "statistical"]


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same groups, scores up to rounding, and the same network."""
    assert found["bundles"] == expected["bundles"]
    assert found["kept"] == expected["kept"]
    assert len(found["kept"]) > 0
    assert found["edits"] == expected["edits"]
    assert torch.equal(found["total"], expected["total"])


@pytest.mark.ddp
@pytest.mark.parametrize("race", [None, "exact"])
@pytest.mark.parametrize("coupling", ["group", "stage"])
def test_two_processes_share_the_work_and_find_what_one_finds(coupling: str, race: str | None, tmp_path: Path) -> None:
    """Each masks its half of the samples; groups form by the samples of both."""
    settings = {"race": race, "coupling": coupling, "budget": 0.2}
    one = ranks.run(spvr_runs.train, tmp_path / "1", settings)
    two = ranks.run(spvr_runs.train, tmp_path / "2", settings, processes=2)
    assert (one["samples"], two["samples"]) == (24, 12)
    assert_alike(two, one)
    if race is None:
        assert two["macs"] * 2 == pytest.approx(one["macs"], rel=0.01)
        for name, scores in one["scores"].items():
            torch.testing.assert_close(two["scores"][name], scores, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("race", RACES)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_ranking_that_was_killed_goes_on(processes: int, race: str | None, tmp_path: Path) -> None:
    """SIGKILL at two places; the run behind ends bit by bit as one that was left alone, and masks less.

    Races look at the samples of a process in three parts, of 16.
    """
    settings = {"race": race, "samples_per_class": 32}
    expected = ranks.run(spvr_runs.train, tmp_path / "alone" / "run", settings, processes=processes)
    home = tmp_path / "killed"
    for number, after in enumerate((1, 2)):
        crew = ranks.start(spvr_runs.train, home / f"run {number}", settings, after, processes=processes)
        assert -signal.SIGKILL in ranks.wait(crew)
    found = ranks.run(spvr_runs.train, home / "last", settings, processes=processes)
    assert_alike(found, expected)
    assert found["macs"] < expected["macs"]
    for name, weight in expected["weights"].items():
        assert torch.equal(found["weights"][name], weight), name
    for name, scores in expected["scores"].items():
        assert torch.equal(found["scores"][name], scores), name
