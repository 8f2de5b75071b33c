"""Small LightningModules and runs of them: no shuffling, no dropout, so that every run can be repeated bit by bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

BATCHES, BATCH = 4, 8


class Net(LightningModule):
    """Two hidden layers of 12 and 8 units, with batch norm in between."""

    def __init__(self, optimizer: str = "sgd", width: int = 12, example: bool = True, norm: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer = optimizer
        self.first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.second = nn.Linear(width, 8)
        self.head = nn.Linear(8, 3)
        if example:
            self.example_input_array = torch.zeros(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Loader(DataLoader):
    """A loader that a checkpoint in the middle of an epoch goes on with where it was."""

    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.position, self.first = 0, 0

    def __iter__(self) -> Iterator[Any]:
        skip, self.first = self.first, 0
        self.position = skip
        for index, batch in enumerate(list(super().__iter__())):
            if index >= skip:
                self.position = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["position"] % len(self)


def samples(seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCHES * BATCH, 6, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


class Stream(IterableDataset):
    """Data of unknown length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(samples())


def loader(seed: int = 1) -> Loader:
    return Loader(samples(seed), batch_size=BATCH)


def make(kind: type[LightningModule] = Net, *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(*args, **options)


def trainer(folder: Path, *callbacks: Callback, epochs: int = 6, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": epochs,
        "callbacks": list(callbacks),
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(settings | options))


def fit(
    folder: Path,
    model: LightningModule,
    *callbacks: Callback,
    ckpt_path: Any = None,
    data: Any = None,
    validate: bool = True,
    **options: Any,
) -> Trainer:
    run = trainer(folder, *callbacks, **options)
    refit(run, model, ckpt_path=ckpt_path, data=data, validate=validate)
    return run


def refit(run: Trainer, model: LightningModule, ckpt_path: Any = None, data: Any = None, validate: bool = True) -> None:
    with warnings.catch_warnings():
        for text in (
            "You're resuming from a checkpoint that ended before",  # its loader can go on
            "The dirpath has changed from",
            "`.fit.ckpt_path=None.` was called without a model",  # it asks so of every OnExceptionCheckpoint
            ".*there is no last checkpoint available",
            "You defined a `validation_step` but have no",
            "Be aware that when using `ckpt_path`",
            "Checkpoint directory .* exists and is not empty",
            "`isinstance.treespec",
        ):
            warnings.filterwarnings("ignore", message=text)
        run.fit(
            model, loader() if data is None else data, loader(2) if validate else None, ckpt_path=ckpt_path,
            weights_only=True if ckpt_path else None,
        )  # fmt: skip


def widths(model: Any) -> tuple[int, int]:
    return model.first.out_features, model.second.out_features


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    found = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return found + sum(len(p._backward_hooks or ()) for p in model.parameters())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(one: Any, other: Any) -> bool:
    """Bit by bit, through dicts and lists."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other or (one != one and other != other))  # NaN is NaN


class Curves(Logger):
    """A logger that keeps its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = "curves"
    version = 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def of(self, name: str) -> list[float]:
        return [row[name] for _, row in self.rows if name in row]
