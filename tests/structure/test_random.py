"""Random networks: whatever is drawn, the cut network is the masked one, costs what was said, and trains.

``LIGHTNING_PRUNE_EXAMPLES=10000 pytest tests/structure/test_random.py`` draws more of them.
"""

import os

import numpy as np
import torch
from hypothesis import example, given, settings

from lightning_prune.structure import TracedModel, trace
from tests.support.random_networks import KINDS, SIZE, RandomNet, check, networks

EXAMPLES = int(os.environ.get("LIGHTNING_PRUNE_EXAMPLES", "100"))


# Cut to one unit of each, the second convolution's input has lost what couples it: the rehearsal called that a number.
@example(([("grouped", 1, 1), ("shuffle", 0, 0), ("grouped", 1, 2)], "pool", 0))
# Cut to one channel in a group, of which a slice freezes another: the rehearsal took the groups for depthwise ones.
@example(([("transposed", 1, 1), ("from_end", 0, 0), ("kernel", 1, 0)], "pool", 1))
# Widths that code takes for one another were equal by chance in the trial, or could not lose different numbers.
@example(([("in_place", 0, 0), ("tied_heads", 0, 0)], "pool", 0))
@example(([("slice", 0, 1), ("tied_heads", 0, 0)], "pool", 0))
@example(([("tied_heads", 1, 0)], "pool", 0))
@example(([("swap", 0, 0), ("tied_heads", 1, 0)], "pool", 1))
@example(([("sized", 0, 2), ("tied_heads", 1, 0)], "pool", 0))
# A number in a module was set for two groups.
@example(([("parts", 1, 0)], "pool", 0))
@example(([("branch", 0, 1), ("sized", 0, 2)], "pool", 0))
@settings(max_examples=EXAMPLES)
@given(networks)
def test_random_networks(drawn):
    check(drawn)


def test_a_split_of_a_single_unit_is_left_alone():
    model = RandomNet([("shuffle", 6, 6), ("shuffle", 2, 4), ("shuffle", 1, 3)], "pool").eval()
    assert trace(TracedModel.of(model, torch.randn(2, 3, SIZE, SIZE))).widths == {}


def test_every_kind_of_step_leaves_something_to_cut():
    """The property would be empty if everything froze."""
    for kind in KINDS:
        model = RandomNet([("conv", 6, 0), (kind, 3, 3), ("conv", 5, 0)], "pool").eval()
        structure = trace(TracedModel.of(model, torch.randn(2, 3, SIZE, SIZE)))
        assert sum(structure.widths.values()) >= 7, kind
    assert np.unique(KINDS).size == len(KINDS)
