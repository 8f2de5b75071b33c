"""Which layers may be pruned, by name, glob and prefix, and how narrow they may become."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune import L1, LAMP, NetworkSlimming, prune
from lightning_prune.planning import NoEffectWarning
from lightning_prune.planning.scope import Scope, select
from lightning_prune.structure.graph import Frozen, Group, Member, Structure


@given(width=st.integers(1, 200), min_width=st.integers(1, 50), round_to=st.integers(1, 20))
def test_ladder(width, min_width, round_to):
    scope = Scope(min_width=min_width, round_to=round_to)
    allowed_widths = scope.allowed_widths(width, round_to)
    reference = [width] + [w for w in range(width - 1, 0, -1) if w % round_to == 0 and w >= min_width]
    assert allowed_widths == reference
    assert scope.narrowest(width, round_to) == allowed_widths[-1] or allowed_widths == [width]


@pytest.mark.parametrize(
    ("makes", "takes", "round_to", "step"),
    [
        (1, 1, 8, 8),
        (4, 4, 8, 2),
        (8, 8, 8, 1),
        (1, 16, 8, 8),
        (16, 1, 8, 8),
        (6, 4, 8, 4),
        (2, 3, 6, 6),
        (4, 9, 12, 12),
    ],
)
def test_widths_are_rounded_in_channels(makes, takes, round_to, step):
    members = (
        Member("a.weight", 0, "out", np.arange(5 * makes).reshape(5, makes)),
        Member("b.weight", 1, "in", np.arange(5 * takes).reshape(5, takes)),
    )
    assert Scope(round_to=round_to).step(Group("a", 5, members)) == step
    assert all(step * size % round_to == 0 for size in (makes, takes))


def test_groups_of_a_group_norm_are_cut_to_multiples_of_channels():
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 2, 1))
    prune(net, torch.zeros(1, 3, 4, 4), pruning_ratio=0.5, scope=Scope(round_to=8))
    assert net[0].out_channels == 16


def test_of():
    assert Scope.of("global") == Scope("global")
    assert Scope.of(Scope(min_width=4)) == Scope(min_width=4)
    assert eval(repr(Scope("global", 2, 8))) == Scope("global", 2, 8)


def test_lamp_is_compared_as_it_is():
    """The allocation of the paper: of all scores together the lowest go, divided by nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3), nn.ReLU(), nn.Linear(3, 12)), nn.Linear(12, 2))
    scores = []
    for layer in (0, 2, 4):
        size = net[layer].weight.square().sum(1).tolist()
        scores += [(mine / sum(other for other in size if other >= mine), layer) for mine in size]
    gone = [layer for _, layer in sorted(scores)[:20]]
    widths = {layer: net[layer].out_features - gone.count(layer) for layer in (0, 2, 4)}
    prune(net, torch.zeros(1, 6), budget={"units": 19}, criterion=LAMP(), scope="global")
    assert {layer: net[layer].out_features for layer in widths} == widths
    assert Scope.of("global", comparable=True) == Scope("global", normalize="none")
    assert Scope.of(Scope(normalize="mean"), comparable=True) == Scope(normalize="mean")
    assert NetworkSlimming(0.5, scope="global").scope == NetworkSlimming(0.5).scope == Scope("global", normalize="none")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scope("layer"), """"local", "global", "erk" or "random", got 'layer'"""),
        (lambda: Scope(min_width=-1), "`min_width` of at least 0, got -1"),
        (lambda: Scope(round_to=0), "`round_to` of at least 1, got 0"),
        (lambda: Scope(normalize="max"), "got 'max'"),
        (lambda: Scope("random", draws=0), "`draws` of at least 1, got 0"),
        (lambda: Scope("local", per="macs"), "`per` with a scope of \"global\" only, got 'local'"),
        (lambda: Scope("global", draws=3), "`draws` and `seed` with a scope of \"random\" only, got 'global'"),
        (lambda: Scope(seed=1), "with a scope of \"random\" only, got 'local'"),
    ],
)
def test_bad_scope(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("bad", [{"min_width": 2.5}, {"round_to": 8.0}, {"round_to": "8"}])
def test_widths_are_whole_numbers(bad):
    with pytest.raises(TypeError, match=f"expected `{next(iter(bad))}` to be a whole number, got "):
        Scope(**bad)
    assert Scope(min_width=np.int64(2)).min_width == 2


@pytest.mark.parametrize(
    ("layers", "ignore", "expected"),
    [
        (None, None, ["layer1.0.conv1", "layer1.1.conv1", "layer1.0.conv2"]),
        ("layer1.0.conv1", None, ["layer1.0.conv1"]),
        (["layer1.?.conv1"], None, ["layer1.0.conv1", "layer1.1.conv1"]),
        ("layer1.1", None, ["layer1.1.conv1", "layer1.0.conv2"]),  # layer1.1.conv2 shares the units of layer1.0.conv2
        ("layer1.1.conv2", None, ["layer1.0.conv2"]),
        (None, "*.conv2", ["layer1.0.conv1", "layer1.1.conv1"]),
        (None, ["layer1.1.conv2", "fc"], ["layer1.0.conv1", "layer1.1.conv1"]),
        ("*", "layer1.0", ["layer1.1.conv1"]),
    ],
)
def test_names_globs_and_prefixes(resnet_like, layers, ignore, expected):
    selected, _ = select(resnet_like, layers, ["layer2", *([ignore] if isinstance(ignore, str) else ignore or [])])
    assert list(selected) == expected


def test_a_prefix_is_a_whole_name(mlp):
    structure = mlp([4] * 7)  # net.0, net.2, ..., net.12, and the frozen net.14
    assert select(structure, "net")[0] == tuple(structure.widths)
    with pytest.raises(ValueError, match="matches no layer"):
        select(structure, "net.1")


def test_the_rest_is_refused_with_reasons(mlp):
    selected, refused = select(mlp([4, 5, 6]), layers=["net.0", "net.2"], ignore="net.2")
    assert selected == ("net.0",)
    assert refused == {
        "net.2": "ignored by 'net.2'",
        "net.4": "not among `layers`",
        "net.6": "it is an output of the model",
    }


@pytest.mark.parametrize(
    ("layers", "ignore", "message"),
    [
        ("net.O", None, r"layers='net.O' matches no layer. Did you mean .*net.0.*\? What can be pruned: net.0, net.2"),
        ("nett.*", None, r"layers='nett.*' matches no layer. Did you mean net.[02], net.[02]\? What"),
        (None, "decoder.*", "ignore='decoder.*' matches no layer. What can be pruned: net.0, net.2"),
        (["net.0", "net.4"], None, "layers='net.4'.* net.4 because it is an output of the model"),
        (None, "net", "ignore='net' leave nothing to prune. What can be pruned: net.0, net.2"),
        ([], None, r"layers=\[\] and ignore=None leave nothing"),
    ],
)
def test_names_without_effect(mlp, layers, ignore, message):
    with pytest.raises(ValueError, match=message):
        select(mlp([4, 5]), layers, ignore)


def test_a_layer_that_follows_another(resnet_like):
    with pytest.raises(ValueError, match=r"this one follows layer1.0.conv1, so name that"):
        select(resnet_like, "layer1.0.bn1")


def test_ignoring_what_is_frozen_is_fine(mlp):
    assert select(mlp([4]), ignore="net.2")[0] == ("net.0",)


def test_nothing_prunable(mlp):
    cost = mlp([4]).cost
    frozen = (Frozen("a.weight", 0, 3, "it is an output of the model"), Frozen("b", 0, 2, "it is used by an FFT"))
    with pytest.raises(
        ValueError, match=r"nothing that can be pruned.*a because it is an output.*; b because it is us"
    ):
        select(Structure((), frozen, cost))
    with pytest.raises(ValueError, match="no layer with a width of its own"):
        select(Structure((), (), cost))


@pytest.mark.parametrize(
    ("limits", "widths", "told"),
    [
        ({"min_width": 12}, (8, 12), ["0 keeps 8 of 8 units where 4 were asked for", "2 keeps 12 of 16"]),
        ({"round_to": 16}, (8, 16), ["0 keeps 8 of 8 units where 4 were asked for", "2 keeps 16 of 16"]),
        ({"min_width": 4}, (4, 8), []),
        ({"round_to": 3}, (3, 9), []),  # the nearest of its widths
    ],
)
def test_a_share_that_the_limits_keep_from_being_reached_is_told(limits, widths, told):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", NoEffectWarning)
        report = prune(model, torch.randn(3, 4), pruning_ratio=0.5, criterion=L1(), scope=Scope("local", **limits))
    assert (model[0].out_features, model[2].out_features) == widths
    notes = [note for note in report.notes if "asked for" in note]
    assert [note.startswith(start) for note, start in zip(notes, told, strict=True)] == [True] * len(told)
    assert [str(one.message) for one in seen] == notes
