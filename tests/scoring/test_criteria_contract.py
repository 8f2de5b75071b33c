"""What every criterion promises, checked on every criterion that exists and every small network."""

import copy
import dataclasses
import importlib
import inspect
import pickle
import pkgutil

import numpy as np
import pytest
import torch

from lightning_prune import scoring
from lightning_prune.scoring import Criterion, Misclassification, criteria, score_groups
from tests.scoring.networks import NETWORKS, batches, examine, network, structure_of, tensors_of, train
from tests.scoring.references import REFERENCES, Evidence, watch

FOUND = sorted(
    {
        kind
        for info in pkgutil.iter_modules(criteria.__path__, f"{criteria.__name__}.")
        for _, kind in inspect.getmembers(importlib.import_module(info.name), inspect.isclass)
        if issubclass(kind, Criterion) and not inspect.isabstract(kind)
    },
    key=lambda kind: kind.__name__,
)
every_kind = pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
every_criterion = pytest.mark.parametrize("criterion", REFERENCES, ids=repr)
mergeable = pytest.mark.parametrize(
    "criterion",
    [c for c in REFERENCES if type(c).statistic is not Criterion.statistic and "merges" not in c.waived],
    ids=repr,
)
clear_of_the_dead = pytest.mark.parametrize(
    "criterion", [c for c in REFERENCES if "dead_is_lowest" not in c.waived], ids=repr
)
every_network = pytest.mark.parametrize("name", NETWORKS)
# Where it counts how a statistic is kept, and not what a layer computes: buffers, a layer that is called twice, random
# numbers, several consumers.
few_networks = pytest.mark.parametrize("name", ["batch norm", "shared", "dropout", "block"])


def run(criterion, model, inputs, structure):
    """Scores after training passes over the inputs. Gradients are gone by then: they belong to the statistic."""
    statistic = criterion.statistic(structure)
    train(model, inputs, statistic)
    if statistic is not None:
        examine(model, inputs, statistic)
    model.zero_grad()
    return score_groups(criterion, structure.groups, tensors_of(model), statistic)


# -- the class -------------------------------------------------------------------------------------------------------


@every_kind
def test_is_exported_documented_and_closed(kind):
    assert kind.__name__ in criteria.__all__
    assert kind.__name__ in scoring.__all__
    assert getattr(scoring, kind.__name__) is kind
    assert inspect.getdoc(kind)
    assert not inspect.getdoc(kind).startswith(f"{kind.__name__}(")  # what dataclass writes where there is none
    assert kind.__dataclass_params__.frozen
    assert not [other for other in FOUND if other is not kind and issubclass(other, kind)]


@every_kind
def test_default_instance_has_a_reference(kind):
    assert kind() in REFERENCES, f"write a reference for {kind.__name__} in references.py"


@every_criterion
def test_waives_clauses_with_a_reason(criterion):
    assert set(criterion.waived) <= {"dead_is_lowest", "equivariant", "merges"}
    assert all(criterion.waived.values())


@every_criterion
def test_survives_pickle_copy_and_repr(criterion):
    names = {kind.__name__: kind for kind in FOUND}
    assert pickle.loads(pickle.dumps(criterion)) == criterion
    assert copy.deepcopy(criterion) == criterion
    assert eval(repr(criterion), names) == criterion
    with pytest.raises(dataclasses.FrozenInstanceError):
        criterion.every_n_batches = 3


# -- the scores ------------------------------------------------------------------------------------------------------


@every_network
@every_criterion
def test_equals_its_reference(criterion, name):
    model, inputs, structure = network(name), batches(name), structure_of(name)
    torch.manual_seed(0)
    found = run(criterion, model, inputs, structure)
    twin = network(name)
    torch.manual_seed(0)
    seen = watch(twin, inputs)
    tensors = {key: tensor.numpy() for key, tensor in tensors_of(twin).items()}
    modules = dict(twin.named_modules())
    assert set(found) == set(structure.widths)
    for group in structure.groups:
        expected = REFERENCES[criterion](criterion, Evidence(group, tensors, seen, modules, twin, inputs))
        np.testing.assert_allclose(found[group.name], expected, rtol=1e-7, err_msg=group.name)


@every_network
@every_criterion
def test_permuting_units_permutes_scores(criterion, name):
    model, inputs, structure = network(name), batches(name), structure_of(name)
    if name == "dropout":
        model.get_submodule("2").p = 0.0  # what is dropped would not move along
    orders = {group.name: np.random.default_rng(3).permutation(group.width) for group in structure.groups}
    permuted = copy.deepcopy(model)
    tensors = tensors_of(permuted)
    for group in structure.groups:
        for member in group.members:
            tensor = tensors[member.tensor].movedim(member.dim, 0)
            tensor[member.index] = tensor[member.index[orders[group.name]]].clone()
    before = run(criterion, model, inputs, structure)
    after = run(criterion, permuted, inputs, structure)
    follows = all(
        np.allclose(after[group], before[group][order], rtol=1e-9, atol=1e-12) for group, order in orders.items()
    )
    assert follows or "equivariant" in criterion.waived


@every_network
@clear_of_the_dead
def test_a_dead_unit_scores_lowest(criterion, name):
    structure = structure_of(name)
    for group in structure.groups:
        model, dead = network(name), group.width // 2
        for member in group.members:
            tensors_of(model)[member.tensor].movedim(member.dim, 0)[member.index[dead]] = 0
        score = run(criterion, model, batches(name), structure)[group.name]
        assert score[dead] == score.min()
        # Masking a unit of these may change none of eleven predictions.
        assert score.min() < score.max() or isinstance(criterion, Misclassification)


@few_networks
@mergeable
def test_half_runs_merged_by_their_reduction_are_one_run(criterion, name):
    model, inputs, structure = network(name), batches(name), structure_of(name)
    if name == "dropout":
        model.get_submodule("2").p = 0.0  # a later run draws other numbers
    whole, first, second = (criterion.statistic(structure) for _ in range(3))
    parts = ((whole, inputs), (first, inputs[:2]), (second, inputs[2:]))
    for statistic, part in parts:
        train(model, part, statistic)
    for statistic, part in parts:
        examine(model, part, statistic)
    merged = criterion.statistic(structure)
    merged.load_state_dict(
        {
            key: first._reductions[key](torch.stack([state, second.state_dict()[key]]))
            for key, state in first.state_dict().items()
        }
    )
    for key, state in whole.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], state, rtol=1e-12, atol=0, msg=key)
    tensors = tensors_of(model)
    one, two = (score_groups(criterion, structure.groups, tensors, s) for s in (whole, merged))
    for group in structure.widths:
        torch.testing.assert_close(two[group], one[group])
        np.testing.assert_equal(merged.split_half(group), whole.split_half(group))


@few_networks
@every_criterion
def test_leaves_the_training_alone(criterion, name):
    inputs, structure = batches(name), structure_of(name)
    plain, observed = network(name), network(name)
    torch.manual_seed(4)
    expected = train(plain, inputs)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    statistic = criterion.statistic(structure)
    outputs = train(observed, inputs, statistic)
    if statistic is not None:
        examine(observed, inputs, statistic)
    scores = score_groups(criterion, structure.groups, tensors_of(observed), statistic)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, outputs, expected))
    for (key, one), (_, two) in zip(plain.state_dict().items(), observed.state_dict().items(), strict=True):
        assert torch.equal(one, two), key
    for (key, one), (_, two) in zip(plain.named_parameters(), observed.named_parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), key
        assert not two._backward_hooks
        assert not two._post_accumulate_grad_hooks
    for module in observed.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            assert not hooks
    assert not any(score.requires_grad for score in scores.values())
