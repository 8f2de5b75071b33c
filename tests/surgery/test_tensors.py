import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_prune.surgery.tensors import blank, canonical, named, non_persistent, take, zero


@st.composite
def tensors_and_kept(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    dtype = draw(
        st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
    )
    tensor = torch.arange(np.prod(shape)).reshape([shape[d] for d in order]).to(dtype)
    tensor = tensor.permute([order.index(d) for d in range(len(shape))])
    dims = draw(st.lists(st.sampled_from(range(len(shape))), unique=True))
    kept = {d: sorted(draw(st.sets(st.sampled_from(range(shape[d])), min_size=1))) for d in dims}
    return tensor, kept


def _reference(tensor, kept):
    """Indexing with an open mesh of positions."""
    mesh = np.ix_(*(kept.get(dim, range(n)) for dim, n in enumerate(tensor.shape)))
    return tensor[tuple(torch.from_numpy(axis) for axis in mesh)]


@given(tensors_and_kept())
def test_take_equals_indexing(drawn):
    tensor, kept = drawn
    taken = take(tensor, kept)
    assert torch.equal(taken, _reference(tensor, kept))
    assert taken.dtype == tensor.dtype
    assert taken.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("transposed", [False, True])
def test_take_of_a_large_tensor_in_blocks_is_the_same(monkeypatch, transposed):
    monkeypatch.setattr("lightning_prune.surgery.tensors._BLOCK", 64)  # two rows at once
    tensor = torch.arange(4096.0).reshape(512, 8) if not transposed else torch.arange(4096.0).reshape(8, 512).T
    kept = {0: list(range(1, 512, 3)), 1: [0, 2, 3, 7]}
    taken = take(tensor, kept)
    assert torch.equal(taken, _reference(tensor, kept))
    assert taken.is_contiguous() != transposed


@given(tensors_and_kept())
def test_take_keeps_the_memory_order(drawn):
    tensor, kept = drawn
    taken = take(tensor, kept)
    order = [d for d in sorted(range(tensor.ndim), key=tensor.stride, reverse=True) if tensor.shape[d] > 1]
    order = [d for d in order if taken.shape[d] > 1]
    strides = [taken.stride(d) for d in order]
    assert strides == sorted(strides, reverse=True)
    assert taken.numel() == 1 + sum((n - 1) * s for n, s in zip(taken.shape, taken.stride(), strict=True))  # dense


@given(tensors_and_kept(), st.data())
def test_take_twice_is_take_of_the_composition(drawn, data):
    tensor, kept = drawn
    again = {d: sorted(data.draw(st.sets(st.sampled_from(range(len(k))), min_size=1))) for d, k in kept.items()}
    once = take(tensor, {d: [kept[d][i] for i in again[d]] for d in kept})
    assert torch.equal(take(take(tensor, kept), again), once)


@given(tensors_and_kept())
def test_zero_is_zero_exactly_where_take_removes(drawn):
    tensor, kept = drawn
    zeroed = zero(tensor, kept)
    assert torch.equal(take(zeroed, kept), take(tensor, kept))
    inside = torch.zeros(tensor.shape, dtype=torch.bool)
    inside[tuple(torch.from_numpy(a) for a in np.ix_(*(kept.get(d, range(n)) for d, n in enumerate(tensor.shape))))] = (
        True
    )
    assert not zeroed[~inside].any()
    assert zeroed.stride() == tensor.stride()


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((8, 6, 3, 3), torch.channels_last),
        ((8, 1, 3, 3), torch.channels_last),
        ((8, 6, 1, 1), torch.channels_last),
        ((8, 6, 3, 3), torch.contiguous_format),
        ((8, 6, 1, 1), torch.contiguous_format),
        ((4, 6, 2, 3, 3), torch.channels_last_3d),
    ],
)
def test_memory_formats_survive(shape, memory_format):
    tensor = torch.empty(shape, memory_format=memory_format)
    for result in (take(tensor, {0: [0, 2, 3]}), blank(tensor, (5, *shape[1:]))):
        wanted = torch.empty((len(result), *shape[1:]), memory_format=memory_format)
        assert result.stride() == wanted.stride()
        assert result.is_contiguous(memory_format=memory_format)


def test_take_from_fake_and_meta_tensors():
    with FakeTensorMode() as mode:
        inside = take(torch.randn(4, 3), {0: [1, 2]})
    outside = take(mode.from_tensor(torch.randn(4, 3)), {0: [1, 2], 1: [0]})
    assert inside.shape == (2, 3)
    assert outside.shape == (2, 1)
    assert take(torch.empty(4, 3, device="meta"), {1: [0]}).shape == (4, 1)


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        ({2: [0]}, "dimension of a tensor of shape"),
        ({0: [0, 4]}, r"in \[0, 4\)"),
        ({0: [-1, 2]}, r"in \[0, 4\)"),
        ({0: [2, 1]}, "strictly ascending"),
        ({0: [1, 1]}, "strictly ascending"),
        ({0: [[1, 2]]}, "strictly ascending"),
    ],
)
@pytest.mark.parametrize("function", [take, zero])
def test_positions_that_do_not_exist_are_refused(function, kept, text):
    with pytest.raises(ValueError, match=text):
        function(torch.randn(4, 3), kept)


@pytest.mark.parametrize("function", [take, zero])
def test_sparse_tensors_are_refused(function):
    with pytest.raises(ValueError, match="zero_grad"):
        function(torch.eye(3).to_sparse(), {0: [1]})


def test_names_of_tied_tensors_compiled_modules_and_unsaved_buffers():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = torch.compile(nn.Linear(2, 2, bias=False))
            self.b.weight = self.a.weight
            self.register_buffer("kept", torch.ones(2))
            self.register_buffer("unsaved", torch.ones(2), persistent=False)
            self.register_buffer("absent", None)

    network = Network()
    found = named(network)
    assert set(found) == {"a.weight", "a.bias", "b.weight", "kept", "unsaved"}
    assert found["b.weight"] is found["a.weight"]
    assert non_persistent(network) == {"unsaved"}
    assert {canonical(name) for name in network.state_dict()} == {"a.weight", "a.bias", "b.weight", "kept"}
