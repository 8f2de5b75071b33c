"""Runs here last as long as their training: sizes are measured and pictures drawn only where a test asks for it."""

from __future__ import annotations

import pytest

from lightning_prune.callbacks import showing


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "measured" not in request.fixturenames:
        monkeypatch.setattr(showing, "latency", lambda *_, **__: {1: 1.0})
        monkeypatch.setattr(showing.Showing, "_picture", lambda *_, **__: None)


@pytest.fixture
def measured() -> None:
    """Latency and the picture are real in this test."""
