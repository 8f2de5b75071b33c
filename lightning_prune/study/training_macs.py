"""MACs that a fit spends: training steps, and everything around its cuts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from typing_extensions import override

__all__ = ["MacCounter", "TrainingMacs"]


class MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the multiply-accumulates of everything that runs inside its context (1 MAC = 2 FLOPs).

    Counted are convolutions, matrix products and attention, forward and backward, by the formulas of PyTorch's
    ``FlopCounterMode``; elementwise operations and linear solves are not. Fake tensors and tensors on the meta device
    do not count, because nothing is computed. The context can be entered several times.

    Attributes:
        macs: The count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        formula = _FORMULAS.get(getattr(func, "overloadpacket", None))
        if formula is None and isinstance(func, OpOverload) and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **given)  # in inference mode a Linear layer arrives whole
            if out is not NotImplemented:
                return out
        out = func(*args, **given)
        if formula is not None and not any(map(_is_stub, tree_leaves((args, given)))):
            self.macs += formula(*args, **given, out_val=out) // 2
        return out


class TrainingMacs(Callback):
    """Counts the MACs of a fit, with its cuts: all that runs from the start of each training batch to its end.

    That includes the forward and the backward pass of every training step, passes over data for scores and repairs with
    what is computed from them, and the teacher of `Distill`. Validation does not count, nor does what `MacCounter` does
    not see. A backward pass takes about twice the MACs of a forward pass, less where inputs or layers need no gradient;
    it is counted, not assumed. The first step of each epoch, size of network and shape of batch is counted, and stands
    for those that are alike. Several processes have the sum of their counts, if they train on equal shares.

    The count is part of the checkpoints, so that a resumed run has all of it.

    Attributes:
        steps: MACs of training steps.
        around: MACs before the steps: of scores, repairs and teachers.
        batches: Number of training batches.
    """

    def __init__(self) -> None:
        self.forget()
        self._counter = MacCounter()
        self._known: dict[Any, int] = {}
        self._step: Any = None
        self._is_open = False
        self._processes = 1

    def forget(self) -> None:
        """Set all counts to zero."""
        self.steps = 0
        self.around = 0
        self.batches = 0

    @property
    def macs(self) -> int:
        """All of them."""
        return (self.steps + self.around) * self._processes

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._processes = trainer.world_size
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [one for one in callbacks if one is not self and not isinstance(one, _BeforeStep)]
        trainer.callbacks = [self, *others, _BeforeStep(self._start_step)]  # type: ignore[attr-defined]

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._known.clear()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._open()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        spent = self._close()
        if self._step not in self._known:
            self._known[self._step] = spent
        self.steps += self._known[self._step]
        self.batches += 1

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()  # a callback may have ended the last batch early

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "around": self.around, "batches": self.batches}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.around = int(state_dict["steps"]), int(state_dict["around"])
        self.batches = int(state_dict["batches"])

    def _start_step(self, module: LightningModule, batch: Any) -> None:
        """Called when all callbacks have begun the batch: what they did is counted, the step only if it is new."""
        self.around += self._close()
        weights = tuple((tuple(weight.shape), weight.requires_grad) for weight in module.parameters())
        shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        self._step = weights, shapes
        if self._step not in self._known:
            self._open()

    def _open(self) -> None:
        self._close()
        self._counter.macs = 0
        self._counter.__enter__()  # type: ignore[no-untyped-call]
        self._is_open = True

    def _close(self) -> int:
        if self._is_open:
            self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._is_open = False
        spent, self._counter.macs = self._counter.macs, 0
        return spent


class _BeforeStep(Callback):
    """Tells when all other callbacks have begun a training batch."""

    def __init__(self, tell: Callable[[LightningModule, Any], None]) -> None:
        self._tell = tell

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._tell(pl_module, batch)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _multi_head(query: Tensor, key: Tensor, _: Tensor, width: int, *__: Any, **___: Any) -> int:
    batch, targets, sources = len(query), query.shape[1], key.shape[1]
    projections = 2 * width**2 * (targets + sources)  # queries and outputs, keys and values
    return 2 * batch * (projections + 2 * targets * sources * width)


def _encoder_layer(source: Tensor, width: int, *args: Any, **_: Any) -> int:
    hidden: Tensor = args[12]  # first weight of the feed-forward part
    return _multi_head(source, source, source, width) + 4 * len(source) * source.shape[1] * hidden.numel()


def _recurrent(source: Tensor, *arguments: Any, **_: Any) -> int:
    flat = [tensor for part in arguments[:2] for tensor in (part if isinstance(part, (list, tuple)) else [part])]
    weights = [tensor for tensor in flat if isinstance(tensor, Tensor) and tensor.dim() == 2]  # the others are biases
    return 2 * math.prod(source.shape[:-1]) * sum(weight.numel() for weight in weights)


def _recurrent_backward(*arguments: Any, **options: Any) -> int:
    return 2 * _recurrent(*arguments, **options)


# Floating-point operations by operator. PyTorch has no formulas for fused attention on processors, for fused recurrent
# layers, and for the whole layers that `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` run in eval mode
# without gradients.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._native_multi_head_attention: _multi_head,
    torch.ops.aten._transformer_encoder_layer_fwd: _encoder_layer,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
    torch.ops.aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    torch.ops.aten._cudnn_rnn: _recurrent,
    torch.ops.aten._cudnn_rnn_backward: _recurrent_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _is_stub(leaf: object) -> bool:
    return isinstance(leaf, FakeTensor) or (isinstance(leaf, Tensor) and leaf.device.type == "meta")
