"""Pruning runs that are killed at random moments and resumed, and what they end with.

A run saves a checkpoint every second step, but for an epoch's last (see `Checkpoints`), and gets SIGKILL after a random
time, again and again, until it is through; every start is the same call, ``fit(ckpt_path="last")``. In two processes
both are killed, or one of them, and the other has to end by itself. What the run ends with is compared bit by bit with
a run that nobody disturbed.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_prune import Contribution, ContributionPruning, LinearSchedule
from lightning_prune.callbacks.network_pruning import NetworkPruning
from lightning_prune.surgery import history_of
from tests.support.ranks import PROCESSES, start, wait

__all__ = ["Checkpoints", "Loader", "campaign", "one_start", "tell"]

EPOCHS, BATCHES, BATCH = 20, 5, 8
#: Twelve cuts, in the middle of epochs and at their ends.
SCHEDULE = LinearSchedule(start=5, end=82, cuts=12, unit="step")


class Net(LightningModule):
    """16-48-24-3, AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Loader(DataLoader[Any]):
    """Goes on with the batch where a checkpoint was written; without shuffling."""

    position = first = 0

    def __iter__(self) -> Iterator[Any]:
        skip, self.first = self.first, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= skip:
                self.position = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["position"] % len(self)


class Checkpoints(ModelCheckpoint):
    """None in an epoch's last batch: Lightning 2.6 resumes from it, but not from the checkpoints of the next epoch.

    Those do not know in which epoch they were written: who resumes from one repeats steps, with or without pruning.
    """

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)


def train(folder: Path) -> None:
    """One start of the run in ``folder``, in each of its processes; `result.pt` is there when it is through."""
    x = torch.randn(BATCHES * BATCH, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    pruning = ContributionPruning(0.75, criterion=Contribution(every_n_batches=2), schedule=SCHEDULE)
    works = {"the analysis": (pruning, "_prepare"), "a cut": (pruning, "_cut")}
    samples = TensorDataset(x, x[:, :3].argmax(1))
    one_start(folder, Net(), samples, pruning, works, batch_size=BATCH, epochs=EPOCHS, every=2)


def one_start(
    folder: Path,
    model: LightningModule,
    samples: TensorDataset,
    pruning: NetworkPruning,
    works: Mapping[str, tuple[Any, str]],
    *,
    batch_size: int,
    epochs: int,
    every: int,
    others: Sequence[Callback] = (),
    more: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """One start of a run in this process, from its last checkpoint; the first process leaves `result.pt` at the end.

    Args:
        folder: Of the run.
        model: What is trained.
        samples: All of them; each process has its share.
        pruning: The callback that is tried.
        works: What is told of, see `tell`; checkpoints are in any case.
        batch_size: Of all processes together.
        epochs: Of the run.
        every: Steps from one checkpoint to the next.
        others: Callbacks behind the pruning.
        more: What else is compared at the end.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    processes, rank = int(os.environ.get(PROCESSES, "1")), int(os.environ.get("LOCAL_RANK", "0"))
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[pruning, *others, Checkpoints(folder, every_n_train_steps=every, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tell(folder / f"moment {rank}", {**works, "a checkpoint": (trainer, "save_checkpoint")})
    data = Subset(samples, range(rank, len(samples), processes))
    trainer.fit(model, Loader(data, batch_size=batch_size // processes), ckpt_path="last")
    history = history_of(model)
    if rank == 0 and history is not None:
        content = {
            "weights": dict(model.state_dict()),
            "optimizer": trainer.optimizers[0].state_dict(),
            "history": history.to_plain(),
            "report": [(cut.index, cut.epoch, cut.step, cut.after) for cut in pruning.report.cuts],
            **more(),
        }
        torch.save(content, folder / "result.tmp")
        os.replace(folder / "result.tmp", folder / "result.pt")


def tell(file: Path, works: Mapping[str, tuple[Any, str]]) -> None:
    """Keep a file with what is being done, for who finds it after a kill.

    Args:
        file: Where.
        works: By its name, an object and the method of it that does that.
    """
    handle = os.open(file, os.O_WRONLY | os.O_CREAT)
    doing = ["a step"]

    def say() -> None:
        os.pwrite(handle, f"{doing[-1]:<16}".encode(), 0)

    def told(name: str, owner: Any, method: str) -> None:
        work = getattr(owner, method)

        def tells(*args: Any, **kwargs: Any) -> Any:
            doing.append(name)
            say()
            try:
                return work(*args, **kwargs)
            finally:
                doing.pop()
                say()

        vars(owner)[method] = tells

    os.pwrite(handle, f"{'the start':<16}".encode(), 0)
    for name, (owner, method) in works.items():
        told(name, owner, method)


def equal(one: Any, other: Any) -> bool:
    """Bit by bit, through dicts and lists."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def campaign(
    home: Path,
    processes: int,
    kills: int,
    seed: int,
    work: Callable[..., None] = train,
    args: Sequence[Any] = (),
    count: Callable[[Path], Mapping[str, int]] = lambda _: {},
) -> dict[str, Any]:
    """Kill runs until ``kills`` are made and the last run is through.

    Args:
        home: Folder for all runs.
        processes: Of a run.
        kills: How many.
        seed: Of the moments.
        work: One start of a run, ``work(folder, *args)``.
        args: Plain data.
        count: What to add up over the runs, of the folder of each.

    Returns:
        What was killed when, how many runs that were, names of those that ended otherwise than the undisturbed, and
        what was counted.
    """
    moments, expected = random.Random(seed), home / "undisturbed" / "run"
    # The first start of all imports; the second one tells how long a run takes.
    for folder in (home / "first" / "run", expected):
        folder.mkdir(parents=True)
        began = time.monotonic()
        codes = wait(start(work, folder, *args, processes=processes), 600)
        seconds = time.monotonic() - began
        if any(codes):
            raise RuntimeError(f"the undisturbed run failed with exit codes {codes}")
    done: list[dict[str, Any]] = []
    wrong: list[str] = []
    counted: Counter[str] = Counter()
    runs = 0
    while len(done) < kills:
        folder = home / f"run {runs}" / "run"  # beside no other: scores are taken from there
        folder.mkdir(parents=True)
        while not (folder / "result.pt").is_file():
            crew = start(work, folder, *args, processes=processes)
            after = moments.uniform(0, 0.9 * seconds) if len(done) < kills else 600
            victims = moments.choice([crew, crew[:1], crew[1:]]) if processes > 1 else crew
            if is_killed(crew, victims, after):
                done.append(found(folder, crew, victims, after))
        result, wanted = (torch.load(run / "result.pt", weights_only=False) for run in (folder, expected))
        parts = [part for part in wanted if not equal(result[part], wanted[part])]
        if parts:
            wrong.append(f"{folder.parent.name}: {', '.join(parts)}")
        counted.update(count(folder))
        runs += 1
    cuts = len(torch.load(expected / "result.pt", weights_only=False)["report"])
    return {
        "processes": processes,
        "runs": runs,
        "cuts": cuts,
        "seconds": round(seconds, 2),
        "wrong": wrong,
        "counted": dict(counted),
        "kills": done,
    }


def is_killed(crew: list[BaseProcess], victims: list[BaseProcess], after: float) -> bool:
    """Let the processes work for some seconds, then kill the victims; whether they had not been through by then."""
    ends = time.monotonic() + after
    while time.monotonic() < ends:
        if all(process.exitcode is not None for process in crew):
            codes = [process.exitcode for process in crew]
            if any(codes):
                raise RuntimeError(f"a start failed by itself, with exit codes {codes}")
            return False
        time.sleep(0.002)
    for process in victims:
        process.kill()
    codes = wait(crew, 30)
    return any(codes)


def found(folder: Path, crew: list[BaseProcess], victims: list[BaseProcess], after: float) -> dict[str, Any]:
    """What is left after a kill: what the first victim was doing, and the newest checkpoint."""
    moment = folder / f"moment {crew.index(victims[0])}"
    newest = folder / "last.ckpt"
    checkpoint = torch.load(newest, weights_only=True) if newest.is_file() else None
    cuts = len(checkpoint.get("lightning_prune", {"edits": []})["edits"]) if checkpoint else 0
    return {
        "after_s": round(after, 3),
        "victims": [crew.index(process) for process in victims],
        "amid": moment.read_text(encoding="utf-8").strip() if moment.is_file() else "the start",
        "resumes_at_step": checkpoint["global_step"] if checkpoint else 0,
        "cuts_made": cuts,
    }
