"""Passes of our own leave the network as it is, whatever happens."""

import pytest
import torch
from torch import nn

from lightning_prune.scoring import NISP, DataPass, KLDivergence, SynFlow
from lightning_prune.scoring.contexts import preserved_state
from lightning_prune.scoring.passes import outputs_of, positive_response
from lightning_prune.structure import Call, TracedModel, trace
from tests.scoring.networks import batches, examine, network, structure_of

own_pass = pytest.mark.parametrize("criterion", [KLDivergence(), NISP(), SynFlow()], ids=repr)


@own_pass
def test_a_failing_pass_leaves_modes_hooks_and_weights(criterion):
    model, structure = network("batch norm"), structure_of("batch norm")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[1].eval()
    model[7].forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        criterion.statistic(structure).collect(model, DataPass([batches("batch norm")[0]]))
    assert model.training
    assert not model[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_random_numbers_and_modes_come_back():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    state = torch.get_rng_state()
    with preserved_state(model):
        assert not any(module.training for module in model.modules())
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model] == [True, False]


@pytest.mark.parametrize(
    "wrap",
    [lambda y: {"logits": y, "count": 3}, lambda y: (y, y.argmax(1)), lambda y: [y]],
    ids=["dict", "tuple", "list"],
)
@own_pass
def test_finds_outputs_wherever_they_are(criterion, wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network("mlp")

        def forward(self, *, features):
            return wrap(self.net(features))

    model = Wrapped()
    x = batches("mlp")[0]
    structure = trace(TracedModel.of(network("mlp"), x))
    plain = criterion.statistic(structure)
    examine(network("mlp"), [x], plain)
    wrapped = criterion.statistic(trace(TracedModel(model, (Call((), {"features": x}),))))
    wrapped.collect(model, DataPass([{"features": x}]))
    torch.testing.assert_close(wrapped.value("net.0"), plain.value("0"))


def test_says_when_nothing_comes_out():
    with pytest.raises(TypeError, match="expected the network to give out floating-point tensors, got int"):
        outputs_of(3)


def test_the_response_of_a_chain_is_the_product_of_its_absolute_weights():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    response, weights = positive_response(model, Call((torch.randn(1, 3),)))
    expected = (model[2].weight.double().abs() @ model[0].weight.double().abs()).sum()
    torch.testing.assert_close(response, expected)
    assert set(weights) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("norm", [nn.RMSNorm(4), nn.LayerNorm(4, bias=False), nn.GroupNorm(2, 4)], ids=repr)
def test_a_norm_over_its_own_input_only_scales(norm):
    """Divided by its own size, the response would be the same whatever the weights before it are."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), norm, nn.Linear(4, 2, bias=False))
    response, _ = positive_response(model, Call((torch.randn(1, 3),)))
    expected = (model[2].weight.double().abs() @ model[0].weight.double().abs()).sum()
    torch.testing.assert_close(response, expected)


def test_synaptic_flow_is_conserved():
    """Without biases as much flows into a hidden unit as out of it (Tanaka et al., 2020, theorem 2)."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    statistic = SynFlow().statistic(trace(TracedModel.of(model, torch.zeros(1, 3))))
    examine(model, [torch.zeros(1, 3)], statistic)
    into, out = statistic.per_pass("score", "0")
    torch.testing.assert_close(into, out)


def test_divergence_by_hand():
    """Two classes, one hidden unit that decides: masked, both are equally likely."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0], [1.0]])
    model[2].weight.data = torch.tensor([[1.0986123, 0.0], [0.0, 0.0]])  # odds of 3 to 1
    statistic = KLDivergence().statistic(trace(TracedModel.of(model, torch.ones(1, 1))))
    examine(model, [torch.ones(1, 1)], statistic)
    assert statistic.value("0").tolist() == pytest.approx([0.1308, 0.0], abs=1e-4)  # 3/4 ln 3/2 + 1/4 ln 1/2
