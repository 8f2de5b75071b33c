"""Hidden units of recurrent layers and cells."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_prune import L1, Contribution, prune
from lightning_prune.structure.discovery import trace
from lightning_prune.structure.traced_model import StructureError, TracedModel
from lightning_prune.surgery.shrink import cut
from tests.support.cutting import draw, half, masked, shrunk

KINDS = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
CELLS = {nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}


def drawn(kind, layers, bidirectional, bias, batch_first, projected):
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias, "batch_first": batch_first}
    return (kind, {**options, "proj_size": 4} if projected else options)


OPTIONS = [
    drawn(*options)
    for options in itertools.product(KINDS, (1, 2), (False, True), (True, False), (False, True), (False, True))
    if options[0] is nn.LSTM or not options[-1]
]


class Reader(nn.Module):
    """A linear layer, a recurrent one, and a head over all time steps and the final states."""

    def __init__(self, kind=nn.LSTM, inputs=5, hidden=7, **options):
        super().__init__()
        self.embed, self.memory = nn.Linear(3, inputs), kind(inputs, hidden, **options)
        width = (options.get("proj_size") or hidden) * (1 + options.get("bidirectional", False))
        self.head, self.last = nn.Linear(width, 2), nn.Linear(options.get("proj_size") or hidden, 2)

    def forward(self, x):
        out, state = self.memory(self.embed(x))
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(out), self.last(hidden)


def structure_of(model, *example):
    return trace(TracedModel.of(model, *example))


def assert_masked(model, structure, *example, seed=0):
    """The cut network equals the one whose removed slices are zero, in float64."""
    model = model.double().eval()
    example = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in example]
    axes = structure.axes(draw(structure, seed))
    expected, found = masked(model, axes)(*example), shrunk(model, axes)(*example)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_a_cut_layer_equals_the_masked_one(kind, options):
    """Random units leave; all layers and directions keep one number of units, as PyTorch's kernels want."""
    model, x = Reader(kind, **options), torch.randn(2, 4, 3)
    structure = structure_of(model, x)
    projected = {"memory#2": 4} if "proj_size" in options else {}
    assert structure.widths == {"embed": 5, "memory": 7, **projected}
    for seed in range(3):
        assert_masked(model, structure, x, seed=seed)


def lstm(x, weights, hidden):
    """A layer by the formulas of its documentation, one sample and step at a time."""
    w_ih, w_hh, b_ih, b_hh = (w.detach().numpy() for w in weights)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    out = np.zeros((*x.shape[:2], hidden))
    for sample in range(len(x)):
        h = c = np.zeros(hidden)
        for step in range(x.shape[1]):
            z = w_ih @ x[sample, step] + b_ih + w_hh @ h + b_hh
            i, f, g, o = (z[k * hidden : (k + 1) * hidden] for k in range(4))
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            out[sample, step] = h
    return out


def test_a_cut_layer_computes_the_formulas_with_the_kept_weights():
    model, x = nn.Sequential(nn.LSTM(3, 6, batch_first=True)).double(), torch.randn(2, 4, 3, dtype=torch.float64)
    whole = Reader(inputs=3, hidden=6, batch_first=True).double()
    whole.memory = model[0]
    structure = structure_of(whole, x)
    kept = (0, 2, 5)
    cut = shrunk(whole, structure.axes({"memory": kept}))
    assert (cut.memory.hidden_size, cut.memory.input_size) == (3, 3)
    rows = torch.tensor([gate * 6 + unit for gate in range(4) for unit in kept])
    own = dict(whole.memory.named_parameters())
    small = [own["weight_ih_l0"][rows], own["weight_hh_l0"][rows][:, kept], own["bias_ih_l0"][rows]]
    small.append(own["bias_hh_l0"][rows])
    torch.testing.assert_close(cut.memory(x)[0], torch.from_numpy(lstm(x.numpy(), small, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "gates"), KINDS.items())
def test_macs_of_all_time_steps(kind, gates):
    model = Reader(kind, num_layers=2, bidirectional=True, batch_first=True)
    structure = structure_of(model, torch.randn(2, 6, 3))
    per_step = 3 * 5 + 2 * gates * 7 * (5 + 7) + 2 * gates * 7 * (14 + 7) + 14 * 2
    assert structure.cost.macs(structure.widths) == 6 * per_step + 4 * 7 * 2
    narrow = {"embed": 4, "memory": 3}
    per_step = 3 * 4 + 2 * gates * 3 * (4 + 3) + 2 * gates * 3 * (6 + 3) + 6 * 2
    assert structure.cost.macs(narrow) == 6 * per_step + 4 * 3 * 2


@pytest.mark.parametrize("samples", [2, 9])
def test_macs_are_those_of_a_sample_if_time_comes_first(samples):
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.head = nn.LSTM(3, 7), nn.Linear(7, 2)

        def forward(self, x):
            return self.head(self.memory(x)[0])

    structure = structure_of(TimeFirst(), torch.randn(6, samples, 3))
    assert structure.cost.macs(structure.widths) == 6 * (4 * 7 * (3 + 7) + 7 * 2)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_cut_cell_equals_the_masked_one(kind, bias):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.cell, self.head = nn.Linear(3, 5), kind(5, 7, bias=bias), nn.Linear(7, 2)

        def forward(self, x):
            state = None
            for step in self.embed(x).unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)

    model, x = Loop(), torch.randn(2, 4, 3)
    structure = structure_of(model, x)
    assert structure.widths == {"embed": 5, "cell": 7}
    assert structure.cost.macs(structure.widths) == 4 * (3 * 5 + CELLS[kind] * 7 * (5 + 7)) + 7 * 2
    assert_masked(model, structure, x)


def test_cells_that_share_a_size_lose_the_same_units():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = 6
            self.lower, self.upper, self.head = nn.LSTMCell(3, 6), nn.GRUCell(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            hidden, cell, top = (torch.zeros(len(x), self.hidden, dtype=x.dtype) for _ in range(3))
            for step in x.unbind(1):
                hidden, cell = self.lower(step, (hidden, cell))
                top = self.upper(hidden, top)
            return self.head(top)

    model, x = Stack(), torch.randn(2, 4, 3)
    structure = structure_of(model, x)
    assert structure.widths == {"lower": 6}
    assert_masked(model, structure, x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_weights_that_are_computed(normed):
    model, x = Reader(batch_first=True), torch.randn(2, 4, 3)
    normed(model.memory, "weight_hh_l0")
    with torch.no_grad():
        model(x)
    assert prune(model, x, pruning_ratio=0.4, layers="memory").widths == {"embed": 5, "memory": 4}
    assert model.memory.hidden_size == 4
    model(x)[0].sum().backward()


class Given(nn.Module):
    """An LSTM whose initial state is given."""

    def __init__(self, state, hidden=6):
        super().__init__()
        self.memory, self.head, self.state = nn.LSTM(3, hidden, batch_first=True), nn.Linear(hidden, 2), state
        self.first = nn.Parameter(torch.randn(2, 1, 1, hidden))

    def forward(self, x):
        return self.head(self.memory(x, self.state(self, x))[0])


def learned(model, x):
    return model.first[0].expand(1, len(x), -1), model.first[1].expand(1, len(x), -1).contiguous()


def zeros(model, x):
    return (torch.zeros(1, len(x), model.memory.hidden_size, dtype=x.dtype),) * 2


def test_a_learned_initial_state_loses_the_units():
    model, x = Given(learned), torch.randn(2, 4, 3)
    structure = structure_of(model, x)
    assert structure.widths == {"memory": 6}
    assert ("first", 3) in {(member.tensor, member.dim) for member in structure.groups[0].members}
    assert_masked(model, structure, x)


def test_an_initial_state_of_the_layers_own_size_follows():
    model, x = Given(zeros), torch.randn(2, 4, 3)
    structure = structure_of(model, x)
    assert structure.widths == {"memory": 6}
    assert_masked(model, structure, x)


@pytest.mark.parametrize("kind", KINDS)
def test_an_initial_state_of_a_size_in_an_attribute_follows(kind):
    """As tutorials write it."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.hidden = 2, 6
            self.memory, self.head = kind(3, 6, 2, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            state = torch.zeros(self.layers, x.size(0), self.hidden, dtype=x.dtype).to(x.device)
            return self.head(self.memory(x, (state, state) if kind is nn.LSTM else state)[0][:, -1])

    model, x = Classifier(), torch.randn(2, 4, 3)
    structure = structure_of(model, x)
    assert structure.widths == {"memory": 6}
    assert [size.tensor for size in structure.groups[0].sizes] == ["hidden"]
    assert_masked(model, structure, x)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_an_initial_state_of_a_literal_size_freezes_with_the_reason(kind):
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.memory, self.head = nn.Linear(4, 3), kind(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            state = torch.zeros(1, x.shape[1], 5)
            return self.head(self.memory(self.embed(x), (state, state) if kind is nn.LSTM else state)[0])

    structure = structure_of(Sequence(), torch.randn(6, 2, 4))
    reasons = {frozen.tensor: frozen.reason for frozen in structure.frozen}
    assert structure.widths == {"embed": 3}
    assert "Expected hidden" in reasons["memory.weight_hh_l0"], reasons


def test_a_state_of_another_source_freezes_with_the_reason():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.head = nn.GRU(3, 5), nn.Linear(5, 2)

        def forward(self, x, state):
            return self.head(self.memory(x, state)[0])

    structure = structure_of(Called(), torch.randn(6, 2, 3), torch.randn(1, 2, 5))
    reasons = {frozen.tensor: frozen.reason for frozen in structure.frozen}
    assert not structure.widths
    assert "meets an axis of fixed size" in reasons["memory.weight_hh_l0"], reasons


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_sorted", [True, False])
def test_packed_sequences(kind, is_sorted):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 5)
            self.memory, self.head = kind(5, 6, 2, batch_first=True, bidirectional=True), nn.Linear(12, 2)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(self.embed(x), lengths.cpu(), True, enforce_sorted=is_sorted)
            out, state = self.memory(packed)
            out, lengths = pad_packed_sequence(out, batch_first=True)
            hidden = state[0] if isinstance(state, tuple) else state
            return self.head(out), hidden.sum(-1), lengths

    model, example = Packed(), (torch.randint(9, (3, 4)), torch.tensor([4, 3, 1] if is_sorted else [1, 4, 3]))
    structure = structure_of(model, *example)
    assert structure.widths == {"embed": 5, "memory": 6}
    gates = KINDS[kind]
    rows = 8 * 2 * gates * 6 * (5 + 6 + 12 + 6)
    assert structure.cost.macs(structure.widths) == round((rows + 12 * 12 * 2) / 3)
    assert_masked(model, structure, *example)


def test_products_of_hidden_states_from_zero():
    """A unit whose weights are zero stays at zero, so it adds nothing to what attention sums over."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.head = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            out, (hidden, _) = self.memory(x)
            weights = (out @ hidden[-1].unsqueeze(-1)).softmax(1)
            return self.head((weights * out).sum(1))

    model, x = Attention(), torch.randn(2, 4, 3)
    structure = structure_of(model, x)
    assert structure.widths == {"memory": 6}
    assert_masked(model, structure, x)


def test_a_sum_over_units_from_a_nonzero_state_is_frozen():
    class Summed(Given):
        def forward(self, x):
            return self.memory(x, self.state(self, x))[0].sum(-1)

    zero = structure_of(Summed(zeros), torch.randn(2, 4, 3))
    assert zero.widths == {"memory": 6}

    def ones(model, x):
        return (torch.zeros(1, len(x), model.memory.hidden_size, dtype=x.dtype) + 1,) * 2

    def written(model, x):
        state = torch.zeros(1, len(x), model.memory.hidden_size, dtype=x.dtype)
        state[:, :1] += 1
        return state, state

    for nonzero in (ones, written):
        assert not structure_of(Summed(nonzero), torch.randn(2, 4, 3)).widths


def test_an_encoder_gives_its_state_to_a_decoder():
    class Translator(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.encoder, self.decoder, self.head = nn.GRU(4, 6), nn.GRU(4, 6), nn.Linear(6, 9)

        def forward(self, x):
            tokens = self.embed(x)
            return self.head(self.decoder(tokens, self.encoder(tokens)[1])[0])

    model, x = Translator(), torch.randint(9, (4, 2))
    structure = structure_of(model, x)
    assert structure.widths == {"embed": 4, "encoder": 6}
    assert_masked(model, structure, x)


def test_one_sample_without_a_batch():
    model, x = Reader(num_layers=2), torch.randn(6, 3)
    structure = structure_of(model, x)
    assert structure.widths == {"embed": 5, "memory": 7}
    assert_masked(model, structure, x)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_a_cut_as_in_the_masked_network(kind):
    """Optimizer state and what the layer keeps of its weights follow; undone, everything is as before."""
    model, x = Reader(kind, num_layers=2, bidirectional=True, batch_first=True).double(), torch.randn(2, 4, 3).double()

    def step(model, optimizer):
        optimizer.zero_grad()
        sum(out.square().sum() for out in model(x)).backward()
        optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    step(model, optimizer)
    structure, before = structure_of(model, x), {name: p.detach().clone() for name, p in model.named_parameters()}
    axes = structure.axes(half(structure))
    reference = masked(model, axes)
    follower = torch.optim.SGD(reference.parameters(), 0.01, momentum=0.9)
    follower.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    change = cut(model, axes, [optimizer])
    assert (model.memory.hidden_size, model.memory.input_size) == (4, 3)
    assert all(own is kept for own, kept in zip(model.memory._flat_weights, model.memory.parameters(), strict=True))
    step(model, optimizer)
    step(reference, follower)
    wide = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        expected = wide[name].detach()
        for dim, kept in axes.get(name, {}).items():
            expected = expected.index_select(dim, torch.from_numpy(kept))
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-12)
    change.undo()
    assert model.memory.hidden_size == 7
    assert all(parameter.shape == before[name].shape for name, parameter in model.named_parameters())
    model(x)


def test_criteria_without_a_linear_consumer_say_so():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.GRU(5, 7)), torch.randn(4, 2, 3)
    with pytest.raises(StructureError, match=r"cannot score 0: its units enter 1, which is no plain Linear"):
        prune(model, x, pruning_ratio=0.5, criterion=Contribution(), data=[(x, x)])
    assert prune(model, x, pruning_ratio=0.4, criterion=L1()).widths == {"0": 3}


def test_as_many_hidden_units_as_projections_are_refused():
    """PyTorch tells an LSTM with projections by the two numbers, and fails where they are equal."""
    network = Reader(proj_size=4, batch_first=True)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(StructureError, match=r"memory: this cut leaves 4 hidden units and as many projections.*Keep"):
        prune(network, torch.randn(2, 5, 3), pruning_ratio={"memory#2": 0.0, "memory": 3 / 7})
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
