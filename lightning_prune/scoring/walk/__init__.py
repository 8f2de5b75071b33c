"""Samples that move through a network station by station, and the rest of the network from there."""

from lightning_prune.scoring.walk.station import Point, Station
from lightning_prune.scoring.walk.walk import (
    Here,
    Visit,
    Walk,
    WalkProgress,
    feature_tables,
    pooled_features,
    stations_of,
)

__all__ = [
    "Here",
    "Point",
    "Station",
    "Visit",
    "Walk",
    "WalkProgress",
    "feature_tables",
    "pooled_features",
    "stations_of",
]
