"""What a cut does to the held-out loss, at once and with a growing penalty: ``python -m benchmarks.ready_cuts``.

An MLP 784-300-100-10 on MNIST, with AdamW and with SGD and momentum, loses half of its hidden units; a pretrained
ResNet-20 on CIFAR-10 loses channels until its MACs are divided by 2.1. The cut is made at once, or prepared by
`GrowPenalty`. Both runs of a network and seed have the same batches, learning rates and number of steps. Measured are
the loss on 2,000 held-out images right before and right after the cut, what the cut would have done when it was
planned, and test accuracy at the end. CIFAR-10's test images are halved, because the weights were trained on all
training images: one half is held out, the other half is the test.

With ``--resume`` it goes on where it was stopped, also within a run. Needs MNIST, CIFAR-10 and
``resnet_cifar10/resnet20-….th`` in the folder that ``LIGHTNING_PRUNE_DATA`` names.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from time import process_time
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.common import EVIDENCE, add_resume, command, computed, fill, here, quiet, rows_in, shown, signed
from lightning_prune import CutExtension, GrowPenalty, OneShot, StructuredPruning
from lightning_prune.callbacks.extensions import RunContext
from lightning_prune.data import CIFAR10, MNIST
from lightning_prune.models import MLPClassifier
from lightning_prune.planning import Plan
from tests.support.pretrained import accuracy, load, normalised

FOLDER = EVIDENCE / "ready_cuts"
HELD_OUT = 2000

#: Network and optimizer: epochs, the epoch of the cut at once, and epochs of the penalty.
RUNS = {
    ("MLP", "AdamW"): (8, 2, 2),
    ("MLP", "SGD"): (8, 2, 2),
    ("ResNet-20", "SGD"): (6, 1, 2),
}
#: The penalty begins when the network without it is cut, or one epoch earlier and ends then.
WAYS = ("at once", "growing penalty", "growing penalty before")


def cifar10(root: str | None, seed: int) -> CIFAR10:
    """As the pretrained network expects it: all training images, and half of the test images held out."""
    data = CIFAR10(root, val_share=0, augment=True, seed=seed)
    data.setup("fit")
    train, test = (normalised(data._splits[part], data) for part in ("train", "test"))
    held_out, test = test.split(0.5, seed=0)
    data._splits = {"train": train, "val": held_out, "test": test}
    return data


@dataclass
class Measured(CutExtension):
    """Held-out loss when the cut is planned, right before it and right after it."""

    losses: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    delays = True  # so that `prepare_cut` is called; the cut is not delayed

    def prepare_cut(self, run: RunContext, plan: Plan) -> bool:
        if "planned" not in self.losses:
            now, cut = run.held_out_losses((Plan({}, {}), plan), HELD_OUT)
            self.losses |= {"planned": now, "planned cut": cut, "planned at": run.trainer.global_step}
        return True

    def before_cut(self, run: RunContext) -> None:
        (self.losses["before"],) = run.held_out_losses((Plan({}, {}),), HELD_OUT)

    def before_step(self, run: RunContext, batch: Any, batch_idx: int) -> None:
        if "before" in self.losses and "after" not in self.losses:
            (self.losses["after"],) = run.held_out_losses((Plan({}, {}),), HELD_OUT)
            self.losses["cut at"] = run.trainer.global_step

    def state(self) -> dict[str, Any]:
        return dict(self.losses)

    def restore(self, state: Mapping[str, Any]) -> None:
        self.losses = dict(state)


def train(job: Mapping[str, Any], root: str | None, work: Path) -> dict[str, Any]:
    """One run."""
    network, optimizer, steps = job["network"], job["optimizer"], job["steps"]
    epochs, first, over = RUNS[network, optimizer]
    if job["way"] == "growing penalty before":
        first, over = first - 1, 1
    seed_everything(job["seed"], verbose=False)
    model: Any
    data: Any
    if network == "MLP":
        model, data = MLPClassifier((784, 300, 100, 10)), MNIST(root, seed=job["seed"])
        amount: dict[str, Any] = {"pruning_ratio": 0.5}
        kinds = {"AdamW": partial(AdamW, lr=1e-3), "SGD": partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)}
    else:
        model = load(20).to(memory_format=torch.channels_last).train()
        data = cifar10(root, job["seed"])
        amount = {"budget": {"macs": 1 / 2.1}}
        kinds = {"SGD": partial(SGD, lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)}
    data.setup("fit")
    total = epochs * (steps or len(data.train_dataloader()))

    def configure_optimizers(module: LightningModule) -> Any:
        made = kinds[optimizer](module.parameters())
        return [made], [{"scheduler": CosineAnnealingLR(made, total), "interval": "step"}]

    model.configure_optimizers = MethodType(configure_optimizers, model)
    growing = [GrowPenalty(jump=0.01, over=over, samples=HELD_OUT)] if job["way"] != "at once" else []
    pruner = StructuredPruning(**amount, schedule=OneShot(first), extensions=[Measured(), *growing])
    home = work / "-".join(str(job[name]) for name in ("network", "optimizer", "steps", "way", "seed")).replace(
        " ", "_"
    )
    saver = ModelCheckpoint(home, filename="last", save_top_k=1, enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, limit_train_batches=steps or 1.0, limit_val_batches=HELD_OUT // 128,
        default_root_dir=home, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[pruner, saver],
    )  # fmt: skip
    last, began = home / "last.ckpt", process_time()
    trainer.fit(model, data, ckpt_path=last if last.is_file() else None)
    last.unlink(missing_ok=True)
    (found,) = (part.losses for part in pruner._extensions.parts if isinstance(part, Measured))
    return {
        "epochs": epochs, "epoch of the plan": found["planned at"] * epochs / total,
        "epoch of the cut": found["cut at"] * epochs / total,
        **{name: found[name] for name in ("planned", "planned cut", "before", "after")},
        "jump": found["after"] / found["before"] - 1, "would be": found["planned cut"] / found["planned"] - 1,
        "accuracy": accuracy(model, data._splits["test"]), "macs": pruner.report.size.macs / pruner.report.dense.macs,
        "seconds": round(process_time() - began, 1),
    }  # fmt: skip


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table per network and optimizer."""
    parts = []
    for network, optimizer, steps in dict.fromkeys((row["network"], row["optimizer"], row["steps"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["optimizer"], row["steps"]) == (network, optimizer, steps)]
        at_once = {row["seed"]: row["accuracy"] for row in mine if row["way"] == "at once"}
        lines = [
            f"{network}, {optimizer}, {mine[0]['epochs']} epochs{'' if steps is None else f' of {steps} steps'}:",
            "",
            "| cut | seeds | epoch of the plan | of the cut | loss when planned, and if cut then | right before it "
            "| right after | change by the cut, % | largest | test accuracy, % | − at once |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for way in WAYS:
            found = [row for row in mine if row["way"] == way]
            if not found:
                continue
            mean = {name: fmean(row[name] for row in found) for name in found[0] if isinstance(found[0][name], float)}
            against = [row["accuracy"] - at_once[row["seed"]] for row in found if row["seed"] in at_once]
            largest = max((row["jump"] for row in found), key=abs)
            cells = [
                way, str(len(found)), f"{mean['epoch of the plan']:.1f}", f"{mean['epoch of the cut']:.1f}",
                f"{mean['planned']:.4f}, {mean['planned cut']:.4f}", f"{mean['before']:.4f}", f"{mean['after']:.4f}",
                shown([100 * row["jump"] for row in found], 2, "+"), f"{100 * largest:+.2f}",
                shown([row["accuracy"] for row in found]), "" if way == "at once" or not against else signed(against),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    """Every row, stored as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="folder of MNIST and CIFAR-10, in torchvision's layout")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints, to continue a stopped run")
    names = [f"{network} {optimizer}" for network, optimizer in RUNS]
    parser.add_argument("--runs", nargs="+", default=names, choices=names, help="networks and optimizers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=80, help="steps of an epoch of ResNet-20; 0 for all training images"
    )
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    add_resume(parser)
    given = parser.parse_args()
    quiet()
    jobs = [
        {
            "network": network,
            "optimizer": optimizer,
            "steps": given.steps or None if network == "ResNet-20" else None,
            "seed": seed,
            "way": way,
        }
        for seed in range(given.seeds)
        for network, optimizer in RUNS
        for way in given.ways
        if f"{network} {optimizer}" in given.runs
    ]
    file = FOLDER / "rows.jsonl"
    run = partial(train, root=given.root, work=given.work)
    list(computed(jobs, run, file, resume=given.resume))
    ran = f"`{command('benchmarks.ready_cuts')}` on {here()['processor']}"
    fill(FOLDER / "README.md", f"{tables(rows_in(file))}\n\n{ran}")


if __name__ == "__main__":
    main()
