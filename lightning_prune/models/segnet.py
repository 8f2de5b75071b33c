"""SegNet: an encoder and a mirrored decoder, which unpools with the encoder's indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, final

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_prune.models.classifier import refuse_more_classes

__all__ = ["SegNet"]

#: Label of pixels without a class.
_IGNORED = 255


@final
class SegNet(LightningModule):
    """SegNet (Badrinarayanan et al., 2017), by default with the 13 convolutions of VGG16 and a mirrored decoder.

    Every stage ends with 2×2 max pooling, and the decoder unpools to the positions of the maxima, so both sides of a
    stage share their channels. Each convolution is followed by batch normalisation and ReLU, except the last one. 29.4
    M parameters with the default stages. Trains with cross entropy over pixels, and logs ``{train,val,test}_loss``,
    ``_acc`` (of pixels) and ``_iou`` (intersection over union, averaged over classes) once per epoch.

    Args:
        classes: Number of classes; pixels labelled 255 are ignored.
        stages: Channels and number of convolutions of each stage of the encoder.
        input_shape: Channels, height and width of an image; height and width divisible by two to the power of the
            number of stages.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: Learning rate.
        momentum: Momentum of SGD; the other optimizers use their defaults.
        weight_decay: Weight decay, as defined by the optimizer.

    Raises:
        ValueError: If height or width cannot be halved once per stage.
    """

    def __init__(
        self,
        classes: int = 19,
        stages: Sequence[tuple[int, int]] = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)),
        input_shape: tuple[int, int, int] = (3, 256, 512),
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        inputs, height, width = input_shape
        if height % 2 ** len(stages) or width % 2 ** len(stages):
            raise ValueError(
                f"SegNet: expected a height and width divisible by {2 ** len(stages)} ({len(stages)} poolings), got "
                f"{height}×{width}. Resize the images, or give fewer `stages`."
            )
        self.optimizer_name, self.lr, self.momentum, self.weight_decay = optimizer, lr, momentum, weight_decay
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for channels, count in stages:
            self.encoder.append(_stage(inputs, [channels] * count))
            # The last convolution of the decoder computes the classes, without normalisation and ReLU.
            outputs = [inputs] if len(self.encoder) > 1 else []
            self.decoder.insert(0, _stage(channels, [channels] * (count - 1) + outputs))
            inputs = channels
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.head = nn.Conv2d(stages[0][0], classes, 3, padding=1)
        self.example_input_array = torch.zeros(2, *input_shape)
        self.metrics = nn.ModuleDict({f"{stage}_metrics": _metrics(classes) for stage in ("train", "val", "test")})

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes, height, width)`` of ``images`` ``(batch, channels, height, width)``."""
        x, indices = images, []
        for stage in self.encoder:
            x, index = self.pool(stage(x))
            indices.append(index)
        for stage in self.decoder:
            x = stage(self.unpool(x, indices.pop()))
        logits: Tensor = self.head(x)
        return logits

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Refuse data with more classes than the network has.

        Raises:
            ValueError: If the data module's ``num_classes``, if known, is larger.
        """
        refuse_more_classes(self, self.head.out_channels)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """The cross entropy of one batch."""
        return self._loss("train", batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Logs ``val_loss``, ``val_acc`` and ``val_iou``."""
        self._loss("val", batch)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Logs ``test_loss``, ``test_acc`` and ``test_iou``."""
        self._loss("test", batch)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """The most likely class of each pixel, shape ``(batch, height, width)``."""
        prediction: Tensor = self(batch[0]).argmax(dim=1)
        return prediction

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer named at construction, over all parameters."""
        common: dict[str, Any] = {"params": self.parameters(), "lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(momentum=self.momentum, **common)
        return torch.optim.Adam(**common) if self.optimizer_name == "adam" else torch.optim.AdamW(**common)

    def _loss(self, stage: str, batch: Sequence[Tensor]) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, ignore_index=_IGNORED)
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        for name, metric in cast(dict[str, Metric], self.metrics[f"{stage}_metrics"]).items():
            metric(logits, labels)
            self.log(
                f"{stage}_{name}", metric, on_step=False, on_epoch=True, prog_bar=name == "iou", batch_size=len(labels)
            )
        return loss


def _metrics(classes: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "acc": MulticlassAccuracy(classes, average="micro", ignore_index=_IGNORED),
            "iou": MulticlassJaccardIndex(classes, ignore_index=_IGNORED),
        }
    )


def _stage(inputs: int, outputs: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in outputs:
        layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        inputs = channels
    return nn.Sequential(*layers)
