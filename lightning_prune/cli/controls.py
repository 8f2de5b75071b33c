"""``lightning-prune controls``: a pruning run beside what the same training gives without it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning_prune.cli import recipes
from lightning_prune.cli.messages import OneLineParser
from lightning_prune.cli.options import placed
from lightning_prune.cli.study import add_launchers, launcher_of
from lightning_prune.cli.verbs import run as train
from lightning_prune.study.controls import define
from lightning_prune.study.controls_report import write_controls
from lightning_prune.study.controls_runner import check, finished, resolve, retry, run_controls
from lightning_prune.study.progress import Progress

__all__ = ["main"]


def main(words: Sequence[str]) -> None:
    """``lightning-prune controls --config RECIPE --seeds 3``, with further arguments of ``fit``."""
    given, rest = _parser().parse_known_args(words)
    if "--print_config" in rest:
        train(["fit", *placed(recipes.resolve(rest))])  # exits after printing
    if given.seeds < 2:
        raise ValueError(f"--seeds: expected at least 2, for an interval, got {given.seeds}. Give 3 or more.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        found = resolve(placed(recipes.resolve(rest)), train)
        controls = define(found, range(given.seeds), given.start, given.stretch, given.metric)
        title = "_".join(Path(file).stem for file in _configs(rest)) or "controls"
        folder = given.folder or Path("runs") / f"{title}-controls"
        if given.retry:
            print(f"{retry(controls, check(controls, train), folder)} failed runs will be run again")
        checked, failed = run_controls(controls, folder, train, launcher_of(folder, given), Progress())
    for failure in failed:
        sys.stderr.write(f"failed: {failure.cell.label}: {failure.error.strip().splitlines()[-1]}\n")
    runs = finished(controls, checked, folder)
    if not runs:
        raise ValueError(
            f"controls: no run has finished; the errors are in {folder / 'failed'}. --retry runs them again."
        )
    for file in write_controls(runs, checked, f"{title}: was pruning worth it?", given.out or folder / "report"):
        print(file)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        "lightning-prune controls",
        description="Run a pruning fit and its controls with paired seeds, and report the differences. Takes the "
        "arguments of `fit` as well, such as --config. Run it again to continue.",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: 3)")
    parser.add_argument("--metric", help="metric to compare (default: the accuracy or loss of validation)")
    parser.add_argument(
        "--start",
        choices=("random", "pretrained"),
        help="weights that the network begins with (default: pretrained if the model has `pretrained` or `weights`)",
    )
    parser.add_argument(
        "--stretch",
        nargs="+",
        default=[],
        metavar="KEY",
        help="further keys with a length in epochs or steps, scaled with the length of a control",
    )
    parser.add_argument("--folder", type=Path, help="folder of the runs (default: runs/<name of the recipe>-controls)")
    parser.add_argument("--out", type=Path, help="where the report is written (default: report in the folder)")
    parser.add_argument("--retry", action="store_true", help="run failed runs again")
    add_launchers(parser)
    return parser


def _configs(words: Sequence[str]) -> list[str]:
    """Names after ``--config``."""
    names = []
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-c"):
            names.append(value if equals else words[place + 1])
    return names
