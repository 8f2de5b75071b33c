import copy
import io
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.structure import Size, TracedModel, trace
from lightning_prune.surgery import history as history_module
from lightning_prune.surgery import restore as restore_module
from lightning_prune.surgery.edits import Keep
from lightning_prune.surgery.history import (
    KEY,
    History,
    HistoryError,
    attach,
    edits_of,
    history_of,
    save_into,
)
from lightning_prune.surgery.masks import attach_masks, masks_of
from lightning_prune.surgery.restore import load_from, match_checkpoint_shapes, replay
from lightning_prune.surgery.shrink import cut
from lightning_prune.surgery.tensors import named

FIXTURES = Path(__file__).parent / "fixtures"

# Latency tables in plain data.
TABLE = {"fixed": 1.0, "per_byte": 0.0, "layers": []}
LAYER = {"axes": [{"fixed": 1, "repeat": {}}] * 2, "grid": [[1], [1]], "ms": [[1.0]]}


def _prune(net, model, cuts=2, start=0):
    """Cuts at random, recorded as a callback would; returns the checkpoint after each."""
    structure, checkpoints = net.structure(net.model()), []
    history = history_of(model) or History.begin(structure)
    for edit in history.edits:
        structure = structure.take(edit.kept)
    for number in range(start, start + cuts):
        random = np.random.default_rng(number)
        kept = {
            name: tuple(np.sort(random.permutation(width)[: max(1, width - 2)]).tolist())
            for name, width in structure.widths.items()
        }
        axes = structure.axes(kept)
        history = history.add(Keep(axes, kept, epoch=number, step=10 * number, cut=number, info={"ratio": 0.5}), model)
        cut(model, axes)
        attach(model, history)
        structure = structure.take(kept)
        checkpoints.append(_checkpoint(model))
    return checkpoints


def _checkpoint(model):
    checkpoint = {"state_dict": copy.deepcopy(model.state_dict())}
    save_into(checkpoint, model)
    return checkpoint


def _through_a_file(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _load(model, checkpoint):
    load_from(checkpoint, model)
    model.load_state_dict(checkpoint["state_dict"])


def _attributes(model):
    return {name: {k: v for k, v in vars(m).items() if not isinstance(v, dict)} for name, m in model.named_modules()}


class TestLoading:
    def test_a_dense_network_takes_a_pruned_checkpoint(self, net):
        model = net.model()
        checkpoint = _through_a_file(_prune(net, model)[-1])
        fresh = net.model(seed=9)
        _load(fresh, checkpoint)
        assert torch.equal(fresh(net.example()), model(net.example()))
        assert {n: m for n, m in _attributes(fresh).items() if n} == {n: m for n, m in _attributes(model).items() if n}
        assert history_of(fresh).size.widths == net.structure(net.model()).widths

    def test_a_pruned_network_takes_any_other_checkpoint_of_its_run(self, net):
        """Narrower, wider, dense, and the same widths again."""
        model = net.model()
        dense = _checkpoint(model)
        references, checkpoints = [net.model()], [dense]
        for number in range(3):
            checkpoints += _prune(net, model, 1, start=number)
            references.append(copy.deepcopy(model))
        order = [0, 3, 1, 2, 3, 3, 0, 2]
        for number in order:
            _load(model, _through_a_file(checkpoints[number]))
            reference = references[number]
            assert torch.equal(model.eval()(net.example()), reference.eval()(net.example()))
            assert all(torch.equal(tensor, named(reference)[name]) for name, tensor in named(model).items())
            assert len(history_of(model).edits if history_of(model) else ()) == number

    def test_other_units_of_the_same_number(self, zoo):
        net = zoo["shared"]
        model, other = net.model(), net.model()
        _prune(net, model, 1, start=0)
        checkpoint = _prune(net, other, 1, start=5)[-1]
        assert not torch.equal(model.offset, other.offset)
        _load(model, checkpoint)
        assert torch.equal(model.offset, other.offset)

    def test_objects_and_optimizers_live_on(self, net):
        model = net.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        net.step(model, optimizer)
        dense, state = _checkpoint(model), copy.deepcopy(optimizer.state_dict())
        objects = [id(p) for p in model.parameters()]
        _prune(net, model, 1)
        _load(model, dense)
        optimizer.load_state_dict(state)
        assert [id(p) for p in model.parameters()] == objects
        assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        net.step(model, optimizer)
        assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if n.endswith("weight"))

    def test_pruning_goes_on_after_loading(self, net):
        model = net.model()
        checkpoint = _prune(net, model, 1)[-1]
        fresh = net.model(seed=9)
        _load(fresh, checkpoint)
        structure = net.structure(net.model()).take(history_of(fresh).edits[0].kept)
        kept = {group.name: tuple(range(group.width - 1)) for group in structure.groups if group.width > 1}
        axes = structure.axes(kept)
        for network in (model, fresh):
            history = history_of(network).add(Keep(axes, kept, 7, 70, 1), network)
            cut(network, axes)
            attach(network, history)
        assert torch.equal(fresh(net.example()), model(net.example()))
        _load(fresh, _checkpoint(net.model(seed=4)))
        assert torch.equal(fresh(net.example()), net.model(seed=4)(net.example()))

    def test_layers_within_layers_are_refused_where_python_cannot_follow(self, net, photograph, same):
        """A checkpoint of ``torch.save`` may nest lists without end."""
        layer = {"kind": "Identity", "options": {}}
        for _ in range(2000):
            layer = {"kind": "Sequential", "layers": [layer]}
        size = {"params": 1, "macs": 1, "widths": {}, "memory": 1}
        edit = {"kind": "replace", "modules": {"head": layer}, "widths": {}, "original": size, "new_dense": True}
        checkpoint = _prune(net, net.model())[-1]
        checkpoint[KEY]["edits"].append({**edit, "epoch": 0, "step": 0, "cut": 0, "info": {}})
        fresh = net.model()
        before = photograph(fresh)
        with pytest.raises(HistoryError, match="nested too deeply"):
            load_from(checkpoint, fresh)
        assert same(photograph(fresh), before)

    def test_the_same_units_again_leave_all_as_it_is(self, net, photograph, same):
        model = net.model()
        checkpoint = _prune(net, model)[-1]
        net.step(model, torch.optim.SGD(model.parameters(), lr=0.1))
        before = photograph(model)
        load_from(_through_a_file(checkpoint), model)
        before[" attributes"][history_module.ATTRIBUTE] = history_of(model)
        assert same(photograph(model), before)

    def test_the_same_units_cut_at_once_leave_all_as_it_is(self, zoo, photograph, same):
        net = zoo["mlp"]
        model, other = net.model(), net.model()
        _prune(net, model)
        first, second = (edit.kept for edit in history_of(model).edits)
        kept = {name: tuple(units[place] for place in second[name]) for name, units in first.items()}
        structure = net.structure(other)
        history = History.begin(structure).add(Keep(structure.axes(kept), kept, 0, 0, 0), other)
        cut(other, structure.axes(kept))
        attach(other, history)
        before = photograph(model)
        load_from(_checkpoint(other), model)
        before[" attributes"][history_module.ATTRIBUTE] = history_of(model)
        assert same(photograph(model), before)

    def test_a_layer_that_was_cut_on_one_side_first(self, zoo):
        model = zoo["mlp"].model()
        dense, structure = _checkpoint(model), zoo["mlp"].structure(model)
        history = History.begin(structure)
        for number, kept in enumerate([{"0": (0, 1)}, {"2": (2, 3)}]):
            axes = structure.axes(kept)
            history = history.add(Keep(axes, kept, 0, 0, number), model)
            cut(model, axes)
            structure = structure.take(kept)
        attach(model, history)
        _load(model, dense)
        assert (model[2].in_features, model[2].out_features) == (8, 5)

    def test_without_any_history_nothing_is_done(self, zoo):
        """Also if shapes differ: that is for `load_state_dict` to say."""
        model = zoo["mlp"].model()
        load_from({"state_dict": {"0.weight": torch.ones(1)}}, model)
        assert history_of(model) is None

    def test_grouped_convolutions_widen_from_a_single_channel_per_group(self):
        """From the narrow shapes alone one could not tell two groups of one channel from a depthwise layer."""
        layer = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2))
        axes = {"0.weight": {0: np.array([1, 5])}, "0.bias": {0: np.array([1, 5])}}
        history = History({}, Size(0, 0, {"0": 4})).add(Keep(axes, {"0": (1,)}, 0, 0, 0), layer)
        dense = {"state_dict": copy.deepcopy(layer.state_dict())}
        cut(layer, axes)
        attach(layer, history)
        assert (layer[0].groups, layer[0].out_channels) == (2, 2)
        _load(layer, dense)
        assert (layer[0].groups, layer[0].in_channels, layer[0].out_channels) == (2, 8, 8)

    @pytest.mark.parametrize("compiled", ["model", "checkpoint"])
    def test_compiled_and_not(self, zoo, compiled):
        net = zoo["mlp"]
        model, fresh = net.model(), net.model(seed=9)
        wrapped = fresh if compiled == "model" else model
        wrapped[2] = torch.compile(wrapped[2])
        structure = net.structure(model)
        kept = net.kept()
        names = {name.replace("_orig_mod.", ""): name for name in model.state_dict()}
        axes = {names[name]: dims for name, dims in net.structure(net.model()).axes(kept).items()}
        history = History.begin(structure).add(Keep(axes, kept, 0, 0, 0), model)
        cut(model, axes)
        attach(model, history)
        load_from(_through_a_file(_checkpoint(model)), fresh)
        assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]


class TestReplay:
    def test_gives_the_network_its_shapes_and_keeps_the_weights(self, net):
        model, twin, conformed = net.model(), net.model(), net.model(seed=3)
        checkpoint = _through_a_file(_prune(net, model, 3)[-1])
        history = History.from_plain(checkpoint[KEY])
        replay(twin, history)
        assert torch.equal(twin(net.example()), model(net.example()))
        match_checkpoint_shapes(conformed, checkpoint["state_dict"], history)
        assert [t.shape for t in named(twin).values()] == [t.shape for t in named(conformed).values()]
        assert history_of(twin).shapes_now == {name: tuple(named(model)[name].shape) for name in history.shapes}

    def test_refuses_a_pruned_network(self, zoo):
        model = zoo["mlp"].model()
        _prune(zoo["mlp"], model)
        with pytest.raises(HistoryError, match="Expected a dense network"):
            replay(model, history_of(model))


class TestAnotherArchitecture:
    @pytest.fixture
    def checkpoint(self, zoo):
        return _prune(zoo["mlp"], zoo["mlp"].model())[-1]

    def _refuse(self, model, checkpoint, text, photograph, same):
        before = photograph(model)
        with pytest.raises(HistoryError, match=f"(?s)another architecture.*{text}.*Nothing has changed"):
            load_from(checkpoint, model)
        assert same(photograph(model), before)

    def test_other_dense_widths(self, checkpoint, photograph, same):
        model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        text = r"0.weight was \[8, 6\] before it was cut, here it is \[9, 6\]; .*; .*; and 2 more"
        self._refuse(model, checkpoint, text, photograph, same)

    def test_missing_layers(self, checkpoint, photograph, same):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double()
        self._refuse(model, checkpoint, "4.weight was .* missing", photograph, same)

    def test_other_shapes_of_what_was_never_cut(self, zoo, checkpoint, photograph, same):
        model = zoo["mlp"].model()
        checkpoint["state_dict"]["4.bias"] = torch.ones(4)
        self._refuse(model, checkpoint, r"4.bias is \[4\], here it should be \[3\]", photograph, same)

    def test_weights_that_contradict_the_history(self, zoo, checkpoint, photograph, same):
        checkpoint["state_dict"]["0.bias"] = torch.ones(8)
        self._refuse(zoo["mlp"].model(), checkpoint, r"0.bias is \[8\], here it should be \[4\]", photograph, same)

    def test_a_pruned_checkpoint_that_lost_its_history(self, zoo, checkpoint, photograph, same):
        model = zoo["mlp"].model()
        _prune(zoo["mlp"], model, 1)
        del checkpoint[KEY]
        self._refuse(model, checkpoint, r"0.weight is \[4, 6\], here it should be \[8, 6\]", photograph, same)

    def test_a_live_pruned_network_of_another_width(self, zoo, checkpoint, photograph, same):
        """Its dense shapes count, not its present ones, which happen to agree."""
        model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        axes = {"0.weight": {0: np.arange(8)}, "0.bias": {0: np.arange(8)}, "2.weight": {1: np.arange(8)}}
        history = History({}, Size(0, 0, {})).add(Keep(axes, {}, 0, 0, 0), model)
        cut(model, axes)
        attach(model, history)
        self._refuse(model, checkpoint, r"0.weight was \[8, 6\] .* here it is \[9, 6\]", photograph, same)


@pytest.mark.parametrize("stage", ["blank", "apply", "attach"])
@pytest.mark.parametrize("fatal", [RuntimeError, KeyboardInterrupt])
def test_a_failure_while_loading_changes_nothing(net, stage, fatal, photograph, same, monkeypatch):
    model = net.model()
    narrow, _ = _prune(net, net.model())[-1], _prune(net, model, 1, start=4)
    before, history = photograph(model), history_of(model)
    calls = 0
    original = getattr(restore_module, stage)

    def failing(*args, **options):
        nonlocal calls
        calls += 1
        if calls == 2 or stage != "blank":
            raise fatal("planted")
        return original(*args, **options)

    monkeypatch.setattr(restore_module, stage, failing)
    with pytest.raises(fatal, match="planted"):
        load_from(narrow, model)
    assert same(photograph(model), before)
    assert history_of(model) is history


class TestPlain:
    def _only_plain(self, value):
        if isinstance(value, dict):
            return all(type(key) in (str, int) and self._only_plain(item) for key, item in value.items())
        if isinstance(value, list):
            return all(map(self._only_plain, value))
        return type(value) in (int, float, str) or (type(value) is torch.Tensor and value.dtype == torch.int64)

    def test_round_trip(self, net, same):
        model = net.model()
        plain = _prune(net, model, 3)[-1][KEY]
        assert self._only_plain(plain)
        again = History.from_plain(_through_a_file(plain)).to_plain()
        assert same(again, plain)
        assert plain["version"] == 3

    def test_numbers_of_numpy_become_plain(self, zoo):
        model = zoo["mlp"].model()
        axes = {"0.bias": {0: np.arange(3)}}
        info = {"a": np.float32(0.5), "b": np.int64(3), "c": True}
        keep = Keep(axes, {"0": tuple(np.arange(3))}, np.int64(1), np.int64(2), 0, info)
        plain = History({}, Size(np.int64(1), 0, {"0": np.int64(8)})).add(keep, model).to_plain()
        assert self._only_plain(plain)
        assert plain["edits"][0]["info"] == {"a": 0.5, "b": 3, "c": 1}

    def test_positions_may_come_as_lists(self, zoo):
        model = zoo["mlp"].model()
        history = History({}, Size(0, 0, {}))
        for kept in ([0, 2, 5], [0, 2]):
            history = history.add(Keep({"0.bias": {0: kept}}, {}, 0, 0, 0), model)
            cut(model, {"0.bias": {0: kept}})
        assert history.axes["0.bias"][0].tolist() == [0, 5]

    def test_what_is_no_number_is_refused_before_the_cut(self, zoo):
        model = zoo["mlp"].model()
        keep = Keep({"0.bias": {0: np.arange(3)}}, {}, 0, 0, 0, {"metric": torch.tensor(1.0)})
        with pytest.raises(HistoryError, match="`info\\['metric'\\]` to be a plain number, got Tensor"):
            History({}, Size(0, 0, {})).add(keep, model)

    def test_units_that_are_not_there_are_refused_before_the_cut(self, zoo):
        model = zoo["mlp"].model()
        _prune(zoo["mlp"], model, 1)  # 6 of 8 units remain
        for edit in (Keep({"0.bias": {0: np.array([7])}}, {}, 0, 0, 0), Keep({}, {"0": (7,)}, 0, 0, 0)):
            with pytest.raises(HistoryError, match=r"in \[0, 6\)"):
                history_of(model).add(edit, model)

    def test_an_edit_of_what_is_not_there(self, zoo):
        with pytest.raises(HistoryError, match=r"got 'nine.weight'"):
            History({}, Size(0, 0, {})).add(Keep({"nine.weight": {0: np.arange(3)}}, {}, 0, 0, 0), zoo["mlp"].model())

    def test_equal_positions_are_written_once(self, zoo):
        """A group has dozens of members in a real network, and each tensor of its own costs an entry in the file."""
        model = zoo["residual"].model()
        plain, file = _prune(zoo["residual"], model, 1)[-1][KEY], io.BytesIO()
        torch.save(plain, file)
        entries = [name for name in zipfile.ZipFile(file).namelist() if "/data/" in name]
        assert len(entries) == 2 < len(plain["edits"][0]["axes"])

    def test_no_history_writes_no_key(self, zoo):
        checkpoint = {}
        save_into(checkpoint, zoo["mlp"].model())
        assert checkpoint == {}

    @pytest.mark.parametrize(
        ("path", "value", "text"),
        [
            ((), [], "expected the history to be a dict, got list"),
            (("version",), None, "it has no 'version'"),
            (("version",), "1", "expected 'version' to be a int, got str"),
            (("version",), 4, "version 4, 3 is the last known.*upgrade"),
            (("version",), 0, "expected 'version' to be at least 1"),
            (("original",), None, "it has no 'original'"),
            (("original", "params"), -5, "expected 'params' to be at least 0"),
            (("original", "macs"), 10**40, "expected 'macs' to be at least 0 and at most"),
            (("original", "widths", "0"), 0, r"expected widths\['0'\] to be at least 1"),
            (("original", "shapes", "0.bias"), [10**40], "not the shape of a tensor"),
            (("original", "memory"), -1, "expected 'memory' to be at least 0"),
            (("original", "latency"), {"fixed": 1.0, "per_byte": "x", "layers": []}, "table of latencies is none"),
            (("original", "latency"), {"fixed": math.nan, "per_byte": 0.0, "layers": []}, "that are no numbers"),
            (("original", "params"), 1.5, "expected 'params' to be a int"),
            (("original", "params"), True, "expected 'params' to be a int, got bool"),
            (("original", "widths", "0"), "8", "widths"),
            (("original", "shapes", "0.bias"), (8,), "to be a list, got tuple"),
            (("original", "shapes", "0.bias"), [0], "not the shape of a tensor"),
            (("original", "shapes", "0.bias"), [], "not the shape of a tensor"),
            (("original", "shapes", "0.bias"), ["8"], "each length of '0.bias' to be a int"),
            (("original", "shapes", "0.bias"), None, "cuts dimension 0 of '0.bias', which has no shape"),
            (("original", "shapes", "extra"), [3], "a dense shape for 'extra', which no edit cuts"),
            (("original", "shapes", 3), [3], "a key of 'shapes' to be a str"),
            (("original", "memory"), 1.5, "expected 'memory' to be a int"),
            (("original", "latency"), {"fixed": 1.0}, "table of latencies is none"),
            (("original", "latency"), {**TABLE, "multiple": 0}, "expected a multiple of at least 1, got 0"),
            (("original", "latency"), {**TABLE, "about": 3}, "table of latencies is none"),
            (("original", "latency"), {**TABLE, "error": "x"}, "table of latencies is none"),
            (("original", "latency"), {**TABLE, "layers": [LAYER | {"steps": [0, 1]}]}, "a multiple of at least 1"),
            (("edits",), {}, "'edits' to be a list"),
            (("edits", 0), "cut", "an edit to be a dict"),
            (("edits", 0, "kind"), "grow", "unknown kind 'grow'.*upgrade"),
            (("edits", 0, "kind"), "drop", "it has no 'modules'"),
            (("edits", 0, "axes", "0.bias", 1), torch.arange(2), "cuts dimension 1 of '0.bias', which has 1"),
            (("edits", 0, "axes", "0.bias", "0"), torch.arange(2), "a dimension of '0.bias' to be a int"),
            (("edits", 0, "axes", "0.bias", 0), [0, 1], "to be a Tensor, got list"),
            (("edits", 0, "axes", "0.bias", 0), torch.arange(2.0), "expected int64 positions"),
            (("edits", 0, "axes", "0.bias", 0), torch.ones(2, 2).long(), "in one dimension"),
            (("edits", 0, "axes", "0.bias", 0), torch.tensor([0, 8]), r"ascending positions in \[0, 8\)"),
            (("edits", 1, "axes", "0.bias", 0), torch.tensor([0, 6]), r"ascending positions in \[0, 6\)"),
            (("edits", 0, "axes", "0.bias", 0), torch.tensor([1, 0]), "ascending"),
            (("edits", 0, "axes", "0.bias", 0), torch.tensor([-1, 0]), "ascending"),
            (("edits", 0, "axes", "0.bias", 0), torch.tensor([]).long(), "ascending"),
            (
                ("edits", 0, "axes", "0.bias", 0),
                torch.arange(2, device="meta"),
                "dense tensor, got one on the meta device",
            ),
            (("edits", 0, "axes", "0.bias", 0), torch.arange(2).to_sparse(), "dense tensor, got one of the layout"),
            (("edits", 0, "kept", "0"), torch.arange(2, device="meta"), "dense tensor, got one on the meta device"),
            (("edits", 0, "epoch"), -1, "expected 'epoch' to be at least 0"),
            (("edits", 0, "info", "note"), 10**40, r"info\['note'\] to be at least"),
            (("edits", 0, "kept", "9"), torch.arange(2), "a group '9' without a dense width"),
            (("edits", 1, "kept", "0"), torch.tensor([7]), r"in \[0, 6\)"),
            (("edits", 0, "epoch"), None, "it has no 'epoch'"),
            (("edits", 0, "info", "note"), "text", r"info\['note'\] to be a int"),
            (("edits", 0, "factors"), {"0.scale": {}}, "multiplies rows of '0.scale', which it does not cut"),
            (("edits", 0, "factors"), {"0.bias": {"rows": torch.arange(2)}}, "the factor of '0.bias' to be a int"),
            (("edits", 0, "factors"), {"0.bias": {"rows": torch.arange(9), "factor": 0.5}}, "ascending positions"),
            (
                ("edits", 0, "factors"),
                {"0.bias": {"rows": torch.arange(2), "factor": -1.0}},
                "multiplies rows.*by -1.0",
            ),
        ],
        ids=str,
    )
    def test_damaged_or_foreign(self, zoo, path, value, text, photograph, same):
        plain = _prune(zoo["mlp"], zoo["mlp"].model())[-1][KEY]
        fresh = zoo["mlp"].model()
        before = photograph(fresh)
        if path:
            place = plain
            for key in path[:-1]:
                place = place[key]
            if value is None:
                del place[path[-1]]
            else:
                place[path[-1]] = value
        else:
            plain = value
        with pytest.raises(HistoryError, match=f"(?s){text}"):
            load_from({"state_dict": {}, KEY: plain}, fresh)
        assert same(photograph(fresh), before)
        assert history_of(fresh) is None


@pytest.mark.parametrize("file", sorted(FIXTURES.glob("history_*.pt")), ids=lambda file: file.stem)
def test_checkpoints_of_every_version_load_for_ever(zoo, file):
    checkpoint = torch.load(file, weights_only=True)
    model = zoo["depthwise"].model()
    _load(model, checkpoint)
    torch.testing.assert_close(model.eval()(zoo["depthwise"].example()), checkpoint["output"], rtol=0, atol=1e-9)


def test_every_version_has_a_fixture():
    written = {torch.load(file, weights_only=True)[KEY]["version"] for file in FIXTURES.glob("history_*.pt")}
    assert written == set(range(1, history_module.VERSION + 1))


def test_numbers_of_an_unflatten_follow_there_and_back() -> None:
    def decoder() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Unflatten(1, (6, 2, 2)), nn.ConvTranspose2d(6, 2, 2))

    model, x = decoder(), torch.randn(2, 4)
    structure = trace(TracedModel.of(model, x))
    kept = {"0": (0, 2, 5)}
    edits = edits_of(structure, kept, 0, 0, 0)
    dense = model(x).detach()
    change = cut(model, structure.axes(kept))
    assert model[2].unflattened_size == (-1, 2, 2)
    narrow = model(x).detach()
    change.undo()
    assert model[2].unflattened_size == (6, 2, 2)
    assert torch.equal(model(x), dense)
    history = History.begin(structure)
    for edit in edits:
        history = history.add(edit, model)
    twin = decoder()
    replay(twin, history)
    assert torch.equal(twin(x), narrow)


@pytest.mark.parametrize("to", ["dense", "another"])
def test_masks_go_when_a_network_is_widened(to) -> None:
    """They are of the narrow one's weights; those of the checkpoint are loaded afterwards."""

    def made():
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    def narrow(kept):
        model = made()
        structure = trace(TracedModel.of(model, torch.zeros(1, 4)))
        (edit,) = edits_of(structure, {"0": kept}, epoch=0, step=0, cut=0)
        replay(model, History.begin(structure).add(edit, model))
        return model

    model = narrow((0, 1))
    attach_masks(model, {"0.weight": torch.eye(2, 4, dtype=torch.bool)})
    load_from(_checkpoint(made() if to == "dense" else narrow((2, 4, 5))), model)
    assert model[0].out_features == (6 if to == "dense" else 3)
    assert not masks_of(model)
