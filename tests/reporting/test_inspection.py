"""What can be pruned, shown before anything is."""

import torch
from rich.console import Console
from torch import nn

from lightning_prune.reporting import Inspection
from lightning_prune.structure import Subject, trace


class Residual(nn.Module):
    """Six layers that share one width, and one of their own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.inner = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(self.inner(x).relu())


def inspection():
    model = Residual()
    return model, Inspection(trace(Subject.of(model, torch.zeros(2, 5))))


def test_totals():
    model, inspected = inspection()
    assert inspected.params == sum(p.numel() for p in model.parameters())
    assert inspected.macs == 5 * 8 + 5 * 64 + 8 * 16 + 16 * 3
    assert inspected.units == 24
    assert inspected.reachable == 1 - 3 / inspected.params  # all but the bias of the head


def test_table_names_couplings_widths_and_reasons():
    _, inspected = inspection()
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(inspected)
    for text in (capture.get(), str(inspected), inspected._repr_html_()):
        words = ("first", "blocks.0, blocks.1", "blocks.2 +2", "inner", "head", "because", "1 MAC = 2 FLOPs")
        assert all(word in text for word in words)
    inner = next(line.split() for line in str(inspected).splitlines() if line.strip().startswith("inner"))
    assert inner == ["inner", "head", "16", "192", "31.8", "%"]  # 8·16 weights, 16 biases, 16·3 weights of the head
    head = next(line for line in str(inspected).splitlines() if line.strip().startswith("head"))
    assert head.strip().endswith("3")
    assert inspected.structure.frozen[0].reason in str(inspected)


def test_nothing_prunable_is_still_shown_with_reasons():
    inspected = Inspection(trace(Subject.of(nn.Linear(4, 3), torch.zeros(2, 4))))
    assert inspected.units == 0
    assert inspected.reachable == 0
    text = str(inspected)
    assert "0 units in 0 groups can be pruned" in text
    assert "What stays as it is" in text
