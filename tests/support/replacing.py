"""Networks of torchvision that are truncated, get a new head and lose half of their units in a run; and by hand.

`forward_by_hand` is the narrow network written down in functions, from nothing but its weights.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_prune import load_from_checkpoint
from lightning_prune.callbacks.lightning.averages import averages
from lightning_prune.callbacks.lightning.checkpoints import keep_history
from lightning_prune.callbacks.lightning.processes import all_or_none, assert_same_parameters, unwrapped
from lightning_prune.callbacks.traced_models import traced_model_of
from lightning_prune.extras import require
from lightning_prune.planning import Scope, Target, make_plan
from lightning_prune.scoring import L1, score_groups
from lightning_prune.structure import trace
from lightning_prune.surgery import LayerSpec, history_of, original_of, spec_of, transaction
from lightning_prune.surgery.tensors import named
from tests.support import ranks

__all__ = ["CASES", "Classifier", "forward_by_hand", "images", "measure", "measure_ranks"]

#: What the new head tells apart, and pixels of an image.
CLASSES, SIZE = 5, 32
#: Epochs of two batches of four; the network changes before the third epoch, ten steps before the end.
EPOCHS, AT, BATCHES, BATCH = 7, 2, 2, 4

Weights = Mapping[str, Tensor]


# -- the networks ------------------------------------------------------------------------------------------------------


def _head(width: int) -> LayerSpec:
    return LayerSpec("Linear", {"in_features": width, "out_features": CLASSES})


def _identities(*names: str) -> dict[str, LayerSpec]:
    return dict.fromkeys(names, LayerSpec("Identity"))


#: By name: the network of torchvision, arguments, and what takes the place of which module.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, LayerSpec]]] = {
    "ResNet-18 behind layer3.1": ("resnet18", {}, {**_identities("layer4"), "fc": _head(256)}),
    "VGG16-BN behind features.20": (
        "vgg16_bn",
        {},
        {
            **_identities(*(f"features.{number}" for number in range(23, 44))),
            "avgpool": LayerSpec("AdaptiveAvgPool2d", {"output_size": 1}),
            "classifier": _head(256),
        },
    ),
    "EfficientNet-B0 behind features.3.0": (
        "efficientnet_b0",
        {"stochastic_depth_prob": 0.0},
        {**_identities("features.3.1", *(f"features.{n}" for n in range(4, 9))), "classifier": _head(40)},
    ),
    "VGG16-BN without features.7": (
        "vgg16_bn",
        {},
        {
            # A layer that vanishes in a chain: the one behind it is built for the 64 channels of the one before it.
            **_identities("features.7", "features.8", "features.9"),
            "features.10": spec_of(nn.Conv2d(128, 128, 3, padding=1), in_channels=64),
            "avgpool": LayerSpec("AdaptiveAvgPool2d", {"output_size": 1}),
            "classifier": _head(512),
        },
    ),
}


class Classifier(LightningModule):
    """One of the networks, in float64, under SGD with momentum and weight decay."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        kind, options, _ = CASES[case]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = getattr(require("torchvision.models", extra="vision"), kind)(**options)
            if kind == "vgg16_bn":  # its two layers of 4,096 units go at once, and are gigabytes until then
                self.network.classifier = nn.Linear(512 * 7 * 7, 10)
            self.network.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)


def images() -> TensorDataset:
    """Two batches of random images with labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, (BATCHES * BATCH,), generator=generator))


# -- by hand -----------------------------------------------------------------------------------------------------------


def forward_by_hand(case: str, weights: Weights, x: Tensor, *, training: bool = False) -> Tensor:
    """The changed network's outputs, in the mode asked for; running statistics move as they do in training."""
    return {"resnet18": _resnet, "vgg16_bn": _vgg, "efficientnet_b0": _efficientnet}[CASES[case][0]](
        _Layers(weights, training), x
    )


class _Layers:
    def __init__(self, weights: Weights, training: bool) -> None:
        self.weights, self.training = weights, training

    def convolution(
        self, name: str, x: Tensor, stride: int = 1, padding: int = 0, *, depthwise: bool = False
    ) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        groups = len(weight) if depthwise else 1
        return F.conv2d(x, weight, self.weights.get(f"{name}.bias"), stride, padding, groups=groups)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance = self.weights[f"{name}.running_mean"], self.weights[f"{name}.running_var"]
        scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.batch_norm(x, mean, variance, scale, shift, self.training)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])


def _resnet(layers: _Layers, x: Tensor) -> Tensor:
    x = layers.norm("bn1", layers.convolution("conv1", x, 2, 3)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for name, stride in (("1.0", 1), ("1.1", 1), ("2.0", 2), ("2.1", 1), ("3.0", 2), ("3.1", 1)):
        block, shortcut = f"layer{name}", x
        out = layers.norm(f"{block}.bn1", layers.convolution(f"{block}.conv1", x, stride, 1)).relu()
        out = layers.norm(f"{block}.bn2", layers.convolution(f"{block}.conv2", out, 1, 1))
        if stride > 1:
            shortcut = layers.norm(f"{block}.downsample.1", layers.convolution(f"{block}.downsample.0", x, stride))
        x = (out + shortcut).relu()
    return layers.linear("fc", x.mean((2, 3)))


def _vgg(layers: _Layers, x: Tensor) -> Tensor:
    last = max(int(name.split(".")[1]) for name in layers.weights if name.startswith("features."))
    for number in range(44):
        name = f"features.{number}"
        if f"{name}.running_mean" in layers.weights:
            x = layers.norm(name, x).relu()
        elif f"{name}.weight" in layers.weights:
            x = layers.convolution(name, x, 1, 1)
        elif number in (6, 13, 23, 33, 43) and (number < last or last > 40):
            x = F.max_pool2d(x, 2)
    return layers.linear("classifier", x.mean((2, 3)))


def _efficientnet(layers: _Layers, x: Tensor) -> Tensor:
    x = F.silu(layers.norm("features.0.1", layers.convolution("features.0.0", x, 2, 1)))
    for block, kernel, stride in (("1.0", 3, 1), ("2.0", 3, 2), ("2.1", 3, 1), ("3.0", 5, 2)):
        home, before, number = f"features.{block}.block", x, 0
        if block != "1.0":
            x, number = F.silu(layers.norm(f"{home}.0.1", layers.convolution(f"{home}.0.0", x))), 1
        deep = layers.convolution(f"{home}.{number}.0", x, stride, kernel // 2, depthwise=True)
        x = F.silu(layers.norm(f"{home}.{number}.1", deep))
        gate = F.silu(layers.convolution(f"{home}.{number + 1}.fc1", x.mean((2, 3), keepdim=True)))
        x = x * layers.convolution(f"{home}.{number + 1}.fc2", gate).sigmoid()
        x = layers.norm(f"{home}.{number + 2}.1", layers.convolution(f"{home}.{number + 2}.0", x))
        if block == "2.1":
            x = x + before
    return layers.linear("classifier", x.mean((2, 3)))


# -- a run -------------------------------------------------------------------------------------------------------------


class Replacing(Callback):
    """Replaces modules and cuts half of the units by L1 before an epoch, unless that was done.

    Attributes:
        after: The weights right after it.
        momentum: The optimizer's, of what it has made steps with.
        params: Parameters before it, after the replacement, and after the cut.
        seconds: How long it took.
    """

    def __init__(self, case: str) -> None:
        self.case = case
        self.after: dict[str, Tensor] = {}
        self.momentum: dict[str, Tensor] = {}
        self.params: list[int] = []
        self.seconds = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        keep_history(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) != (AT, 0) or history_of(pl_module) is not None:
            return
        began, traced = perf_counter(), traced_model_of(pl_module, batch)
        modules = {f"network.{name}": spec for name, spec in CASES[self.case][2].items()}
        self.params = [_count(pl_module)]
        with unwrapped(trainer, pl_module):
            with (
                all_or_none(),
                transaction(
                    pl_module,
                    trainer.optimizers,
                    averages(trainer),
                    lambda: pl_module.forward(batch[0]),
                    epoch=trainer.current_epoch,
                    step=trainer.global_step,
                ) as change,
            ):
                structure = change.replace(modules, lambda: trace(traced), trace(traced))
                self.params.append(_count(pl_module))
                original = original_of(pl_module, structure)
                scores = score_groups(L1(), structure.groups, named(pl_module), None)
                target, _ = Target.of(pruning_ratio=0.5).resolve(structure, tuple(structure.widths))
                change.keep(structure, make_plan(structure, scores, target, 1.0, Scope(), original).kept)
            assert_same_parameters(pl_module)
        self.seconds = perf_counter() - began
        self.params.append(_count(pl_module))
        self.after = {name: tensor.detach().clone() for name, tensor in pl_module.network.state_dict().items()}
        state = trainer.optimizers[0].state
        self.momentum = {
            name: state[parameter]["momentum_buffer"].clone()
            for name, parameter in pl_module.network.named_parameters()
            if parameter in state
        }


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def train(case: str, folder: Path, resume: Path | None = None) -> tuple[Trainer, Classifier, Replacing]:
    """One run, saved after every epoch; each process takes its share of the batches."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    processes, rank = int(os.environ.get(ranks.PROCESSES, "1")), int(os.environ.get("LOCAL_RANK", "0"))
    model, replacing = Classifier(case), Replacing(case)
    mine = Subset(images(), range(rank, BATCHES * BATCH, processes))
    several: dict[str, Any] = {"strategy": "ddp", "use_distributed_sampler": False} if processes > 1 else {}
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=processes,
        callbacks=[replacing, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **several,
    )
    trainer.fit(model, DataLoader(mine, BATCH // processes), ckpt_path=resume, weights_only=True if resume else None)
    return trainer, model, replacing


def _steps_by_hand(case: str, after: Weights, momentum: Weights) -> dict[str, Tensor]:
    """The weights after the ten steps that follow the change, of network and optimizer by hand."""
    weights = {name: tensor.clone() for name, tensor in after.items() if not name.endswith("num_batches_tracked")}
    trained = {name: weight.requires_grad_() for name, weight in weights.items() if "running" not in name}
    momentum = {name: buffer.clone() for name, buffer in momentum.items()}
    for _ in range(EPOCHS - AT):
        for x, y in DataLoader(images(), BATCH):
            loss = F.cross_entropy(forward_by_hand(case, weights, x, training=True), y)
            grads = torch.autograd.grad(loss, [*trained.values()])
            with torch.no_grad():
                for (name, weight), grad in zip(trained.items(), grads, strict=True):
                    step = grad + 1e-3 * weight
                    momentum[name] = 0.9 * momentum[name] + step if name in momentum else step
                    weight -= 0.01 * momentum[name]
    return {name: weight.detach() for name, weight in weights.items()}


def measure(case: str, folder: Path) -> dict[str, Any]:
    """Everything that has to hold for one case, in numbers; the largest difference where two things are compared."""
    x = images()[:][0]
    trainer, model, replacing = train(case, folder)
    weights = {name: tensor for name, tensor in model.network.state_dict().items() if "num_batches" not in name}
    loaded = load_from_checkpoint(Classifier, folder / f"epoch={EPOCHS - 1}.ckpt", weights_only=True).eval()
    found: dict[str, Any] = {"params": replacing.params, "seconds": replacing.seconds}
    with torch.no_grad():
        outputs = model.eval()(x)
        found["by_hand"] = _difference(outputs, forward_by_hand(case, weights, x))
        found["loaded"] = _difference(outputs, loaded(x))
    found["resumed"] = {}
    for epoch in (AT - 1, AT, EPOCHS - 2):  # right before it, right after it, later
        again, other, _ = train(case, folder / f"again{epoch}", folder / f"epoch={epoch}.ckpt")
        found["resumed"][epoch] = all(_same(trainer, model, again, other))
    if int(os.environ.get(ranks.PROCESSES, "1")) == 1:
        found["steps"] = _difference_of(weights, _steps_by_hand(case, replacing.after, replacing.momentum))
    return found


def measure_ranks(case: str, folder: Path, processes: int = 2) -> dict[str, Any]:
    """The same with several processes (gloo)."""
    found: dict[str, Any] = ranks.run(measure, case, folder, processes=processes, seconds=600)
    return found


def _same(trainer: Trainer, model: nn.Module, again: Trainer, other: nn.Module) -> Iterator[bool]:
    mine, theirs = model.state_dict(), other.state_dict()
    yield mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    states = [[*run.optimizers[0].state.values()] for run in (trainer, again)]
    yield len(states[0]) == len(states[1]) and all(
        torch.equal(one["momentum_buffer"], two["momentum_buffer"]) for one, two in zip(*states, strict=True)
    )


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _difference_of(one: Weights, other: Weights) -> float:
    return max(_difference(tensor, other[name]) for name, tensor in one.items() if name in other)
