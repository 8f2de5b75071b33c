"""Distillation of the dense network into the pruned one during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_prune.callbacks.extensions.extension import CutExtension, RunContext
from lightning_prune.callbacks.lightning.averages import averages, counts
from lightning_prune.reporting import require
from lightning_prune.surgery import Edit, load_from, save_into
from lightning_prune.surgery.compiled import is_compiled
from lightning_prune.surgery.tensors import canonical

__all__ = ["Distill"]

_AVERAGE = "average"


@final
@dataclass
class Distill(CutExtension):
    r"""Trains the pruned network to match the dense one's outputs (Hinton et al., "Distilling the Knowledge", 2015).

    From the first cut on, the loss of every training step is

    .. math:: L + w \, T^2 \; \mathrm{KL}\big(\mathrm{softmax}(z_{dense} / T) \,\|\, \mathrm{softmax}(z / T)\big)

    with the outputs :math:`z` of the last layer, averaged over samples (and positions), or with ``loss="mse"`` the mean
    squared difference, :math:`L + w \, \overline{(z - z_{dense})^2}`, for regression and reconstruction. The user's
    module does not change: the gradient of the term is added where :math:`z` receives its own, so that accumulated
    batches, mixed precision, gradient clipping and manual optimization work. The loss that the module logs is still
    :math:`L`; the term is logged as ``pruning/distillation``.

    The dense network is a copy from right before the first cut, so train it well before pruning, or the network of a
    checkpoint; it is not trained further. With ``teacher="average"``, the averaged weights of Lightning's
    `EMAWeightAveraging` (or another one) are learnt from instead, as they are at each step and cut like the network
    (Tarvainen and Valpola, "Mean teachers", 2017); before averaging starts there is no term. The teacher runs
    ``training_step`` on the same batches, in eval mode and without gradients, which adds about a third of a dense
    training step to each step, and the memory of its weights. Put random augmentation in the data loader, because in
    ``training_step`` each network would draw its own.

    Args:
        weight: Weight w of the term, above 0.
        temperature: Temperature T, above 0.
        teacher: Checkpoint of the same module, dense or pruned, or ``"average"``; by default the network before the
            first cut, which is then part of this run's checkpoints.
        layer: Name of the layer whose outputs are compared; by default the last layer with parameters that
            ``training_step`` calls. Its outputs must not be pruned.
        loss: ``"kl"`` for logits, ``"mse"`` for other outputs. The class dimension is the last one of a Linear layer's
            outputs, and dimension 1 for other layers.

    Raises:
        ValueError: On construction for settings out of range; before the first training step if there is no such
            layer, ``training_step`` does not call it, its outputs can be pruned, are no tensor or have fewer than two
            classes (``"kl"``), the network is compiled, the checkpoint is of another module, or nothing is averaged.

    Example:
        >>> from lightning_prune import Distill, StructuredPruning
        >>> callback = StructuredPruning(0.5, extensions=[Distill(weight=0.5, temperature=4.0)])
    """

    weight: float = 1.0
    temperature: float = 2.0
    teacher: str | None = None
    layer: str | None = None
    loss: Literal["kl", "mse"] = "kl"
    _dense: nn.Module | None = field(default=None, init=False, repr=False, compare=False)
    _stored: Mapping[str, Any] | None = field(default=None, init=False, repr=False, compare=False)
    _name: str = field(default="", init=False, repr=False, compare=False)
    _wanted: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    _terms: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    _hook: RemovableHandle | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Distill: expected `{name}` above 0, got {getattr(self, name)}.")

    @override
    def prepare(self, run: RunContext) -> None:
        if is_compiled(run.module):
            raise ValueError(
                "Distill: expected a network that is not compiled, because compiled code hides the outputs of its "
                "layers. Do not use `torch.compile`."
            )
        self._name = self._checked_layer(run)
        if self.teacher is None:
            return
        self._stored = None  # of a run so far that had no `teacher`
        if self.teacher != _AVERAGE:
            self._dense = self._loaded(run)
        elif not averages(run.trainer):
            raise ValueError(
                'Distill: expected a callback that averages weights for `teacher="average"`, got none. Give the '
                "Trainer `EMAWeightAveraging()`."
            )

    @override
    def before_cut(self, run: RunContext) -> None:
        if self.teacher is None and self._dense is None and self._stored is None:
            self._dense = _frozen(run.traced.copy("real").module)

    @override
    def after_cut(self, edits: Sequence[Edit]) -> None:
        self._forget_average()

    @override
    def after_take_back(self) -> None:
        self._forget_average()

    @override
    def before_step(self, run: RunContext, batch: Any, batch_idx: int) -> None:
        if not self._name:  # resumed after the last cut, where nothing else is to prepare
            self.prepare(run)
        if self._stored is not None:
            self._dense = _restored(run, self._stored)
            self._stored = None
        if self.teacher == _AVERAGE and run.report.cuts and counts(run.trainer)[0]:
            self._dense = self._dense or _frozen(run.traced.copy("real").module)
            self._dense.load_state_dict(averages(run.trainer)[0].state_dict())
        if self._dense is None or not run.report.cuts:
            return
        dense, (step,) = self._dense.to(run.module.device), run.traced.optional
        self._wanted, self._terms = [], []
        handle = dense.get_submodule(self._name).register_forward_hook(
            lambda _module, _args, output: self._wanted.append(output.detach())
        )
        try:
            with torch.no_grad(), _own_random_state(run), run.trainer.precision_plugin.forward_context():
                getattr(dense, step.method)(*(batch, batch_idx)[: len(step.args)])
        finally:
            handle.remove()
        scale = _loss_scale(run)
        self._hook = run.module.get_submodule(self._name).register_forward_hook(
            lambda layer, _args, output: self._pull(layer, output, scale)
        )

    @override
    def finish_step(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    @override
    def after_step(self, run: RunContext) -> None:
        if self._terms:
            run.module.log("pruning/distillation", torch.stack(self._terms).sum())

    @override
    def state(self) -> dict[str, Any]:
        if self._stored is not None:
            return {"teacher": self._stored}
        if self._dense is None or self.teacher is not None:
            return {}
        stored: dict[str, Any] = {"state_dict": self._dense.state_dict()}
        save_into(stored, self._dense)
        return {"teacher": stored}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        require(state["teacher"], dict[str, Any], "the network to learn from")
        require(state["teacher"]["state_dict"], dict[str, Any], "weights of the network to learn from")
        self._dense, self._stored = None, state["teacher"]

    def _forget_average(self) -> None:
        """Drop the copy for averaged weights, which has the shapes of before."""
        if self.teacher == _AVERAGE:
            self._dense = None

    def _pull(self, layer: nn.Module, output: Tensor, scale: float) -> None:
        """Add the gradient of the term to the gradient of a layer's outputs."""
        if not output.requires_grad or len(self._terms) == len(self._wanted):  # not trained, or computed once more
            return
        wanted = self._wanted[len(self._terms)]
        with torch.enable_grad():
            given = output.detach().to(torch.promote_types(output.dtype, torch.float32)).requires_grad_()
            term = self.weight * self._difference(given, wanted.to(given), _class_dim(layer, given))
            (gradient,) = torch.autograd.grad(term, given)
        self._terms.append(term.detach())
        output.register_hook(lambda own: own + (scale * gradient).to(own))  # type: ignore[no-untyped-call]

    def _difference(self, given: Tensor, wanted: Tensor, dim: int) -> Tensor:
        if self.loss == "mse":
            return F.mse_loss(given, wanted)
        given, wanted = ((logits / self.temperature).log_softmax(dim) for logits in (given, wanted))
        divergence = (wanted.exp() * (wanted - given)).sum(dim)
        return self.temperature**2 * divergence.mean()

    def _checked_layer(self, run: RunContext) -> str:
        """Name of the layer whose outputs are compared."""
        network = type(run.module).__name__
        modules = sorted({canonical(found) for found, _ in run.module.named_modules()} - {""})
        if self.layer is not None and self.layer not in modules:
            raise ValueError(
                f"Distill: expected `layer` to be a layer of {network}, got {self.layer!r}. Layers: "
                f"{', '.join(modules)}."
            )
        called = _called(run, self.layer)
        if not called:
            what = "calls no layer with parameters" if self.layer is None else f"does not call {self.layer!r}"
            raise ValueError(
                f"Distill: `training_step` of {network} {what}. Give the name of a module that it calls as `layer`."
            )
        name, output = [*called.items()][-1]
        cut = [group.name for group in run.groups if name in group.producers]
        if cut:
            raise ValueError(
                f"Distill: expected a `layer` whose outputs are not pruned, got {name!r}, whose outputs are in the "
                f"group {cut[0]!r}. Use the last layer, or exclude the group with `ignore={cut[0]!r}`."
            )
        if not isinstance(output, Tensor):
            raise ValueError(
                f"Distill: expected a `layer` that returns a tensor, got {name!r}, which returns a "
                f"{type(output).__name__}. Give another `layer`."
            )
        classes = output.shape[_class_dim(run.module.get_submodule(name), output)] if output.dim() else 1
        if self.loss == "kl" and classes < 2:
            raise ValueError(
                f'Distill: expected at least two classes for loss="kl", got outputs of shape {tuple(output.shape)} '
                f'from {name!r}, whose term is always 0. Give loss="mse", or another `layer`.'
            )
        return name

    def _loaded(self, run: RunContext) -> nn.Module:
        """The network of the checkpoint ``teacher``."""
        if not Path(str(self.teacher)).is_file():
            raise ValueError(f"Distill: expected `teacher` to be a checkpoint, got {self.teacher!r}: no such file.")
        checkpoint = torch.load(str(self.teacher), map_location="cpu", weights_only=True)
        if "state_dict" not in checkpoint:
            raise ValueError(
                f"Distill: expected a checkpoint of the Trainer in `teacher`, got {self.teacher!r} without "
                "`state_dict`. Save one with `trainer.save_checkpoint(...)`."
            )
        try:
            return _restored(run, checkpoint)
        except RuntimeError as error:
            raise ValueError(
                f"Distill: expected a checkpoint of {type(run.module).__name__} in `teacher`, got {self.teacher!r}, "
                f"which is of another network. {error}"
            ) from error


def _restored(run: RunContext, checkpoint: Mapping[str, Any]) -> nn.Module:
    """The network of a checkpoint, which may be wider or narrower than the run's network."""
    copy = run.traced.copy("real").module
    load_from(checkpoint, copy)
    copy.load_state_dict(checkpoint["state_dict"])
    return _frozen(copy)


def _frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


def _called(run: RunContext, layer: str | None) -> dict[str, Any]:
    """Outputs of a layer, or of all layers with parameters, in the order of their last call in the training step."""
    copy, (step,) = _frozen(run.traced.copy("real").module), run.traced.optional
    called: dict[str, Any] = {}
    for name, module in copy.named_modules():
        is_last = next(module.parameters(), None) is not None and next(module.children(), None) is None
        if is_last if layer is None else canonical(name) == layer:
            module.register_forward_hook(partial(_note, called, canonical(name)))
    with torch.no_grad(), _own_random_state(run), run.trainer.precision_plugin.forward_context():
        getattr(copy, step.method)(*step.args)
    return called


def _note(called: dict[str, Any], name: str, _module: nn.Module, _args: Any, output: Any) -> None:
    called.pop(name, None)
    called[name] = output


def _own_random_state(run: RunContext) -> AbstractContextManager[None]:
    """Restores the run's random state at the end."""
    device = run.module.device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _loss_scale(run: RunContext) -> float:
    """The factor by which Lightning multiplies the loss before the backward pass."""
    trainer, scaler = run.trainer, getattr(run.trainer.precision_plugin, "scaler", None)
    accumulated = trainer.accumulate_grad_batches if run.module.automatic_optimization else 1
    return (1.0 if scaler is None else float(scaler.get_scale())) / accumulated


def _class_dim(layer: nn.Module, output: Tensor) -> int:
    return -1 if isinstance(layer, nn.Linear) or output.dim() < 2 else 1
