"""One unit is left of a group: what it was does not show in the network's shapes any more, and is still known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import LinearSchedule, OneShot, StructuredPruning, inspect, prune, sensitivity
from lightning_prune.surgery import history_of, replay
from tests.callbacks.small import Small, loaders, trainer


class Attention(nn.Module):
    """Heads of 4 features, as many as the layers are wide."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 4 * heads) for _ in range(3))
        self.out = nn.Linear(4 * heads, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (4, 2)).repeat(1, 1, 4)
        q, k, v = (layer(x).view(*x.shape[:-1], -1, 4).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        out: Tensor = self.out(y.transpose(1, 2).reshape(*x.shape[:-1], -1))
        return F.relu(x + out).mean(1)


class Attending(Small):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        # The first has one head from the start, of the same size as the one that is left of the second.
        first = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8)]
        self.net = nn.Sequential(*first, Attention(1), Attention(heads), nn.Linear(8, 3)).double()


HEADS = "net.4.query"


def example(samples: int = 5) -> Tensor:
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_a_network_with_one_head_left_is_pruned_again() -> None:
    model = Attending()
    dense = inspect(model, example()).structure.widths
    prune(model, example(), pruning_ratio=0.5, layers=[HEADS])
    assert model.net[4].query.out_features == 4
    assert inspect(model, example()).structure.widths == {**dense, HEADS: 1}
    report = prune(model, example(), pruning_ratio=0.6)
    assert model.net[4].query.out_features == 4
    assert model.net[0].out_features == 5
    assert report.final.widths[HEADS] == 1


def test_all_members_of_the_single_head_are_known() -> None:
    model = Attending(heads=3)
    members = {(m.tensor, m.dim, m.role) for m in inspect(model, example()).structure.group(HEADS).members}
    prune(model, example(), pruning_ratio=0.7, layers=[HEADS])
    group = inspect(model, example()).structure.group(HEADS)
    assert group.width == 1
    assert {(m.tensor, m.dim, m.role) for m in group.members} == members
    assert all(m.index.shape == (1, 4) for m in group.members)


def test_sensitivity_looks_at_the_other_groups() -> None:
    model = Attending()
    prune(model, example(), pruning_ratio=0.5, layers=[HEADS])
    scan = sensitivity(model, lambda m: float(m(example()).sum()), example(), shares=(0.5,), layers=[HEADS])
    assert scan.metrics.keys() == {HEADS}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_run_resumes_after_one_head_is_left(tmp_path: Path, epoch: int) -> None:
    def run(ckpt_path: Path | None = None) -> Attending:
        model = Attending(heads=3)
        pruner = StructuredPruning(0.67, schedule=LinearSchedule(start=1, end=2, cuts=2), layers=[HEADS])
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        fit = trainer(tmp_path, 4, pruner, saver, enable_checkpointing=True)
        fit.fit(model, *loaders(), ckpt_path=ckpt_path)
        return model

    whole = run()
    history = history_of(whole)
    assert history is not None
    assert history.widths_now[HEADS] == 1
    resumed = run(tmp_path / f"epoch={epoch}.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    replayed = Attending(heads=3)
    replay(replayed, history)
    assert replayed.net[4].query.weight.shape == whole.net[4].query.weight.shape


def test_a_fit_of_a_network_that_was_cut_before(tmp_path: Path) -> None:
    model = Attending()
    prune(model, example(), pruning_ratio=0.5, layers=[HEADS])
    pruner = StructuredPruning(0.5, schedule=OneShot(1), layers=["net.0", HEADS])
    trainer(tmp_path, 2, pruner).fit(model, *loaders())
    assert pruner.report.final.widths[HEADS] == 1
