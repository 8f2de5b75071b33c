"""Walks: samples are moved through a network station by station, and the rest of it can be run from there."""

from lightning_prune.scoring.walk.consumers import Consumer
from lightning_prune.scoring.walk.station import Point, Station
from lightning_prune.scoring.walk.walk import (
    StationBatch,
    Visit,
    Walk,
    WalkProgress,
    feature_tables,
    pooled_features,
    stations_of,
)

__all__ = [
    "Consumer",
    "Point",
    "Station",
    "StationBatch",
    "Visit",
    "Walk",
    "WalkProgress",
    "feature_tables",
    "pooled_features",
    "stations_of",
]
