"""Residual networks for CIFAR, the usual benchmark of filter pruning."""

from __future__ import annotations

from typing import Literal, final

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.models.classifier import Classifier
from lightning_prune.models.pretrained import load_pretrained

__all__ = ["ResNetCIFAR"]


@final
class ResNetCIFAR(Classifier):
    """ResNet-20, -32, -44, -56 or -110 for 32×32 images (He et al., 2016, section 4.2).

    Three stages with 16, 32 and 64 channels and ``(depth − 2) / 6`` blocks of two 3×3 convolutions each. Between
    stages, the shortcut is either free of parameters (option A: every second pixel, padded with zero channels), which
    fixes the widths of the later streams, or a 1×1 convolution with normalisation (option B), and all widths are
    prunable.

    Args:
        depth: Number of layers with weights, 6n + 2.
        classes: Number of classes.
        size: Height and width of the images, for the summary and the analysis; other sizes are accepted, too.
        shortcut: ``"pad"`` (option A) or ``"projection"`` (option B).
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: Learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        pretrained: File with initial weights, see `load_pretrained`; not saved as a hyperparameter in checkpoints.
    """

    def __init__(
        self,
        depth: int = 20,
        classes: int = 10,
        size: int = 32,
        shortcut: Literal["pad", "projection"] = "pad",
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        pretrained: str | None = None,
    ) -> None:
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"ResNetCIFAR: expected `depth` of 6n + 2, got {depth}. Use 20, 32, 44, 56 or 110.")
        if shortcut not in ("pad", "projection"):
            raise ValueError(f'ResNetCIFAR: expected `shortcut` of "pad" or "projection", got {shortcut!r}.')
        super().__init__((3, size, size), classes, optimizer, lr, momentum, weight_decay)
        self.save_hyperparameters(ignore="pretrained")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, shortcut)
        self.layer2 = _stage(blocks, 16, 32, shortcut)
        self.layer3 = _stage(blocks, 32, 64, shortcut)
        self.linear = nn.Linear(64, classes)
        if pretrained is not None:
            load_pretrained(self, pretrained)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of ``images`` ``(batch, 3, 32, 32)``."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if projection and self.more
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            return F.relu(out + self.shortcut(x))
        shortcut = x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]
        if self.more:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(out + shortcut)


def _stage(blocks: int, inputs: int, outputs: int, shortcut: str) -> nn.Sequential:
    projection = shortcut == "projection"
    later = (_Block(outputs, outputs, 1, projection) for _ in range(blocks - 1))
    return nn.Sequential(_Block(inputs, outputs, outputs // inputs, projection), *later)
