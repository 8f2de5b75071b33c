"""Status messages of slow operations."""

from __future__ import annotations

from io import StringIO
from time import sleep
from types import SimpleNamespace

import pytest
from rich.console import Console

from lightning_prune.callbacks.display import status as module
from lightning_prune.callbacks.display.status import log_status


def a_run(*, bar=None, first=True):
    return SimpleNamespace(progress_bar_callback=bar, is_global_zero=first)


@pytest.mark.parametrize(("seconds", "first", "lines"), [(0.3, True, 1), (0.3, False, 0), (0.0, True, 0)])
def test_one_line_without_a_terminal(seconds, first, lines, monkeypatch, caplog):
    monkeypatch.setattr(module, "_DELAY", 0.05)
    with log_status(a_run(first=first), "Tracing the network"):
        sleep(seconds)
    assert [record.getMessage() for record in caplog.records] == ["Tracing the network ..."] * lines


def test_a_clock_in_a_terminal(monkeypatch, caplog):
    written = StringIO()
    monkeypatch.setattr(module, "_DELAY", 0.05)
    monkeypatch.setattr(module, "Console", lambda: Console(file=written, force_terminal=True, width=80))

    def failing():
        sleep(0.3)
        raise KeyError

    with pytest.raises(KeyError), log_status(a_run(bar=object()), "Tracing the network"):
        failing()
    assert "Tracing the network" in written.getvalue()
    assert "0:00:0" in written.getvalue()
    assert not caplog.records
