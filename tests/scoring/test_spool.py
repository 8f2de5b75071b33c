"""A store of tensors that keeps to a limit of memory."""

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.scoring.spool import Spool

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(TYPES), st.booleans(), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_comes_back_as_it_was(shape, dtype, is_transposed, limit):
    tensor = torch.randint(0, 2, shape).to(dtype)
    tensor = tensor.mT if is_transposed and tensor.dim() > 1 else tensor
    spool = Spool(limit)
    stored = spool.put(tensor)
    assert spool.in_memory <= limit
    assert torch.equal(stored.get(), tensor)
    assert stored.get().dtype == dtype
    assert stored.is_on_disk is (stored.size > limit)


@pytest.mark.parametrize("limit", [0, 10**6])
def test_the_order_of_dimensions_in_memory_is_kept(limit):
    tensor = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert Spool(limit).put(tensor).get().stride() == tensor.stride()


def test_the_limit_holds_and_what_is_freed_is_used_again(tmp_path):
    spool = Spool(100, tmp_path)
    parts = [spool.put(torch.full((10,), float(i))) for i in range(5)]
    assert (spool.in_memory, spool.on_disk) == (80, 120)
    assert len(list(tmp_path.rglob("*"))) == 1 + 3
    mapped = parts[3].get()
    parts[0].free()
    parts[3].free()
    parts[3].free()
    assert (spool.in_memory, spool.on_disk) == (40, 80)
    assert mapped.tolist() == [3.0] * 10, "a mapping outlives its file"
    assert not spool.put(torch.zeros(10)).is_on_disk
    with pytest.raises(ValueError, match="got one that was freed"):
        parts[3].get()
    del spool, parts, mapped
    gc.collect()
    assert not list(Path(tmp_path).rglob("*"))


@pytest.mark.parametrize("limit", [0, 100])
def test_is_a_copy(limit):
    tensor = torch.ones(3)
    stored = Spool(limit).put(tensor)
    tensor.zero_()
    assert stored.get().tolist() == [1, 1, 1]


def test_a_negative_limit():
    with pytest.raises(ValueError, match="at least 0 bytes, got -1"):
        Spool(-1)
