"""What can be pruned, shown before anything is."""

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_prune.reporting import Inspection, Report, size_of
from lightning_prune.structure import TracedModel, trace


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
    return model, Inspection(trace(TracedModel.of(model, torch.zeros(2, 5))))


def test_totals():
    model, inspected = inspection()
    assert inspected.params == sum(p.numel() for p in model.parameters())
    assert inspected.macs == 5 * 8 + 5 * 64 + 8 * 16 + 16 * 3
    assert inspected.units == 24
    assert inspected.reachable == 1 - 3 / inspected.params  # all but the bias of the head
    assert "of the parameters and 100.0 % of the MACs lie on them" in inspected.summary


def test_what_a_frozen_layer_holds_cannot_be_reached():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.hidden, self.head = nn.LSTM(4, 32, batch_first=True), nn.Linear(32, 8), nn.Linear(8, 2)

        def forward(self, x):
            literal = torch.zeros(1, len(x), 32)
            return self.head(self.hidden(self.lstm(x, (literal, literal))[0]).relu())

    structure = trace(TracedModel.of(Recurrent(), torch.zeros(2, 5, 4)))
    assert structure.widths == {"hidden": 8}
    ours, lstm = 32 * 8 + 8 * 2, 4 * 32 * (4 + 32)
    assert structure.reachable == {
        "params": pytest.approx((ours + 8) / (ours + 8 + 2 + lstm + 8 * 32)),
        "macs": pytest.approx(ours / (ours + lstm)),
    }
    assert "5.4 % of the parameters and 5.6 % of the MACs" in " ".join(str(Inspection(structure)).split())
    size = size_of(structure)
    assert size.reachable == structure.reachable
    report = " ".join(str(Report(dense=size, final=size)).split())
    assert "The prunable layers hold 5.4 % of the parameters and 5.6 % of the MACs." in report
    assert not size_of(structure.take({"hidden": (0, 1)}), size).reachable


def test_table_names_couplings_widths_and_reasons():
    _, inspected = inspection()
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(inspected)
    for text in (capture.get(), str(inspected), inspected._repr_html_()):
        words = ("first", "blocks.0, blocks.1", "blocks.2 +2", "inner", "head", "reason", "1 MAC = 2 FLOPs")
        assert all(word in text for word in words)
    inner = next(line.split() for line in str(inspected).splitlines() if line.strip().startswith("inner"))
    assert inner == ["inner", "head", "16", "192", "31.8", "%"]  # 8·16 weights, 16 biases, 16·3 weights of the head
    head = next(line for line in str(inspected).splitlines() if line.strip().startswith("head"))
    assert head.strip().endswith("3")
    assert inspected.structure.frozen[0].reason in str(inspected)


def test_nothing_prunable_is_still_shown_with_reasons():
    inspected = Inspection(trace(TracedModel.of(nn.Linear(4, 3), torch.zeros(2, 4))))
    assert inspected.units == 0
    assert inspected.reachable == 0
    text = str(inspected)
    assert "0 units in 0 groups can be pruned" in text
    one = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2))
    assert "1 unit in 1 group can be pruned" in str(Inspection(trace(TracedModel.of(one, torch.zeros(2, 4)))))
    assert "What cannot be pruned" in text


class Heads(nn.Module):
    """Attention with a scale of its own, so that widths of heads can shrink; and a layer that nothing reaches."""

    def __init__(self):
        super().__init__()
        self.inside, self.out, self.unused = nn.Linear(6, 24), nn.Linear(8, 3), nn.Linear(5, 7)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.inside(x).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.out(seen.transpose(1, 2).flatten(2))


def test_units_of_several_channels_are_explained_by_their_own_numbers_and_a_width_is_told_once():
    text = str(Inspection(trace(TracedModel.of(Heads(), torch.zeros(2, 5, 6)))))
    assert "4 × 6" in text
    assert "4 × 6 means 4 units of 6 channels each" in " ".join(text.split())
    unused = next(line for line in text.splitlines() if line.strip().startswith("unused"))
    assert unused.split()[-1] == "7"
    assert "7, 7" not in unused
