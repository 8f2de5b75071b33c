"""Settings of the whole suite: one thread, no network, the same random numbers every time."""

from __future__ import annotations

import os

# Before torch is imported: the suite runs on several processes, and each one's threads would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
# LightningCLI calls what newer versions of jsonargparse will drop.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support import other_package

other_package.use()

matplotlib.use("Agg")
torch.set_num_threads(1)

# Derandomised: a suite that fails on one machine must fail on all of them.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _settings_of_torch_stay() -> Iterator[None]:
    """``Trainer(deterministic=True)`` sets the whole process, in which some operators then fail."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def _levels_of_loggers_stay() -> Iterator[None]:
    """The runs of a study, which have processes of their own elsewhere, quieten Lightning."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine may be connected to (W&B talks to a process of its own)."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"tests run offline, this one wants to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder of the test's own, without data elsewhere and without processes that write there afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_PRUNE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name, module in list(sys.modules.items()):  # another test's `mine.py` is another module
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
