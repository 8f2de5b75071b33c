"""Distributed training: merging statistics, broadcasting plans and rebuilding the DDP wrapper.

Functions have no effect in a single process. Only this file uses private names of Lightning's DDP strategy.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_prune.errors import PruningError
from lightning_prune.packages import both
from lightning_prune.planning import Plan
from lightning_prune.scoring import Statistic
from lightning_prune.structure import LatencyTable
from lightning_prune.structure.sharding import is_sharded

T = TypeVar("T")

__all__ = [
    "DisagreementError",
    "all_or_none",
    "assert_same_parameters",
    "broadcast_plan",
    "from_rank_zero",
    "gathered",
    "holds_on_all_ranks",
    "in_exception",
    "measure_on_rank_zero",
    "merged",
    "on_rank_zero",
    "refuse_strategy",
    "run_on_rank_zero",
    "same_buffers",
    "several",
    "unwrapped",
]


class DisagreementError(PruningError, RuntimeError):
    """Raised when processes have different states, or one of them has failed."""


def refuse_strategy(name: str, trainer: Trainer) -> None:
    """Raise an error for unsupported strategies.

    Args:
        name: Name of the callback, for the message.
        trainer: The run.

    Raises:
        ValueError: For anything but one device, DDP or FSDP2, and for DDP communication hooks with a state.
    """
    strategy = trainer.strategy
    if isinstance(strategy, both(DDPStrategy)) and type(strategy) in both(DDPStrategy):
        state = strategy._ddp_comm_state
        if state is not None:
            raise ValueError(
                f"{name}: expected a communication hook without a state, got {type(state).__name__}: what it keeps has "
                "the shapes before a cut. Use a hook such as `fp16_compress_hook`."
            )
        return
    if isinstance(strategy, (*both(SingleDeviceStrategy), *both(ModelParallelStrategy))):
        return
    raise ValueError(
        f"{name}: expected one device, DistributedDataParallel or FSDP2, got {type(strategy).__name__}, whose layers "
        'cannot be cut. Use `Trainer(devices=1)`, `Trainer(strategy="ddp")`, or `ModelParallelStrategy` with '
        "`fully_shard` in `configure_model`."
    )


def several() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def merged(statistic: Statistic | None) -> Iterator[None]:
    """Merge a statistic over all processes within the context."""
    if statistic is None or not several():
        yield
        return
    statistic.sync()
    try:
        yield
    finally:
        statistic.unsync()


def in_exception() -> bool:
    """Whether an exception is being handled, so that other processes may not take part in a collective."""
    return sys.exc_info()[0] is not None


def broadcast_plan(trainer: Trainer, plan: Plan) -> Plan:
    """Broadcast the plan of rank zero."""
    if not several():
        return plan
    return Plan.from_plain(trainer.strategy.broadcast(plan.to_plain()))


def measure_on_rank_zero(trainer: Trainer, measure: Callable[[], LatencyTable]) -> LatencyTable:
    """Measure on rank zero and broadcast the result."""
    if not several():
        return measure()
    return LatencyTable.from_plain(trainer.strategy.broadcast(measure().to_plain() if trainer.is_global_zero else {}))


def from_rank_zero(trainer: Trainer, contents: dict[str, Tensor]) -> dict[str, Tensor]:
    """Broadcast tensors of rank zero."""
    if not several() or not contents:
        return contents
    plain = {name: content.cpu() for name, content in contents.items()}
    return trainer.strategy.broadcast(plain)


@contextmanager
def same_buffers(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Use the buffers of rank zero in all processes within the context, then restore each process's own."""
    if not several():
        yield
        return
    buffers = dict(module.named_buffers())
    own = {name: buffer.clone() for name, buffer in buffers.items()}
    for name, content in from_rank_zero(trainer, buffers).items():
        buffers[name].copy_(content)
    try:
        yield
    finally:
        for name, buffer in buffers.items():
            buffer.copy_(own[name])


def run_on_rank_zero(trainer: Trainer, make: Callable[[], T]) -> T:
    """Run a function on rank zero and broadcast its result.

    Raises:
        DisagreementError: On other ranks, if it has failed.
    """
    if not several():
        return make()
    made: list[T] = []
    failure: str | None = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            made = [make()]
        except Exception as raised:
            failure, error = f"{type(raised).__name__}: {raised}", raised
    made, failure = trainer.strategy.broadcast((made, failure))
    if error is not None:
        raise error
    if failure is not None:
        raise DisagreementError(f"the first process failed: {failure}")
    return made[0]


def gathered(rows: Tensor) -> Tensor:
    """Gather rows from all processes to the CPU, in the original order of the samples.

    Args:
        rows: One row per sample of this process, on any device.
    """
    if not several():
        return rows
    parts: list[Tensor] = [rows] * dist.get_world_size()
    dist.all_gather_object(parts, rows.detach().cpu())
    whole = parts[0].new_empty((sum(len(part) for part in parts), *rows.shape[1:]))
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def holds_on_all_ranks(mine: bool) -> bool:
    """Whether a condition holds on all ranks."""
    return _failures(int(not mine)) == 0


@contextmanager
def all_or_none() -> Iterator[None]:
    """Require that the context succeeds in every process.

    A KeyboardInterrupt or similar is raised without communication.

    Raises:
        DisagreementError: If it has succeeded here, but not in another process.
    """
    try:
        yield
    except Exception:
        _failures(1)
        raise
    failed = _failures(0)
    if failed:
        raise DisagreementError(
            f"{failed} of {dist.get_world_size()} processes failed, see their texts. Nothing has changed."
        )


def _failures(mine: int) -> int:
    """Number of processes that have failed."""
    if not several():
        return mine
    failed = torch.tensor(float(mine), device=_device())
    dist.all_reduce(failed)
    return int(failed.item())


def assert_same_parameters(module: LightningModule) -> None:
    """Assert that all processes hold the same parameters; of sharded ones, that their shapes agree.

    Raises:
        DisagreementError: If their shapes or contents differ.
    """
    if not several():
        return
    numbers = [float(p.numel()) for p in module.parameters()]
    sums = [p.detach().to(torch.float64).sum() for p in module.parameters() if not is_sharded(p)]
    mine = torch.stack([torch.tensor(numbers, device=_device()).double().sum(), *(s.to(_device()) for s in sums)])
    lowest, highest = mine.clone(), mine.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if not torch.equal(lowest, highest):
        raise DisagreementError(
            "expected the same weights in all processes, got different ones after a cut. Was a parameter changed in "
            "one process only?"
        )


@contextmanager
def unwrapped(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Remove the DDP wrapper within the context and create a new one afterwards.

    The reducer of a wrapper has autograd nodes of the old shapes, so that backward would fail. After an error, none is
    created, as other processes may not take part.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, both(DDPStrategy)) or not isinstance(strategy.model, DistributedDataParallel):
        yield
        return
    strategy.model = module
    gc.collect()  # the wrapper is in reference cycles, and its hooks are removed with it
    yield
    strategy.model = strategy._setup_model(module)
    strategy._register_ddp_hooks()
    strategy._pl_static_graph_delay_done = False


def _device() -> torch.device:
    """Device for collectives of the backend."""
    if several() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def on_rank_zero(statistic: dict[str, Tensor]) -> dict[str, Tensor]:
    """Restore merged sums on rank zero only; zeros on other ranks."""
    if not several() or dist.get_rank() == 0:
        return statistic
    return {name: value if name == "batches" else torch.zeros_like(value) for name, value in statistic.items()}
