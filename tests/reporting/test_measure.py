"""Bytes and milliseconds."""

import math
import platform
import time
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_prune.reporting import measure
from lightning_prune.reporting.measure import latencies, latency, size_on_disk, versions
from lightning_prune.structure import TracedModel


class Spy(nn.Module):
    """Notes how it and its copies are called, changes a buffer, counts its calls, and draws random numbers."""

    seen: ClassVar[list] = []  # of the class: copies share it

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.dropout = nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.passes = 0

    def forward(self, x, scale, mask=None):
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.passes += 1
        self.seen.append((tuple(x.shape), tuple(scale.shape), tuple(mask.shape), self.training, self.dropout.training))
        return self.dropout(self.layer(x)) + torch.rand(())


def spied():
    return (torch.randn(2, 4), torch.ones(3)), {"mask": torch.ones(2, 1)}


def test_size_on_disk_is_that_of_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    file = (tmp_path / "weights.pt").stat().st_size
    # the name of the file is part of the archive, once per entry
    assert abs(size_on_disk(model) - file) < 1024
    assert size_on_disk(nn.Linear(400, 300)) > 4 * 400 * 300


def test_latency_resizes_the_batch_and_leaves_no_trace():
    model, hooked = Spy(), []
    model.seen.clear()
    model.register_forward_hook(lambda *_: hooked.append(1))
    model.dropout.eval()
    args, kwargs = spied()
    state = torch.get_rng_state()
    timings = latency(TracedModel.of(model, *args, **kwargs), (1, 5), seconds=0.01)
    assert list(timings) == [1, 5]
    assert all(0 < timing.ms < 1000 and timing.spread is not None and timing.spread >= 0 for timing in timings.values())
    assert {seen[:3] for seen in model.seen} == {((n, 4), (3,), (n, 1)) for n in (1, 5)}
    assert not any(training for seen in model.seen for training in seen[3:])
    assert model.training
    assert not model.dropout.training
    assert torch.equal(torch.get_rng_state(), state)
    # The network itself was not run.
    assert len(model.seen) > 2
    assert (model.passes, model.calls.item(), hooked) == (0, 0, [])


def test_latency_is_that_of_the_forward_pass():
    class Slow(nn.Module):
        passes = 0

        def forward(self, x):
            Slow.passes += 1
            time.sleep(0.05)
            return x

    # Sleeping takes no less than it says, and more on a busy machine.
    ms, spread = latency(TracedModel.of(Slow(), torch.ones(1, 2)), (1,), seconds=0.01)[1]
    assert 50 <= ms < 1000
    assert spread is None
    assert Slow.passes == 2  # one to warm up, one to time: that took long enough


def test_networks_take_turns(monkeypatch):
    """The machine is twice as slow in every other round: both medians are those of the fast rounds, with the spread."""
    clock = iter([0.001, 0.01, 0.002, 0.02, 0.001, 0.01, 0.002, 0.02, 0.001, 0.01])
    monkeypatch.setattr(measure, "median_seconds", lambda *_: next(clock))
    call = TracedModel.of(nn.Identity(), torch.ones(1, 2)).calls[0]
    first, second = latencies(call, [nn.Identity(), nn.Identity()], (1,))
    assert first[1] == pytest.approx((1.0, 0.5))
    assert second[1] == pytest.approx((10.0, 5.0))


def test_the_network_is_as_it_was_after_an_error():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    model = Broken()
    with pytest.raises(RuntimeError, match="no"):
        latency(TracedModel.of(model, torch.ones(1, 2)))
    assert model.training


def test_too_large_a_batch_is_no_number():
    class Large(nn.Module):
        def forward(self, x):
            if len(x) > 1:
                raise torch.cuda.OutOfMemoryError("no memory")
            return x

    timings = latency(TracedModel.of(Large(), torch.ones(1, 2)), (1, 64), seconds=0.001)
    assert timings[1].ms > 0
    assert math.isnan(timings[64].ms)


def test_versions():
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
