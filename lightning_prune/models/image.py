"""Networks of torchvision and timm by name, as LightningModules."""

from __future__ import annotations

import os
from typing import Any, Literal, final
from urllib.error import URLError

from torch import Tensor, nn

from lightning_prune.extras import require
from lightning_prune.models.classifier import Classifier
from lightning_prune.models.pretrained import load_pretrained

__all__ = ["ImageClassifier"]

Pooling = Literal["avg", "max"]


@final
class ImageClassifier(Classifier):
    """A network of torchvision or timm with a classifier for the given number of classes, optionally pretrained.

    The network is the attribute ``net``. A classifier that depends on the image size (VGG, AlexNet) is replaced by
    global pooling and one linear layer, as in the paper on XGB pruning (Ratajczyk & Horzyk, 2024).

    Args:
        network: The library and the name for its ``get_model`` or ``create_model``: ``"torchvision.resnet50"``,
            ``"timm.tf_efficientnet_lite0"``.
        classes: Number of classes.
        size: Height and width of the images, for the summary and the analysis; most networks accept other sizes, too.
        pretrained: Source of the weights: a file, the name of a package that contains them
            (``"efficientnet-lite0"``), or ``"default"``, which lets the library download its own (for torchvision also
            the name of weights, such as ``"IMAGENET1K_V1"``). Not saved as a hyperparameter in checkpoints.
        pooling: The pooling before a replaced classifier.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: Learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.

    Raises:
        ValueError: If the name does not start with one of the two libraries, or the library does not know it.
        FileNotFoundError: If the weights are neither a file nor a known name, or cannot be downloaded.
    """

    def __init__(
        self,
        network: str,
        classes: int,
        size: int = 224,
        pretrained: str | None = None,
        pooling: Pooling = "avg",
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        lr: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__((3, size, size), classes, optimizer, lr, momentum, weight_decay)
        self.save_hyperparameters(ignore="pretrained")
        library, _, name = network.partition(".")
        if library not in ("timm", "torchvision") or not name:
            raise ValueError(
                'ImageClassifier: expected `network` such as "torchvision.resnet50" or "timm.tf_efficientnet_lite0", '
                f"got {network!r}. Name the library first."
            )
        build = _of_timm if library == "timm" else _of_torchvision
        self.net, weights = build(name, classes, pooling, pretrained)
        if weights is not None:
            load_pretrained(self.net, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of ``images`` ``(batch, 3, height, width)``."""
        logits: Tensor = self.net(images)
        return logits


def _of_timm(name: str, classes: int, _: Pooling, pretrained: str | None) -> tuple[nn.Module, Any]:
    """The network, and the weights that are still to be loaded."""
    timm = require("timm", extra="timm")
    _require_known(name, timm.is_model(name.partition(".")[0]), "timm.list_models()")
    is_default = pretrained == "default" and not os.path.exists(pretrained)
    try:
        return timm.create_model(name, pretrained=is_default, num_classes=classes), None if is_default else pretrained
    except (OSError, RuntimeError) as error:
        if not is_default:
            raise
        raise _no_download(name) from error


def _of_torchvision(name: str, classes: int, pooling: Pooling, pretrained: str | None) -> tuple[nn.Module, Any]:
    models = require("torchvision.models", extra="vision")
    _require_known(name, name in models.list_models(module=models), "torchvision.models.list_models()")
    net = models.get_model(name, weights=None, num_classes=classes)
    if isinstance(net, (models.VGG, models.AlexNet)):
        _pool(net, classes, pooling)
    known = {"DEFAULT", *models.get_model_weights(name).__members__}
    if pretrained is None or os.path.exists(pretrained) or pretrained.upper() not in known:
        return net, pretrained
    weights = models.get_model_weights(name)[pretrained.upper()]
    try:
        return net, weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise _no_download(name, weights.url) from error


def _pool(net: Any, classes: int, pooling: Pooling) -> None:
    """Replace the classifier of a VGG or an AlexNet by global pooling and one linear layer."""
    width = [layer for layer in net.features if isinstance(layer, nn.Conv2d)][-1].out_channels
    net.avgpool = nn.AdaptiveAvgPool2d(1) if pooling == "avg" else nn.AdaptiveMaxPool2d(1)
    net.classifier = nn.Sequential(nn.Linear(width, classes))
    nn.init.normal_(net.classifier[0].weight, 0, 0.01)
    nn.init.zeros_(net.classifier[0].bias)


def _require_known(name: str, is_known: bool, where: str) -> None:
    if not is_known:
        raise ValueError(f"ImageClassifier: expected a network that `{where}` lists, got {name!r}.")


def _no_download(name: str, file: str = "their file") -> FileNotFoundError:
    return FileNotFoundError(
        f"ImageClassifier: the weights of {name} cannot be downloaded. Get {file} on another machine, and give the "
        "path of the copy as `pretrained` (`--model.pretrained FILE`); `null` starts without."
    )
