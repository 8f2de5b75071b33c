"""The criteria, one paper per file."""

from lightning_prune.scoring.criteria.contribution import Contribution
from lightning_prune.scoring.criteria.l1 import L1
from lightning_prune.scoring.criteria.l2 import L2
from lightning_prune.scoring.criteria.random import Random

__all__ = ["L1", "L2", "Contribution", "Random"]
