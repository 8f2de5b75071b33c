"""The XGB pruner: what boosted trees on a layer's features do not use goes (Ratajczyk and Horzyk, 2024)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import _TunerExitException
from typing_extensions import override

from lightning_prune.callbacks.extensions import CutExtension, ReestimateIfBetter
from lightning_prune.callbacks.heads import NamesHead, backbone_in
from lightning_prune.callbacks.layer_scores import Mode, Scored, ScoreOptions, ScoringRun
from lightning_prune.callbacks.moments import now
from lightning_prune.callbacks.network_pruning import Decision, NetworkPruning
from lightning_prune.callbacks.processes import agreed, made_on_first, same_buffers
from lightning_prune.callbacks.scheduled import instance_of
from lightning_prune.callbacks.score_display import ScoreProgress, show_scores, sizes_at_thresholds, table_of
from lightning_prune.callbacks.traced_models import inputs_of
from lightning_prune.callbacks.training_data import require_readable, training_data
from lightning_prune.planning import (
    Amount,
    CutPoint,
    Depth,
    NoEffectWarning,
    Schedule,
    Scope,
    Target,
    feasible,
    plan_by_use,
    require_depth,
    select,
)
from lightning_prune.reporting import SizeAtThreshold
from lightning_prune.scoring import DataPass, NeuralProbe, Surrogate, XGBoost
from lightning_prune.scoring.surrogates import Metric, metric_function, metric_name, require_labels
from lightning_prune.scoring.xgb import log_importance
from lightning_prune.structure import Size, Structure, StructureError
from lightning_prune.structure.boundaries import Boundary, find_boundaries
from lightning_prune.surgery import Repair, Ridge, Transaction
from lightning_prune.surgery.truncation import truncated

__all__ = ["XGBPruning"]


@dataclass(frozen=True)
class _Choice(Decision):
    """Units to keep, and where the network is to end."""

    scored: Scored | None = None


@final
class XGBPruning(NamesHead, NetworkPruning):
    """Removes units that a surrogate on their layer's features does not use.

    I. Ratajczyk and A. Horzyk, "Advancing ConvNet Architectures: A Novel XGB-Based Pruning Algorithm for Transfer
    Learning Efficiency" (2024). Of each layer what the next one reads, its output after norm and activation, becomes
    one number per channel; gradient-boosted trees predict the labels from these. The importance of a channel is how
    much the trees use it, and units whose importance is at most ρ go. μ of a layer is how well the trees predict
    samples that were held back.

    It acts once: before the first training batch, after a checkpoint was restored, or at the moment of its schedule.
    Layers that can only shrink together count by the maximum over them; a layer that would be emptied keeps its best
    unit, with a warning. What is scored is written down layer by layer, so that a run that is killed scores at most one
    layer again, and `lightning-prune score` scores without pruning.

    Where the paper leaves a choice open: its parameters of XGBoost cannot be had, see `XGBoost` for ours; μ is measured
    on a share of the *training* data and early stopping by another, so that validation and test data stay untouched;
    by default the layers that read what was cut are fitted again (`Ridge`), and batch norms are re-estimated where
    samples that were held back say so (`ReestimateIfBetter`): the paper freezes the network as the cut has left it,
    which ``extensions=[]`` does.

    Args:
        mode: ``"one_shot"``: all layers are scored on the network as it is. ``"layer_wise"``: one after the other, each
            on what is left of those before it.
        threshold: ρ in [0, 1): units with an importance of at most ρ go. Importances of one layer have sum 1. At most
            one of this and the next four is given; without any, ``gain=0.99``.
        quantile: Instead, a share in [0, 1): ρ of every layer is this quantile of its importances.
        gain: Instead, a share in (0, 1]: the most used units stay that together hold this share of everything that the
            trees have gained on their layer (the sums of gains, where importances are means).
        pruning_ratio: Instead, the share of the units of every layer to remove, in [0, 1).
        budget: Instead, what remains of the network, see `StructuredPruning`: units go by their importance, wherever
            they are. In layer-wise mode that takes several walks, with one threshold after the other.
        depth: Whether the network is also cut in depth, behind the layer (of a residual network: the block) whose μ is
            the best, ``"argmax"``, the paper's choice; or behind the first one whose μ is within a tolerance of the
            best, 0.02 say. Of equal ones the shallower counts. What is behind becomes the identity, and the first layer
            of the head is made anew where it reads another number of channels. Importances then count over the layers
            that are left; the head is not pruned. By default the depth stays.
        head: With ``depth``: names or globs of the modules that are the head; by default all behind the last
            convolution and its norm.
        reduction: What becomes one number per channel: the mean (``"avg"``) or the maximum (``"max"``) over positions.
        surrogate: What predicts the labels: `XGBoost` by default, with ``task="regression"`` for numbers; `NeuralProbe`
            or `SklearnEstimator`.
        metric: What μ is: ``"accuracy"`` (default), ``"balanced_accuracy"``, ``"r2"`` (default for regression), or a
            function of labels and predictions.
        samples: How many training samples are used at most, the same share of every class; all by default.
        per_class: Instead of ``samples``, how many of every class.
        labels: Labels of a training batch, one per sample; by default the second of a pair ``(x, y)``.
        inputs: What ``forward`` takes of a training batch; by default found by trying. See `DataPass`.
        held_back: Share of the samples that μ is measured on, in (0, 1).
        seed: Of the choice and split of samples.
        scores: A file that `lightning-prune score` has written; it has to fit network, samples and options. Files of
            runs in folders beside this one's are found without it.
        schedule: When it acts; at once by default. It has one moment.
        layers: Only these layers: names, globs, or names of modules that contain them.
        ignore: Not these layers.
        extensions: What goes with the cut, see `StructuredPruning`; by default ``[Ridge(), ReestimateIfBetter()]``, on
            the samples, task and split that layers are scored by. An empty list is the paper's own form.
        reset_monitors: See `StructuredPruning`.
        dirpath: Folder for report, scores and pictures; by default the logger's folder.
        memory_limit: Bytes of samples, activations and features together that are kept in memory, samples at most half
            of them; the others go to temporary files.

    Raises:
        ValueError: At once for settings that are out of range; before the first training step for all that depends on
            network, data and trainer.
        FileNotFoundError: Before the first training step, if ``scores`` is no file.

    Example:
        >>> from lightning_prune import XGBPruning
        >>> callback = XGBPruning(mode="layer_wise", gain=0.95)
    """

    acts_once = True
    _aims = (
        *("target", "depth", "head", "mode", "reduction", "surrogate", "metric", "held_back", "seed"),
        *("samples", "per_class", "layers", "ignore"),
    )

    def __init__(
        self,
        mode: Mode = "one_shot",
        threshold: float | None = None,
        quantile: float | None = None,
        gain: float | None = None,
        pruning_ratio: float | None = None,
        budget: float | int | dict[str, float | int] | None = None,
        depth: Depth | None = None,
        head: str | list[str] | None = None,
        reduction: Literal["avg", "max"] = "avg",
        surrogate: Surrogate | None = None,
        metric: Metric | None = None,
        samples: int | None = None,
        per_class: int | None = None,
        labels: Callable[[Any], Any] | None = None,
        inputs: Callable[[Any], Any] | None = None,
        held_back: float = 0.2,
        seed: int = 0,
        scores: str | None = None,
        schedule: Schedule | None = None,
        layers: str | list[str] | None = None,
        ignore: str | list[str] | None = None,
        extensions: list[Repair | CutExtension] | None = None,
        reset_monitors: bool = True,
        dirpath: str | None = None,
        memory_limit: int = 2**30,
    ) -> None:
        self.amount = Amount.of(threshold, quantile, gain, pruning_ratio, budget)
        surrogate = XGBoost() if surrogate is None else surrogate
        instance_of(self, "surrogate", surrogate, Surrogate, "XGBoost()")
        for name, value, allowed in (("mode", mode, get_args(Mode)), ("reduction", reduction, ("avg", "max"))):
            if value not in allowed:
                known = " or ".join(f'"{one}"' for one in allowed)
                raise ValueError(f"XGBPruning: expected `{name}` of {known}, got {value!r}")
        if not isinstance(held_back, (int, float)) or not 0 < held_back < 0.9:
            raise ValueError(f"XGBPruning: expected `held_back` in (0, 0.9), got {held_back!r}. Give 0.2.")
        require_depth(depth)
        metric_function(metric, surrogate.task)
        self.options = ScoreOptions(mode, reduction, surrogate, metric, held_back, seed, memory_limit)
        self.depth, self.head = depth, head
        if samples is not None and per_class is not None:
            raise ValueError(
                f"XGBPruning: expected `samples` or `per_class`, got both ({samples} and {per_class}). Leave one out."
            )
        # Its arguments are checked here, not when it is read.
        DataPass(
            [], samples=samples, per_class=per_class, seed=seed, labels=labels, inputs=inputs, memory_limit=memory_limit
        )
        self.samples, self.per_class, self.scores = samples, per_class, scores
        self._labels_of, self._inputs_of = labels, inputs
        #: Whether the fit ends when layers are scored: how `lightning-prune score` runs.
        self.only_score = False
        super().__init__(
            schedule,
            layers,
            ignore,
            reset_monitors,
            dirpath,
            self._usual_extensions() if extensions is None else extensions,
        )

    def _usual_extensions(self) -> list[Repair | CutExtension]:
        options = self.options
        probe = NeuralProbe(options.surrogate.task, hidden=0)
        return [Ridge(), ReestimateIfBetter(probe=probe, held_back=options.held_back, seed=options.seed)]

    @override
    def _unprepare(self) -> None:
        super()._unprepare()
        self._scored: Scored | None = None
        self._ends: tuple[Boundary, ...] = ()
        self._selected: tuple[str, ...] = ()
        self._inputs: Callable[[Any], Any] | None = None  # what `forward` takes of a batch, found by trying

    @property
    def scored(self) -> Scored | None:
        """What was found in this fit: scores of layers, use of units; None before."""
        return self._scored

    @property
    @override
    def own_groups(self) -> tuple[str, ...]:
        return self._selected

    @property
    @override
    def removes_layers(self) -> bool:
        return self.depth is not None

    @override
    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "target": self.amount,
            "depth": self.depth,
            "head": self.head,
            **self.options.plain(),
            "samples": self.samples,
            "per_class": self.per_class,
        }

    # -- before the first step ----------------------------------------------------------------------------------------

    @override
    def _check(
        self, trainer: Trainer, module: LightningModule, batch: Any, structure: Structure, original: Size
    ) -> tuple[CutPoint, ...]:
        if self._last_done >= 0 and not self.only_score:  # what it was to look at may be gone
            return self._moments(trainer, 0.5)
        assert self._traced_model is not None
        self._check_data(trainer, batch)
        if self._inputs_of is None:
            self._inputs = inputs_of(module, batch, self._traced_model)
        self._selected = select(structure, self.layers, self.ignore)[0]
        if self.depth is not None:
            self._ends = find_boundaries(self._traced_model, self.head)
        fraction = 0.5
        if not self.amount.is_local:
            target = Target.of(None, self.amount.value)
            if self.depth is None:  # a shallower network may be as small as the units cannot make this one
                feasible(structure, target, Scope("global", normalize="none"), self._selected, original)
            fraction = target.fraction(original, original.among(self._selected, structure))
        return self._moments(trainer, fraction)

    def _check_data(self, trainer: Trainer, batch: Any) -> None:
        """Refuse what scoring would refuse when it is due, which may be many epochs later."""
        surrogate = self.options.surrogate
        surrogate.require_packages()
        require_readable(trainer, type(self).__name__, "Train from such a loader.")
        labels = DataPass([batch], labels=self._labels_of).labels
        require_labels(labels.detach().cpu().numpy(), surrogate.task)
        made_on_first(trainer, self._require_table)  # which is the one that reads it

    def _require_table(self) -> None:
        if self.scores is not None and not Path(self.scores).is_file():
            raise FileNotFoundError(
                f"XGBPruning: expected `scores` to be a file that `lightning-prune score` has written, got "
                f"{self.scores!r}, where there is none. Correct the path, or leave it out to score the layers."
            )

    @override
    def _other_aims(self) -> dict[str, tuple[Any, Any]]:
        return {} if self.only_score else super()._other_aims()  # nothing is to be cut

    @override
    def _reached(self) -> int:
        return self._last_done  # it acts once, whatever was done to the network before

    # -- the cut ------------------------------------------------------------------------------------------------------

    @override
    def act(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        """Cut if that is due; where only scores are asked for, score and end the fit."""
        if self.only_score:
            first = self._timeline[0] if self._timeline and self._last_done < 0 else None
            if first is not None and now(trainer, first) < first.at:
                warnings.warn(
                    f"the network is scored as it is now, and {self.schedule!r} prunes it after further training, when "
                    "its scores are others. To choose an amount for that moment give `ckpt_path` of a checkpoint that "
                    "was saved then",
                    stacklevel=2,
                )
            self._score(trainer, module)
            raise _TunerExitException
        super().act(trainer, module, batch_idx)

    @override
    def _decide(self, trainer: Trainer, module: LightningModule, point: CutPoint) -> Decision | None:
        scored = self._score(trainer, module)
        for name in scored.emptied:
            note = f"One unit of {name} stays: by {self.amount.rule}={self.amount.value} all of them would go."
            self.report.notes.append(note)
            warnings.warn(note, NoEffectWarning, stacklevel=2)
        if scored.plan.is_empty and scored.end is None:
            warnings.warn(
                f"XGBPruning: {self.amount.rule}={self.amount.value} removes nothing", NoEffectWarning, stacklevel=2
            )
            return None
        scores = {name: torch.from_numpy(log_importance(use.importance)) for name, use in scored.use.items()}
        numbers = {f"pruning/mu/{station.layer}": found.score for station, found in scored.layers.items()}
        return _Choice(agreed(trainer, scored.plan), {}, numbers, scores, scored)

    @override
    def _change(self, change: Transaction, trainer: Trainer, module: LightningModule, decision: Decision) -> Structure:
        assert isinstance(decision, _Choice)
        assert decision.scored is not None
        end, use = decision.scored.end, decision.scored.use
        if end is not None:
            self._structure = change.replace(truncated(module, end), self._retrace(trainer), self._structure)
            # A budget counts what is left of the shallower network.
            plan, _ = plan_by_use(self._structure, use, self.amount, self._original)
            decision = replace(decision, plan=agreed(trainer, plan))
        return super()._change(change, trainer, module, decision)

    def _score(self, trainer: Trainer, module: LightningModule) -> Scored:
        """Score the layers of the network as it is now, and show what was found."""
        assert self._structure is not None
        groups = [self._structure.group(name) for name in self._selected]
        folder = self.session.writer(self, trainer).folder()
        with same_buffers(trainer, module), ScoreProgress(trainer) as progress:
            run = ScoringRun(
                trainer,
                module,
                self._structure,
                self._original,
                self._data(trainer, module),
                self.options,
                folder,
                None if self.scores is None else Path(self.scores),
                progress.see,
            )
            lost = run.unscorable(groups)
            self._selected = self._without(lost)
            groups = [group for group in groups if group.name not in lost]
            scored = run.run(groups, self.amount, self._ends, self.depth)
        self._scored = scored
        threshold = self.amount.value if self.amount.rule == "threshold" else None
        table = table_of(scored, groups, self._metric, threshold, *self._sizes(trainer, module, scored))
        self.report.scored[:], self.report.depths[:] = table.rows, table.depths
        if trainer.is_global_zero:
            show_scores(trainer, table, folder, threshold, prints=self.only_score)
        return scored

    def _sizes(self, trainer: Trainer, module: LightningModule, scored: Scored) -> tuple[list[SizeAtThreshold], str]:
        """What other thresholds would leave of what; layer-wise, where each needs a walk of its own, nothing."""
        assert self._structure is not None
        backbone = backbone_in(trainer, module)
        one_shot = self.options.mode == "one_shot"
        sizes = sizes_at_thresholds(scored, self._structure, backbone) if one_shot else []
        return sizes, "the network" if backbone is None else "the backbone"

    def _without(self, lost: Mapping[str, str]) -> tuple[str, ...]:
        """The selected groups without those that cannot be scored; an error if the user named one of these."""
        left = tuple(name for name in self._selected if name not in lost)
        reasons = "; ".join(f"{name}: {why}" for name, why in lost.items())
        if lost and (self.layers is not None or not left):
            raise StructureError(f"XGBPruning cannot score {reasons}. Choose other `layers`.")
        if lost:
            warnings.warn(f"XGBPruning cannot score, so these stay as they are: {reasons}", stacklevel=2)
        return left

    @property
    def _metric(self) -> str:
        return metric_name(self.options.metric, self.options.surrogate.task)

    @override
    def _samples(self, trainer: Trainer, module: LightningModule, batches: int | None = None) -> DataPass:
        return self._data(trainer, module, batches=batches, is_shared=False)

    def _data(
        self, trainer: Trainer, module: LightningModule, batches: int | None = None, is_shared: bool = True
    ) -> DataPass:
        data = training_data(
            trainer,
            module,
            batches=batches,
            samples=self.samples if batches is None else None,
            per_class=self.per_class if batches is None else None,
            seed=self.options.seed,
            labels=self._labels_of,
            memory_limit=self.options.memory_limit // 2,  # activations have what samples leave
            is_shared=is_shared,
        )
        return data.using(inputs=self._inputs_of or self._inputs)
