"""The XGB pruner's scores: equal to the method written down naively, in both modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_prune import inspect
from lightning_prune.planning import Amount, best_unit, plan_by_use
from lightning_prune.scoring import DataPass, Station, Walk, XGBoost, pooled_features, stations_of
from lightning_prune.scoring.score_file import ScoreFile, network_fingerprint, read_scores
from lightning_prune.scoring.surrogates import split_samples
from lightning_prune.scoring.xgb import (
    LayerScore,
    LayerScorer,
    Usage,
    group_usage,
    log_importance,
    score_layers,
    score_layers_in_turn,
    unscorable,
)
from lightning_prune.structure import Size
from tests.support.xgb_reference import NETWORKS, images, naive, network

RULES = [("threshold", 0.1), ("quantile", 0.4), ("gain", 0.9), ("pruning_ratio", 0.5)]


def scored(net: Any, mode: str, amount: Amount, reduction: str = "avg", memory: Any = None) -> tuple[Any, Any]:
    """Scores, and which units of each group stay."""
    x, labels = images()
    data = DataPass((x, labels), batch_size=60)
    structure = inspect(net, x[:2]).structure
    everything = stations_of(net, next(iter(data)))
    producers = {layer for group in structure.groups for layer in group.producers}
    stations = [station for station in everything if station.layer in producers]
    y = data.labels.numpy()
    scorer = LayerScorer(XGBoost(), y, split_samples(y, "classification"), memory=memory)
    if mode == "one_shot":
        found = score_layers(scorer, stations, lambda left: pooled_features(net, data, left, reduction).items())
        plan, _ = plan_by_use(structure, group_usage(structure.groups, found), amount, Size.of(structure))
        return found, {g.name: list(plan.kept.get(g.name, range(g.width))) for g in structure.groups}
    kept: dict[str, list[int]] = {}

    def decide(group: Any, use: Usage) -> list[int]:
        kept[group.name] = list(amount.kept(use) or (best_unit(use),))
        return kept[group.name]

    walk = Walk(net, data, stations)
    found = score_layers_in_turn(
        walk, everything, structure.groups, scorer, lambda visit: visit.features(reduction), decide
    )
    return found, kept


def in_order(net: Any) -> tuple[Any, Any, Any]:
    """The samples as a pass hands them out."""
    x, labels = images()
    data = DataPass((x, labels), batch_size=60)
    import torch

    return (
        torch.cat([batch.args[0] for batch in data]),
        data.labels,
        split_samples(data.labels.numpy(), "classification"),
    )


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("mode", ["one_shot", "layer_wise"])
@pytest.mark.parametrize(("rule", "amount"), RULES)
def test_naive(kind: type[Any], mode: str, rule: Any, amount: float) -> None:
    net = network(kind)
    found, kept = scored(net, mode, Amount(rule, amount))
    expected, stay = naive(net, *in_order(net), mode, rule, amount)
    assert [station.layer for station in found] == list(net.layers)
    for station, score in found.items():
        naively = expected[station.layer]
        assert score.score == pytest.approx(naively.mu, abs=1e-9)
        np.testing.assert_allclose(score.importance, naively.importance, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(score.share, naively.total, rtol=1e-5, atol=1e-8)
    assert kept == stay


@pytest.mark.parametrize("reduction", ["avg", "max"])
def test_reductions(reduction: str) -> None:
    net = network(NETWORKS[0])
    found, _ = scored(net, "one_shot", Amount("gain", 0.9), reduction)
    expected, _ = naive(net, *in_order(net), "one_shot", "gain", 0.9, reduction)
    for station, score in found.items():
        np.testing.assert_allclose(score.importance, expected[station.layer].importance, rtol=1e-5, atol=1e-8)


def test_the_network_is_left_as_it_is() -> None:
    net = network(NETWORKS[1]).train()
    before, state = network_fingerprint(net), torch.get_rng_state()
    scored(net, "layer_wise", Amount("gain", 0.5))
    assert network_fingerprint(net) == before
    assert all(module.training and not module._forward_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), state)


def some(layer: str = "a", call: int = 0) -> LayerScore:
    """Numbers that are no round decimals."""
    importance = np.random.default_rng(call).random(5)
    return LayerScore(Station(layer, "activation", call), 1 / 3, importance, importance[::-1].copy(), 0.1)


def assert_same(one: LayerScore | None, other: LayerScore) -> None:
    assert one is not None
    assert (one.station, one.score, one.seconds) == (other.station, other.score, other.seconds)
    np.testing.assert_array_equal(one.importance, other.importance)
    np.testing.assert_array_equal(one.share, other.share)


def test_scores_are_written_and_read_exactly(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.jsonl"
    file = ScoreFile(path, {"network": "n"})
    for one in (some(), some(call=1), some("b")):
        file.put(one)
    again = ScoreFile(path, {"network": "n"})
    assert again.fits
    for one in (some(), some(call=1), some("b")):
        assert_same(again.get(one.station), one)
    assert again.get(Station("c")) is None
    key, layers = read_scores(path)
    assert key == {"network": "n"}
    assert [one.station.layer for one in layers] == ["a", "a", "b"]


def test_a_file_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    file = ScoreFile(path, {})
    file.put(some("a"))
    file.put(some("b"))
    path.write_text(path.read_text()[:-7])
    again = ScoreFile(path, {})
    assert again.get(some("b").station) is None
    assert_same(again.get(some("a").station), some("a"))
    again.put(some("b"))
    assert [one.station.layer for one in read_scores(path)[1]] == ["a", "b"]


def test_scores_of_another_key_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    ScoreFile(path, {"network": "n", "seed": 0}).put(some())
    other = ScoreFile(path, {"network": "n", "seed": 1})
    assert not other.fits
    assert other.difference == {"seed": ("0", "1")}
    assert other.get(some().station) is None
    third = ScoreFile(tmp_path / "third.jsonl", {"network": "n", "seed": 0})
    assert third.merge(ScoreFile(path, {"network": "n", "seed": 0}))
    assert_same(ScoreFile(tmp_path / "third.jsonl", {"network": "n", "seed": 0}).get(some().station), some())


@pytest.mark.parametrize("text", ["", "[1]\n", '{"a": 1}\n', "nonsense\n", '{"format": 9, "key": {}}\n'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(ValueError, match=r"expected .*scores"):
        ScoreFile(tmp_path / "f", {})


def test_an_address_in_memory_is_no_part_of_a_key(tmp_path: Path) -> None:
    assert ScoreFile(tmp_path / "f", {"a": object()}).key == ScoreFile(tmp_path / "f", {"a": object()}).key


def test_fingerprint() -> None:
    net = network(NETWORKS[0])
    before = network_fingerprint(net)
    with torch.no_grad():
        net.n1.running_mean[0] += 1e-6
    assert network_fingerprint(net) != before
    # The same bytes, of another shape and under another name.
    ones = [torch.nn.Linear(*shape, bias=False) for shape in ((2, 3), (3, 2), (2, 3))]
    for one in ones:
        torch.nn.init.ones_(one.weight)
    networks = [torch.nn.ModuleDict({name: one}) for name, one in zip("aab", ones, strict=True)]
    assert len({network_fingerprint(one) for one in networks}) == 3


def test_log_importance() -> None:
    np.testing.assert_allclose(log_importance(np.array([0.0, 1.0])), [np.log(1e-16), 0], atol=1e-12)


def test_what_cannot_be_scored() -> None:
    structure = inspect(network(NETWORKS[0]), images()[0][:2]).structure
    assert unscorable(structure.groups, [Station("c1"), Station("d1")]) == {
        "c2": "no convolution or linear layer that is called as a module gives its units"
    }
