"""MobileNetV2 for 32×32 images."""

from __future__ import annotations

from typing import Literal, final

from torch import Tensor, nn

from lightning_prune.models.classifier import Classifier
from lightning_prune.models.pretrained import load_pretrained

__all__ = ["MobileNetV2CIFAR"]

# Expansion, channels, blocks and stride of each stage.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 1),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@final
class MobileNetV2CIFAR(Classifier):
    """MobileNetV2 (Sandler et al., 2018, table 2), adapted to 32×32 images (Chen, 2018).

    The stem and stages 1, 2, 3, 5 and 7 have stride 1, stages 4 and 6 stride 2. Shortcuts are identities, so only
    blocks that change neither size nor channels have one. Every block has an expansion convolution, even the first,
    which does not expand. 2.24 M parameters with ten classes, 5.95e8 FLOPs (2.98e8 MACs) per image.

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
        self.stem = nn.Sequential(*_conv(3, 32, 3), nn.ReLU())
        blocks, inputs = [], 32
        for expansion, outputs, repeats, first_stride in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(inputs, outputs, expansion, first_stride if i == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.top = nn.Sequential(*_conv(inputs, 1280, 1), nn.ReLU())
        self.linear = nn.Linear(1280, classes)
        if pretrained is not None:
            load_pretrained(self, pretrained)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of ``images`` ``(batch, 3, 32, 32)``."""
        logits: Tensor = self.linear(self.top(self.blocks(self.stem(images))).mean((2, 3)))
        return logits


class _Block(nn.Module):
    """Expansion, depthwise convolution, projection; added to the input if both have the same shape."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * inputs
        self.body = nn.Sequential(
            *(*_conv(inputs, inner, 1), nn.ReLU()),
            *(*_conv(inner, inner, 3, stride, groups=inner), nn.ReLU()),
            *_conv(inner, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out + x if self.residual else out


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs)
