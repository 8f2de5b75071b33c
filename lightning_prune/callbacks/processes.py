"""Several processes, one network: statistics merged, one plan for all, the wrapper off during a cut and on again.

Everything here does nothing with a single process. The private names of Lightning's DDP strategy are used here only.
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
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_prune.errors import PruningError
from lightning_prune.planning import Plan
from lightning_prune.scoring import Statistic
from lightning_prune.structure import LatencyTable

T = TypeVar("T")

__all__ = [
    "DisagreementError",
    "agreed",
    "all_or_none",
    "from_first",
    "gathered",
    "holds_everywhere",
    "in_exception",
    "made_on_first",
    "measured_on_first",
    "merged",
    "on_first",
    "refuse_strategy",
    "same_buffers",
    "same_everywhere",
    "several",
    "unwrapped",
]


class DisagreementError(PruningError, RuntimeError):
    """Processes that must hold the same hold different things, or one of them has failed."""


def refuse_strategy(name: str, trainer: Trainer) -> None:
    """Refuse the strategies in which a cut cannot be made safe.

    Args:
        name: Who refuses, for the message.
        trainer: The run.

    Raises:
        ValueError: For anything but one device or DDP, and for DDP that compresses with a state of its own.
    """
    strategy = trainer.strategy
    if type(strategy) is DDPStrategy:
        state = strategy._ddp_comm_state
        if state is not None:
            raise ValueError(
                f"{name}: expected a communication hook without a state, got {type(state).__name__}: what it keeps has "
                "the shapes before a cut. Use a hook such as `fp16_compress_hook`."
            )
        return
    if isinstance(strategy, SingleDeviceStrategy):
        return
    raise ValueError(
        f"{name}: expected one device or DistributedDataParallel, got {type(strategy).__name__}. Use "
        '`Trainer(devices=1)` or `Trainer(strategy="ddp")`: layers of sharded networks cannot be cut yet.'
    )


def several() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def merged(statistic: Statistic | None) -> Iterator[None]:
    """Within the context a statistic holds what all processes observed, merged by its declared reductions."""
    if statistic is None or not several():
        yield
        return
    statistic.sync()
    try:
        yield
    finally:
        statistic.unsync()


def in_exception() -> bool:
    """Whether an exception is being handled, in which other processes may not take part in a collective."""
    return sys.exc_info()[0] is not None


def agreed(trainer: Trainer, plan: Plan) -> Plan:
    """The plan of the first process."""
    if not several():
        return plan
    return Plan.from_plain(trainer.strategy.broadcast(plan.to_plain()))


def measured_on_first(trainer: Trainer, measure: Callable[[], LatencyTable]) -> LatencyTable:
    """What the first process measures, on all of them."""
    if not several():
        return measure()
    return LatencyTable.from_plain(trainer.strategy.broadcast(measure().to_plain() if trainer.is_global_zero else {}))


def from_first(trainer: Trainer, contents: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the first process: others may see other data, or round differently."""
    if not several() or not contents:
        return contents
    plain = {name: content.cpu() for name, content in contents.items()}
    return trainer.strategy.broadcast(plain)


@contextmanager
def same_buffers(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Within the context all processes have the first one's buffers: norms have seen other data in each.

    Afterwards each has its own again.
    """
    if not several():
        yield
        return
    buffers = dict(module.named_buffers())
    own = {name: buffer.clone() for name, buffer in buffers.items()}
    for name, content in from_first(trainer, buffers).items():
        buffers[name].copy_(content)
    try:
        yield
    finally:
        for name, buffer in buffers.items():
            buffer.copy_(own[name])


def made_on_first(trainer: Trainer, make: Callable[[], T]) -> T:
    """What the first process makes, on all of them; what it raises there, the others hear of.

    Raises:
        DisagreementError: In the other processes, if it has failed.
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
    """Rows of all processes, on the CPU, in the order of the samples that were dealt out to them one after the other.

    Args:
        rows: One per sample of this process, on any device.
    """
    if not several():
        return rows
    parts: list[Tensor] = [rows] * dist.get_world_size()
    dist.all_gather_object(parts, rows.detach().cpu())
    whole = parts[0].new_empty((sum(len(part) for part in parts), *rows.shape[1:]))
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def holds_everywhere(mine: bool) -> bool:
    """Whether something holds in every process, by whether it holds in this one."""
    return _failures(int(not mine)) == 0


@contextmanager
def all_or_none() -> Iterator[None]:
    """What is done within the context has to succeed in every process.

    An interrupt of one process (anything but an `Exception`) ends it without asking the others.

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
    """In how many processes something has failed."""
    if not several():
        return mine
    failed = torch.tensor(float(mine), device=_device())
    dist.all_reduce(failed)
    return int(failed.item())


def same_everywhere(module: LightningModule) -> None:
    """Assert that all processes hold the same parameters.

    Raises:
        DisagreementError: If their shapes or contents differ.
    """
    if not several():
        return
    numbers = [float(p.numel()) for p in module.parameters()]
    sums = [p.detach().to(torch.float64).sum() for p in module.parameters()]
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
    """Within the context no DDP wrapper watches the parameters; afterwards a new one does.

    A live wrapper's reducer holds autograd nodes of the old shapes, and backward would fail in it. After an error,
    which ends the run, none is made: it would ask all processes, and some may not come.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        yield
        return
    strategy.model = module
    gc.collect()  # the wrapper is in reference cycles; its hooks go when it goes
    yield
    strategy.model = strategy._setup_model(module)
    strategy._register_ddp_hooks()
    strategy._pl_static_graph_delay_done = False


def _device() -> torch.device:
    """Where the backend's collectives work."""
    if several() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def on_first(statistic: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this process restores of merged sums: all of it the first, nothing the others."""
    if not several() or dist.get_rank() == 0:
        return statistic
    return {name: value if name == "batches" else torch.zeros_like(value) for name, value in statistic.items()}
