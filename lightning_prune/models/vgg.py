"""VGG16 with batch normalisation for 32×32 images."""

from __future__ import annotations

from typing import Literal, final

from torch import Tensor, nn

from lightning_prune.models.classifier import Classifier
from lightning_prune.models.pretrained import load_pretrained

__all__ = ["VGG16CIFAR"]

# Channels of the 3×3 convolutions; each row ends in 2×2 max pooling.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


@final
class VGG16CIFAR(Classifier):
    """VGG16 (Simonyan & Zisserman, 2015, configuration D), adapted to 32×32 images.

    Batch normalisation follows each of the thirteen convolutions, and one linear layer uses the averages of 512
    channels. Five poolings reduce a 32×32 image to one pixel, but other sizes work, too. 14.7 M parameters with ten
    classes, 6.3e8 FLOPs.

    Args:
        classes: Number of classes.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: Learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        pretrained: File with initial weights, see `load_pretrained`; not saved as a hyperparameter in checkpoints.
    """

    def __init__(
        self,
        classes: int = 10,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        pretrained: str | None = None,
    ) -> None:
        super().__init__((3, 32, 32), classes, optimizer, lr, momentum, weight_decay)
        self.save_hyperparameters(ignore="pretrained")
        layers: list[nn.Module] = []
        inputs = 3
        for stage in _STAGES:
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(inputs, classes)
        if pretrained is not None:
            load_pretrained(self, pretrained)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of ``images`` ``(batch, 3, 32, 32)``."""
        logits: Tensor = self.linear(self.features(images))
        return logits
