"""The contribution paper's feed-forward network for MNIST."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, final

from torch import Tensor, nn

from lightning_prune.models.classifier import Classifier
from lightning_prune.models.pretrained import load_pretrained

__all__ = ["MLPClassifier"]


@final
class MLPClassifier(Classifier):
    """Linear layers with ReLU between them; images are flattened.

    The default is the four-layer network of the contribution paper's appendix A.1, 784-50-30-10.

    Args:
        sizes: Widths from the input to the number of classes, at least two.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: Learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        pretrained: File with initial weights, see `load_pretrained`; not saved as a hyperparameter in checkpoints.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (784, 50, 30, 10),
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        pretrained: str | None = None,
    ) -> None:
        if len(sizes) < 2:
            raise ValueError(
                f"MLPClassifier: expected `sizes` from the input to the classes, at least two, got {list(sizes)}. "
                "For example, use [784, 50, 30, 10]."
            )
        super().__init__((sizes[0],), sizes[-1], optimizer, lr, momentum, weight_decay)
        self.save_hyperparameters(ignore="pretrained")
        layers: list[nn.Module] = [nn.Flatten()]
        for width, next_width in pairwise(sizes):
            layers += [nn.Linear(width, next_width), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        if pretrained is not None:
            load_pretrained(self, pretrained)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of ``images`` ``(batch, ...)`` with ``sizes[0]`` values each."""
        logits: Tensor = self.layers(images)
        return logits
