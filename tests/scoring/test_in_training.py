"""Every criterion in a run of Lightning: observed, examined, cut, and the run goes on."""

import warnings

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import OneShot, StructuredPruning
from lightning_prune.callbacks.display.report_writer import ReportWriter
from lightning_prune.scoring import Contribution, Criterion, GradientStatistic, Statistic, criteria
from lightning_prune.scoring.spvr.criterion import MaskingStatistic
from tests.scoring.references import shares


class Net(LightningModule):
    def __init__(self, example=None):
        super().__init__()
        self.example_input_array = example
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(4 * 16, 8), nn.ReLU(), nn.Linear(8, 3)),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """Latencies and pictures take longer than the training."""
    monkeypatch.setattr(ReportWriter, "measure", lambda self, traced, size, dense=None: size)
    monkeypatch.setattr(ReportWriter, "finish", lambda *_: None)


def fit(callback, tmp_path, model, val=False, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*is less than one unit of any layer")
        trainer = Trainer(
            **{"max_epochs": 4, "accelerator": "cpu", "logger": False, "callbacks": [callback]},
            **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
            **{"default_root_dir": tmp_path, "log_every_n_steps": 1, **settings},
        )
        data = TensorDataset(torch.rand(24, 1, 8, 8), torch.randint(3, (24,)))
        trainer.fit(model, DataLoader(data, 8), DataLoader(data, 8) if val else None)


@pytest.mark.parametrize("kind", criteria.__all__)
def test_cuts_a_network_in_training(kind, tmp_path):
    settings = {"group_size": 1} if kind == "SPvR" else {}
    model, callback = Net(), StructuredPruning(0.5, criterion=getattr(criteria, kind)(**settings))
    fit(callback, tmp_path, model, accumulate_grad_batches=2)
    assert callback.structure.widths == {"net.0": 3, "net.3": 2, "net.6": 4}
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["Contribution", "Taylor", "APoZ", "KLDivergence"])
def test_observes_only_what_may_be_pruned(kind, tmp_path, monkeypatch):
    recorded, record = set(), Statistic.record

    def recording(self, name, *rest, **quantities):
        recorded.add(name)
        record(self, name, *rest, **quantities)

    monkeypatch.setattr(Statistic, "record", recording)
    model, callback = Net(), StructuredPruning(0.5, criterion=getattr(criteria, kind)(), layers=["net.0", "net.6"])
    fit(callback, tmp_path, model)
    assert recorded == {"net.0", "net.6"}
    assert callback.structure.widths == {"net.0": 3, "net.3": 4, "net.6": 4}


def test_looks_at_training_data_rather_than_an_example(tmp_path, monkeypatch):
    seen, collect = [], MaskingStatistic.collect
    monkeypatch.setattr(
        MaskingStatistic,
        "collect",
        lambda self, model, data: (seen.append(next(iter(data)).args[0].shape), collect(self, model, data)),
    )
    model = Net(torch.zeros(1, 1, 8, 8))
    fit(StructuredPruning(0.5, criterion=criteria.KLDivergence(), schedule=OneShot()), tmp_path, model)
    assert seen == [(8, 1, 8, 8)]


@pytest.mark.parametrize("kind", criteria.__all__)
def test_is_chosen_by_name(kind):
    parser = ArgumentParser()
    parser.add_argument("--criterion", type=Criterion)
    assert parser.instantiate_classes(parser.parse_args([f"--criterion={kind}"])).criterion == getattr(criteria, kind)()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_shares_in_a_run_are_those_of_its_training_passes(precision, tmp_path, monkeypatch):
    """Gradients accumulate and validation comes in between; every training pass counts, and no other."""

    class Validated(Net):
        def validation_step(self, batch, _):
            return self(batch[0])

    model, passes = Validated(), []

    def record(layer, args, _):
        if layer.training:
            passes.append(shares(layer, args[0].detach().float(), "absolute")[0])

    scored, score = {}, Contribution.score
    monkeypatch.setattr(
        Contribution,
        "score",
        lambda self, group, tensors, statistic: (
            scored.setdefault(group.name, (statistic.average(group.name), statistic.maximum(group.name))),
            score(self, group, tensors, statistic),
        )[1],
    )
    model.net[8].register_forward_hook(record)
    criterion = Contribution(lambda_max=1.0, every_n_batches=1)
    callback = StructuredPruning(0.5, criterion=criterion, schedule=OneShot(2))
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 1, "precision": precision}
    fit(callback, tmp_path, model, val=True, **settings)
    passes = np.concatenate([share for share in passes if share.shape[1] == 8])  # before the cut
    assert len(passes) == 2 * 24 * 3
    average, maximum = scored["net.6"]
    np.testing.assert_allclose(average, passes.sum(0) / passes.any(1).sum(), rtol=1e-5)
    np.testing.assert_allclose(maximum, passes.max(0), rtol=1e-5)


def test_learns_the_scale_of_the_loss_from_mixed_precision(tmp_path, monkeypatch):
    """fp16 starts at 2¹⁶; without it gradients would be that much larger."""
    seen, observe = [], GradientStatistic.observe
    monkeypatch.setattr(
        GradientStatistic, "observe", lambda self, model: (seen.append(self.loss_scale), observe(self, model))[1]
    )
    callback = StructuredPruning(0.5, criterion=criteria.Taylor(every_n_batches=1))
    fit(callback, tmp_path, Net(), plugins=MixedPrecision("16-mixed", "cpu"))
    assert seen[0] == 2**16
    assert callback.structure.widths["net.0"] == 3
