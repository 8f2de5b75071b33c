"""The report gives the parameters of the backbone alone, wherever a head is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_prune import GradualUnfreezing, MagnitudePruning, OneShot, StructuredPruning, prune
from lightning_prune.callbacks.network_pruning import Decision, NetworkPruning
from lightning_prune.planning import CutPoint, Plan
from lightning_prune.reporting import Report, backbone_modules, size_of
from lightning_prune.structure import Size, Structure, TracedModel, trace
from lightning_prune.surgery import spec_of, transaction
from tests.callbacks.networks import fit


class ConvNet(LightningModule):
    """Two convolutions with norms, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        )
        self.hidden = nn.Linear(8, 10)
        self.head = nn.Linear(10, 3)
        self.example_input_array = torch.zeros(2, 1, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.features(x).mean((2, 3))).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class NewHead(NetworkPruning):
    """Replaces the last layer at once, and makes no unit go."""

    acts_once = True

    def __init__(self, classes: int) -> None:
        self.classes = classes
        super().__init__(None, None, None, True, None, None)

    @override
    def _check(
        self, trainer: Any, module: Any, batch: Any, structure: Structure, original: Any
    ) -> tuple[CutPoint, ...]:
        return self._moments(trainer)

    @override
    def _decide(self, trainer: Any, module: Any, point: CutPoint) -> Decision:
        return Decision(Plan({}, {}))

    @override
    def _change(self, change: Any, trainer: Any, module: Any, decision: Decision) -> Structure:
        specs = {"head": spec_of(module.head, out_features=self.classes)}
        return change.replace(specs, self._retrace(trainer), self._structure, new_dense=True)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 1, 4, 4, generator=generator), torch.randint(3, (12,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def counted(model: nn.Module, *names: str) -> int:
    return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())


def run(folder: Path, *callbacks: Any, model: LightningModule | None = None, **options: Any) -> ConvNet:
    torch.manual_seed(0)
    model = ConvNet() if model is None else model
    fit(folder, model, *callbacks, data=data(), validate=False, **options)
    return model  # type: ignore[return-value]


def test_a_run_tells_the_backbone_before_and_after(tmp_path: Path) -> None:
    dense = counted(ConvNet(), "features")
    callback = StructuredPruning(0.5, schedule=OneShot(at=1), dirpath=str(tmp_path / "report"))
    model = run(tmp_path, callback, epochs=2)
    report = callback.report
    assert report.dense is not None
    assert report.final is not None
    now = counted(model, "features")
    assert (report.dense.backbone, report.cuts[0].size.backbone, report.final.backbone) == (dense, now, now)
    assert now < dense
    assert report.metrics()["pruning/backbone_params"] == now
    stored = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (stored["dense"]["backbone"], stored["final"]["backbone"]) == (dense, now)
    assert stored["summary"]["pruning/backbone_params"] == now
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if "parameters of the backbone" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == [f"{dense:,}", f"{now:,}", f"{100 * now / dense:.1f} %"]
    assert Report.from_plain(report.to_plain()).final == report.final


def test_dense_is_the_network_with_its_new_head(tmp_path: Path) -> None:
    """Also where the head of the start was another one."""
    callback = NewHead(7)
    model = run(tmp_path, callback, epochs=1)
    report = callback.report
    assert report.dense is not None
    assert report.dense.params == sum(p.numel() for p in model.parameters())
    assert model.head.out_features == 7
    assert report.dense.backbone == counted(model, "features")


def test_the_head_that_gradual_unfreezing_names_counts(tmp_path: Path) -> None:
    callback = StructuredPruning(0.5, schedule=OneShot(at=1))
    thaw = GradualUnfreezing(e_f=0, e_u=0.5, head="head")
    model = run(tmp_path, callback, thaw, epochs=2)
    assert callback.report.final is not None
    assert callback.report.final.backbone == counted(model, "features", "hidden")


def test_masked_weights_do_not_count(tmp_path: Path) -> None:
    callback = MagnitudePruning(0.5, schedule=OneShot(at=1))
    model = run(tmp_path, callback, epochs=2)
    assert callback.report.final is not None
    zeros = sum(int((p == 0).sum()) for name, p in model.features.named_parameters() if "weight" in name)
    assert zeros > 0
    assert callback.report.final.backbone == counted(model, "features") - zeros


def test_without_a_trainer() -> None:
    model = ConvNet()
    dense = counted(model, "features")
    report = prune(model, model.example_input_array, pruning_ratio=0.5)
    assert report.dense is not None
    assert report.size is not None
    assert (report.dense.backbone, report.size.backbone) == (dense, counted(model, "features"))
    again = prune(model, model.example_input_array, pruning_ratio=0.75)  # dense as it was
    assert again.dense is not None
    assert again.dense.backbone == dense


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def test_no_head_no_backbone() -> None:
    """Of a network without convolutions a new head alone tells what the backbone is."""
    model = mlp()
    assert backbone_modules(model) is None
    assert backbone_modules(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1))) is None
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.LayerNorm(4), nn.Linear(4, 4))
    assert backbone_modules(patches) is None
    x = torch.zeros(1, 4)
    traced = TracedModel.of(model, x)
    with transaction(model, run=lambda: model(x)) as change:
        structure = change.replace({"2": spec_of(model[2], out_features=5)}, lambda: trace(traced), new_dense=True)
    assert backbone_modules(model) == {"0"}
    assert size_of(structure, backbone=backbone_modules(model)).backbone == 4 * 8 + 8
    report = prune(model, x, pruning_ratio=0.5)
    assert report.size is not None
    assert report.size.backbone == 4 * 4 + 4
    assert "parameters of the backbone" in str(report)


@pytest.mark.parametrize(("known", "cells"), [(80, ["80", "30", "37.5 %"]), (None, ["–", "30", "–"])])
def test_a_network_whose_dense_backbone_is_not_known(known: int | None, cells: list[str]) -> None:
    report = Report(dense=Size(100, 1000, {"a": 4}, backbone=known))
    report.final = Size(60, 600, {"a": 2}, backbone=30)
    row = next(
        line for line in report.pages(pictures=False)[0].markdown().splitlines() if "parameters of the backbone" in line
    )
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == cells
