"""The very small network on which Batra et al. (2024) compare four pruning methods."""

from __future__ import annotations

from typing import Literal, final

from torch import Tensor, nn

from lightning_prune.models.classifier import Classifier
from lightning_prune.models.pretrained import load_pretrained

__all__ = ["FourConvClassifier"]


@final
class FourConvClassifier(Classifier):
    """Four convolutions of three filters each, then two dense layers.

    The network of Batra et al., "Exploring Large Convolutional Network Pruning" (2024), section 1.4. The paper states
    neither the dense layers nor the data. Assumed here: 3×3 kernels with ReLU, 2×2 max pooling after the second and
    the fourth convolution, dense layers 192-15-classes. Then the convolutions have a tenth of all weights, as in the
    paper's figure 4 (60 to 70 % of their weights are 6 to 7 % of all).

    Args:
        input_shape: Channels, height and width of one image; height and width divisible by 4.
        classes: Number of classes.
        filters: Filters of each convolution.
        hidden: Width of the hidden dense layer.
        batch_norm: Batch normalisation after each convolution; the paper's network has none.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: Learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        pretrained: File with initial weights, see `load_pretrained`; not saved as a hyperparameter in checkpoints.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        filters: int = 3,
        hidden: int = 15,
        batch_norm: bool = False,
        optimizer: Literal["sgd", "adam", "adamw"] = "adam",
        lr: float = 0.003,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        pretrained: str | None = None,
    ) -> None:
        depth, height, width = input_shape
        if height % 4 or width % 4:
            raise ValueError(
                f"FourConvClassifier: expected a height and width divisible by 4 (two 2×2 poolings), got "
                f"{height}×{width}. Pad or resize the images."
            )
        super().__init__(input_shape, classes, optimizer, lr, momentum, weight_decay)
        self.save_hyperparameters(ignore="pretrained")
        layers: list[nn.Module] = []
        for i in range(4):
            layers.append(nn.Conv2d(filters if i else depth, filters, 3, padding=1))
            layers += [nn.BatchNorm2d(filters)] if batch_norm else []
            layers += [nn.ReLU(), *([nn.MaxPool2d(2)] if i % 2 else [])]
        self.features = nn.Sequential(*layers)
        inputs = filters * height * width // 16
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        if pretrained is not None:
            load_pretrained(self, pretrained)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of ``images`` ``(batch, channels, height, width)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
