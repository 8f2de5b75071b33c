"""SPvR in plain loops, written from the paper alone: no hooks, no batching, nothing shared with the package."""

import copy
import math

import numpy as np
import torch


def correlations(features):
    """Eq. 3, entry by entry; constant columns correlate with nothing; ties to nine decimals."""
    n, m = features.shape
    centred = np.empty((n, m))
    for q in range(m):
        mean = math.fsum(features[:, q]) / n
        centred[:, q] = features[:, q] - mean
    found = np.zeros((m, m))
    for i in range(m):
        for j in range(m):
            a, b = math.fsum(centred[:, i] ** 2), math.fsum(centred[:, j] ** 2)
            if a > 1e-24 and b > 1e-24:
                found[i, j] = math.fsum(centred[:, i] * centred[:, j]) / math.sqrt(a) / math.sqrt(b)
    return found.round(9)


def groups_of(correlations, d):
    """Algorithm 1: the next unit and the d - 1 that are left which correlate most with it, the lower index first."""
    left, groups = list(range(len(correlations))), []
    while left:
        unit = left.pop(0)
        group = [unit]
        while left and len(group) < d:
            best = left[0]
            for other in left:
                if correlations[unit][other] > correlations[unit][best]:
                    best = other
            group.append(best)
            left.remove(best)
        groups.append(tuple(sorted(group)))
    return groups


def pooled(activation, width):
    """Eq. 4 for maps; numbers as they are."""
    found = np.empty((len(activation), width))
    for p, sample in enumerate(activation.numpy().reshape(len(activation), width, -1)):
        for q, values in enumerate(sample):
            found[p, q] = values[0] if len(values) == 1 else math.fsum(abs(values))
    return found


def without(model, consumers, width, units):
    """A copy in which no layer reads these units: the weights that would are 0."""
    twin = copy.deepcopy(model).eval()
    for name in consumers:
        weight = twin.get_submodule(name).weight
        inputs = 0 if getattr(twin.get_submodule(name), "transposed", False) else 1
        each = weight.shape[inputs] // width
        with torch.no_grad():
            for unit in units:
                weight.movedim(inputs, 0)[unit * each : (unit + 1) * each] = 0
    return twin


@torch.no_grad()
def probabilities(model, inputs, kind="multiclass"):
    """Decision by decision: a list of class probabilities for each of them."""
    rows = []
    for x in inputs:
        out = model(x)
        out = out["out"] if isinstance(out, dict) else out
        for sample in out.numpy():
            if kind == "multiclass":
                for scores in sample.reshape(len(sample), -1).T:
                    shifted = np.exp(scores - max(scores))
                    rows.append(shifted / math.fsum(shifted))
            else:
                for logit in sample.reshape(-1):
                    p = 1 / (1 + math.exp(-logit))
                    rows.append(np.array([1 - p, p]))
    return rows


def first_largest(values):
    best = 0
    for c, value in enumerate(values):
        if value > values[best]:
            best = c
    return best


def importance(whole, masked, measure="prediction_change"):
    """Eq. 2, the divergence or the count, summed over decisions."""
    total = []
    for p, q in zip(whole, masked, strict=True):
        c = first_largest(p)
        wrong = 1 if first_largest(q) != c else 0
        if measure == "misclassification":
            total.append(wrong)
        elif measure == "kl_divergence":
            total += [a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)]
        else:
            total.append(wrong + abs(p[c] - q[c]))
    return math.fsum(total)


def ranking(model, inputs, consumers, width, groups, measure="prediction_change", kind="multiclass"):
    """Importance of every group: one network without it after the other."""
    whole = probabilities(copy.deepcopy(model).eval(), inputs, kind)
    return [
        importance(whole, probabilities(without(model, consumers, width, group), inputs, kind), measure)
        for group in groups
    ]
