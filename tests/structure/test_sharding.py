"""What pruning needs of FSDP2, with a process group of this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import Shard
from torch.nn.functional import scaled_dot_product_attention

from lightning_prune import prune
from lightning_prune.structure import TracedModel, trace
from lightning_prune.structure.sharding import WholeTensors, fit_groups, require_reduced, require_supported, whole
from lightning_prune.surgery import CutError, history_of, transaction, with_history
from lightning_prune.surgery.tensors import named

pytestmark = pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="refused before PyTorch 2.13")

KEPT = {"0": (0, 2, 5, 6), "2": (1, 3, 4)}


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def sharded(**options: Any) -> Any:
    model, mesh = plain(), init_device_mesh("cpu", (1,))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh, **options)
    return model


def batch(step: int) -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *steps: int) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def cut(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def run() -> Tensor:
        fit_groups(model)
        return model(batch(0))

    structure = trace(TracedModel.of(plain(), batch(0)))
    try:
        with transaction(model, [optimizer], run=run) as change:
            change.keep(structure, KEPT)
    finally:
        fit_groups(model)


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(mine.detach()), theirs.detach()), name


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


@pytest.mark.parametrize("before", [0, 3])
def test_a_cut(before: int) -> None:
    """Before the first forward pass too. Parameters stay the same objects, with what users keep with them."""
    one, many = plain(), sharded()
    optimizers = optimizer_of(one), optimizer_of(many)
    parameters, calls = list(many.parameters()), list[Tensor]()
    parameters[0].note = "mine"
    parameters[0].register_post_accumulate_grad_hook(calls.append)
    for model, optimizer in zip((one, many), optimizers, strict=True):
        train(model, optimizer, *range(before))
        cut(model, optimizer)
        train(model, optimizer, 3, 4)
    assert_equal(many, one)
    assert [id(p) for p in many.parameters()] == [id(p) for p in parameters]
    assert [tuple(p.shape) for p in parameters[:2]] == [(4, 4), (4,)]
    assert parameters[0].note == "mine"
    assert len(calls) == before + 2


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("in backward")


def in_forward(x: Tensor) -> Tensor:
    raise RuntimeError("in forward")


@pytest.mark.parametrize(("failure", "where"), [(in_forward, "in forward"), (Fails.apply, "in backward")])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_cut_that_fails(failure: Any, where: str, layer: int) -> None:
    """The network is as before and trains on: nothing of the interrupted pass is left."""
    one, many = plain(), sharded()
    optimizers = optimizer_of(one), optimizer_of(many)
    train(one, optimizers[0], 0, 1, 2, 3)
    train(many, optimizers[1], 0, 1)
    forward = many[layer].forward
    many[layer].forward = lambda x: failure(forward(x))
    with pytest.raises(CutError, match=where):
        cut(many, optimizers[1])
    del many[layer].forward
    assert history_of(many) is None
    train(many, optimizers[1], 2, 3)
    assert_equal(many, one)


def test_copies_are_plain() -> None:
    model = sharded()
    model(batch(0)).sum().backward()
    traced = TracedModel.of(model, batch(0))
    for kind in ("meta", "fake"):
        copy = traced.copy(kind).module
        assert not any(isinstance(part, FSDPModule) for part in copy.modules())
        assert {name: tuple(p.shape) for name, p in copy.named_parameters()} == {
            name: tuple(p.shape) for name, p in plain().named_parameters()
        }
        copy.load_state_dict(copy.state_dict())
    with pytest.raises(ValueError, match="expected a network whose weights are all in this process"):
        traced.copy("real")
    assert trace(traced).widths == trace(TracedModel.of(plain(), batch(0))).widths == {"0": 7, "2": 5}
    assert [isinstance(part, FSDPModule) for part in model] == [True, False, True, False, False]
    model(batch(0)).sum().backward()


class Attention(nn.Module):
    """Attention with a scale that PyTorch computes, and two heads of eight features."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 8
        self.q, self.k, self.v = (nn.Linear(4, 16) for _ in "qkv")
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_features_of_heads_are_those_of_the_plain_network() -> None:
    network, wide = (nn.Sequential(Attention(), nn.Linear(4, 2)) for _ in range(2))
    x, mesh = torch.randn(2, 3, 4), init_device_mesh("cpu", (1,))
    expected = trace(TracedModel.of(network, x)).groups
    assert any(group.queries for group in expected)
    fully_shard(wide, mesh=mesh)
    assert trace(TracedModel.of(wide, x)).groups == expected
    prune(network, x, pruning_ratio={"0.q": 0.5, "*#head_dim": 0.75})  # of one head with two features, shapes tell less
    traced = TracedModel.of(network, x)
    narrow = with_history(trace(traced), traced).groups
    fully_shard(network, mesh=mesh)
    assert with_history(trace(traced), traced).groups == narrow
    assert [group.name for group in narrow] == [group.name for group in expected]


def test_whole_tensors() -> None:
    tensors = WholeTensors(named(sharded()))
    assert tensors.keys() == named(plain()).keys()
    for name, tensor in named(plain()).items():
        assert type(tensors[name]) is Tensor
        assert torch.equal(tensors[name], tensor)


def test_what_cannot_be_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_supported(sharded())
    with pytest.raises(ValueError, match="CPUOffloadPolicy"):
        require_supported(sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)))
    with pytest.raises(ValueError, match=r"along their first dimension.*0.weight.*Shard\(dim=1\)"):
        require_supported(sharded(shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else None))
    monkeypatch.delattr(FSDPModule, "reset_iter_state")
    with pytest.raises(ValueError, match=r"expected PyTorch 2\.13 or later"):
        require_supported(sharded())


def test_gradients_without_synchronization_are_refused() -> None:
    model = sharded()
    model.set_requires_gradient_sync(False)
    model(batch(0)).sum().backward()
    with pytest.raises(RuntimeError, match="expected gradients that are reduced after every backward pass"):
        require_reduced(model)
    model.set_requires_gradient_sync(True)
    model(batch(0)).sum().backward()
    require_reduced(model)


def test_the_private_parts_of_pytorch_that_we_use() -> None:
    """PyTorch 2.13 to 2.15 have them; another minor may keep shapes in other places."""
    minor = tuple(map(int, torch.__version__.split(".")[:2]))
    assert (2, 13) <= minor <= (2, 15), "look at `structure/sharding.py` before this test is widened"
    model = sharded()
    model(batch(0)).sum().backward()
    state = model[0]._get_fsdp_state()
    (group,) = state._fsdp_param_groups
    assert isinstance(group, FSDPParamGroup)
    assert state._is_root is False
    weight, _ = group.fsdp_params
    assert isinstance(weight, FSDPParam)
    assert weight.sharded_param is model[0].weight
    assert weight._orig_size == (7, 4)
    assert weight._unsharded_param.grad is weight.unsharded_accumulated_grad is None
    assert type(model[0]).__mro__[2] is nn.Linear
    settings = ("mesh_info", "post_forward_mesh_info", "device", "mp_policy", "_module_info", "_post_load_hook_handle")
    assert all(hasattr(weight, name) for name in settings)
