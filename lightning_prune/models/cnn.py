"""The contribution paper's small convolutional network for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

from torch import Tensor, nn

from lightning_prune.models.classifier import Classifier
from lightning_prune.models.pretrained import load_pretrained

__all__ = ["CNNClassifier"]


@final
class CNNClassifier(Classifier):
    """Two convolution blocks, then three dense layers (contribution paper, appendix A.1).

    Each block is a 3×3 convolution, ReLU and 2×2 max pooling; with 16 and 32 channels, a 32×32 image gives
    32·8·8 = 2048 values, the paper's "fully-connected input". The dense layers are 2048-256-128-classes; the paper
    states only the 2048 and the classes.

    Args:
        input_shape: Channels, height and width of one image; height and width divisible by 4.
        classes: Number of classes.
        channels: Channels of the two blocks.
        hidden: Widths of the two hidden dense layers.
        batch_norm: Batch normalisation after each convolution.
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
        channels: tuple[int, int] = (16, 32),
        hidden: tuple[int, int] = (256, 128),
        batch_norm: bool = True,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        pretrained: str | None = None,
    ) -> None:
        depth, height, width = input_shape
        if height % 4 or width % 4:
            raise ValueError(
                f"CNNClassifier: expected a height and width divisible by 4 (two 2×2 poolings), got "
                f"{height}×{width}. Pad or resize the images."
            )
        super().__init__(input_shape, classes, optimizer, lr, momentum, weight_decay)
        self.save_hyperparameters(ignore="pretrained")
        first, second = channels
        self.features = nn.Sequential(*_block(depth, first, batch_norm), *_block(first, second, batch_norm))
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(second * height * width // 16, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], classes),
        )
        if pretrained is not None:
            load_pretrained(self, pretrained)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of ``images`` ``(batch, channels, height, width)``."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _block(inputs: int, outputs: int, batch_norm: bool) -> Sequence[nn.Module]:
    norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
    return [nn.Conv2d(inputs, outputs, 3, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2)]
