"""Structures of small networks, built by hand so that planning is tested without a model."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from lightning_prune.structure.cost import Axis, CostModel, LatencyTable, LayerTimes, Term
from lightning_prune.structure.graph import Frozen, Group, Member, Structure


def build_mlp(hidden: Sequence[int], inputs: int = 7, outputs: int = 3) -> Structure:
    """`Linear` layers net.0, net.2, ... with ReLUs between; the hidden widths are the groups, the output is frozen."""
    names = [f"net.{2 * i}" for i in range(len(hidden) + 1)]
    axes = [Axis(inputs), *(Axis(0, ((name, 1),)) for name in names[:-1]), Axis(outputs)]
    groups = []
    for i, width in enumerate(hidden):
        index = np.arange(width)[:, None]
        members = (
            Member(f"{names[i]}.weight", 0, "out", index),
            Member(f"{names[i]}.bias", 0, "along", index),
            Member(f"{names[i + 1]}.weight", 1, "in", index),
        )
        groups.append(Group(names[i], width, members))
    sizes = [inputs, *hidden, outputs]
    shapes = {f"{name}.weight": (sizes[i + 1], sizes[i]) for i, name in enumerate(names)}
    shapes |= {f"{name}.bias": (sizes[i + 1],) for i, name in enumerate(names)}
    weights = tuple(Term(1, (axes[i + 1], axes[i]), name) for i, name in enumerate(names))
    biases = tuple(Term(1, (axes[i + 1],), name) for i, name in enumerate(names))
    frozen = (Frozen(f"{names[-1]}.weight", 0, outputs, "it is an output of the model"),)
    memory = tuple(Term(4, term.axes, term.layer) for term in biases)
    times = tuple(
        LayerTimes(term.axes, ((1, n), (1, m)), ((1.0, float(m)), (float(n), float(n * m))))
        for term, n, m in zip(weights, sizes[1:], sizes[:-1], strict=True)
    )
    cost = CostModel(weights + biases, weights, shapes, memory, LatencyTable(3.0, 0.5, times))
    return Structure(tuple(groups), frozen, cost)


@pytest.fixture(scope="session")
def mlp() -> Callable[..., Structure]:
    return build_mlp


@pytest.fixture(scope="session")
def resnet_like() -> Structure:
    """Two residual stages: the blocks of a stage share one width, each has an inner one; names as in torchvision."""
    groups, terms, frozen = [], [], (Frozen("fc.weight", 0, 10, "it is an output of the model"),)
    shapes: dict[str, tuple[int, ...]] = {}
    for stage, width in enumerate((16, 32), start=1):
        outer = f"layer{stage}.0.conv2"
        index = np.arange(width)[:, None]
        members = []
        for block in range(2):
            inner, last = f"layer{stage}.{block}.conv1", f"layer{stage}.{block}.conv2"
            members += [Member(f"{last}.weight", 0, "out", index), Member(f"{inner}.weight", 1, "in", index)]
            follower = f"layer{stage}.{block}.bn1"
            own = (
                Member(f"{inner}.weight", 0, "out", index),
                Member(f"{follower}.weight", 0, "along", index),
                Member(f"{last}.weight", 1, "in", index),
            )
            groups.append(Group(inner, width, own))
            terms += [
                Term(9, (Axis(0, ((inner, 1),)), Axis(0, ((outer, 1),))), inner),
                Term(9, (Axis(0, ((outer, 1),)), Axis(0, ((inner, 1),))), last),
            ]
            shapes |= {f"{inner}.weight": (width, width, 3, 3), f"{last}.weight": (width, width, 3, 3)}
            shapes[f"{follower}.weight"] = (width,)
        groups.append(Group(outer, width, tuple(sorted(members, key=lambda m: m.role != "out"))))
    return Structure(tuple(groups), frozen, CostModel(tuple(terms), tuple(terms), shapes))
