"""Pruning under FSDP2 with 2 and 4 processes against one process: ``python -m benchmarks.fsdp2``.

Three small networks in float64 are cut ten times by L1 while they train, under Lightning's `ModelParallelStrategy` on
CPU (gloo) and in one process. Measured are the largest differences of weights and of optimizer state at the end, those
of runs that continue from checkpoints of both forms, and the memory of a cut of a larger network (on Linux). With
``--resume``, stored rows are kept.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks.common import EVIDENCE, add_resume, computed, publish, quiet
from lightning_prune import LinearSchedule, StructuredPruning
from lightning_prune.structure import TracedModel, trace
from lightning_prune.structure.sharding import fit_groups, is_sharded, whole
from lightning_prune.surgery import history_of
from lightning_prune.surgery.shrink import cut
from tests.support import ranks

BATCHES, BATCH, EPOCHS, CUTS = 4, 16, 12, 10
OPTIMIZERS = ("SGD with momentum", "AdamW")
PROCESSES = (2, 4)
FORMS = ("file", "folder")
#: Checkpoints to continue from: before the second cut, in the middle, and after the last cut. None is the last step of
#: an epoch, from which Lightning does not continue exactly.
STEPS = (6, 21, 42)


def mlp() -> nn.Sequential:
    """Two hidden layers, each a block."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(12, 40), nn.ReLU()), nn.Sequential(nn.Linear(40, 30), nn.ReLU()), nn.Linear(30, 3)
    )


class Residual(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out: Tensor = x + self.second(self.first(self.norm(x)).relu())
        return out


def cnn() -> nn.Sequential:
    """A residual network, on rows of 12 numbers as images of 3 × 4."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 22, 3, padding=1), Residual(22), Residual(22),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(22, 3),
    )  # fmt: skip


class Attention(nn.Module):
    """Self-attention with eleven heads, and an MLP."""

    def __init__(self, width: int = 22, heads: int = 11) -> None:
        super().__init__()
        self.num_heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 33), nn.GELU(), nn.Linear(33, width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        h = self.norms[0](x)
        inputs = (part(h).unflatten(-1, (self.num_heads, -1)) for part in (self.query, self.key, self.value))
        parts = [part.transpose(1, 2) for part in inputs]
        x = x + self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def transformer() -> nn.Sequential:
    """Two blocks of attention, on rows of 12 numbers as 4 tokens of 3 features."""
    return nn.Sequential(
        nn.Unflatten(1, (4, 3)), nn.Linear(3, 22), Attention(), Attention(), nn.Flatten(), nn.Linear(88, 3)
    )


NETWORKS = {"MLP": mlp, "residual CNN": cnn, "transformer": transformer}


class Network(LightningModule):
    """One of the networks in float64, each block of which is an FSDP group where there are several processes."""

    def __init__(self, network: str, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.optimizer = optimizer
        self.net = NETWORKS[network]().double()

    def configure_model(self) -> None:
        """Shard every block, then the rest."""
        if _processes() > 1:
            mesh = self.device_mesh["data_parallel"]
            for block in self.net:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An ε of 1e-3, as Adam's own of 1e-8 turns rounding noise of zero gradients (a key's bias) into steps."""
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-3)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Loader(DataLoader):  # type: ignore[type-arg]
    """This process's share of the same global batches, continued from the middle of an epoch."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(BATCHES * BATCH, 12, dtype=torch.float64, generator=draw)
        mine = range(_rank(), len(x), _processes())
        super().__init__(Subset(TensorDataset(x, x[:, :3].argmax(1)), mine), batch_size=BATCH // _processes())
        self.skipped = 0

    def __iter__(self) -> Any:
        skipped, self.skipped = self.skipped, 0
        for number, batch in enumerate(list(super().__iter__())):
            if number >= skipped:
                yield batch


def _processes() -> int:
    return int(os.environ.get(ranks.PROCESSES, "1"))


def _rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def train(
    folder: Path, network: str, optimizer: str, form: str, step: int | None = None, saved: Path | None = None
) -> dict[str, Any]:
    """What a run ends with, all tensors whole.

    Args:
        folder: For its checkpoints.
        network: Name of the network.
        optimizer: Name of the optimizer.
        form: Form of its checkpoints.
        step: Step of the checkpoint to continue from, if any.
        saved: Folder of that checkpoint.
    """
    quiet()
    module = Network(network, optimizer)
    pruner = StructuredPruning(0.8, schedule=LinearSchedule(start=1, end=CUTS, cuts=CUTS))
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    settings: dict[str, Any] = {"devices": 1}
    if _processes() > 1:
        strategy = ModelParallelStrategy(_processes(), 1, save_distributed_checkpoint=form == "folder")
        settings = {"devices": _processes(), "strategy": strategy, "use_distributed_sampler": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=EPOCHS, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[pruner, saving], **settings,
    )  # fmt: skip
    loader = Loader()
    loader.skipped = 0 if step is None else step % BATCHES
    trainer.fit(module, loader, ckpt_path=None if step is None or saved is None else saved / f"step={step}.ckpt")
    history = history_of(module)
    kept = [] if history is None else [{name: list(units) for name, units in e.kept.items()} for e in history.edits]
    everywhere = [kept] * _processes()
    if _processes() > 1:
        dist.all_gather_object(everywhere, kept)
    state = trainer.optimizers[0].state
    return {
        "weights": [whole(p.detach()) for p in module.parameters()],
        "state": [whole(entry) for p in module.parameters() for entry in state[p].values()],
        "kept": kept,
        "agree": all(one == kept for one in everywhere),
    }


def runs(folder: Path, jobs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several runs one after the other."""
    return [train(folder / str(number), **job) for number, job in enumerate(jobs)]


def distance(found: dict[str, Any], expected: dict[str, Any], what: str) -> float:
    """Largest difference; infinite where the shapes differ."""
    pairs = list(zip(found[what], expected[what], strict=True))
    if any(mine.shape != other.shape for mine, other in pairs):
        return float("inf")
    return max(float((mine - other).abs().max()) for mine, other in pairs)


def row(job: dict[str, Any]) -> dict[str, Any]:
    """Differences of one network with one optimizer, by number of processes and form of checkpoint."""
    with tempfile.TemporaryDirectory() as home:
        (one,) = ranks.run(runs, Path(home), [{**job, "form": "file"}])
        places = {processes: Path(home) / str(processes) for processes in PROCESSES}
        found, resumed, elsewhere = {}, {}, {}
        for processes, place in places.items():
            cases = [{**job, "form": form} for form in FORMS]
            again = [{**case, "step": step, "saved": place / str(n)} for n, case in enumerate(cases) for step in STEPS]
            done = ranks.run(runs, place, [*cases, *again], processes=processes, seconds=500)
            found[processes], resumed[processes] = done[: len(FORMS)], done[len(FORMS) :]
        for processes, other in zip(PROCESSES, PROCESSES[::-1], strict=True):
            again = [
                {**job, "form": form, "step": STEPS[1], "saved": places[processes] / str(n)}
                for n, form in enumerate(FORMS)
            ]
            elsewhere[processes] = ranks.run(runs, places[other], again, processes=other, seconds=500)
    rows = []
    for processes in PROCESSES:
        for n, form in enumerate(FORMS):
            mine, other = found[processes][n], elsewhere[processes][n]
            same = resumed[processes][n * len(STEPS) : (n + 1) * len(STEPS)]
            rows.append(
                {
                    "processes": processes,
                    "form": form,
                    "cuts": len(mine["kept"]),
                    "plans": mine["agree"] and mine["kept"] == one["kept"] == other["kept"],
                    "weights": distance(mine, one, "weights"),
                    "state": distance(mine, one, "state"),
                    "resumed": max(distance(run, mine, what) for run in same for what in ("weights", "state")),
                    "elsewhere": max(distance(other, one, what) for what in ("weights", "state")),
                }
            )
    return {"rows": rows}


# -- memory ------------------------------------------------------------------------------------------------------------


class Large(Network):
    """Eight blocks of 4,197,376 weights and biases each, and a small head."""

    def __init__(self) -> None:
        super().__init__("MLP", "AdamW")
        width, hidden = 1024, 2048
        blocks = (nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in range(8))
        self.net = nn.Sequential(nn.Linear(12, width), *blocks, nn.Linear(width, 3)).double()


class Memory(Callback):
    """Measures the cut before the fifth step, and a step: one stands before the pruning callback, one after it."""

    def __init__(self, found: dict[str, int], *, is_first: bool) -> None:
        self.found, self.is_first = found, is_first

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to measure, or end."""
        if trainer.global_step == BATCHES and self.is_first:
            self.found["shards"] = _held(trainer, pl_module)
            _begin()
        elif trainer.global_step == BATCHES:
            self.found |= {"cut": _peak(), "narrow shards": _held(trainer, pl_module)}
        elif trainer.global_step == BATCHES + 1 and self.is_first:
            _begin()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """End of a step after the cut."""
        if trainer.global_step == BATCHES + 2 and self.is_first:
            self.found["step"] = _peak()


_BEFORE: list[int] = []


def _begin() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again
    _BEFORE.append(_resident("VmRSS"))


def _peak() -> int:
    """Largest number of bytes since `_begin`, less those at that time."""
    return _resident("VmHWM") - _BEFORE.pop()


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _held(trainer: Trainer, module: LightningModule) -> int:
    """Bytes of this process's part of parameters, gradients and optimizer state."""
    state = trainer.optimizers[0].state
    tensors = [t for p in module.parameters() for t in (p, p.grad, *state[p].values()) if t is not None]
    local = [t.to_local() if is_sharded(t) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def memory(folder: Path) -> dict[str, int]:
    """Bytes of a process in a cut to half of every hidden layer, and of what it holds."""
    quiet()
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed is returned to the system at once
    module, found = Large(), dict[str, int]()
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in module.net]
    pruner = StructuredPruning(0.5, schedule=LinearSchedule(start=1, end=1, cuts=1), layers=["net.[1-8].0"])
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, devices=_processes(), use_distributed_sampler=False,
        strategy=ModelParallelStrategy(_processes(), 1),
        callbacks=[Memory(found, is_first=True), pruner, Memory(found, is_first=False)],
    )  # fmt: skip
    trainer.fit(module, Loader())
    narrow = max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in module.net)
    found |= {"whole": sum(sizes), "group": max(sizes), "narrow group": narrow}
    found["narrowing"] = narrowing(trainer, module)
    everyone: list[Any] = [None] * _processes()
    dist.all_gather_object(everyone, found)
    return {name: max(one[name] for one in everyone) for name in found}


def narrowing(trainer: Trainer, module: LightningModule) -> int:
    """Bytes of another cut to half, without scores and verification, less those of the narrower parts that result."""
    fit_groups(module)
    structure = trace(TracedModel.of(module, torch.zeros(2, 12, dtype=torch.float64)))
    axes = structure.axes({f"net.{number}.0": tuple(range(512)) for number in range(1, 9)})
    before = _held(trainer, module)
    _begin()
    change = cut(module, axes, trainer.optimizers)
    fit_groups(module)
    peak, new = _peak(), _held(trainer, module)
    change.undo()
    fit_groups(module)
    assert _held(trainer, module) == before
    return peak - new


def tables(rows: list[dict[str, Any]], held: dict[str, dict[str, int]]) -> str:
    """Both tables."""
    flat = [{**one, **part} for one in rows for part in one["rows"]]
    lines = [
        "| network | optimizer | processes | checkpoints | cuts | plans equal | weights | optimizer state | resumed | "
        "resumed with the other number |",
        "|---|---|---:|---|---:|---|---:|---:|---:|---:|",
    ]
    for one in flat:
        numbers = (f"{one[key]:.1e}" if one[key] else "0" for key in ("weights", "state", "resumed", "elsewhere"))
        cells = (one["network"], one["optimizer"], one["processes"], f"a {one['form']}", one["cuts"])
        lines.append(f"| {' | '.join(map(str, cells))} | {'yes' if one['plans'] else 'NO'} | {' | '.join(numbers)} |")
    names = {
        "whole": "whole network",
        "group": "largest FSDP group",
        "shards": "held by a process before the cut: its part of parameters, gradients and optimizer state",
        "narrow shards": "held after the cut",
        "cut": "more during the cut, with scores and verification, beside what is held before",
        "step": "more during a training step after the cut",
        "narrow group": "largest FSDP group after the cut",
        "narrowing": "more while a second cut narrows the network, beside what is held before and after",
    }
    lines += ["", f"| MB at most | {' | '.join(f'{p} processes' for p in held)} |", f"|---|{'---:|' * len(held)}"]
    for key, name in names.items():
        lines.append(f"| {name} | {' | '.join(f'{found[key] / 1e6:.1f}' for found in held.values())} |")
    return "\n".join(lines)


def main() -> None:
    """All rows, and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    add_resume(parser)
    given = parser.parse_args()
    jobs = [{"network": network, "optimizer": optimizer} for network in given.networks for optimizer in OPTIMIZERS]
    rows = list(computed(jobs, row, EVIDENCE / "fsdp2" / "rows.jsonl", resume=given.resume))
    held = {}
    for processes in PROCESSES:
        with tempfile.TemporaryDirectory() as home:
            held[str(processes)] = ranks.run(memory, Path(home), processes=processes, seconds=300)
    publish("fsdp2", {"rows": rows, "memory": held}, tables(rows, held))


if __name__ == "__main__":
    main()
