"""``lightning-prune study``: run a hyperparameter study, report on it, and export its table."""

from __future__ import annotations

import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.cli import recipes
from lightning_prune.cli.messages import OneLineParser
from lightning_prune.cli.verbs import run as train
from lightning_prune.study.analysis import analyse
from lightning_prune.study.definition import Study, load
from lightning_prune.study.launchers import Launcher, Local, Ray, Slurm
from lightning_prune.study.numeric import numeric_tables
from lightning_prune.study.progress import Progress
from lightning_prune.study.report import page
from lightning_prune.study.runner import check, extent_of, retry_failed, rows, run_study
from lightning_prune.study.store import Store
from lightning_prune.study.sweep import cell_at, log_page, log_result, run_cell, sweep
from lightning_prune.study.table import read_table, write_table
from lightning_prune.study.transfer import export_study, import_study

__all__ = ["add_launchers", "launcher_of", "main"]


def main(words: Sequence[str]) -> None:
    """``lightning-prune study run | report | export | import | sweep | cell FILE``."""
    given, rest = _parser().parse_known_args(words)
    file = Path(given.file) if Path(given.file).is_file() else recipes.study(given.file)
    study, folder = load(file, recipes.path), given.folder or Path("runs") / file.stem
    if given.verb == "cell":
        _cell(study, folder, given, rest)
        return
    if rest:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    verbs = {"run": _run, "report": _report, "export": _export, "import": _import, "sweep": _sweep}
    verbs[given.verb](study, folder, given)


def _parser() -> OneLineParser:
    parser = OneLineParser("lightning-prune study", description="The hyperparameter performance space of a network.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    helps = {
        "run": "run all unfinished runs",
        "report": "write tables, figures and a page of the finished runs",
        "export": "write the table of all finished runs, and the architectures",
        "import": "import what `export` wrote, to continue from it",
        "sweep": "write the study as a W&B sweep",
        "cell": "run a single run; called by a sweep's agent",
    }
    known = {verb: verbs.add_parser(verb, help=text, allow_abbrev=False) for verb, text in helps.items()}
    for verb in known.values():
        verb.add_argument("file", help="a study.yaml, or the name of a bundled study")
        verb.add_argument("--folder", type=Path, help="folder of its runs (default: runs/<name of the file>)")
    add_launchers(known["run"])
    known["run"].add_argument("--retry", action="store_true", help="run failed runs again")
    known["report"].add_argument(
        "--accept", type=float, default=0.5, help="acceptable risk in percentage points (default: 0.5)"
    )
    known["report"].add_argument("--table", type=Path, help="read this table instead of the runs in the folder")
    known["report"].add_argument("--out", type=Path, help="where to write (default: report in the folder)")
    known["report"].add_argument("--wandb", action="store_true", help="also log the report to W&B")
    known["export"].add_argument("--out", type=Path, help="folder to write to (default: export in the folder)")
    known["import"].add_argument("source", type=Path, help="folder that `export` wrote")
    known["sweep"].add_argument("--out", type=Path, help="file to write (default: sweep.yaml in the folder)")
    known["cell"].add_argument("--variant", required=True, help="name of the variant, as in the table")
    known["cell"].add_argument("--seed", type=int, required=True, help="seed of the run")
    known["cell"].add_argument("--wandb", action="store_true", help="log the result to W&B")
    return parser


def add_launchers(parser: OneLineParser) -> None:
    """Add the options of what starts the runs."""
    parser.add_argument(
        "--launcher", choices=("local", "ray", "slurm"), default="local", help="what starts the runs (default: local)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes of the local launcher, one thread each")
    parser.add_argument("--address", help="address of a Ray cluster; by default one is started on this machine")
    parser.add_argument("--cpus", type=float, default=1, help="CPU cores per run on Ray")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs per run on Ray")
    parser.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of submitit: timeout_min=60 slurm_partition=gpu gpus_per_node=1 slurm_array_parallelism=20 ...",
    )
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local"),
        default="slurm",
        help="submitit's cluster; local runs jobs as processes on this machine, for testing",
    )


def _run(study: Study, folder: Path, given: Namespace) -> None:
    launcher = launcher_of(folder, given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        check(study, train)
    if given.retry:
        print(f"{retry_failed(study, folder)} failed runs will be run again")
    failed = run_study(study, folder, train, launcher, Progress())
    write_table(rows(study, folder), study.axes, folder / "table.csv")
    for failure in failed:
        sys.stderr.write(f"failed: {failure.cell.label}: {failure.error.strip().splitlines()[-1]}\n")


def _report(study: Study, folder: Path, given: Namespace) -> None:
    found = rows(study, folder) if given.table is None else read_table(given.table, study.axes)
    analysis = analyse(found, study.axes)
    written = page(study, analysis, Path(given.file).stem, given.accept)
    for each in written.write(given.out or folder / "report", "report"):
        print(each)
    if given.wandb:
        log_page(written, numeric_tables(found, analysis), folder)


def _export(study: Study, folder: Path, given: Namespace) -> None:
    export_study(study, folder, given.out or folder / "export")


def _import(study: Study, folder: Path, given: Namespace) -> None:
    print(f"{import_study(study, given.source, folder)} runs imported")


def _sweep(study: Study, folder: Path, given: Namespace) -> None:
    program = shutil.which("lightning-prune") or "lightning-prune"
    file = str(Path(given.file).absolute()) if Path(given.file).is_file() else given.file
    command = [program, "study", "cell", file, f"--folder={folder.absolute()}", "--wandb"]
    found = sweep(study, extent_of(study, Store(folder)), command, Path(given.file).stem)
    out = given.out or folder / "sweep.yaml"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
    print(f"{out}\nwandb sweep {out} prints the command of its agents.")


def _cell(study: Study, folder: Path, given: Namespace, rest: Sequence[str]) -> None:
    parser = OneLineParser("lightning-prune study cell", allow_abbrev=False)
    for axis in study.axes:
        parser.add_argument(f"--{axis.key}", type=float, required=True, dest=axis.key)
    cell = cell_at(study, given.variant, given.seed, vars(parser.parse_args(rest)))
    result = run_cell(study, folder, cell, train)
    print(f"{cell.label}: {100 * result.metrics[study.metric]:.2f} %")
    if given.wandb:
        log_result(result, cell, folder)


def launcher_of(folder: Path, given: Namespace) -> Launcher:
    """The launcher that the options name.

    Raises:
        ValueError: If the options are of another one.
    """
    if given.slurm and given.launcher != "slurm":
        raise ValueError("--slurm: expected `--launcher slurm`, whose settings these are.")
    if given.launcher == "ray":
        return Ray(given.address, cpus=given.cpus, gpus=given.gpus)
    if given.launcher == "slurm":
        return Slurm(folder / "slurm", given.cluster, tuple(_setting(word) for word in given.slurm))
    return Local(given.workers)


def _setting(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not (key and equals):
        raise ValueError(f"--slurm: expected KEY=VALUE, such as timeout_min=60, got {word!r}.")
    return key, yaml.safe_load(value)
