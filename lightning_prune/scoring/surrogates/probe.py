"""A small neural network on one layer's pooled features (after De Leon and Atienza, 2022)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_prune.scoring.surrogates.metrics import Task
from lightning_prune.scoring.surrogates.surrogate import Surrogate, Trained

__all__ = ["NeuralProbe"]


@final
@dataclass(frozen=True)
class NeuralProbe(Surrogate):
    """A classifier with one hidden layer, trained on the standardised pooled features of one layer.

    De Leon and Atienza, "Depth Pruning with Auxiliary Networks for TinyML" (2022), attach such a network to each layer
    to choose a depth, and train it on feature maps; here it uses the same pooled features as other surrogates, which
    are computed once.

    Attributes:
        task: ``"classification"`` (cross entropy) or ``"regression"`` (squared error).
        hidden: Width of the hidden layer; 0 for a linear classifier.
        epochs: Maximum number of epochs.
        patience: Number of epochs without improvement of the loss on the stopping samples after which training ends and
            the best weights are restored; None trains all epochs and keeps the last weights.
        batch_size: Samples per step.
        lr: Learning rate of Adam.
        importance: ``"weight"``: norm of the first layer's weights of a feature, normalised to sum 1;
            ``"permutation"``: see `Surrogate`.
        device: Device for training.
        seed: Seed of initial weights and shuffling.

    Raises:
        ValueError: If a setting is out of range.
    """

    task: Task = "classification"
    hidden: int = 128
    epochs: int = 100
    patience: int | None = 10
    batch_size: int = 64
    lr: float = 1e-3
    importance: Literal["weight", "permutation"] = "weight"
    device: str = "cpu"
    seed: int = 0

    importances: ClassVar[tuple[str, ...]] = ("weight", "permutation")
    incidental: ClassVar[tuple[str, ...]] = ("device",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("hidden", 0), ("epochs", 1), ("patience", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"NeuralProbe: expected `{name}` of at least {least}, got {value}")
        if not self.lr > 0:
            raise ValueError(f"NeuralProbe: expected `lr` above 0, got {self.lr}")

    @override
    def train(
        self,
        features: npt.NDArray[np.float32],
        labels: npt.NDArray[Any],
        stop_features: npt.NDArray[np.float32],
        stop_labels: npt.NDArray[Any],
    ) -> Trained:
        """Train with early stopping."""
        scaler = _Scaler(features, labels if self.task == "regression" else None)
        outputs = int(labels.max()) + 1 if self.task == "classification" else 1
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(_devices(self.device)):
            torch.manual_seed(self.seed)
            network = self._network(features.shape[1], outputs).to(self.device)
            self._learn(
                network,
                (self._inputs(scaler, features), self._targets(scaler, labels)),
                (self._inputs(scaler, stop_features), self._targets(scaler, stop_labels)),
            )

        @torch.no_grad()
        def predict(rows: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
            out = network(self._inputs(scaler, rows)).cpu()
            if self.task == "classification":
                return np.asarray(out.argmax(1).numpy())
            return np.asarray(out[:, 0].double().numpy() * scaler.label_std + scaler.label_mean)

        first = network[0].get_parameter("weight").detach().double().norm(dim=0).cpu().numpy()
        # A constant feature has no importance, whatever its initial weights.
        return Trained(predict, np.where(scaler.varies, first, 0.0))

    def _network(self, width: int, outputs: int) -> nn.Sequential:
        if not self.hidden:
            return nn.Sequential(nn.Linear(width, outputs))
        return nn.Sequential(nn.Linear(width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, outputs))

    def _learn(self, network: nn.Module, fit: tuple[Tensor, Tensor], stop: tuple[Tensor, Tensor]) -> None:
        optimizer = torch.optim.Adam(network.parameters(), lr=self.lr)
        best, weights, waited = math.inf, copy.deepcopy(network.state_dict()), 0
        for _ in range(self.epochs):
            for rows in torch.split(torch.randperm(len(fit[0])).to(self.device), self.batch_size):
                optimizer.zero_grad()
                self._loss(network(fit[0][rows]), fit[1][rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if self.patience is None:
                continue
            with torch.no_grad():
                loss = float(self._loss(network(stop[0]), stop[1]))
            if loss < best:
                best, weights, waited = loss, copy.deepcopy(network.state_dict()), 0
            else:
                waited += 1
                if waited >= self.patience:
                    break
        if self.patience is not None:
            network.load_state_dict(weights)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.task == "classification":
            return F.cross_entropy(outputs, targets)
        return F.mse_loss(outputs[:, 0], targets)

    def _inputs(self, scaler: _Scaler, features: npt.NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(((features - scaler.mean) / scaler.std).astype(np.float32)).to(self.device)

    def _targets(self, scaler: _Scaler, labels: npt.NDArray[Any]) -> Tensor:
        if self.task == "classification":
            return torch.from_numpy(labels).to(self.device)
        return torch.from_numpy(((labels - scaler.label_mean) / scaler.label_std).astype(np.float32)).to(self.device)


class _Scaler:
    """Mean and standard deviation of features and regression targets."""

    def __init__(self, features: npt.NDArray[np.float32], labels: npt.NDArray[Any] | None) -> None:
        self.mean = features.mean(0, dtype=np.float64)
        deviation = features.std(0, dtype=np.float64)
        self.varies = deviation > 0
        self.std = np.where(self.varies, deviation, 1.0)
        self.label_mean = 0.0 if labels is None else float(labels.mean())
        self.label_std = 1.0 if labels is None else float(labels.std())


def _devices(device: str) -> list[torch.device]:
    """Devices besides the CPU whose random state must be preserved."""
    one = torch.device(device)
    return [one] if one.type == "cuda" else []
