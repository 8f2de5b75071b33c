"""Runs here last as long as their training: sizes are measured and pictures drawn only where a test asks for it."""

from __future__ import annotations

import pytest

from tests.support.quick_reports import quick_reports


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "measured" not in request.fixturenames:
        quick_reports(monkeypatch)


@pytest.fixture
def measured() -> None:
    """Latency and the picture are real in this test."""
