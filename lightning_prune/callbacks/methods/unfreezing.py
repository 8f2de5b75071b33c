"""Gradual unfreezing of a pretrained backbone: the training scheme of transfer learning after pruning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_prune.callbacks.display.report_writer import log_now
from lightning_prune.callbacks.heads import NamesHead
from lightning_prune.callbacks.lightning.checkpoints import StatefulCallback, keep_history
from lightning_prune.callbacks.lightning.compatibility import require_compatible
from lightning_prune.callbacks.lightning.optimizer_groups import add_group, without_optimizer
from lightning_prune.callbacks.lightning.processes import unwrapped
from lightning_prune.callbacks.lightning.progress import is_fast_dev_run, run_length
from lightning_prune.callbacks.scheduled import ScheduledPruning
from lightning_prune.reporting import require
from lightning_prune.structure.backbone import Backbone, ConvolutionalLayer, head_error, is_norm
from lightning_prune.structure.layers import is_within
from lightning_prune.surgery import History, Keep, history_of
from lightning_prune.surgery.compiled import reset_compiled

__all__ = ["GradualUnfreezing"]

# Form of the callback's state in a checkpoint.
_FORMAT = 1

# In epochs: shares are sums of floats.
_TOLERANCE = 1e-6


@final
class GradualUnfreezing(NamesHead, StatefulCallback):
    """Trains the head of a pretrained network first, then its convolutional layers one by one from the last.

    Algorithm 2 of Ratajczyk & Horzyk, "Advancing ConvNet Architectures: A Novel XGB-based Pruning Algorithm for
    Transfer Learning Efficiency" (2024): the convolutional backbone is frozen, the rest trains for ``e_f`` epochs, and
    then, ``l`` times, the network trains for ``e_u`` epochs *before* the last frozen convolution is unfrozen. So the
    i-th convolution from the end trains from epoch ``e_f + i·e_u`` on, and in a run of exactly ``e_f + l·e_u`` epochs
    the first convolution never trains, as printed. A longer run trains all layers afterwards.

    A convolution is unfrozen together with its norm; frozen BatchNorm uses and keeps its running statistics. Layers
    that pruning has removed are skipped. A pruning callback in the same run acts first in each training batch, and new
    layers of the backbone are frozen like those they replace.

    `configure_optimizers` may pass all parameters, or only those that require gradients: then each layer is added as a
        parameter group when it is unfrozen, with the options that the first group has at that time, learning rate
        included. A resumed run, also from within an epoch, has the same frozen layers and parameter groups.

    Args:
        e_f: Epochs in which the backbone is frozen; may be a fraction.
        e_u: Epochs between one layer and the next, more than 0; may be a fraction, such as 0.1 for a deep backbone.
            Within an epoch, a layer is unfrozen at the first batch at or after that time, with gradient accumulation at
            the first batch of a step.
        head: Names or globs of the modules that train from the beginning, with their submodules. By default everything
            after the last convolution and its norm. Required if the classifier is a convolution.
        train_bn: Let the norms of the backbone train from the beginning, with their statistics.

    Raises:
        ValueError: On construction for numbers out of range; before the first training batch for a network without
            convolutions or without a head, for parameters without an optimizer if there are several optimizers, for
            strategies other than one device and DDP, and for a run that is shorter than ``e_f + l·e_u`` epochs.

    Example:
        >>> from lightning_prune import GradualUnfreezing
        >>> callback = GradualUnfreezing(e_f=2, e_u=0.25)
    """

    def __init__(
        self, e_f: float = 1.0, e_u: float = 1.0, head: str | list[str] | None = None, train_bn: bool = False
    ) -> None:
        if not (math.isfinite(e_f) and e_f >= 0):
            raise ValueError(f"GradualUnfreezing: expected `e_f` to be a number of epochs of at least 0, got {e_f!r}.")
        if not (math.isfinite(e_u) and e_u > 0):
            raise ValueError(f"GradualUnfreezing: expected `e_u` to be a number of epochs above 0, got {e_u!r}.")
        self.e_f, self.e_u, self.head, self.train_bn = e_f, e_u, head, train_bn
        self._is_fit = False
        self._begin()

    def _begin(self) -> None:
        """Reset to the state in which nothing is unfrozen."""
        self._thawed: list[str] = []  # layers in the order in which they were unfrozen, those removed later included
        self._groups: list[list[str]] = []  # parameters of each group that was added to the optimizer
        self._frozen_by_user: dict[str, bool] = {}
        self._backbone = Backbone((), {})
        self._still: list[nn.Module] = []  # norms kept in eval mode
        self._history: History | None = None  # of the network that `_backbone` was made from
        self._is_checked = False  # whether the run is long enough for the network that it trains

    @property
    def frozen(self) -> tuple[str, ...]:
        """Frozen convolutions, the next one to be unfrozen first."""
        return tuple(layer.name for layer in reversed(self._backbone.layers) if layer.name not in self._thawed)

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_fit = stage == "fit"
        if not self._is_fit:
            return
        self._begin()
        require_compatible(self, trainer, pl_module)
        keep_history(pl_module)
        _act_after_pruning(self, trainer)
        self.freeze_before_training(pl_module)

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze the backbone before `configure_optimizers` is called."""
        self._find_layers(pl_module)
        self._apply()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._is_fit:
            self.freeze_before_training(pl_module)  # the checkpoint's network may have other layers

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"format": _FORMAT, "unfrozen": list(self._thawed), "groups": [list(names) for names in self._groups]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._is_fit:
            return
        if not isinstance(state_dict, dict) or state_dict.get("format") != _FORMAT:
            raise ValueError(
                f"expected a GradualUnfreezing state of format {_FORMAT}, got another one. It was written by another "
                "version of lightning-prune: install that one, or resume without the state."
            )
        try:
            require(state_dict["unfrozen"], list[str], "unfrozen")
            require(state_dict["groups"], list[list[str]], "groups")
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the GradualUnfreezing state in the checkpoint is damaged ({type(error).__name__}: {error}). Resume "
                "from another checkpoint."
            ) from error
        self._thawed, self._groups = list(state_dict["unfrozen"]), [list(names) for names in state_dict["groups"]]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._find_layers(pl_module)  # `configure_model` may have built it after `setup`
        self._refuse_network(pl_module)
        if not any(isinstance(one, ScheduledPruning) and one.removes_layers for one in _callbacks(trainer)):
            self._refuse_short(trainer)
        self._apply_in(trainer, pl_module)
        present = self._parameters(layer.name for layer in self._backbone.layers)
        for names in self._groups:
            group = {name: present[name] for name in names if name in present}
            self._refuse_given(trainer, group)
            add_group(trainer, group)
        self._refuse_optimizers(trainer)
        if any(isinstance(one, ScheduledPruning) for one in _callbacks(trainer)):
            # Pruning at the first batch must see the weights as without this callback: frozen ones are not masked, say.
            self._apply(lifted=True)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.num_training_batches == float("inf") and not (_is_whole(self.e_f) and _is_whole(self.e_u)):
            raise ValueError(
                f"GradualUnfreezing: expected whole epochs with data of unknown length, got e_f={self.e_f} and "
                f"e_u={self.e_u}. Give whole numbers, or `limit_train_batches` to the Trainer."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        history = history_of(pl_module)
        is_changed = history is not self._history
        if is_changed:
            self._find_layers(pl_module)
            self._refuse_network(pl_module)
        if not self._is_checked:
            self._refuse_unknown(pl_module)
            self._refuse_short(trainer)
            self._is_checked = is_changed = True
        if is_changed:
            self._apply_in(trainer, pl_module)
        due = self._due(trainer, batch_idx)
        if due:
            self._thaw(trainer, pl_module, due)
        if due or is_changed:
            self._set_modes()  # not before: Lightning warns if a fit starts with modules in eval mode
        for norm in self._still:
            norm.training = False  # `train()` may have been called on the network

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    # -- when ---------------------------------------------------------------------------------------------------------

    def _due(self, trainer: Trainer, batch_idx: int) -> tuple[str, ...]:
        """The layers to unfreeze before this batch."""
        frozen = self.frozen
        if not frozen or batch_idx % trainer.accumulate_grad_batches:
            return ()
        batches = trainer.num_training_batches
        epoch = trainer.current_epoch + (batch_idx / batches if batches != float("inf") else 0)
        reached = math.floor((epoch - self.e_f + _TOLERANCE) / self.e_u)
        return frozen[: max(reached - len(self._thawed), 0)]

    def _refuse_short(self, trainer: Trainer) -> None:
        """Check that the run is long enough to unfreeze the last layer."""
        length = run_length(trainer)
        layers = len(self._backbone.layers) + len(set(self._thawed) - {layer.name for layer in self._backbone.layers})
        needed = self.e_f + layers * self.e_u
        if is_fast_dev_run(trainer):
            return
        given: list[tuple[float | None, str]] = [(length.epochs, f"max_epochs={trainer.max_epochs}")]
        if length.steps is not None and length.steps_per_epoch is not None:
            given.append((length.steps / length.steps_per_epoch, f"max_steps={trainer.max_steps}"))
        for epochs, said in given:
            if epochs is not None and epochs < needed - _TOLERANCE:
                longest = max((epochs - self.e_f) / layers, 0)
                raise ValueError(
                    f"GradualUnfreezing: expected at least {needed:g} epochs (e_f={self.e_f:g}, and e_u={self.e_u:g} "
                    f"for each of {layers} convolutional layers), got {said}. Train for "
                    f"{math.ceil(needed - _TOLERANCE)} epochs, or choose e_u={longest:.3g} or less."
                )

    # -- what ---------------------------------------------------------------------------------------------------------

    def _find_layers(self, module: LightningModule) -> None:
        """Find the convolutional layers of the current network."""
        self._backbone, self._history = Backbone.of(module, self.head), history_of(module)
        for layer in self._backbone.layers:
            for name, parameter in layer.parameters.items():
                self._frozen_by_user.setdefault(name, not parameter.requires_grad)

    def _is_frozen(self, layer: ConvolutionalLayer, owner: nn.Module) -> bool:
        return layer.name not in self._thawed and not (self.train_bn and is_norm(owner))

    def _wanted(self, *, lifted: bool = False) -> Iterator[tuple[nn.Parameter, bool]]:
        """Yield every parameter of the backbone and whether it is trained."""
        for layer in self._backbone.layers:
            for owner_name, owner in layer.modules.items():
                for own, parameter in owner._parameters.items():
                    if parameter is not None:
                        by_user = self._frozen_by_user[f"{owner_name}.{own}"]
                        yield parameter, not by_user and (lifted or not self._is_frozen(layer, owner))

    def _apply(self, *, lifted: bool = False) -> None:
        """Freeze and unfreeze parameters.

        Args:
            lifted: Freeze only what the user has frozen.
        """
        for parameter, trains in self._wanted(lifted=lifted):
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None  # an optimizer would keep stepping by it

    def _set_modes(self) -> None:
        """Put the norms of frozen layers in eval mode, and those of other layers back in train mode."""
        before, self._still = self._still, []
        for layer in self._backbone.layers:
            for norm in layer.norms.values():
                if self._is_frozen(layer, norm) and (norm.training or norm in before):
                    self._still.append(norm.eval())
        for norm in before:
            if norm not in self._still:
                norm.train()

    def _apply_in(self, trainer: Trainer, module: LightningModule) -> None:
        """Freeze and unfreeze parameters during a run, and update DDP and compiled code."""
        if all(parameter.requires_grad == trains for parameter, trains in self._wanted()):
            return
        reset_compiled(module)
        with unwrapped(trainer, module):
            self._apply()

    def _thaw(self, trainer: Trainer, module: LightningModule, names: tuple[str, ...]) -> None:
        """Unfreeze layers and add their missing parameters to the optimizer."""
        self._thawed.extend(names)
        self._apply_in(trainer, module)
        for name in names:
            missing = without_optimizer(trainer, self._parameters([name]))
            if missing:
                self._groups.append(list(missing))
                add_group(trainer, missing)
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        log_now(trainer, {"unfreezing/layers": float(len(self._thawed)), "unfreezing/params": float(count)})

    def _parameters(self, names: Any) -> Mapping[str, nn.Parameter]:
        """Parameters of layers that are trained once unfrozen, by name."""
        wanted = set(names)
        return {
            name: parameter
            for layer in self._backbone.layers
            if layer.name in wanted
            for name, parameter in layer.parameters.items()
            if not self._frozen_by_user[name]
        }

    def _release(self) -> None:
        """Unfreeze everything this callback has frozen, but keep its state for a later checkpoint."""
        self._apply(lifted=True)
        thawed, self._thawed = self._thawed, [*self._thawed, *self.frozen]
        self._set_modes()
        self._thawed = thawed

    # -- errors -------------------------------------------------------------------------------------------------------

    def _refuse_network(self, module: LightningModule) -> None:
        objection = head_error(module, self.head)
        if objection:
            raise ValueError(f"GradualUnfreezing: {objection}")
        if not self._backbone.layers:
            raise ValueError(
                f"GradualUnfreezing: expected convolutions to unfreeze in {type(module).__name__}, found none outside "
                f"of the head {self.head or 'as it was found'}. Train such a network without this callback."
            )
        if not any(parameter.requires_grad for parameter in self._backbone.head_parameters.values()):
            last = self._backbone.layers[-1].name
            raise ValueError(
                f"GradualUnfreezing: expected something to train behind the last convolution {last!r}, found nothing. "
                'Name the classifier, for example head="net.classifier".'
            )

    def _refuse_unknown(self, module: LightningModule) -> None:
        """Check that the state belongs to this network or to one that it was cut from."""
        edits = () if self._history is None else self._history.edits
        removed = [name for edit in edits if not isinstance(edit, Keep) for name in edit.modules]
        known = {layer.name for layer in self._backbone.layers}
        unknown = [name for name in self._thawed if name not in known and not is_within(name, removed)]
        if unknown:
            raise ValueError(
                f"GradualUnfreezing: expected the convolutions of {type(module).__name__} in the checkpoint, got "
                f"{', '.join(unknown)}, which it does not have. Resume with the network that the checkpoint was saved "
                "from."
            )

    def _refuse_given(self, trainer: Trainer, group: Mapping[str, nn.Parameter]) -> None:
        """Check that the optimizer does not already have parameters that the checkpoint's got later."""
        given = group.keys() - without_optimizer(trainer, group).keys()
        if given:
            raise ValueError(
                "GradualUnfreezing: expected `configure_optimizers` to give the parameters that require gradients, as "
                f"in the run that saved the checkpoint, got {min(given)} from the beginning. Resume with the "
                "`configure_optimizers` of that run."
            )

    def _refuse_optimizers(self, trainer: Trainer) -> None:
        missing = without_optimizer(trainer, self._parameters(self.frozen))
        if missing and len(trainer.optimizers) != 1:
            raise ValueError(
                f"GradualUnfreezing: expected one optimizer that can get the layers as they are unfrozen, or all "
                f"parameters in one of several, got {len(trainer.optimizers)} optimizers without {next(iter(missing))}"
                f"{' and others' if len(missing) > 1 else ''}. Give the backbone to one of them in "
                "`configure_optimizers`."
            )


def _act_after_pruning(callback: Callback, trainer: Trainer) -> None:
    """Move a callback behind the pruning callbacks, so that new layers are frozen before they train."""
    callbacks = _callbacks(trainer)
    last = max((i for i, one in enumerate(callbacks) if isinstance(one, ScheduledPruning)), default=-1)
    here = callbacks.index(callback)
    if here < last:
        # A new list: Lightning is iterating over the old one.
        others = [*callbacks[:here], *callbacks[here + 1 : last + 1], callback, *callbacks[last + 1 :]]
        trainer.callbacks = others  # type: ignore[attr-defined]


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _is_whole(epochs: float) -> bool:
    return float(epochs).is_integer()
