"""Criteria, one file each."""

from lightning_prune.scoring.criteria.apoz import APoZ
from lightning_prune.scoring.criteria.bn_scale import BNScale
from lightning_prune.scoring.criteria.chip import CHIP
from lightning_prune.scoring.criteria.contribution import Contribution
from lightning_prune.scoring.criteria.fisher import Fisher
from lightning_prune.scoring.criteria.fpgm import FPGM
from lightning_prune.scoring.criteria.grasp import GraSP
from lightning_prune.scoring.criteria.hrank import HRank
from lightning_prune.scoring.criteria.kl_divergence import KLDivergence
from lightning_prune.scoring.criteria.l1 import L1
from lightning_prune.scoring.criteria.l2 import L2
from lightning_prune.scoring.criteria.lamp import LAMP
from lightning_prune.scoring.criteria.lrp import LRP
from lightning_prune.scoring.criteria.misclassification import Misclassification
from lightning_prune.scoring.criteria.nisp import NISP
from lightning_prune.scoring.criteria.random import Random
from lightning_prune.scoring.criteria.reconstruction import Reconstruction
from lightning_prune.scoring.criteria.snip import SNIP
from lightning_prune.scoring.criteria.spvr import SPvR
from lightning_prune.scoring.criteria.synflow import SynFlow
from lightning_prune.scoring.criteria.taylor import Taylor

__all__ = [
    "CHIP",
    "FPGM",
    "L1",
    "L2",
    "LAMP",
    "LRP",
    "NISP",
    "SNIP",
    "APoZ",
    "BNScale",
    "Contribution",
    "Fisher",
    "GraSP",
    "HRank",
    "KLDivergence",
    "Misclassification",
    "Random",
    "Reconstruction",
    "SPvR",
    "SynFlow",
    "Taylor",
]
