"""Reports without what takes longest: the latency is not timed, and no pictures are drawn."""

from __future__ import annotations

import pytest

from lightning_prune.callbacks.display import report_writer
from lightning_prune.reporting import Timing


def quick_reports(patch: pytest.MonkeyPatch) -> None:
    """For good where a process of its own gives a new ``MonkeyPatch``."""
    patch.setattr(report_writer, "latencies", lambda _, networks: [{1: Timing(1.0)} for _ in networks])
    patch.setattr(report_writer.ReportWriter, "_pages", lambda self: self.report.pages(pictures=False))


@pytest.fixture(autouse=True)
def quick_reports_unless_measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a room whose `conftest` imports it: every test without the fixture `measured` has quick reports."""
    if "measured" not in request.fixturenames:
        quick_reports(monkeypatch)


@pytest.fixture
def measured() -> None:
    """Latency and the picture are real in this test."""
