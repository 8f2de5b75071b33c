"""A network before and after a cut."""

from __future__ import annotations

from copy import deepcopy

import torch

from lightning_prune import prune
from lightning_prune.models import CNNClassifier


def cut_network() -> tuple[CNNClassifier, CNNClassifier]:
    """A small CNN with random weights, and the same one at half of its MACs."""
    torch.manual_seed(1)
    dense = CNNClassifier((1, 8, 8), channels=(4, 6), hidden=(8, 8))
    narrow = deepcopy(dense)
    prune(narrow, budget={"macs": 0.5})
    return dense, narrow
