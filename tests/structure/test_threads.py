"""Networks that are traced in several threads, or while another thread trains."""

import threading
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_prune.structure import TracedModel, trace


class Watched(nn.Module):
    """Says when it runs."""

    def __init__(self, running: Callable[[], None]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.running = running

    def forward(self, x):
        self.running()
        return self.last(self.first(x).relu())


def groups(running: Callable[[], None]) -> list[tuple[str, int]]:
    structure = trace(TracedModel.of(Watched(running), torch.ones(2, 4)))
    return [(group.name, group.width) for group in structure.groups]


def test_what_another_thread_assigns_meanwhile_stays():
    weight, given = nn.Parameter(torch.zeros(3)), torch.ones(3)

    def elsewhere() -> None:
        thread = threading.Thread(target=setattr, args=(weight, "data", given))
        thread.start()
        thread.join()

    assert groups(elsewhere) == [("first", 6)]
    torch.testing.assert_close(weight.detach(), torch.ones(3))


def test_two_threads_run_networks_one_after_the_other():
    before = nn.Module.__getattr__
    inside: list[int] = []
    most: list[int] = []
    found: list[object] = []

    def running() -> None:
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()

    threads = [threading.Thread(target=lambda: found.append(groups(running))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[("first", 6)]] * 2
    assert max(most) == 1
    assert nn.Module.__getattr__ is before
    assert "data" not in vars(torch.Tensor)
