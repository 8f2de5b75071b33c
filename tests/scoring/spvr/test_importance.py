"""The paper's example, and how outputs of every kind are read."""

import math

import numpy as np
import pytest
import torch

from lightning_prune.scoring.spvr import (
    MEASURES,
    ClassScores,
    class_scores,
    kl_divergence,
    misclassification,
    prediction_change,
    score_tensor,
)
from tests.scoring.spvr import reference

WHOLE = torch.tensor([[0.1, 0.3, 0.6]], dtype=torch.float64)
MASKED = torch.tensor([[[0.1, 0.6, 0.3]], [[0.01, 0.1, 0.89]], [[0.1, 0.8, 0.1]]], dtype=torch.float64)


def read(outputs, labels=None, **how):
    return class_scores(outputs, labels, **how).log_probabilities(outputs)


def test_the_example_of_the_paper():
    """Section 3.1.1, all variants at once and one by one."""
    scores = class_scores(WHOLE)
    assert scores.normalized
    p = scores.log_probabilities(WHOLE)
    several = torch.stack([scores.log_probabilities(q) for q in MASKED])
    torch.testing.assert_close(prediction_change(p, several)[:, 0].tolist(), [1.3, 0.29, 1.5])
    torch.testing.assert_close(kl_divergence(p, several)[:, 0].tolist(), [0.208, 0.323, 0.781], atol=5e-4, rtol=0)
    assert misclassification(p, several)[:, 0].tolist() == [1, 0, 1]
    for q, one in zip(several, prediction_change(p, several), strict=True):
        assert torch.equal(prediction_change(p, q), one)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (2, 4, 3, 5)])
def test_measures_equal_plain_loops(shape, measure):
    torch.manual_seed(0)
    whole, masked = torch.randn(2, *shape, dtype=torch.float64)
    scores = class_scores(whole)
    found = MEASURES[measure](scores.log_probabilities(whole), scores.log_probabilities(masked))
    assert found.shape == shape[:1]
    for sample in range(shape[0]):
        p, q = (reference.probabilities(lambda x: x, [x[sample : sample + 1]]) for x in (whole, masked))
        np.testing.assert_allclose(found[sample], reference.importance(p, q, measure), rtol=1e-12)


def test_equal_probabilities_go_to_the_lower_class():
    p = read(torch.tensor([[0.4, 0.4, 0.2]]))
    assert misclassification(p, read(torch.tensor([[0.4, 0.4, 0.2]]))).tolist() == [0]
    assert misclassification(p, read(torch.tensor([[0.3, 0.4, 0.3]]))).tolist() == [1]


def test_a_certain_network_has_a_finite_divergence():
    p, q = read(torch.tensor([[1.0, 0.0]])), read(torch.tensor([[0.0, 1.0]]))
    assert kl_divergence(p, p).tolist() == [0]
    assert 50 < kl_divergence(p, q).item() < math.inf


# -- what outputs are ------------------------------------------------------------------------------------------------


def test_logits_go_through_softmax_and_probabilities_do_not():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.1, 0.2]])
    assert not class_scores(logits).normalized
    assert class_scores(logits.softmax(1)).normalized
    torch.testing.assert_close(read(logits), read(logits.softmax(1)))
    torch.testing.assert_close(read(logits), read(logits.log_softmax(1)))
    assert class_scores(logits.softmax(1).bfloat16()).normalized
    assert not class_scores(logits.softmax(1), normalized=False).normalized


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_output_is_a_yes_or_no(shape):
    logits = torch.linspace(-3, 3, 6).reshape(shape)
    scores = class_scores(logits, torch.tensor([0, 1, 0, 1, 0, 1]))
    assert (scores.task, scores.normalized) == ("binary", False)
    p = scores.log_probabilities(logits).exp()
    assert p.shape == (6, 2, 1)
    torch.testing.assert_close(p[:, 1, 0], logits.reshape(6).sigmoid())
    torch.testing.assert_close(p.sum(1), torch.ones(6, 1))
    torch.testing.assert_close(read(logits.sigmoid()), read(logits))
    assert read(torch.tensor([0.0, 1.0])).isfinite().all()


def test_several_labels_are_several_decisions():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]])
    scores = class_scores(logits, labels.float())
    assert scores.task == "multilabel"
    p = scores.log_probabilities(logits)
    assert p.shape == (5, 2, 3)
    q = scores.log_probabilities(-logits)
    assert misclassification(p, q).tolist() == [3] * 5
    apart = sum(prediction_change(read(x), read(-x)) for x in logits.T)
    torch.testing.assert_close(prediction_change(p, q), apart)
    assert class_scores(logits, task="multilabel").task == "multilabel"


def test_pixels_are_decisions():
    torch.manual_seed(0)
    maps, labels = torch.randn(2, 4, 3, 5), torch.zeros(2, 3, 5, dtype=torch.long)
    p = read(maps, labels)
    assert p.shape == (2, 4, 15)
    torch.testing.assert_close(p[1, :, 7], maps[1, :, 1, 2].log_softmax(0))


def test_the_scores_are_found_in_what_forward_returns():
    x = torch.zeros(2, 3)
    assert score_tensor(x) is x
    assert score_tensor((x, 5, torch.zeros(2, dtype=torch.long))) is x
    assert score_tensor({"out": x, "aux": torch.ones(2, 3)}) is x
    assert score_tensor({"loss": torch.zeros(()), "logits": x}) is x
    with pytest.raises(TypeError, match=r"got 2 floating-point tensors .* Return the scores alone"):
        score_tensor((x, x + 1))
    with pytest.raises(TypeError, match="got 0 floating-point tensors"):
        score_tensor(torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("outputs", "labels", "how", "message"),
    [
        (torch.zeros(()), None, {}, "Does `forward` return a loss"),
        (torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.long), {}, "got labels of shape"),
        (torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long), {}, "one label for each of the"),
        (torch.zeros(4, 1), torch.tensor([0.5, 1.0, 2.0, 3.0]), {}, "not defined for regression"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), {}, "below the 3 classes of the outputs, got 3"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 255]), {}, "below the 3 classes of the outputs, got 255"),
        (torch.zeros(1, 3, 2), torch.tensor([[3, 255]]), {}, "below the 3 classes of the outputs, got 3"),
        (torch.tensor([[0.0, torch.nan]]), None, {}, "expected scores that are numbers, got NaN or infinity"),
        (torch.tensor([[0.0, torch.inf]]), None, {}, "expected scores that are numbers, got NaN or infinity"),
        (torch.zeros(4, 1), None, {"task": "multiclass"}, "two classes or more"),
        (torch.zeros(4, 3), None, {"task": "regression"}, "expected `task` to be one of"),
    ],
)
def test_what_is_no_class_score_is_refused(outputs, labels, how, message):
    with pytest.raises(ValueError, match=message):
        class_scores(outputs, labels, **how)


def test_pixels_of_no_class_are_no_error():
    reading = class_scores(torch.zeros(2, 3, 2), torch.tensor([[255, 2], [255, 255]]))
    assert reading == ClassScores("multiclass", False)
