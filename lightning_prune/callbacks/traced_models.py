"""Build a `TracedModel` from a LightningModule and a batch.

``forward`` is traced, and ``training_step`` too, which may use a head that ``forward`` does not. The step runs on a
copy whose metrics, logging, optimizers and trainer are stubs.
"""

from __future__ import annotations

import inspect as signatures
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_prune.packages import beside
from lightning_prune.structure import Call, StructureError, TracedModel
from lightning_prune.structure.examples import accepted, candidates, forward_calls

__all__ = ["call_on", "inputs_of", "traced_model_of"]


def traced_model_of(
    module: LightningModule,
    batch: Any = None,
    *,
    step: bool = True,
    own_example: bool = True,
    convert: Callable[[Any], Any] = lambda example: example,
) -> TracedModel:
    """Build the `TracedModel` of a LightningModule.

    Args:
        module: The network.
        batch: A training batch, for the example (where there is no ``example_input_array``) and the training step.
        step: Trace ``training_step`` too.
        own_example: Take the module's ``example_input_array``, if it has one, rather than a part of the batch.
        convert: Converts the module's own example to the dtype of training; the batch has it already.

    Raises:
        StructureError: If there is no example that ``forward`` accepts.
    """
    prepare, memo = _Stubs(module), _memo_of(module)
    example = convert(module.example_input_array) if own_example else None
    calls = forward_calls(module, batch, example, memo=memo, prepare=prepare)
    optional: tuple[Call, ...] = ()
    if step and batch is not None and is_overridden("training_step", module, parent=beside(LightningModule, module)):
        optional = (Call(_step_arguments(module, batch), method="training_step", training=True),)
    return TracedModel(module, calls, optional, memo, prepare)


def call_on(module: LightningModule, batch: Any, traced: TracedModel) -> Call:
    """Return the call of ``forward`` on a training batch.

    An ``example_input_array`` may be random or a single sample; it is used only if no part of the batch fits.
    """
    if module.example_input_array is None:
        return traced.calls[0]
    try:
        return forward_calls(module, batch, None, memo=_memo_of(module), prepare=_Stubs(module))[0]
    except StructureError as error:
        warnings.warn(f"the `example_input_array` is run: {error}", stacklevel=2)
        return traced.calls[0]


def inputs_of(module: LightningModule, batch: Any, traced: TracedModel) -> Callable[[Any], Any]:
    """Return a function that picks the inputs of ``forward`` from a training batch, for criteria that use data.

    An ``example_input_array`` may be random or a single sample; it is used only if no part of the batch fits.

    Args:
        module: The network.
        batch: A training batch.
        traced: How the network is run.

    Returns:
        A function of any batch, for `DataPass`.
    """
    try:
        number = accepted(module, batch, memo=_memo_of(module), prepare=_Stubs(module))
    except StructureError as error:
        call = traced.calls[0]
        if module.example_input_array is not None:
            warnings.warn(f"scores are taken on the `example_input_array`: {error}", stacklevel=2)
        return lambda _: dict(call.kwargs) or call.args

    def inputs(raw: Any) -> Any:
        args, kwargs = list(candidates(raw, None))[number]
        return kwargs or args

    return inputs


def _step_arguments(module: LightningModule, batch: Any) -> tuple[Any, ...]:
    accepts = signatures.signature(module.training_step).parameters
    return (batch, 0) if "batch_idx" in accepts or len(accepts) > 1 else (batch,)


def _memo_of(module: LightningModule) -> dict[int, Any]:
    """Copy memo that excludes the trainer, which holds data, loggers and optimizers, and compiled code."""
    trainer, compiled = getattr(module, "_trainer", None), getattr(module, "_compiler_ctx", None)
    memo: dict[int, Any] = {} if trainer is None else {id(trainer): _TrainerStub(trainer)}
    return memo if compiled is None else {**memo, id(compiled): {}}


class _Silent:
    """Stub that accepts every call and attribute access and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __getitem__(self, _: Any) -> Any:
        return self

    def __deepcopy__(self, _: Any) -> Any:
        return self


class _TrainerStub(_Silent):
    """Stub of a trainer that returns its plain values and does nothing else."""

    def __init__(self, trainer: Any) -> None:
        vars(self)["_real"] = trainer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(vars(self)["_real"], name)
        return value if isinstance(value, (bool, int, float, str, type(None))) else _Silent()


class _MetricStub(nn.Module):
    """Stub of a metric, whose code may depend on data; its inputs must keep their sizes."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return zero; the inputs go through an operator that lets no width change."""
        for leaf in (*args, *kwargs.values()):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                torch.cumsum(leaf.reshape(-1), 0)
        return torch.zeros(())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return self.forward if name in ("update", "compute") else _Silent()


class _AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Replacement of a SyncBatchNorm in a single process."""

    def _check_input_dim(self, _: Tensor) -> None:
        return


def _drop_compiled(copy: nn.Module) -> None:
    """Remove compiled methods, by ``module.compile()`` or by Lightning, which are bound to the original."""
    vars(copy).pop("_compiled_call_impl", None)
    if vars(copy).get("_compiler_ctx") is not None:
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            vars(copy).pop(name, None)


class _Stubs:
    """Prepares a copy of a LightningModule for a training step without side effects.

    Args:
        module: The original, for the number of its optimizers.
    """

    def __init__(self, module: LightningModule) -> None:
        trainer = getattr(module, "_trainer", None)
        self.optimizers = len(trainer.optimizers) if trainer is not None and trainer.optimizers else 1
        self.trainer = None if trainer is None else _TrainerStub(trainer)

    def __call__(self, copy: nn.Module) -> None:
        _drop_compiled(copy)
        silent: Any = _Silent()
        several = [silent] * self.optimizers if self.optimizers > 1 else silent
        for parent in list(copy.modules()):
            if isinstance(parent, (Metric, MetricCollection)):
                continue
            if isinstance(parent, nn.SyncBatchNorm):  # asks for a GPU and for other processes
                parent.__class__ = _AnyBatchNorm  # type: ignore[assignment]
            for name, child in list(parent._modules.items()):
                if isinstance(child, (Metric, MetricCollection)):
                    parent._modules[name] = _MetricStub()
        for name in (
            "log",
            "log_dict",
            "print",
            "manual_backward",
            "toggle_optimizer",
            "untoggle_optimizer",
            "clip_gradients",
            "toggled_optimizer",
        ):
            vars(copy)[name] = silent
        vars(copy)["optimizers"] = MethodType(lambda _self, *_, **__: several, copy)
        vars(copy)["lr_schedulers"] = silent
        vars(copy)["_trainer"] = self.trainer  # a copied LightningModule has none
