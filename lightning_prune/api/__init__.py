"""Functions that need no Trainer, and no Lightning."""

from lightning_prune.api.by_shapes import load_by_shapes
from lightning_prune.api.device_latency import latency_script
from lightning_prune.api.exporting import export
from lightning_prune.api.hub import PrunedModel
from lightning_prune.api.hugging_face import SavedModel, from_pretrained, save_pretrained
from lightning_prune.api.inspecting import inspect
from lightning_prune.api.portable import load, save
from lightning_prune.api.pruning import prune
from lightning_prune.api.quantising import quantise
from lightning_prune.api.rebuilding import rebuild
from lightning_prune.api.scan import sensitivity
from lightning_prune.api.stripping import strip

__all__ = [
    "PrunedModel",
    "SavedModel",
    "export",
    "from_pretrained",
    "inspect",
    "latency_script",
    "load",
    "load_by_shapes",
    "prune",
    "quantise",
    "rebuild",
    "save",
    "save_pretrained",
    "sensitivity",
    "strip",
]
