"""A pass over data: counted, seeded, by class, the same every time, without a trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_prune.scoring import DataPass


def tensors(total=60, classes=3, sorted_by_class=True):
    """Inputs that tell their position, and labels."""
    labels = torch.arange(total) * classes // total if sorted_by_class else torch.arange(total) % classes
    return torch.arange(float(total))[:, None].repeat(1, 2), labels


def loader(total=60, classes=3, batch_size=8, **settings):
    return DataLoader(TensorDataset(*tensors(total, classes)), batch_size=batch_size, **settings)


def positions(data):
    """Which samples are handed out, in order."""
    return [int(x) for batch in data for x in batch.args[0][:, 0]]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TensorDataset(*tensors()))


class Indexed(Dataset):
    """Without `targets`."""

    def __init__(self, total=60):
        self.tensors = tensors(total)
        self.read = []

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        self.read.append(i)
        return self.tensors[0][i], self.tensors[1][i]


SOURCES = {
    "loader": loader,
    "shuffling loader": lambda: loader(shuffle=True),
    "loader without targets": lambda: DataLoader(Indexed(), batch_size=8),
    "stream": lambda: DataLoader(Stream(), batch_size=8),
    "list": lambda: list(loader()),
    "generator": lambda: iter(list(loader())),
    "one batch": lambda: tensors(),
    "data set of batches": lambda: DataLoader(list(loader()), batch_size=None),
}
every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


@every_source
def test_the_same_samples_every_time_and_each_once(source):
    data = DataPass(source())
    first = positions(data)
    assert positions(data) == first
    assert sorted(first) == list(range(60))
    assert first != sorted(first), "a sorted data set is mixed"
    assert len(data) == data.total == 60
    assert torch.equal(data.labels, tensors()[1][first])


@every_source
def test_per_class(source):
    data = DataPass(source(), per_class=4)
    assert data.classes == {0: 4, 1: 4, 2: 4}
    assert len(set(positions(data))) == len(data) == 12
    assert torch.equal(torch.cat([batch.labels for batch in data]), data.labels)


@pytest.mark.parametrize("source", [v for k, v in SOURCES.items() if k != "loader without targets"])
def test_samples_have_the_same_share_of_every_class(source):
    data = DataPass(source(), samples=31)
    assert sorted(data.classes.values()) == [10, 10, 11]


def test_only_what_is_chosen_is_read():
    dataset = Indexed()
    data = DataPass(DataLoader(dataset, batch_size=8), samples=10)
    assert not dataset.read, "nothing is read before it is needed"
    assert len(data) == 10
    assert len(dataset.read) == 10
    dataset.read.clear()
    positions(data)
    assert not dataset.read, "read once"


@given(st.integers(1, 80), st.integers(1, 6), st.integers(0, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_shares_are_within_one_of_the_exact_ones(total, classes, seed, draw):
    samples = draw.draw(st.integers(1, total))
    labels = torch.randint(0, classes, (total,), generator=torch.Generator().manual_seed(seed))
    data = DataPass((torch.arange(float(total))[:, None], labels), samples=samples, seed=seed)
    assert len(data) == samples
    for label, count in zip(*np.unique(labels.numpy(), return_counts=True), strict=True):
        assert abs(data.classes.get(int(label), 0) - samples * count / total) < 1


def test_the_seed_decides_alone():
    torch.manual_seed(1)
    one = positions(DataPass(loader(shuffle=True), samples=20, seed=3))
    torch.manual_seed(2)
    assert positions(DataPass(loader(shuffle=True), samples=20, seed=3)) == one
    assert positions(DataPass(loader(shuffle=True), samples=20, seed=4)) != one


def test_what_the_sampler_leaves_out_is_left_out():
    dataset = TensorDataset(*tensors())
    data = DataPass(DataLoader(dataset, batch_size=8, sampler=SubsetRandomSampler(range(10, 30))))
    assert sorted(positions(data)) == list(range(10, 30))


def test_labels_of_subsets_and_concatenations_are_known_without_reading():
    inner = Indexed()
    inner.targets = inner.tensors[1].tolist()
    dataset = ConcatDataset([Subset(inner, range(15, 25)), Subset(inner, range(50, 60))])
    data = DataPass(DataLoader(dataset, batch_size=4), per_class=2)
    assert data.classes == {0: 2, 1: 2, 2: 2}
    assert len(inner.read) == 6


def test_fewer_than_asked_for_is_said():
    with pytest.warns(UserWarning, match="expected 100 samples, got 60"):
        assert len(DataPass(loader(), samples=100)) == 60
    x, y = tensors(12)
    y[:] = 0
    y[:2] = 1
    with pytest.warns(UserWarning, match=r"expected 5 samples of every class, got fewer of: 1 \(2\)"):
        assert DataPass((x, y), per_class=5).classes == {0: 5, 1: 2}


def test_labels_by_a_function_and_inputs_by_a_function():
    raw = [{"image": torch.full((3, 2), float(i)), "kind": ["a", "b", "a"], "id": torch.arange(3)} for i in range(2)]
    data = DataPass(
        raw, labels=lambda batch: [ord(kind) - 97 for kind in batch["kind"]], inputs=lambda batch: batch["image"]
    )
    assert data.classes == {0: 4, 1: 2}
    for batch in data:
        assert isinstance(batch.args[0], torch.Tensor)
        assert [ord(kind) - 97 for kind in batch.raw["kind"]] == batch.labels.tolist()
    plain = next(iter(DataPass([{"x": torch.ones(2, 1)}])))
    assert (plain.args, set(plain.kwargs), plain.labels) == ((), {"x"}, None)


@pytest.mark.parametrize(
    "raw", [torch.ones(4, 2), (torch.ones(4, 2),), {"x": torch.ones(4, 2)}], ids=["x", "1", "dict"]
)
def test_no_labels_are_a_clear_error(raw):
    data = DataPass([raw])
    assert len(data) == 4
    with pytest.raises(ValueError, match=r"expected data with labels of one shape, got none\. Give batches"):
        data.labels  # noqa: B018
    with pytest.raises(ValueError, match=r"expected labels that are classes \(integers\), got no labels"):
        len(DataPass([raw], per_class=2))


def test_labels_that_are_no_classes():
    x, _ = tensors()
    assert len(DataPass((x, torch.rand(60)), samples=7)) == 7
    with pytest.raises(ValueError, match=r"got labels of type torch\.float32"):
        len(DataPass((x, torch.rand(60)), per_class=2))
    with pytest.raises(ValueError, match=r"expected a label for each of the 60 samples of a batch, got a tensor of"):
        DataPass((x, torch.zeros(3))).labels  # noqa: B018


def test_classes_of_masks_are_those_that_an_image_shows():
    masks = torch.zeros(20, 2, 2, dtype=torch.int64)
    masks[::2, 0, 0] = 1
    masks[5, 1, 1] = 2
    masks[6, 1, 1] = -1
    masks[7, 1, 1] = 255
    data = DataPass((torch.rand(20, 3, 2, 2), masks), per_class=3)
    with pytest.warns(UserWarning, match=r"got fewer of: 2 \(1\)"):
        assert data.classes[1] >= 3
    assert data.classes[2] == 1
    assert len(data) <= 7


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"samples": 0}, "`samples` to be an int of at least 1, got 0"),
        ({"per_class": -1}, "`per_class` to be an int of at least 1, got -1"),
        ({"samples": 3, "per_class": 1}, "`samples` or `per_class`, got both"),
        ({"batch_size": 1.5}, "`batch_size` to be an int"),
        ({"rank": 2, "world_size": 2}, r"`rank` to be an int in \[0, 2\), got 2"),
        ({"rank": 0.5}, r"`rank` to be an int in \[0, 1\), got 0.5"),
        ({"seed": -1}, "`seed` to be an int of at least 0, got -1"),
        ({"seed": None}, "`seed` to be an int of at least 0, got None"),
        ({"memory_limit": "1"}, "`memory_limit` to be an int of at least 0, got '1'"),
        ({"labels": "y"}, "`labels` to be a function, got 'y'"),
        ({"inputs": 3}, "`inputs` to be a function, got 3"),
        ({"loss": 3}, "`loss` to be a function, got 3"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(ValueError, match=text):
        DataPass(loader(), **settings)


@pytest.mark.parametrize("batches", [None, 5, "abc", torch.nn.Linear(2, 2)])
def test_what_gives_no_batches(batches):
    with pytest.raises(ValueError, match="`batches` to be a DataLoader, a list of batches or one batch"):
        DataPass(batches)


def test_one_batch_that_is_a_mapping():
    x, y = torch.randn(6, 2), torch.arange(6) % 2
    data = DataPass({"input": x, "y": y}, labels=lambda batch: batch["y"])
    assert data.classes == {0: 3, 1: 3}
    assert [batch.kwargs.keys() for batch in data] == [{"input", "y"}]


def test_labels_that_are_words():
    with pytest.raises(ValueError, match=r"labels that are numbers, got list .*Give `labels=`"):
        len(DataPass([(torch.randn(2, 3), ["cat", "dog"])]))


def test_single_samples_in_place_of_batches():
    with pytest.raises(ValueError, match="Give batches, not single samples"):
        len(DataPass([(torch.randn(3), torch.tensor(1))]))


@pytest.mark.parametrize("held_back", [None, "a", 0, 1.0, float("nan")])
def test_a_share_held_back_that_is_none(held_back):
    with pytest.raises(ValueError, match="`held_back` between 0 and 1"):
        DataPass(loader()).split(held_back)


def test_a_process_without_a_sample():
    data = DataPass((torch.randn(1, 3), torch.tensor([2])), rank=1, world_size=2)
    assert (len(data), list(data), data.labels.shape, data.classes) == (0, [], (0,), {})


def test_no_samples():
    with pytest.raises(ValueError, match="at least one sample, got an empty data set or loader"):
        len(DataPass([]))


# -- parts ------------------------------------------------------------------------------------------------------------


@every_source
def test_split_by_class(source):
    data = DataPass(source(), seed=5)
    kept, held = data.split(0.2)
    assert held.classes == {0: 4, 1: 4, 2: 4}
    assert sorted(positions(kept) + positions(held)) == list(range(60))
    again = DataPass(source(), seed=5).split(0.2)[1]
    assert positions(again) == positions(held)
    assert positions(data.split(0.2, seed=6)[1]) != positions(held)


def test_split_says_what_it_cannot():
    data = DataPass((torch.rand(11, 2), torch.tensor([0] * 10 + [1])))
    with pytest.warns(UserWarning, match="held back has no sample of class 1"):
        kept, held = data.split(0.2)
    assert (kept.classes, held.classes) == ({0: 8, 1: 1}, {0: 2})
    with pytest.raises(ValueError, match=r"`held_back` between 0 and 1, got 1\.0"):
        data.split(1.0)
    with pytest.raises(ValueError, match="at least one sample in each part, got 0 held back of 11"):
        data.split(0.01)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_the_samples(world):
    whole = DataPass(loader(), samples=31)
    parts = [DataPass(loader(), samples=31, rank=rank, world_size=world) for rank in range(world)]
    assert sorted(i for part in parts for i in positions(part)) == sorted(positions(whole))
    assert {part.total for part in parts} == {31}
    held = [part.split(0.3)[1] for part in parts]
    assert sorted(i for part in held for i in positions(part)) == sorted(positions(whole.split(0.3)[1]))


# -- storing ----------------------------------------------------------------------------------------------------------


def test_a_memory_limit_changes_nothing_and_is_kept():
    inside, outside = DataPass(list(loader())), DataPass(list(loader()), memory_limit=100)
    assert positions(inside) == positions(outside)
    spool = outside._samples.spool
    assert spool.in_memory <= 100 < spool.on_disk
    assert inside.fingerprint() == outside.fingerprint()


def test_writing_into_a_batch_changes_no_sample():
    data = DataPass(list(loader()), memory_limit=0)
    before = positions(data)
    for batch in data:
        batch.args[0].zero_()
    assert positions(data) == before


def test_batches_of_several_forms_stay_apart_and_labels_in_order():
    x = [torch.full((3, n), float(n)) for n in (2, 5, 2)]
    data = DataPass([(part, torch.full((3,), len(part[0]))) for part in x], batch_size=4)
    for batch in data:
        assert (batch.labels == batch.args[0].shape[1]).all()
    assert torch.equal(torch.cat([batch.labels for batch in data]), data.labels)


def test_what_has_no_tensor_is_a_sample_of_its_own():
    class Graph:
        def __init__(self, n):
            self.n = n

    data = DataPass([Graph(i) for i in range(5)], samples=3)
    seen = [batch.args[0].n for batch in data]
    assert len(data) == len(set(seen)) == 3


def test_the_fingerprint_tells_samples_apart():
    x, y = tensors()
    same = DataPass((x, y)).fingerprint()
    assert DataPass((x.clone(), y)).fingerprint() == same
    x = x.clone()
    x[3, 1] += 1
    assert DataPass((x, y)).fingerprint() != same


# -- running ----------------------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Changes a buffer, replaces another and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.last = x.mean().reshape(1)
        random.random()
        np.random.rand()
        return self.drop(self.norm(self.layer(x + torch.rand(()))))


@pytest.mark.parametrize("keep_modes", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_no_trace(keep_modes, fails):
    model = Restless()
    model.norm.eval()
    model.layer.weight.grad = torch.ones(3, 2)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    kept, objects = {name: tensor.clone() for name, tensor in model.state_dict().items()}, list(model.buffers())
    seen = []

    def see(batch, output):
        seen.append(model.training)
        output.sum().backward()
        if fails and len(seen) == 2:
            raise ZeroDivisionError

    data = DataPass(loader())
    if fails:
        with pytest.raises(ZeroDivisionError):
            data.run(model, see, keep_modes=keep_modes, grad=True)
    else:
        assert data.run(model, see, keep_modes=keep_modes, grad=True) == 60
    assert set(seen) == {keep_modes}
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert all(now is before for now, before in zip(model.buffers(), objects, strict=True))
    assert model.layer.weight.grad.tolist() == torch.ones(3, 2).tolist()
    assert model.norm.weight.grad is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_a_run_is_the_same_every_time():
    model, data = Restless(), DataPass(loader())
    runs = []
    for _ in range(2):
        outputs = []
        data.run(model, lambda batch, output, outputs=outputs: outputs.append(output), keep_modes=True)
        runs.append(torch.cat(outputs))
    assert torch.equal(*runs)


def test_the_seed_is_also_of_what_running_draws():
    """Where all samples are alike, their order tells nothing."""

    def run(seed):
        outputs = []
        data = DataPass((torch.ones(8, 2), torch.zeros(8, dtype=torch.int64)), seed=seed)
        data.run(model, lambda batch, output: outputs.append(output), keep_modes=True)
        return torch.cat(outputs)

    model = Restless()
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(0), run(1))


def test_counts_and_progress():
    told = []
    data = DataPass(loader(20), progress=lambda done, total: told.append((done, total)))
    assert data.run(nn.Linear(2, 1), macs=2) == 20
    assert data.run(nn.Linear(2, 1), macs=2, limit=1) == 8
    assert told == [(8, 20), (16, 20), (20, 20), (8, 20)]
    assert data.macs == 56


def test_runs_in_another_way_with_a_loss():
    model = nn.Linear(2, 3)
    data = DataPass(loader(), loss=lambda model, batch: nn.functional.cross_entropy(model(*batch.args), batch.labels))
    losses = []
    data.run(model, lambda _, loss: losses.append(loss.item()), call=data.loss_of)
    expected = [nn.functional.cross_entropy(model(b.args[0]), b.labels).item() for b in data]
    assert losses == pytest.approx(expected)
    with pytest.raises(ValueError, match="expected data with a loss, got none"):
        DataPass(loader()).run(model, call=DataPass(loader()).loss_of)
    wrong = DataPass(loader(), loss=lambda model, batch: model(*batch.args))
    with pytest.raises(ValueError, match=r"a tensor with one number, .* got a tensor of shape \(8, 3\)"):
        wrong.run(model, call=wrong.loss_of)


def test_transfer_is_applied_to_every_batch():
    data = DataPass(loader(), transfer=lambda raw: (raw[0].double() + 1, raw[1]))
    assert sorted(positions(data)) == list(range(1, 61))
    assert next(iter(data)).raw[0].dtype == torch.float64
