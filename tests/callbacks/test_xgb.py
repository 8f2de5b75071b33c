"""The XGB pruner in a run: what it decides, when, what it writes down, and what it refuses."""

from __future__ import annotations

import copy
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_prune
from lightning_prune import (
    NeuralProbe,
    OneShot,
    ReestimateBatchNorm,
    ReestimateIfBetter,
    Rewind,
    Ridge,
    SklearnEstimator,
    StructuredPruning,
    XGBoost,
    XGBPruning,
)
from lightning_prune.callbacks.display import score_display
from lightning_prune.models import ResNetCIFAR
from lightning_prune.planning import NoEffectWarning
from lightning_prune.reporting import layer_parameters
from lightning_prune.scoring import DataPass
from lightning_prune.scoring.spool import Spool
from lightning_prune.scoring.surrogates import split_samples
from lightning_prune.structure import StructureError
from lightning_prune.surgery import history_of
from tests.callbacks.small import trainer
from tests.callbacks.xgb_runs import (
    QUICK,
    Classifier,
    Counting,
    Deep,
    Interrupted,
    Module,
    Regressor,
    fit,
    in_processes,
    kept,
    loader,
    repaired,
)
from tests.support import ranks, wandb_files
from tests.support import xgb_reference as reference


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "measured" not in request.fixturenames:
        monkeypatch.setattr(score_display, "_pictures", lambda *_: [])


def naive(module: Module, mode: str, rule: str, amount: float) -> tuple[Any, Any]:
    data = DataPass(loader())
    x, labels = torch.cat([batch.args[0] for batch in data]), data.labels
    parts = split_samples(labels.numpy(), "classification")
    found = reference.naive(module.net.eval(), x, labels, parts, mode, rule, amount)
    module.net.train()
    return found


# -- what it decides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Chain", "Residual", "Dense"])
@pytest.mark.parametrize("mode", ["one_shot", "layer_wise"])
def test_a_run_keeps_what_the_naive_method_keeps(kind: str, mode: Any, tmp_path: Path) -> None:
    """And the weights of what stays, as they were."""
    module = Module(kind, lr=0.0)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    found, stay = naive(module, mode, "pruning_ratio", 0.5)
    pruning = XGBPruning(mode, pruning_ratio=0.5, extensions=[])
    fit(tmp_path, module, pruning)
    assert kept(module) == stay
    assert pruning.scored is not None
    assert {s.layer.removeprefix("net."): f.score for s, f in pruning.scored.layers.items()} == pytest.approx(
        {layer: one.mu for layer, one in found.items()}
    )
    first = module.net.layers[0]
    group = next(name for name, one in module.net.groups.items() if first in one.producers)
    torch.testing.assert_close(
        module.get_parameter(f"net.{first}.weight"), before[f"net.{first}.weight"][stay[group]], rtol=0, atol=0
    )


@pytest.mark.ddp
@pytest.mark.parametrize("kind", ["Chain", "Residual", "Dense"])
@pytest.mark.parametrize("mode", ["one_shot", "layer_wise"])
def test_processes_decide_as_the_naive_method(kind: str, mode: str, tmp_path: Path) -> None:
    """Two of them, each with half of the samples."""
    expected, stay = naive(Module(kind), mode, "pruning_ratio", 0.5)
    found, units, _ = ranks.run(in_processes, str(tmp_path), kind, {"mode": mode, "pruning_ratio": 0.5}, processes=2)
    assert units == stay
    assert found.keys() == expected.keys()
    for layer, one in expected.items():
        for mine, other in zip(found[layer], (one.mu, one.importance, one.total), strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-8)


@pytest.mark.ddp
def test_processes_score_one_network(tmp_path: Path) -> None:
    """Norms have other statistics in each process when it has trained; those of the first count, as in a checkpoint."""
    settings = {"pruning_ratio": 0.5, "schedule": OneShot(1)}
    found, units, _ = ranks.run(in_processes, str(tmp_path), "Chain", settings, 2, processes=2)
    module = Module()
    module.load_state_dict(torch.load(tmp_path / "ends" / "epoch=0.ckpt", weights_only=True)["state_dict"])
    expected, stay = naive(module, "one_shot", "pruning_ratio", 0.5)
    assert units == stay
    for layer, one in expected.items():
        for mine, other in zip(found[layer], (one.mu, one.importance, one.total), strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-8)


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("kind", "repairs", "depth"),
    [
        ("Chain", [Ridge(batches=2)], None),
        ("Residual", [Ridge(batches=2), ReestimateBatchNorm(batches=2)], None),
        ("Chain", [Ridge(batches=2), ReestimateIfBetter(batches=2)], None),
        ("Deep", [Ridge(batches=2)], "argmax"),
    ],
)
def test_processes_repair_one_network(kind: str, repairs: Any, depth: Any, tmp_path: Path) -> None:
    """All hold what one process alone makes of the checkpoint, which has the statistics of the first."""
    first, second = ranks.run(repaired, str(tmp_path / "1"), kind, repairs, depth, processes=2)
    checkpoint = str(tmp_path / "1" / "ends" / "epoch=0.ckpt")
    (alone,) = ranks.run(repaired, str(tmp_path / "2"), kind, repairs, depth, checkpoint)
    assert first.keys() == second.keys() == alone.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        if name not in ("head.weight", "head.bias"):  # drawn anew behind the cut in depth
            torch.testing.assert_close(alone[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mode", ["one_shot", "layer_wise"])
def test_a_budget(mode: Any, tmp_path: Path) -> None:
    """What remains is at most the budget, and one unit more would be above it."""
    module = Module()
    pruning = XGBPruning(mode, budget={"macs": 0.9, "params": 0.5}, surrogate=QUICK, extensions=[])
    fit(tmp_path, module, pruning)
    dense, now = pruning.report.dense, pruning.report.size
    assert dense is not None
    assert now is not None
    assert 0.4 * dense.params < now.params <= 0.5 * dense.params
    if mode == "layer_wise":
        # Every walk has written down its own threshold.
        assert len(list(tmp_path.glob("scores-*.jsonl"))) > 1


def test_the_network_as_it_is_by_default(tmp_path: Path) -> None:
    assert str(XGBPruning().amount) == "Amount(rule='gain', value=0.99)"
    assert [type(one) for one in XGBPruning().extensions] == [Ridge, ReestimateIfBetter]
    module = Module()
    pruning = XGBPruning(surrogate=QUICK)
    fit(tmp_path, module, pruning)
    assert all(len(units) >= 1 for units in kept(module).values())


def test_numbers_to_predict(tmp_path: Path) -> None:
    """A regression by configuration: μ is R²."""
    x, _ = reference.images()
    numbers = x[:, 0, :2].mean((1, 2)) * 3 - x[:, 0, 5:].mean((1, 2))
    pruning = XGBPruning(pruning_ratio=0.5, surrogate=XGBoost("regression", rounds=20), extensions=[])
    fit(tmp_path, Regressor(), pruning, data=loader(labels=numbers))
    assert pruning.scored is not None
    best = max(found.score for found in pruning.scored.layers.values())
    assert 0.2 < best <= 1
    assert pruning.report.config["metric"] == "r2"


@pytest.mark.parametrize(
    "surrogate",
    [
        SklearnEstimator("sklearn.ensemble.ExtraTreesClassifier", {"n_estimators": 10}),
        NeuralProbe(epochs=3, patience=None),
    ],
    ids=["scikit-learn", "probe"],
)
def test_other_surrogates(surrogate: Any, tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, XGBPruning(pruning_ratio=0.5, surrogate=surrogate, extensions=[]))
    assert {name: len(units) for name, units in kept(module).items()} == {"c1": 4, "c2": 3, "d1": 4}


def test_a_layer_that_would_be_emptied_keeps_its_best_unit(tmp_path: Path) -> None:
    module = Module()
    pruning = XGBPruning(threshold=0.99, surrogate=QUICK, extensions=[])
    with pytest.warns(NoEffectWarning) as seen:
        fit(tmp_path, module, pruning)
    assert "One unit of net.c1 stays: by threshold=0.99 all of them would go." in [str(one.message) for one in seen]
    assert pruning.scored is not None
    use = pruning.scored.use
    assert kept(module) == {n.removeprefix("net."): [int(np.argmax(one.importance))] for n, one in use.items()}
    assert "One unit of net.c1 stays" in str(pruning.report)


def test_after_a_cut_the_network_trains_on_and_is_repaired(tmp_path: Path) -> None:
    """With `Ridge` the outputs are nearer to the dense network's than without."""
    x, _ = reference.images()
    apart = {}
    for name, extensions in (("ridge", None), ("source", [])):
        module = Module(lr=0.0)
        dense = module.net.eval()(x).detach()
        module.train()
        fit(tmp_path / name, module, XGBPruning(pruning_ratio=0.5, surrogate=QUICK, extensions=extensions))
        apart[name] = float((module.net.eval()(x) - dense).square().mean().detach())
    assert apart["ridge"] < 0.5 * apart["source"]


# The samples are 123 kB, what is live at a convolution 740 kB and more, tables of all layers about 40 kB.
@pytest.mark.parametrize(("mode", "limit"), [("one_shot", 40_000), ("layer_wise", 250_000)])
@pytest.mark.parametrize("kind", ["Chain", "Residual", "Dense"])
def test_a_memory_limit_is_kept(
    kind: str, mode: Any, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples, activations and features together, counted in bytes; what is found is the same."""
    spools = weakref.WeakSet[Spool]()
    peak = {"in_memory": 0, "on_disk": 0}
    put = Spool.put

    def counted(spool: Spool, tensor: Tensor) -> Any:
        spools.add(spool)
        stored = put(spool, tensor)
        for name in peak:
            peak[name] = max(peak[name], sum(getattr(one, name) for one in spools))
        return stored

    found = {}
    for name, settings in (("whole", {}), ("limited", {"memory_limit": limit})):
        with monkeypatch.context() as patch:
            if settings:
                patch.setattr(Spool, "put", counted)
            module = Module(kind, lr=0.0)
            pruning = XGBPruning(mode, pruning_ratio=0.5, surrogate=QUICK, extensions=[], **settings)
            fit(tmp_path / name / "run", module, pruning)
        assert pruning.scored is not None
        found[name] = kept(module), [one.importance.tolist() for one in pruning.scored.layers.values()]
    assert found["limited"] == found["whole"]
    assert limit // 4 < peak["in_memory"] <= limit
    assert peak["on_disk"] > limit


# -- depth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["one_shot", "layer_wise"])
def test_a_chain_ends_where_the_score_is_best(mode: Any, tmp_path: Path) -> None:
    """And what is left computes what the dense network would with all that is gone set to zero."""
    module = Deep()
    before = copy.deepcopy(module).eval()
    pruning = XGBPruning(mode, pruning_ratio=0.5, depth="argmax", surrogate=QUICK, extensions=[])
    fit(tmp_path, module, pruning)
    scored = pruning.scored
    assert scored is not None
    assert [end.name for end, _ in scored.depths] == ["net.2", "net.5", "net.8", "net"]
    scores = [score for _, score in scored.depths]
    assert scores == [found.score for found in scored.layers.values()], "they need no surrogates of their own"
    best = scores.index(max(scores))
    assert best < 2
    convolutions = [layer for layer in module.net if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == best + 1
    assert convolutions[-1].out_channels == before.net[3 * best].out_channels // 2
    assert module.head.in_features == convolutions[-1].out_channels
    units, y = kept(module), reference.images()[0]
    with torch.no_grad():
        found = module.net.eval()(y)
        for place in range(best + 1):
            y = before.net[3 * place : 3 * place + 3](y)
            mask = torch.zeros(y.shape[1], dtype=y.dtype)
            mask[units[str(3 * place)]] = 1
            y = y * mask[:, None, None]
    torch.testing.assert_close(found, y[:, units[str(3 * best)]])


def test_a_tolerance_takes_the_shallowest(tmp_path: Path) -> None:
    module = Deep()
    fit(tmp_path, module, XGBPruning(gain=1.0, depth=1.0, surrogate=QUICK, extensions=[]))
    assert [type(layer).__name__ for layer in module.net[3:]] == ["Identity"] * 9


@pytest.mark.parametrize("mode", ["one_shot", "layer_wise"])
def test_a_residual_network_ends_behind_a_block(mode: Any, tmp_path: Path) -> None:
    """The score of a block is that of its sum."""
    torch.manual_seed(0)
    x, labels = torch.randn(96, 3, 16, 16, dtype=torch.float64), torch.arange(96) % 3
    x[labels == 1, 0] += 1
    data = DataPass((x, labels), batch_size=32)
    module = Classifier(ResNetCIFAR(14, 3).double())
    blocks: list[Tensor] = []
    hook = module.net.layer1[0].register_forward_hook(lambda _, __, out: blocks.append(out.mean((2, 3)).float()))
    data.run(module)
    hook.remove()
    parts = split_samples(data.labels.numpy(), "classification")
    expected = QUICK.fit(torch.cat(blocks).numpy(), data.labels.numpy(), parts).score
    pruning = XGBPruning(mode, pruning_ratio=0.25, depth=0.5, surrogate=QUICK, extensions=[])
    fit(tmp_path, module, pruning, data=DataLoader(TensorDataset(x, labels), batch_size=32))
    scored = pruning.scored
    assert scored is not None
    assert [end.name for end, _ in scored.depths][:3] == ["net.bn1", "net.layer1.0", "net.layer1"]
    if mode == "one_shot":
        assert scored.depths[1][1] == pytest.approx(expected)
    assert scored.end is not None
    left = [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)]
    assert set(left) == set(scored.end.layers)
    assert module.net.linear.in_features == scored.end.width * 3 // 4
    assert scored.passes < 1.3
    assert "chosen" in str(pruning.report)


def test_depth_and_a_budget(tmp_path: Path) -> None:
    """The budget counts the network that is left."""
    module = Deep()
    dense = sum(p.numel() for p in module.parameters())
    pruning = XGBPruning(budget={"params": 0.1}, depth="argmax", surrogate=QUICK, extensions=[])
    fit(tmp_path, module, pruning)
    assert 0 < sum(p.numel() for p in module.parameters()) <= 0.1 * dense


def test_a_network_cut_in_depth_is_rewound(tmp_path: Path) -> None:
    """What is left of the backbone holds its first weights; the new head, which had none, its new ones."""

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == (1, 0):
                found.update({name: p.detach().clone() for name, p in module.named_parameters()})

    found: dict[str, Tensor] = {}
    module = Deep(0.1)
    first = module.net[0].weight.detach().clone()
    settings: dict[str, Any] = {"pruning_ratio": 0.5, "depth": 1.0, "surrogate": QUICK, "extensions": [Rewind(0)]}
    fit(tmp_path, module, XGBPruning(schedule=OneShot(1), **settings), Look(), epochs=2)
    units = kept(module)["0"]
    assert torch.equal(found["net.0.weight"], first[units])
    assert found["head.weight"].shape == (3, 3)
    assert not torch.equal(module.net[0].weight, first[units])


def test_a_run_that_was_cut_in_depth_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"gain": 0.9, "depth": "argmax", "surrogate": QUICK, "layers": ["net.0", "net.9"]}
    whole = Deep(0.01)
    fit(tmp_path / "a" / "1", whole, XGBPruning(**settings), epochs=2)
    first, module = Deep(0.01), Deep(0.01)
    fit(tmp_path / "b" / "1", first, XGBPruning(**settings), epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    fit(tmp_path / "b" / "2", module, XGBPruning(**settings), epochs=2, ckpt_path=tmp_path / "last.ckpt")
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), weight, rtol=0, atol=0)


@pytest.mark.ddp
def test_processes_cut_the_same_depth(tmp_path: Path) -> None:
    settings = {"gain": 0.9, "depth": "argmax"}
    _, kept_alone, alone = ranks.run(in_processes, str(tmp_path / "1"), "Deep", settings)
    _, kept_together, together = ranks.run(in_processes, str(tmp_path / "2"), "Deep", settings, processes=2)
    assert kept_alone == kept_together
    assert {name: weight.shape for name, weight in alone.items()} == {n: w.shape for n, w in together.items()}


def test_a_network_that_is_no_chain(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match="expected"):
        fit(tmp_path, Bare(), XGBPruning(depth="argmax", surrogate=QUICK))


# -- when, and what is written down -----------------------------------------------------------------------------------


def test_it_acts_once_whatever_is_resumed(tmp_path: Path) -> None:
    counting, module, again = Counting(), Module(), Module()
    settings: dict[str, Any] = {"pruning_ratio": 0.5, "surrogate": counting, "extensions": []}
    fit(tmp_path / "1", module, XGBPruning(**settings)).save_checkpoint(tmp_path / "last.ckpt")
    assert len(counting.fits) == 3
    fit(tmp_path / "2", again, XGBPruning(**settings), epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert len(counting.fits) == 3
    history = history_of(again)
    assert history is not None
    assert len({edit.cut for edit in history.edits}) == 1


@pytest.mark.parametrize(
    ("others", "text"),
    [
        ({"pruning_ratio": None, "gain": 0.5}, r"`target` was .*0\.25.* and is .*'gain'"),
        ({"depth": 0.5}, "`depth` was None and is 0.5"),
        ({"mode": "layer_wise"}, "`mode` was 'one_shot' and is 'layer_wise'"),
        ({"surrogate": NeuralProbe()}, "`surrogate` was .*XGBoost.* and is .*NeuralProbe"),
        ({"ignore": ["net.c1"]}, r"`ignore` was None and is \['net\.c1'\]"),
    ],
)
def test_other_settings_are_for_a_run_that_is_not_cut_yet(others: dict[str, Any], text: str, tmp_path: Path) -> None:
    module, again = Module(), Module()
    settings: dict[str, Any] = {"pruning_ratio": 0.25, "surrogate": QUICK, "extensions": []}
    run = fit(tmp_path / "1", module, XGBPruning(**settings))
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=rf"had other settings \({text}.*% of the units are gone\. It acts once"):
        fit(tmp_path / "2", again, XGBPruning(**settings | others), epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert kept(again) == kept(module)


def test_it_acts_after_a_checkpoint_was_restored(tmp_path: Path) -> None:
    """The weights that are scored are those of the checkpoint, which knows of no pruning."""
    trained, module = Module(lr=0.0), Module(lr=0.0)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.1)
    run = trainer(tmp_path / "1", 1)
    run.fit(trained, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    _, stay = naive(trained, "one_shot", "pruning_ratio", 0.5)
    pruning = XGBPruning(pruning_ratio=0.5, extensions=[])
    fit(tmp_path / "2", module, pruning, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert kept(module) == stay


def test_the_moment_of_a_schedule(tmp_path: Path) -> None:
    pruning = XGBPruning(pruning_ratio=0.5, surrogate=QUICK, schedule=OneShot(2), extensions=[])
    fit(tmp_path, Module(), pruning, epochs=3)
    assert [(cut.epoch, cut.step) for cut in pruning.report.cuts] == [(2, 8)]


@pytest.mark.parametrize("mode", ["one_shot", "layer_wise"])
@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_an_interruption_loses_one_layer_at_most(mode: Any, stop_at: int, tmp_path: Path) -> None:
    """The run that is started again fits no surrogate twice, and ends as one that never stopped."""
    settings: dict[str, Any] = {"mode": mode, "gain": 0.9, "extensions": []}
    undisturbed = Module("Residual")
    fit(tmp_path / "a" / "run", undisturbed, XGBPruning(surrogate=Counting(), **settings))
    fits: list[int] = []
    with pytest.raises(Interrupted):
        fit(tmp_path / "b" / "1", Module("Residual"), XGBPruning(surrogate=Counting(fits, stop_at), **settings))
    assert len(fits) == stop_at
    module = Module("Residual")
    fit(tmp_path / "b" / "2", module, XGBPruning(surrogate=Counting(fits), **settings))
    assert len(fits) == 5, "as many as there are layers"
    assert kept(module) == kept(undisturbed)
    for name, weight in undisturbed.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), weight, rtol=0, atol=0)


def test_a_line_that_was_cut_short(tmp_path: Path) -> None:
    fit(tmp_path / "1", Module(), XGBPruning(surrogate=Counting(), gain=0.9))
    (file,) = (tmp_path / "1").glob("scores-*.jsonl")
    whole = file.read_text()
    file.write_text(whole[:-20])
    fits: list[int] = []
    fit(tmp_path / "2", Module(), XGBPruning(surrogate=Counting(fits), gain=0.9))
    assert len(fits) == 1
    again = [json.loads(line) for line in (tmp_path / "2" / file.name).read_text().splitlines()]
    for mine, other in zip(again, map(json.loads, whole.splitlines()), strict=True):
        mine.pop("seconds", None)
        other.pop("seconds", None)
        assert mine == other


@pytest.mark.parametrize(
    "changed",
    [{"reduction": "max"}, {"held_back": 0.3}, {"metric": "balanced_accuracy"}, {"samples": 120}, {"seed": 1}],
)
def test_scores_of_other_options_are_not_taken(changed: dict[str, Any], tmp_path: Path) -> None:
    fits: list[int] = []
    fit(tmp_path / "1", Module(), XGBPruning(surrogate=Counting(fits), gain=0.9))
    fit(tmp_path / "2", Module(), XGBPruning(surrogate=Counting(fits), **{"gain": 0.9, **changed}))
    assert len(fits) == 6


def test_scores_serve_any_number_of_threads(tmp_path: Path) -> None:
    """As a table that a machine with a GPU has made serves one without."""
    fit(tmp_path / "1", Module(), XGBPruning(gain=0.9, surrogate=QUICK))
    (file,) = (tmp_path / "1").glob("scores-*.jsonl")
    again = XGBPruning(gain=0.9, surrogate=replace(QUICK, threads=2), scores=str(file))
    fit(tmp_path / "2" / "run", Module(), again)
    assert again.scored is not None
    assert again.scored.passes == 0


def test_scores_serve_every_amount_but_only_their_network(tmp_path: Path) -> None:
    fits: list[int] = []
    for name, amount in (("1", {"gain": 0.9}), ("2", {"threshold": 0.1}), ("3", {"pruning_ratio": 0.5})):
        fit(tmp_path / name, Module(), XGBPruning(surrogate=Counting(fits), **amount))  # type: ignore[arg-type]
    assert len(fits) == 3
    (file,) = (tmp_path / "1").glob("scores-*.jsonl")
    other = Module()
    with torch.no_grad():
        other.net.c1.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(
        ValueError, match=r"`scores`: expected a table of this network.* the network's weights or shapes differ\. Score"
    ):
        fit(tmp_path / "4", other, XGBPruning(surrogate=Counting(fits), gain=0.9, scores=str(file)))
    assert len(fits) == 3


def test_a_file_that_holds_no_scores(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"expected a file with scores of layers, got .*other\.jsonl"):
        fit(tmp_path / "run", Module(), XGBPruning(surrogate=QUICK, scores=str(tmp_path / "other.jsonl")))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Else all layers would be scored once more, in silence."""
    pruning = XGBPruning(surrogate=QUICK, scores=str(tmp_path / "scores.jsonl"), schedule=OneShot(1))
    with pytest.raises(
        FileNotFoundError, match=r"expected `scores` to be a file .* got .*scores\.jsonl.*Correct the path"
    ):
        fit(tmp_path / "run", Module(), pruning, epochs=2)


def test_channels_that_no_group_has_stay(tmp_path: Path) -> None:
    """Zeros are concatenated to the stream of such a residual network: half of the channels behind cannot go."""
    x, labels = torch.randn(96, 3, 16, 16, dtype=torch.float64), torch.arange(96) % 3
    x[labels == 1, 0] += 1
    module = Classifier(ResNetCIFAR(8, 3).double())
    pruning = XGBPruning(pruning_ratio=0.5, surrogate=QUICK, extensions=[])
    fit(tmp_path, module, pruning, data=DataLoader(TensorDataset(x, labels), batch_size=32))
    layers = {name: layer.out_channels for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)}
    assert {row.layer: row.kept for row in pruning.report.scored} == layers
    assert len(set(layers.values())) > 2


def test_what_is_shown(measured: None, tmp_path: Path) -> None:
    pruning = XGBPruning(gain=0.9, surrogate=QUICK)
    fit(tmp_path, Module(), pruning)
    pictures = {"scores.png", "importances.png", "thresholds.png", "depth.png", "report.png"}
    assert {"scores.md", "report.md", *pictures} <= {path.name for path in tmp_path.iterdir()}
    page = (tmp_path / "scores.md").read_text()
    assert "| net.c1 | 8 |" in page
    assert "![importances](importances.png)" in page
    assert "![thresholds](thresholds.png)" in page
    assert "**Sizes by threshold**" in page
    assert "![parameters over depth](depth.png)" in (tmp_path / "report.md").read_text()
    assert "Layers" in str(pruning.report)
    again = lightning_prune.reporting.Report.from_plain(json.loads((tmp_path / "report.json").read_text()))
    assert again.scored == pruning.report.scored
    assert [row.layer for row in again.scored] == ["net.c1", "net.c2", "net.d1"]
    assert all(0 < row.score <= 1 and row.kept for row in again.scored)


def test_wandb_gets_pictures_and_their_numbers(measured: None, tmp_path: Path) -> None:
    import wandb

    logger = WandbLogger(save_dir=tmp_path, offline=True)
    module = Module()
    try:
        fit(tmp_path, module, XGBPruning(gain=0.9, surrogate=QUICK), logger=logger)
    finally:
        wandb.finish()
    (segment,) = wandb_files.segments(tmp_path)
    logged = {name: value for row in wandb_files.rows(segment) for name, value in row.items()}
    for picture in ("importances", "scores", "thresholds", "depth", "report"):
        file = logged[f"pruning/pictures/{picture}.path"]
        assert (segment / "files" / file).stat().st_size > 5_000, picture
    tables = {}
    for table in ("layers", "thresholds", "channels", "widths"):
        tables[table] = json.loads((segment / "files" / logged[f"pruning/tables/{table}.path"]).read_text())["data"]
        assert tables[table], table
    decided = [row[4] for row in tables["channels"] if row[0] == "net.c1"]
    assert decided.count("kept") == len(kept(module)["c1"])
    assert len(decided) == 8


@pytest.mark.parametrize("depth", [None, 0.5])
def test_sizes_are_those_that_the_thresholds_lead_to(depth: float | None, tmp_path: Path) -> None:
    """What the page of scores says of a threshold is what is left after a run with it."""
    options: dict[str, Any] = {"depth": depth, "surrogate": QUICK, "layers": ["net.0", "net.3"]}
    said = XGBPruning(threshold=0.0, **options)
    said.only_score = True
    first = Deep()
    rows, _ = _scored_sizes(said, fit(tmp_path / "0", first, said), first)
    row = next(row for row in rows if row.threshold > 0 and row.params < rows[0].params)
    module, pruning = Deep(), XGBPruning(threshold=row.threshold, extensions=[], **options)
    fit(tmp_path / "1", module, pruning)
    layers = pruning.report.final and pruning.report.final.layers
    assert layers
    assert sum(layers.values()) == row.params
    assert sum(layer_parameters(first).values()) == row.of_params
    assert (len(layers) < len(layer_parameters(first))) == (depth is not None)


def _scored_sizes(pruning: XGBPruning, run: Any, module: Any) -> Any:
    assert pruning.scored is not None
    return pruning._sizes(run, module, pruning.scored)


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"threshold": 0.1, "gain": 0.9}, ValueError, "expected one of .*got threshold=0.1, gain=0.9"),
        ({"threshold": 1.0}, ValueError, r"expected `threshold` in \[0, 1\), got 1.0"),
        ({"gain": 0.0}, ValueError, r"expected `gain` in \(0, 1\], got 0.0"),
        ({"quantile": -0.1}, ValueError, r"expected `quantile` in \[0, 1\)"),
        ({"gain": "much"}, TypeError, "expected a number for `gain`, got 'much'"),
        ({"mode": "stepwise"}, ValueError, 'expected `mode` of "one_shot" or "layer_wise", got \'stepwise\''),
        ({"reduction": "sum"}, ValueError, 'expected `reduction` of "avg" or "max", got \'sum\''),
        ({"held_back": 1.0}, ValueError, r"expected `held_back` in \(0, 0.9\), got 1.0"),
        ({"depth": -0.1}, ValueError, 'expected `depth` to be None, "argmax" or a tolerance'),
        ({"depth": "best"}, ValueError, 'expected `depth` to be None, "argmax" or a tolerance'),
        ({"samples": 100, "per_class": 10}, ValueError, "expected `samples` or `per_class`, got both"),
        ({"samples": 0}, ValueError, "expected `samples` to be an int of at least 1, got 0"),
        ({"per_class": 2.5}, ValueError, "expected `per_class` to be an int of at least 1, got 2.5"),
        ({"memory_limit": -1}, ValueError, "expected `memory_limit` to be an int of at least 0, got -1"),
        ({"labels": "y"}, ValueError, "expected `labels` to be a function, got 'y'"),
        ({"held_back": "x"}, ValueError, r"expected `held_back` in \(0, 0.9\), got 'x'"),
        ({"metric": "r2"}, ValueError, "expected a `metric` for classification"),
        ({"surrogate": "xgboost"}, TypeError, "expected `surrogate` to be an instance of Surrogate"),
        ({"budget": {"params": 2.0}}, ValueError, "budget"),
    ],
)
def test_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        XGBPruning(**settings)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(240, dtype=torch.long), "expected samples of at least two classes, got 240 of class 0"),
        (torch.linspace(0, 1, 240), 'expected whole numbers as classes, got labels such as .*`task="regression"`'),
        (torch.tensor([0, 1] * 119 + [2, 2]), r"at least three samples of each class.*class 2 \(2\)"),
    ],
    ids=["one class", "numbers", "a class too rare to be in every part"],
)
def test_labels(labels: Tensor, message: str, tmp_path: Path) -> None:
    """Before anything is trained or cut."""
    module = Regressor() if labels.is_floating_point() else Module()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, XGBPruning(surrogate=QUICK), data=loader(labels=labels))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    module = Module()
    with torch.no_grad():
        module.net.c2.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"layer 'net\.c2': expected finite features.*channel 0"):
        fit(tmp_path, module, XGBPruning(surrogate=QUICK))


def test_without_xgboost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(ModuleNotFoundError, match=r'extra `xgb`: pip install .*"xgboost>=3"'):
        fit(tmp_path / "1", Module(), XGBPruning())


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, ModuleNotFoundError, r'extra `xgb`: pip install .*"xgboost>=3"'),
        (torch.linspace(0, 1, 240), ValueError, "expected whole numbers as classes"),
        (
            torch.full((240, 3), 1 / 3, dtype=torch.float64),
            ValueError,
            r"expected one label per sample, shape \(n,\), got \(60, 3\)",
        ),
    ],
    ids=["no xgboost", "numbers", "one-hot"],
)
def test_what_a_later_cut_would_refuse_is_refused_at_once(
    labels: Any, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the epochs before it."""
    if labels is None:
        monkeypatch.setitem(sys.modules, "xgboost", None)
    module = Regressor() if labels is not None and labels.ndim == 1 else Module()
    with pytest.raises(error, match=message):
        fit(tmp_path, module, XGBPruning(schedule=OneShot(5)), data=loader(labels=labels), epochs=9)
    assert module.global_step == 0


def test_a_stream_of_data(tmp_path: Path) -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(zip(*reference.images(), strict=True))

    with pytest.raises(ValueError, match=r"XGBPruning reads some .* got DataLoader over Stream\. Train from such"):
        fit(tmp_path, Module(), XGBPruning(surrogate=QUICK), data=DataLoader(Stream(), batch_size=60))


class Branches(Module):
    """Two branches that meet behind their last convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Module(), nn.Linear(8, 3)
        for name in ("left", "right"):
            self.add_module(name, nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))
        return out


def test_a_network_of_parallel_branches_has_no_depth(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match=r"expected a backbone that is a chain .* Leave `depth` out"):
        fit(tmp_path / "1", Branches(), XGBPruning(depth="argmax", surrogate=QUICK))
    with pytest.raises(StructureError, match=r"expected names of modules as `head`, got 'tail'\. The outermost are n"):
        fit(tmp_path / "2", Deep(), XGBPruning(depth="argmax", head="tail", surrogate=QUICK))


class Bare(Module):
    """The convolution's units are taken by a parameter, whose own units no layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Module()
        self.conv, self.mix, self.head = nn.Conv2d(1, 8, 3), nn.Parameter(torch.randn(8, 6)), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(torch.relu(self.conv(x)).mean((2, 3)) @ self.mix))
        return out


def test_a_layer_without_a_channel_axis(tmp_path: Path) -> None:
    """What cannot be scored or masked stays, and is named; an error if it was asked for."""
    assert set(lightning_prune.inspect(Bare()).structure.widths) == {"conv", "mix"}
    module = Bare()
    with pytest.warns(UserWarning, match="so these stay as they are: mix: no convolution or linear layer"):
        fit(tmp_path / "1", module, XGBPruning(pruning_ratio=0.5, surrogate=QUICK, extensions=[]))
    assert (module.conv.out_channels, module.mix.shape) == (4, (4, 6))
    with pytest.raises(StructureError, match="XGBPruning cannot score conv: its units enter mix"):
        fit(tmp_path / "2", Bare(), XGBPruning("layer_wise", surrogate=QUICK, layers="conv"))


def test_a_schedule_with_several_moments(tmp_path: Path) -> None:
    pruning = XGBPruning(surrogate=QUICK, schedule=lightning_prune.LinearSchedule(start=0, end=2, cuts=2))
    with pytest.raises(ValueError, match="expected a `schedule` with one moment, got 2"):
        fit(tmp_path, Module(), pruning, epochs=3)


def test_data_without_labels(tmp_path: Path) -> None:
    class Own(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).square().mean()

    data = DataLoader(TensorDataset(reference.images()[0]), batch_size=60)
    with pytest.raises(ValueError, match="labels"):
        fit(tmp_path, Own(), XGBPruning(surrogate=QUICK), data=data)


def test_batches_of_another_form(tmp_path: Path) -> None:
    """Where labels and inputs are is said by functions."""

    class Mapped(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["image"], batch["kind"]), batch_idx)

    x, y = reference.images()
    data = DataLoader([{"image": image, "kind": label} for image, label in zip(x, y, strict=True)], batch_size=60)
    module, plain = Mapped(), Module()
    found = {"labels": lambda batch: batch["kind"], "inputs": lambda batch: batch["image"]}
    fit(tmp_path / "1" / "run", module, XGBPruning(gain=0.9, surrogate=QUICK, extensions=[], **found), data=data)
    fit(tmp_path / "2" / "run", plain, XGBPruning(gain=0.9, surrogate=QUICK, extensions=[]))
    assert kept(module) == kept(plain)


def test_beside_another_callback(tmp_path: Path) -> None:
    """Each prunes its own layers."""
    module = Module()
    pruning = XGBPruning(pruning_ratio=0.5, surrogate=QUICK, layers="net.c1", extensions=[])
    fit(tmp_path, module, pruning, StructuredPruning(0.5, schedule=OneShot(1), layers="net.c2"), epochs=2)
    assert {name: len(units) for name, units in kept(module).items()} == {"c1": 4, "c2": 3}
