"""The XGB pruner: remove units that boosted trees on a layer's features do not use (Ratajczyk and Horzyk, 2024)."""

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

from lightning_prune.callbacks.display.score_display import ScoreProgress, show_scores, sizes_at_thresholds, table_of
from lightning_prune.callbacks.extensions import CutExtension, ReestimateIfBetter
from lightning_prune.callbacks.heads import NamesHead, backbone_in
from lightning_prune.callbacks.layer_scores import Mode, Scored, ScoreOptions, ScoringRun
from lightning_prune.callbacks.lightning.processes import broadcast_plan, run_on_rank_zero, same_buffers
from lightning_prune.callbacks.lightning.progress import now
from lightning_prune.callbacks.network_pruning import Decision, NetworkPruning
from lightning_prune.callbacks.scheduled import instance_of
from lightning_prune.callbacks.traced_models import inputs_of
from lightning_prune.callbacks.training_data import require_readable, training_data
from lightning_prune.packages import beside
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
    """A decision with the scores it was made from."""

    scored: Scored | None = None


@final
class XGBPruning(NamesHead, NetworkPruning):
    """Removes units that a surrogate on their layer's features does not use.

    I. Ratajczyk and A. Horzyk, "Advancing ConvNet Architectures: A Novel XGB-Based Pruning Algorithm for Transfer
    Learning Efficiency" (2024). The output of each layer after norm and activation is pooled to one number per channel,
    and gradient-boosted trees predict the labels from these. The importance of a channel is how much the trees use it,
    and units with an importance of at most ρ are removed. μ of a layer is how well the trees predict held-out samples.

    It prunes once: before the first training batch, after a checkpoint was restored, or at the point its schedule
    gives. Coupled layers are scored by the maximum over them; a layer that would be emptied keeps its best unit, with a
    warning. Scores are saved layer by layer, so that an interrupted run scores at most one layer again, and
    `lightning-prune score` scores without pruning.

    Where the paper leaves a choice open: its parameters of XGBoost are not available, see `XGBoost` for ours; μ is
    measured on a share of the *training* data, and early stopping uses another, so that validation and test data are
    not used; by default the layers after a cut one are refitted (`Ridge`), and batch norms are re-estimated if held-out
    samples gain from it (`ReestimateIfBetter`). The paper leaves the network as it is after the cut: ``extensions=[]``.

    Args:
        mode: ``"one_shot"``: all layers are scored on the unpruned network. ``"layer_wise"``: one after the other, each
            with the previous layers pruned.
        threshold: ρ in [0, 1): units with an importance of at most ρ are removed. Importances of one layer sum to 1. At
            most one of this and the next four is given; without any, ``gain=0.99``.
        quantile: Instead, a share in [0, 1): ρ of every layer is this quantile of its importances.
        gain: Instead, a share in (0, 1]: the most used units that together hold this share of the layer's total gain
            are kept (of the sums of gains, whereas importances are means).
        pruning_ratio: Instead, the share of the units of every layer to remove, in [0, 1).
        budget: Instead, the size that remains, see `StructuredPruning`: units are removed by importance over all
            layers. Layer-wise mode takes several passes for it, one per threshold.
        depth: Also cut the network in depth, after the layer (in a residual network: the block) with the best μ,
            ``"argmax"``, the paper's choice; or after the first one whose μ is within a tolerance of the best, such as
            0.02. Of equal ones the shallower is chosen. Later layers become the identity, and the first layer of the
            head is rebuilt if its number of input channels changes. Importances are then taken over the layers
            that are left; the head is not pruned. By default the depth is kept.
        head: With ``depth``: names or globs of the modules of the head; by default everything after the last
            convolution and its norm.
        reduction: Pooling to one number per channel: the mean (``"avg"``) or the maximum (``"max"``) over positions.
        surrogate: Model that predicts the labels: `XGBoost` by default, with ``task="regression"`` for numbers;
            `NeuralProbe` or `SklearnEstimator`.
        metric: Metric of μ: ``"accuracy"`` (default), ``"balanced_accuracy"``, ``"r2"`` (default for regression), or a
            function of labels and predictions.
        samples: Maximum number of training samples, the same share of every class; all by default.
        per_class: Instead of ``samples``, number of samples per class.
        labels: Labels of a training batch, one per sample; by default the second of a pair ``(x, y)``.
        inputs: Inputs of ``forward`` in a training batch; by default found by trying. See `DataPass`.
        held_back: Share of the samples that μ is measured on, in (0, 1).
        seed: Seed of the choice and split of samples.
        scores: A file written by `lightning-prune score`, which has to match network, samples and options. Files of
            runs in neighbouring folders are found without it.
        schedule: When to prune, exactly once; by default at the start.
        layers: Layers to prune, all by default: names, globs, or names of modules that contain them.
        ignore: Layers not to prune.
        extensions: Extensions of the cut, see `StructuredPruning`; by default ``[Ridge(), ReestimateIfBetter()]``, on
            the samples, task and split that layers are scored by. An empty list gives the method of the paper.
        reset_monitors: See `StructuredPruning`.
        dirpath: Folder for report, scores and pictures; by default the logger's folder.
        memory_limit: Bytes of samples, activations and features kept in memory, samples at most half of it; the rest is
            written to temporary files.

    Raises:
        ValueError: On construction for settings out of range; before the first training step for everything that
            depends on network, data and trainer.
        FileNotFoundError: Before the first training step if ``scores`` does not exist.

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
        budget: int | float | dict[str, int | float] | None = None,
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
        # Check its arguments early.
        DataPass(
            [], samples=samples, per_class=per_class, seed=seed, labels=labels, inputs=inputs, memory_limit=memory_limit
        )
        self.samples, self.per_class, self.scores = samples, per_class, scores
        self._labels_of, self._inputs_of = labels, inputs
        #: Whether the fit ends after scoring, as in `lightning-prune score`.
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
    def _reset_fit(self) -> None:
        super()._reset_fit()
        self._scored: Scored | None = None
        self._ends: tuple[Boundary, ...] = ()
        self._selected: tuple[str, ...] = ()
        self._inputs: Callable[[Any], Any] | None = None  # inputs of `forward` in a batch, found by trying

    @property
    def scored(self) -> Scored | None:
        """Scores of layers and usage of units; None before they were scored in this fit."""
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
        if self._last_done >= 0 and not self.only_score:  # the layers to score may have been removed
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
            if self.depth is None:  # with `depth` the network may become smaller than by units alone
                feasible(structure, target, Scope("global", normalize="none"), self._selected, original)
            fraction = target.fraction(original, original.among(self._selected, structure))
        return self._moments(trainer, fraction)

    def _check_data(self, trainer: Trainer, batch: Any) -> None:
        """Check early what scoring needs, since it may run many epochs later."""
        surrogate = self.options.surrogate
        surrogate.require_packages()
        require_readable(trainer, type(self).__name__, "Train from such a loader.")
        labels = DataPass([batch], labels=self._labels_of).labels
        require_labels(labels.detach().cpu().numpy(), surrogate.task)
        run_on_rank_zero(trainer, self._require_table)  # which reads it

    def _require_table(self) -> None:
        if self.scores is not None and not Path(self.scores).is_file():
            raise FileNotFoundError(
                f"XGBPruning: expected `scores` to be a file that `lightning-prune score` has written, got "
                f"{self.scores!r}, where there is none. Correct the path, or leave it out to score the layers."
            )

    @override
    def _other_aims(self) -> dict[str, tuple[Any, Any]]:
        return {} if self.only_score else super()._other_aims()  # nothing is pruned

    @override
    def _reached(self) -> int:
        return self._last_done  # it prunes once, whatever was done to the network before

    # -- the cut ------------------------------------------------------------------------------------------------------

    @override
    def act(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        """Prune if a cut is due; with ``only_score``, score and end the fit."""
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
            raise beside(_TunerExitException, trainer)
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
        return _Choice(broadcast_plan(trainer, scored.plan), {}, numbers, scores, scored)

    @override
    def _change(self, change: Transaction, trainer: Trainer, module: LightningModule, decision: Decision) -> Structure:
        assert isinstance(decision, _Choice)
        assert decision.scored is not None
        end, use = decision.scored.end, decision.scored.use
        if end is not None:
            self._structure = change.replace(truncated(module, end), self._retrace(trainer), self._structure)
            # A budget refers to the shallower network.
            plan, _ = plan_by_use(self._structure, use, self.amount, self._original)
            decision = replace(decision, plan=broadcast_plan(trainer, plan))
        return super()._change(change, trainer, module, decision)

    def _score(self, trainer: Trainer, module: LightningModule) -> Scored:
        """Score the layers of the current network and show the results."""
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
        """Sizes at other thresholds, and of what; none in layer-wise mode, where each needs its own pass."""
        assert self._structure is not None
        backbone = backbone_in(trainer, module)
        one_shot = self.options.mode == "one_shot"
        sizes = sizes_at_thresholds(scored, self._structure, backbone) if one_shot else []
        return sizes, "the network" if backbone is None else "the backbone"

    def _without(self, lost: Mapping[str, str]) -> tuple[str, ...]:
        """Selected groups that can be scored.

        Raises:
            StructureError: If one that the user named cannot be scored.
        """
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
            memory_limit=self.options.memory_limit // 2,  # the rest is for activations
            is_shared=is_shared,
        )
        return data.using(inputs=self._inputs_of or self._inputs)
