"""Base class of the classifiers: cross entropy, accuracies, an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["Classifier", "refuse_more_classes"]

Stage = Literal["train", "val", "test"]

# With no more classes than this, top-5 accuracy is not informative.
_FEW_CLASSES = 10


class Classifier(LightningModule):
    """Trains with cross entropy and logs ``{train,val,test}_loss`` and ``_acc`` once per epoch.

    With more than ten classes, ``val_acc_top5`` and ``test_acc_top5`` are logged as well.

    Subclasses build their layers and implement ``forward``, which returns logits of shape ``(batch, classes)``.

    Args:
        input_shape: Shape of one sample, without the batch dimension.
        classes: Number of classes.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``. A name, not an object, so that a checkpoint's hyperparameters
            are plain values.
        lr: Learning rate.
        momentum: Momentum of SGD; the other optimizers use their defaults.
        weight_decay: Weight decay, as defined by the optimizer.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        if momentum and optimizer != "sgd":
            raise ValueError(
                f"{type(self).__name__}: expected `momentum` with optimizer='sgd' only, got momentum={momentum} with "
                f"optimizer={optimizer!r}. Omit `momentum` or choose 'sgd'."
            )
        self.classes = classes
        self.optimizer_name = optimizer
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.example_input_array = torch.zeros(2, *input_shape)
        self.accuracies = nn.ModuleDict(
            {f"{stage}_acc": MulticlassAccuracy(classes, average="micro") for stage in ("train", "val", "test")}
        )
        if classes > _FEW_CLASSES:
            for stage in ("val", "test"):
                self.accuracies[f"{stage}_acc_top5"] = MulticlassAccuracy(classes, top_k=5, average="micro")

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Refuse data with more classes than the network has.

        Raises:
            ValueError: If the data module's ``num_classes``, if known, is larger.
        """
        refuse_more_classes(self, self.classes)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """The cross entropy of one batch."""
        return self._loss("train", batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Logs ``val_loss`` and ``val_acc``."""
        self._loss("val", batch)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Logs ``test_loss`` and ``test_acc``."""
        self._loss("test", batch)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """The most likely class of each sample, shape ``(batch,)``."""
        prediction: Tensor = self(batch[0]).argmax(dim=1)
        return prediction

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer named at construction, over all parameters."""
        common: dict[str, Any] = {"params": self.parameters(), "lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(momentum=self.momentum, **common)
        return torch.optim.Adam(**common) if self.optimizer_name == "adam" else torch.optim.AdamW(**common)

    def _loss(self, stage: Stage, batch: Sequence[Tensor]) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        for name in (f"{stage}_acc", f"{stage}_acc_top5"):
            if name in self.accuracies:
                accuracy = cast(MulticlassAccuracy, self.accuracies[name])
                accuracy(logits, labels)
                shown = name == f"{stage}_acc"
                self.log(name, accuracy, on_step=False, on_epoch=True, prog_bar=shown, batch_size=len(labels))
        return loss


def refuse_more_classes(module: LightningModule, classes: int) -> None:
    """Refuse data with more classes than a network has, if the data module has ``num_classes``.

    Args:
        module: The network, in a run.
        classes: Its number of classes.

    Raises:
        ValueError: With the number of classes that is needed.
    """
    data = getattr(module.trainer, "datamodule", None)
    found = getattr(data, "num_classes", None)
    if isinstance(found, int) and found > classes:
        raise ValueError(
            f"{type(module).__name__}: expected at least the {found} classes of {type(data).__name__}, got {classes}. "
            f"Set `--model.classes={found}` (for an MLP, the last of its `sizes`), or remove classes from the data."
        )
