"""SPvR in a run: what goes, when, what starts anew, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune
from lightning_prune import OneShot, Reinitialise, Ridge, SPvRPruning, StructuredPruning
from lightning_prune.callbacks.display.report_writer import ReportWriter
from lightning_prune.callbacks.methods import spvr as callback_file
from lightning_prune.models import ResNetCIFAR, SegNet
from lightning_prune.planning import NoEffectWarning
from lightning_prune.structure import StructureError
from lightning_prune.surgery import Replace, history_of
from tests.callbacks.small import Saver, Small, loaders, trainer
from tests.scoring.spvr import reference


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies and pictures take longer than the training."""
    monkeypatch.setattr(ReportWriter, "measure", lambda self, traced, size, dense=None: size)
    monkeypatch.setattr(ReportWriter, "finish", lambda *_: None)


def block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


def spvr(**settings: Any) -> SPvRPruning:
    return SPvRPruning(**{"samples_per_class": 8, **settings})


class Chain(LightningModule):
    """Two stages, one of them of two layers, global pooling, a hidden layer."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(*block(3, 8), nn.MaxPool2d(2), *block(8, 8), *block(8, 8), nn.MaxPool2d(2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
        )
        self.double()
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr)


def images(n: int = 24) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 8, 8, generator=draw, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.arange(n) % 3), batch_size=8)


def fit(folder: Path, module: LightningModule, pruning: Any, *, epochs: int = 1, data: Any = None, **how: Any) -> Any:
    settings = {name: how.pop(name) for name in [*how] if name not in ("ckpt_path", "callbacks")}
    run = trainer(folder, epochs, pruning, *how.pop("callbacks", ()), **settings)
    data = images() if data is None else data
    run.fit(module, data, None if isinstance(module, Chain) else data, **how)
    return run


def params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -- what goes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.7, 0.4, 0.15, 0.09])
def test_the_least_groups_go_until_the_budget_holds(share: float, tmp_path: Path) -> None:
    """By naive rankings of the network as it is; a chain's layers vanish whole, their pooling with the last of them."""
    module = Chain()
    x = torch.cat([batch for batch, _ in images()])
    chain = {"net.0": ["4"], "net.4": ["7"], "net.7": ["13"], "net.13": ["15"]}
    ranked: list[tuple[float, int, int, str, tuple[int, ...]]] = []
    net = module.net.eval()
    for number, (name, layers) in enumerate(chain.items()):
        seen: list[Tensor] = []
        handle = net.get_submodule(layers[0]).register_forward_pre_hook(lambda _, a, seen=seen: seen.append(a[0]))
        with torch.no_grad():
            net(x)
        handle.remove()
        groups = reference.groups_of(reference.correlations(reference.pooled(seen[0].detach(), 8)), 4)
        scores = reference.ranking(net, [x], layers, 8, groups)
        ranked += [(round(s, 9), number, min(g), name, g) for s, g in zip(scores, groups, strict=True)]
    module.train()
    left = {name: set(range(8)) for name in chain}

    def size() -> int:
        conv = [len(left[name]) for name in ("net.0", "net.4", "net.7") if left[name]]
        dense = [conv[-1], *([len(left["net.13"])] if left["net.13"] else []), 3]
        norm = sum(9 * a * b + 3 * b for a, b in itertools.pairwise([3, *conv]))
        return norm + sum((a + 1) * b for a, b in itertools.pairwise(dense))

    limit, whole = int(share * params(module)), params(module)
    assert size() == whole
    for *_, name, units in sorted(ranked):
        if size() <= limit:
            break
        if name != "net.0" or left[name] != set(units):
            left[name] -= set(units)
    pruning = spvr(budget=share, group_size=4)
    fit(tmp_path, module, pruning)
    assert params(module) == size() <= limit
    for name in chain:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Identity) if not left[name] else layer.weight.shape[0] == len(left[name])
    stage_is_gone = not left["net.4"] and not left["net.7"]
    assert isinstance(module.net[10], nn.Identity if stage_is_gone else nn.MaxPool2d)
    assert pruning.structure is not None
    assert pruning.structure.widths == {name: len(units) for name, units in left.items() if units}
    assert pruning.ranking is not None
    assert pruning.ranking.samples == 24


def test_without_drawing_anew_the_kept_units_keep_their_weights(tmp_path: Path) -> None:
    module = Chain(lr=0.0)
    before = module.net[0].weight.detach().clone()
    pruning = spvr(budget=0.31, group_size=4, reinit=False)
    fit(tmp_path, module, pruning)
    history = history_of(module)
    assert history is not None
    assert not any(isinstance(edit, Replace) for edit in history.edits)
    assert all(isinstance(module.net[i], nn.Conv2d) for i in (0, 4, 7))
    kept = history.edits[0].kept.get("net.0", tuple(range(8)))  # type: ignore[union-attr]
    assert torch.equal(module.net[0].weight, before[list(kept)])


def test_the_first_layer_and_the_head_are_what_remains(tmp_path: Path) -> None:
    """The smallest network: one group of the first layer, then the head; nothing smaller can be asked for."""
    smallest = (27 * 4 + 4 + 8) + (4 + 1) * 3
    module, pruning = Chain(), spvr(budget={"params": smallest}, group_size=4)
    fit(tmp_path / "1", module, pruning)
    assert params(module) == smallest
    with pytest.raises(
        ValueError, match=rf"budget of {smallest - 1} params cannot be reached: .* has {smallest}\. What"
    ):
        fit(tmp_path / "2", Chain(), spvr(budget={"params": smallest - 1}, group_size=4))


@pytest.mark.parametrize("budget", [0.5, 0.2, 0.05])
@pytest.mark.parametrize("coupling", ["group", "stage"])
def test_residual_networks(coupling: Any, budget: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ResNetCIFAR(14, classes=3, size=8, shortcut="projection")
    whole = params(module)
    data = DataLoader(TensorDataset(torch.randn(24, 3, 8, 8), torch.arange(24) % 3), batch_size=12)
    pruning = spvr(budget=budget, coupling=coupling)
    fit(tmp_path, module, pruning, data=data)
    assert params(module) <= budget * whole
    assert module(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    if coupling == "stage":
        for stage in (module.layer1, module.layer2, module.layer3):
            widths = {m.out_channels for m in stage.modules() if isinstance(m, nn.Conv2d)}
            assert len(widths) <= 1, "every layer of a stage has lost as many"


def test_segmentation_networks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = SegNet(3, ((8, 1), (12, 1)), (3, 8, 8))
    whole = params(module)
    labels = torch.arange(12)[:, None, None].expand(12, 8, 8) % 3
    data = DataLoader(TensorDataset(torch.randn(12, 3, 8, 8), labels), batch_size=6)
    few = spvr(budget=0.5, samples_per_class=1)
    both = TensorDataset(
        torch.randn(2, 3, 8, 8), torch.arange(2)[:, None, None].expand(2, 8, 8) % 3 + torch.eye(8).long()
    )
    fit(tmp_path, SegNet(3, ((8, 1), (12, 1)), (3, 8, 8)), few, data=DataLoader(both, batch_size=2))
    assert few.ranking is not None
    assert few.ranking.samples == 2  # two images that show three classes
    pruning = spvr(budget=0.5, samples_per_class=2)
    fit(tmp_path / "more", module, pruning, data=data)
    assert params(module) <= 0.5 * whole
    assert pruning.ranking is not None
    assert pruning.ranking.samples == 6
    assert module(torch.zeros(2, 3, 8, 8)).shape == (2, 3, 8, 8)


# -- what starts anew -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reinit", [True, Reinitialise(rule="he", seed=3)])
def test_weights_are_drawn_anew_and_the_optimizer_starts_anew(reinit: Any, tmp_path: Path) -> None:
    module = Chain(lr=0.0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    pruning = spvr(budget=0.3, reinit=reinit, schedule=OneShot(1))
    run = fit(tmp_path, module, pruning, epochs=2)
    assert [(cut.epoch, cut.step) for cut in pruning.report.cuts] == [(1, 3)]
    rule = Reinitialise(rule="own") if reinit is True else reinit
    twin = Chain()
    lightning_prune.surgery.replay(twin, history_of(module))  # type: ignore[attr-defined]
    drawn = rule.after(twin, lambda *_: None)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, drawn.get(name, twin.get_parameter(name)), msg=name)
    (optimizer,) = run.optimizers
    assert all(state["step"] == 3 for state in optimizer.state.values()), "the steps since the cut"
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in module.parameters()}
    history = history_of(module)
    assert history is not None
    assert any(edit.info.get(f"reinitialised/{rule.rule}") for edit in history.edits if not hasattr(edit, "groups"))


# -- when -------------------------------------------------------------------------------------------------------------


def test_resumed_runs_end_as_one_that_never_stopped(tmp_path: Path) -> None:
    def pruning() -> SPvRPruning:
        return spvr(budget=0.3, schedule=OneShot(1))

    straight, saver = Small(), Saver(tmp_path)
    fit(tmp_path / "a", straight, pruning(), epochs=4, data=loaders()[0], callbacks=[saver])
    for epoch in (0, 1, 2):
        again, second = Small(), pruning()
        fit(tmp_path / "b", again, second, epochs=4, data=loaders()[0], ckpt_path=saver.path(epoch))
        assert len(second.report.cuts) == 1
        for name, weight in straight.named_parameters():
            assert torch.equal(again.get_parameter(name), weight), name
    loaded = lightning_prune.load_from_checkpoint(Small, saver.path(3))
    for name, weight in straight.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight), name


def test_a_run_is_resumed_whose_only_layer_has_vanished(tmp_path: Path) -> None:
    """What `layers` names is no longer there, and nothing is looked for again."""
    settings: dict[str, Any] = {"budget": {"params": 1000}, "group_size": 8, "layers": ["net.7"]}
    module, again = Chain(), Chain()
    run = fit(tmp_path / "a", module, spvr(**settings), epochs=1)
    assert isinstance(module.net[7], nn.Identity)
    run.save_checkpoint(tmp_path / "last.ckpt")
    fit(tmp_path / "b", again, spvr(**settings), epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert isinstance(again.net[7], nn.Identity)
    assert params(again) == params(module)


@pytest.mark.parametrize(
    ("race", "ranking"), [(None, "rank"), ("exact", "rank_by_race"), ("statistical", "rank_by_race")]
)
def test_a_killed_ranking_goes_on(race: Any, ranking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = Chain()
    fit(tmp_path / "a" / "1", undisturbed, spvr(budget=0.3, race=race))
    see, seen = callback_file.RankingProgress.see, []

    def stop(self: Any, name: str, done: int, total: int) -> None:
        see(self, name, done, total)
        seen.append(done)
        if len(seen) == 2:
            raise RuntimeError("killed")

    monkeypatch.setattr(callback_file.RankingProgress, "see", stop)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "b" / "1", Chain(), spvr(budget=0.3, race=race))
    macs = []
    rank = getattr(callback_file, ranking)
    monkeypatch.setattr(callback_file, ranking, lambda *a, **k: (found := rank(*a, **k), macs.append(found.macs))[0])
    module, fresh = Chain(), Chain()
    fit(tmp_path / "b" / "2", module, spvr(budget=0.3, race=race))
    fit(tmp_path / "c" / "1", fresh, spvr(budget=0.3, race=race))
    assert macs[0] < macs[1]
    for name, weight in undisturbed.named_parameters():
        assert torch.equal(module.get_parameter(name), weight), name
        assert torch.equal(fresh.get_parameter(name), weight), name


@pytest.mark.parametrize("coupling", ["group", "stage"])
@pytest.mark.parametrize("budget", [0.8, 0.5, 0.1])
def test_an_exact_race_removes_what_the_full_ranking_removes(coupling: Any, budget: float, tmp_path: Path) -> None:
    found = {}
    for race in (None, "exact"):
        torch.manual_seed(0)
        module = ResNetCIFAR(8, 3, 8, shortcut="projection").double()
        module.example_input_array = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
        pruning = spvr(budget=budget, coupling=coupling, race=race)
        fit(tmp_path / str(race), module, pruning, data=images(), max_steps=1)
        history = history_of(module)
        assert history is not None
        assert pruning.ranking is not None
        kept = [getattr(edit, "kept", None) for edit in history.edits]
        found[race] = kept, params(module), pruning.ranking.complete
    assert found["exact"][:2] == found[None][:2]
    assert found[None][2] is None
    assert found["exact"][2] is not None


def test_a_fast_dev_run_checks_and_changes_nothing(tmp_path: Path) -> None:
    module = Chain()
    before = params(module)
    fit(tmp_path, module, spvr(budget=0.3), fast_dev_run=True)
    assert params(module) == before


def test_a_budget_that_holds_already_changes_nothing(tmp_path: Path) -> None:
    module = Chain()
    before = params(module)
    with pytest.warns(NoEffectWarning, match="nothing is left to remove"):
        fit(tmp_path, module, spvr(budget={"params": before}))
    assert params(module) == before


# -- as a criterion ---------------------------------------------------------------------------------------------------


def test_as_a_criterion_groups_go_whole(tmp_path: Path) -> None:
    criterion = lightning_prune.SPvR(group_size=4)
    pruning = StructuredPruning(budget=0.4, criterion=criterion, schedule=OneShot(), scope="global")
    fit(tmp_path, Chain(), pruning, epochs=2)
    assert pruning.structure is not None
    assert all(width % 4 == 0 for width in pruning.structure.widths.values())


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budget": {"macs": 0.5}}, ValueError, "expected a budget of parameters"),
        ({"budget": 0.1, "group_size": 0}, ValueError, "`group_size` to be at least 1, got 0"),
        ({"budget": 0.1, "samples_per_class": 0}, ValueError, "`samples_per_class` to be at least 1, got 0"),
        ({"budget": 0.1, "coupling": "layer"}, ValueError, '`coupling` of "group" or "stage", got \'layer\''),
        ({"budget": 0.1, "race": "fast"}, ValueError, '`race` of "exact", "statistical" or None, got \'fast\''),
        ({"budget": 0.1, "coupling": "stage", "reinit": False}, ValueError, "expected `reinit` with coupling"),
        ({"budget": 0.1, "reinit": "he"}, TypeError, "`reinit` of True, False or a Reinitialise, got 'he'"),
        ({"budget": 0.1, "extensions": [Ridge()]}, ValueError, "expected no repair with `reinit`.* got Ridge"),
    ],
)
def test_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SPvRPruning(**settings)


class Regressor(Chain):
    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


def test_what_gives_no_class_scores_is_refused(tmp_path: Path) -> None:
    x = torch.randn(12, 3, 8, 8, dtype=torch.float64)
    for labels in (torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)):
        data = DataLoader(TensorDataset(x, labels), batch_size=6)
        with pytest.raises(ValueError, match="class"):
            fit(tmp_path, Regressor(), spvr(budget=0.3), data=data)


def test_fewer_samples_than_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a sample or more for each of the 3 classes, got 2 in all"):
        fit(tmp_path, Chain(), spvr(budget=0.3, samples_per_class=1), data=images(2))


def test_data_without_labels_is_refused(tmp_path: Path) -> None:
    class Unlabelled(Chain):
        def training_step(self, batch: Any, _: int) -> Tensor:
            return self(batch[0]).square().mean()

    data = DataLoader(TensorDataset(torch.randn(12, 3, 8, 8, dtype=torch.float64)), batch_size=6)
    with pytest.raises(ValueError, match="label"):
        fit(tmp_path, Unlabelled(), spvr(budget=0.3), data=data)


@pytest.mark.parametrize("outputs", [1, 3])
def test_yes_or_no_with_labels_of_floating_point(outputs: int, tmp_path: Path) -> None:
    """As ``binary_cross_entropy_with_logits`` takes them, one or several in a sample."""

    class Binary(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.net[-1] = nn.Linear(8, outputs).double()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    x, labels = torch.randn(16, 3, 8, 8, dtype=torch.float64), (torch.arange(16 * outputs) % 2).double()
    module, pruning = Binary(), spvr(budget=0.4)
    before = params(module)
    fit(tmp_path, module, pruning, data=DataLoader(TensorDataset(x, labels.view(16, outputs)), batch_size=8))
    assert params(module) <= 0.4 * before
    assert pruning.ranking is not None


def test_outputs_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    class Diverged(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.nan

    with pytest.raises(ValueError, match=r"got NaN or infinity .* Has its training diverged"):
        fit(tmp_path, Diverged(), spvr(budget=0.3))


def test_samples_of_no_class_are_refused(tmp_path: Path) -> None:
    data = DataLoader(TensorDataset(torch.randn(12, 3, 8, 8, dtype=torch.float64), torch.full((12,), -100)))
    with pytest.raises(ValueError, match=r"takes `samples_per_class` samples .* 12 samples have no class"):
        fit(tmp_path, Chain(), spvr(budget=0.3), data=data)


def test_a_schedule_with_several_moments_is_refused(tmp_path: Path) -> None:
    pruning = spvr(budget=0.3, schedule=lightning_prune.LinearSchedule(cuts=2))
    with pytest.raises(ValueError, match="expected a `schedule` with one moment, got 2"):
        fit(tmp_path, Chain(), pruning, epochs=20)


def test_layers_that_cannot_be_ranked(tmp_path: Path) -> None:
    class Taken(Chain):
        """The last weight is taken, not called."""

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.net[:-1](x), self.net[-1].weight, self.net[-1].bias)

    with pytest.raises(StructureError, match=r"cannot rank net\.13: its units enter net\.15"):
        fit(tmp_path, Taken(), spvr(budget=0.5, layers=["net.13"]))
    module = Taken()
    with pytest.warns(UserWarning, match=r"cannot rank, so these stay as they are: net\.13"):
        fit(tmp_path, module, spvr(budget=0.5))
    assert module.net[13].out_features == 8
