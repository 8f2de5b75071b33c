"""Runs here last as long as their training: sizes are measured and pictures drawn only where a test asks for it."""

from __future__ import annotations

import pytest

from lightning_prune.callbacks.display import report_writer
from lightning_prune.reporting import Timing


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "measured" not in request.fixturenames:
        monkeypatch.setattr(report_writer, "latencies", lambda _, networks: [{1: Timing(1.0)}] * len(networks))
        monkeypatch.setattr(report_writer.ReportWriter, "_pages", lambda self: self.report.pages(pictures=False))


@pytest.fixture
def measured() -> None:
    """Latency and the picture are real in this test."""
