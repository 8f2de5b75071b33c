"""Report of a pruning run with its controls: numbers, page and picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lightning_prune.extras import new_figure
from lightning_prune.reporting.grid import MISSING, Grid, count, number
from lightning_prune.reporting.pages import Bullets, Heading, Page, Paragraph, Picture
from lightning_prune.study.controls import PRUNED, Checked, ControlRun
from lightning_prune.study.statistics import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["controls_figure", "controls_page", "controls_to_plain", "write_controls"]

# Share of the last epochs in which a network that is trained to its end changes no more.
_TAIL = 0.1

_COUNTED = (
    "Training MACs are counted as they are spent (1 MAC = 2 FLOPs): forward and backward passes (a backward pass takes "
    "about twice the MACs of a forward pass), dense epochs before the cuts, passes for scores and repairs, and a "
    "teacher. Validation is not counted. Runs with equal MACs have whole epochs, all shortened alike, and learning "
    "rates that end with them. ± is the 95 % interval of the mean over seeds (Student's t); differences are paired by "
    "seed."
)

_COLOURS = ("#D55E00", "#000000", "#56B4E9", "#0072B2")


def write_controls(runs: Sequence[ControlRun], checked: Checked, title: str, folder: Path) -> tuple[Path, ...]:
    """Write ``controls.json``, ``.md`` and ``.html``, and the picture.

    Args:
        runs: The finished runs.
        checked: Metric and mode.
        title: Heading of the page.
        folder: Where they are written; made where it is missing.
    """
    written = controls_page(runs, checked, title).write(folder, "controls")
    numbers = folder / "controls.json"
    numbers.write_text(json.dumps(controls_to_plain(runs, checked), indent=1) + "\n", encoding="utf-8")
    return (numbers, *written)


def controls_page(runs: Sequence[ControlRun], checked: Checked, title: str) -> Page:
    """The report of what is finished; needs the extra ``plot``.

    Args:
        runs: The finished runs, those of the pruned network among them.
        checked: Metric and mode.
        title: Heading of the page.

    Raises:
        ValueError: If no pruned run is finished.
    """
    found = _by_name(runs)
    figure = controls_figure(runs, checked)
    return Page(
        title,
        (
            Bullets(tuple(_verdicts(found, checked))),
            _differences(found, checked),
            Heading("Runs"),
            _runs(found, checked),
            Picture.of("controls", _caption(checked), figure),
            Heading("How it was counted"),
            Paragraph(_COUNTED),
        ),
    )


def controls_to_plain(runs: Sequence[ControlRun], checked: Checked) -> dict[str, Any]:
    """Everything in plain data: each run, and the paired differences with half the widths of their intervals."""
    found = _by_name(runs)
    return {
        "metric": checked.metric,
        "mode": checked.mode,
        "differences": {
            name: {what: {"mean": pair[0], "half": pair[1], "seeds": pair[2]} for what, pair in both.items()}
            for name in found
            if name != PRUNED and (both := _paired(found, name, checked))
        },
        "runs": [
            {
                "name": run.name,
                "seed": run.seed,
                "last": run.last(checked.metric),
                "best": run.best(checked),
                "params": run.result.params,
                "macs": run.result.macs,
                "training_macs": run.macs,
                "epochs": len(run.result.curve),
                "batches": run.result.batches,
                "seconds": run.result.seconds,
                "diverged": run.result.diverged,
                "curve": [row.get(checked.metric) for row in run.result.curve],
                "sizes": run.result.sizes,
                "spent": run.result.spent,
            }
            for run in runs
        ],
    }


def controls_figure(runs: Sequence[ControlRun], checked: Checked) -> Figure:
    """The metric against the MACs spent, a thin line for each seed; and the paired differences with their intervals."""
    found = _by_name(runs)
    figure: Figure = new_figure(figsize=(10.5, 4.2), layout="constrained", dpi=120)
    curves, pairs = figure.subplots(1, 2, gridspec_kw={"width_ratios": [3, 2]})
    for name, colour in zip(found, _COLOURS, strict=False):
        _draw_curves(curves, found[name], checked, name, colour)
    curves.set(xlabel="training MACs", ylabel=_labelled(checked))
    curves.legend(fontsize="small", frameon=False)
    _draw_pairs(pairs, found, checked)
    for axes in (curves, pairs):
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# -- numbers ----------------------------------------------------------------------------------------------------------


def _by_name(runs: Sequence[ControlRun]) -> dict[str, list[ControlRun]]:
    found: dict[str, list[ControlRun]] = {}
    for run in runs:
        found.setdefault(run.name, []).append(run)
    if PRUNED not in found:
        raise ValueError("controls: expected a finished run of the pruned network, got none. Let the runs end first.")
    return found


def _paired(
    found: Mapping[str, Sequence[ControlRun]], name: str, checked: Checked
) -> dict[str, tuple[float, float | None, int]]:
    """Mean difference of the pruned runs to those of a name, half its interval, and pairs, for last and best epoch."""
    pruned, others = ({run.seed: run for run in found[each]} for each in (PRUNED, name))
    seeds = sorted(pruned.keys() & others.keys())
    if not seeds:
        return {}
    values = {
        "last": [pruned[seed].last(checked.metric) - others[seed].last(checked.metric) for seed in seeds],
        "best": [pruned[seed].best(checked) - others[seed].best(checked) for seed in seeds],
    }
    return {
        what: (*(mean_interval(each) if len(each) > 1 else (each[0], None)), len(seeds))
        for what, each in values.items()
    }


def _is_share(checked: Checked) -> bool:
    return "acc" in checked.metric.lower()


def _labelled(checked: Checked) -> str:
    return f"{checked.metric} (%)" if _is_share(checked) else checked.metric


def _value(value: float, checked: Checked) -> str:
    return f"{100 * value:.2f}" if _is_share(checked) else number(value)


def _with_interval(mean: float, half: float | None, checked: Checked, sign: str = "") -> str:
    scale, digits = (100, 2) if _is_share(checked) else (1, 4)
    text = f"{scale * mean:{sign}.{digits}f}"
    return text if half is None else f"{text} ± {scale * half:.{digits}f}"


def _averaged(values: Sequence[float], checked: Checked) -> str:
    mean, half = mean_interval(values) if len(values) > 1 else (values[0], None)
    return _with_interval(mean, half, checked)


# -- words ------------------------------------------------------------------------------------------------------------


def _verdicts(found: Mapping[str, Sequence[ControlRun]], checked: Checked) -> list[str]:
    lines = []
    for name in found:
        pair = _paired(found, name, checked).get("last") if name != PRUNED else None
        if pair is None:
            continue
        mean, half, seeds = pair
        better = mean if checked.mode == "max" else -mean
        if half is None:
            verdict = "one seed has no interval"
        elif abs(mean) <= half:
            verdict = "no difference is shown"
        else:
            verdict = "pruning is better" if better > 0 else "pruning is worse"
        unit = " points" if _is_share(checked) else ""
        difference = _with_interval(mean, half, checked, "+")
        lines.append(f"Against {name}: {verdict} ({difference}{unit} in the last epoch, {seeds} seeds).")
    return lines


def _differences(found: Mapping[str, Sequence[ControlRun]], checked: Checked) -> Grid:
    rows = []
    for name in found:
        both = _paired(found, name, checked) if name != PRUNED else {}
        if both:
            cells = [_with_interval(both[what][0], both[what][1], checked, "+") for what in ("last", "best")]
            rows.append((name, str(both["last"][2]), *cells))
    unit = "points" if _is_share(checked) else checked.metric
    note = (
        f"{checked.metric} of the pruned network minus that of the control, in {unit}; "
        f"{'higher' if checked.mode == 'max' else 'lower'} is better. The best epoch of each run is chosen by the same "
        "data that measure it; that of the pruned network is one at its final size."
    )
    return Grid("Pruned minus control", ("control", "pairs", "last epoch", "best epoch"), tuple(rows), note=note)


def _runs(found: Mapping[str, Sequence[ControlRun]], checked: Checked) -> Grid:
    rows = []
    for name, runs in found.items():
        results = [run.result for run in runs]
        diverged = sum(result.diverged for result in results)
        rows.append(
            (
                name + (f" ({diverged} diverged)" if diverged else ""),
                str(len(runs)),
                count(fmean(result.params for result in results)),
                count(fmean(result.macs for result in results)),
                count(fmean(run.macs for run in runs)),
                number(fmean(len(result.curve) for result in results), 3),
                _averaged([run.last(checked.metric) for run in runs], checked)
                + (", not trained out" if _still_learns(runs, checked) else ""),
                _averaged([run.best(checked) for run in runs], checked),
            )
        )
    columns = ("run", "seeds", "parameters", "MACs", "training MACs", "epochs", "last epoch", "best epoch")
    note = (
        f"{_labelled(checked)}, mean over seeds. MACs are for one sample. Not trained out: in the last "
        f"{_TAIL:.0%} of the epochs the network still got better, by more than the interval of that change, so that it "
        "is no baseline yet."
    )
    return Grid("Runs", columns, tuple(rows), note=note)


def _still_learns(runs: Sequence[ControlRun], checked: Checked) -> bool:
    """Whether the last epochs improved the metric by more than the interval of the change over seeds."""
    changes = []
    for run in runs:
        values = [row[checked.metric] for row in run.result.curve if checked.metric in row]
        tail = max(round(_TAIL * len(values)), 1)
        if len(values) <= tail:
            return False
        change = values[-1] - values[-1 - tail]
        changes.append(change if checked.mode == "max" else -change)
    if len(changes) < 2:
        return False
    mean, half = mean_interval(changes)
    return mean > half


def _caption(checked: Checked) -> str:
    return (
        f"Left: {checked.metric} against the MACs spent, a thin line for each seed, a dot at the end. Right: pruned "
        "minus control with its 95 % interval; filled: last epoch, hollow: best epoch."
    )


# -- picture ----------------------------------------------------------------------------------------------------------


def _draw_curves(axes: Axes, runs: Sequence[ControlRun], checked: Checked, name: str, colour: str) -> None:
    scale = 100 if _is_share(checked) else 1
    for place, run in enumerate(runs):
        points = [
            (spent, scale * row[checked.metric])
            for spent, row in zip(run.result.spent, run.result.curve, strict=True)
            if checked.metric in row
        ]
        spent, values = zip(*points, strict=True)
        axes.plot(spent, values, color=colour, lw=1.0, alpha=0.7, label=name if place == 0 else None)
        axes.plot(spent[-1:], values[-1:], "o", color=colour, ms=4)


def _draw_pairs(axes: Axes, found: Mapping[str, Sequence[ControlRun]], checked: Checked) -> None:
    scale = 100 if _is_share(checked) else 1
    names = [name for name in found if name != PRUNED and _paired(found, name, checked)]
    colours = dict(zip(found, _COLOURS, strict=False))
    for place, name in enumerate(names):
        for what, shift, face in (("last", -0.12, colours[name]), ("best", 0.12, "white")):
            mean, half, _ = _paired(found, name, checked)[what]
            axes.errorbar(
                scale * mean,
                place + shift,
                xerr=None if half is None else scale * half,
                fmt="o",
                color=colours[name],
                markerfacecolor=face,
                capsize=3,
            )
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize="small")
    axes.invert_yaxis()
    unit = "points" if _is_share(checked) else checked.metric
    axes.set_xlabel(f"pruned − control ({unit})" if names else MISSING)
