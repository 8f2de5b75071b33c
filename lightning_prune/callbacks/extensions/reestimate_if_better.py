"""Re-estimation of batch norm statistics after a cut, if it helps the task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.callbacks.extensions.extension import CutExtension, RunContext
from lightning_prune.callbacks.heads import backbone_in
from lightning_prune.callbacks.training_data import require_readable
from lightning_prune.reporting import Report
from lightning_prune.scoring import DataPass, NeuralProbe, Surrogate
from lightning_prune.scoring.surrogates import Fitted, metric_name, require_labels, split_samples
from lightning_prune.scoring.walk import Station, pooled_features, stations_of
from lightning_prune.surgery import Edit, Keep, ReestimateBatchNorm, Repair
from lightning_prune.surgery.repairs.batch_norms import batch_norms
from lightning_prune.surgery.repairs.repair import Run
from lightning_prune.surgery.tensors import named

__all__ = ["ReestimateIfBetter"]

# Values in the history of a cut: the score without and with the new statistics, and whether these are used.
_WITHOUT, _WITH, _STAY = "score_norms_kept", "score_norms_reestimated", "norms_reestimated"


@final
@dataclass
class ReestimateIfBetter(CutExtension):
    r"""Re-estimates the running statistics of batch norms after a cut if features then predict the labels better.

    Whether new statistics help depends on how far the training data are from the data of the old statistics: in
    transfer learning they change even the accuracy of the unpruned network. So the criterion is the task, not closeness
    to the network before the cut. The pooled features that enter the head are computed twice for samples of the
    training data: with the statistics left by the cut and earlier extensions, and with those of
    `ReestimateBatchNorm`. A probe, linear by default, is fitted to each and predicts held-out samples. With :math:`d_i`
    the gain on sample :math:`i` (1 if it is correct only with the new statistics, −1 if only with the old ones; in
    regression, the decrease of the squared error), the new statistics are used if the mean of the :math:`n` gains is
    above its standard error, :math:`\bar d > s_d / \sqrt n`, and the old ones otherwise.

    The head is left out because in transfer learning it is untrained. If no head is known, the features are the inputs
    of the last layer. Both scores and the choice are in the report and in the history of the cut. A network without
    trained batch norms is not changed. The cost is two forward passes over the samples and two fits of the probe.

    Args:
        batches: Batches of training data for `ReestimateBatchNorm`.
        probe: Model fitted to the features: `NeuralProbe`, without a hidden layer by default, with
            ``task="regression"`` for continuous labels; `XGBoost` or `SklearnEstimator`.
        held_back: Share of held-out samples, in (0, 0.9). The samples are those that `XGBPruning` scores layers on; for
            other callbacks up to 2,000 of the training data.
        seed: Seed of the split.

    Raises:
        ValueError: On construction for settings out of range; before the first training step for unsuitable training
            data or labels.

    Example:
        >>> from lightning_prune import ReestimateIfBetter, Ridge, StructuredPruning
        >>> callback = StructuredPruning(0.5, extensions=[Ridge(), ReestimateIfBetter()])
    """

    batches: int = 32
    probe: Surrogate = NeuralProbe(hidden=0)  # noqa: RUF009 - it is frozen
    held_back: float = 0.2
    seed: int = 0
    _report: Report | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches < 1:
            raise ValueError(f"ReestimateIfBetter: expected `batches` of at least 1, got {self.batches}.")
        if not 0 < self.held_back < 0.9:
            raise ValueError(f"ReestimateIfBetter: expected `held_back` in (0, 0.9), got {self.held_back}. Give 0.2.")

    @override
    def prepare(self, run: RunContext) -> None:
        if batch_norms(run.module):
            self.probe.require_packages()
            require_readable(run.trainer, type(self).__name__)
            require_labels(run.samples(1).labels.cpu().numpy(), self.probe.task)

    @override
    def repairs(self, run: RunContext) -> tuple[Repair, ...]:
        self._report = run.report
        return (_Choice(self, run),) if batch_norms(run.module) else ()

    @override
    def after_cut(self, edits: Sequence[Edit]) -> None:
        for info in (edit.info for edit in edits if isinstance(edit, Keep) and _STAY in edit.info):
            assert self._report is not None
            choice = "re-estimated" if info[_STAY] else "not re-estimated"
            score = metric_name(None, self.probe.task)
            self._report.notes.append(
                f"Batch norms are {choice}: {score} of a probe on held-out samples is {info[_WITH]:.3f} with "
                f"re-estimated statistics and {info[_WITHOUT]:.3f} without."
            )


class _Choice(Repair):
    """Repair that re-estimates the running statistics if the new ones are better."""

    def __init__(self, settings: ReestimateIfBetter, run: RunContext) -> None:
        self.batches = settings.batches
        self._settings, self._run = settings, run
        self._info: Mapping[str, float] = {}

    @property
    @override
    def info(self) -> Mapping[str, float]:
        return self._info

    @override
    def after(self, model: nn.Module, run: Run) -> dict[str, Tensor]:
        new = ReestimateBatchNorm(self.batches).after(model, run)
        if not new:
            return {}
        present = named(model)
        old = {name: present[name].clone() for name in new}
        with self._run.trainer.precision_plugin.forward_context():
            data = self._run.samples(None)
            labels = data.labels.cpu().numpy()
            without = self._fitted(model, data, labels)
            _fill(present, new)
            better = self._fitted(model, data, labels)
            _fill(present, old)
        truth = labels[self._parts(labels).held_back]
        stay = _is_better(truth, without.predictions, better.predictions, self._settings.probe.task)
        self._info = {_WITHOUT: without.score, _WITH: better.score, _STAY: int(stay)}
        return new if stay else {}

    def _fitted(self, model: nn.Module, data: DataPass, labels: npt.NDArray[Any]) -> Fitted:
        station = _before_head(stations_of(model, next(iter(data))), backbone_in(self._run.trainer, self._run.module))
        features = pooled_features(model, data, [station])[station]
        table = np.ascontiguousarray(features.to(torch.float32).numpy())
        return self._settings.probe.fit(table, labels, self._parts(labels))

    def _parts(self, labels: npt.NDArray[Any]) -> Any:
        one = self._settings
        return split_samples(labels, one.probe.task, held_back=one.held_back, seed=one.seed)


def _fill(present: Mapping[str, Tensor], contents: Mapping[str, Tensor]) -> None:
    for name, content in contents.items():
        present[name].copy_(content)


def _before_head(order: Sequence[Station], backbone: frozenset[str] | None) -> Station:
    """The input of the first layer after the backbone, or of the last layer."""
    inside = [place for place, station in enumerate(order) if station.layer in (backbone or ())]
    behind = order[inside[-1] + 1 :] if inside else ()
    first = behind[0] if behind else order[-1]
    return Station(first.layer, "input", first.call)


def _is_better(truth: npt.NDArray[Any], before: npt.NDArray[Any], after: npt.NDArray[Any], task: str) -> bool:
    """Whether predictions are better than others on the same samples, by more than a standard error."""
    if task == "classification":
        gains = (after == truth).astype(np.float64) - (before == truth)
    else:
        gains = (before - truth) ** 2 - (after - truth) ** 2
    if len(gains) < 2:
        return False
    # A gain on a single sample is exactly at the limit, and could be chance.
    return bool(gains.mean() > (1 + 1e-9) * gains.std(ddof=1) / math.sqrt(len(gains)))
